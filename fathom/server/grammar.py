"""Grammars of what the model may write, in the Lark dialect of llguidance.

A block of calls has the marker token in every tag, and text between. Since no ordinary text
contains that token, a raw string value is simply everything up to `</` before the next marker; no
escaping is needed, and what a value spells cannot end it.

Paper: §5.1.1 (tool-call schema).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fathom.chat.requests import ToolSpec
from fathom.server.problems import Problem
from fathom.server.strict import enumerated, root_of, split

# As the prompt shows JSON, and without room for endless blanks.
_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_ANY_STRING = r"(?s:.)*"
_SPECIAL_KEYS = ("$defs", "definitions")


class GrammarBuilder:
    """Writes one grammar; `marker` is the id of the token in every tag."""

    def __init__(self, marker: int) -> None:
        self._marker = f"<[{marker}]>"
        self._rules: list[str] = []
        self._count = 0

    def text(self, start: str) -> str:
        """The whole grammar, whose start rule is `start`."""
        return "\n".join([f"start: {start}", *self._rules])

    def json(self, schema: Any) -> str:
        """A JSON value that fits `schema`."""
        form: dict[str, Any] = {"x-guidance": _LAYOUT}
        if isinstance(schema, Mapping):
            form = {**cast("Mapping[str, Any]", schema), **form}
        return self._rule(f"%json {json.dumps(form)}")

    def any_text(self) -> str:
        """Text without any special token."""
        return self._terminal(f"/{_ANY_STRING}/")

    def calls(self, tools: Sequence[ToolSpec], *, many: bool, opened: bool) -> str:
        """A block of calls of `tools`; `opened`: its first line is there already."""
        tag = self._marker
        calls = [self._call(tool) for tool in tools]
        call = self._rule(" | ".join(calls))
        rest = f' ("\\n" {call})*' if many else ""
        head = "" if opened else f'"<" {tag} "tool_calls>\\n" '
        return self._rule(f'{head}{call}{rest} "\\n</" {tag} "tool_calls>"')

    def text_then(self, tools: Sequence[ToolSpec], *, many: bool) -> str:
        """Text alone, or text up to the bracket of a block of calls, and that block."""
        tag = self._marker
        inside = self.calls(tools, many=many, opened=True)
        plain, before = self.any_text(), self._terminal(f"/{_ANY_STRING}\\n\\n</")
        return f'{plain} | {before} {tag} "tool_calls>\\n" {inside}'

    def _call(self, tool: ToolSpec) -> str:
        tag = self._marker
        head = f'"<" {tag} {_literal(f"invoke name={_quoted(tool.name)}>")} "\\n"'
        tail = f'"</" {tag} "invoke>"'
        if not tool.strict and tool.kind != "custom":
            return self._rule(f"{head} {self._free_parameter()}* {tail}")
        schema = root_of(tool)
        properties = cast("Mapping[str, Any]", schema.get("properties", {}))
        required = cast("list[str]", schema.get("required", []))
        shared = {key: schema[key] for key in _SPECIAL_KEYS if key in schema}
        parts: list[str] = []
        for name, form in properties.items():
            if form is False and name not in required:
                continue  # an argument that may not be there
            parameter = self._parameter(tool, name, form, shared)
            parts.append(parameter if name in required else f"{parameter}?")
        return self._rule(" ".join([head, *parts, tail]))

    def _parameter(self, tool: ToolSpec, name: str, form: Any, shared: Mapping[str, Any]) -> str:
        if not name or re.search('["<>\r\n\uff5c]', name):
            raise _unsupported(tool, f"the argument name {name!r} cannot be enforced: rename it")
        tag = self._marker
        strings, others = split(form, shared)
        ways: list[str] = []
        for string in strings:
            opening = _literal(f'parameter name="{name}" string="true">')
            ways.append(f"{opening} {self._string(tool, name, string)}")
        if others is not None:
            opening = _literal(f'parameter name="{name}" string="false">')
            value = self.json({**others, **shared})
            ways.append(f'{opening} {value} "</"')
        if not ways:
            raise _unsupported(tool, f"no value fits the argument {name!r}")
        body = " | ".join(ways)
        return self._rule(f'"<" {tag} ({body}) {tag} "parameter>\\n"')

    def _string(self, tool: ToolSpec, name: str, form: Mapping[str, Any]) -> str:
        """A raw string with the `</` behind it."""
        low, high = form.get("minLength", 0), form.get("maxLength")
        values = enumerated(form)
        if values is not None:
            values = [v for v in values if low <= len(v) and (high is None or len(v) <= high)]
            if not values:
                raise _unsupported(tool, f"no value fits the argument {name!r}")
            body = f"({' | '.join(map(_literal, values))})"
        elif "minLength" in form or high is not None:
            body = f"/(?s:.){{{low},{'' if high is None else high}}}/"
        else:
            body = f"/{_ANY_STRING}/"
        pattern = form.get("pattern")
        if pattern is None and values is None:
            return self._terminal(f"{body[:-1]}<\\//")
        if pattern is None:
            return f'{body} "</"'
        wanted = self._terminal(f"/{_anchored(pattern)}/")
        both = self._terminal(f"{wanted} & {self._terminal(body)}")
        return self._terminal(f'{both} "</"')

    def _free_parameter(self) -> str:
        """Any argument of any kind."""
        tag = self._marker
        name = self._terminal(r'/[^"<>\r\n\x{FF5C}]+/'.replace(r"\x{FF5C}", "\uff5c"))
        text = self._terminal(f"/{_ANY_STRING}<\\//")
        value = self.json({})
        ways = f'"true\\">" {text} | "false\\">" {value} "</"'
        return self._rule(
            f'"<" {tag} "parameter name=\\"" {name} "\\" string=\\"" ({ways}) {tag} "parameter>\\n"'
        )

    def _rule(self, body: str) -> str:
        self._count += 1
        name = f"r{self._count}"
        self._rules.append(f"{name}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        self._count += 1
        name = f"T{self._count}"
        self._rules.append(f"{name}: {body}")
        return name


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _quoted(name: str) -> str:
    return f'"{name}"'


def _anchored(pattern: str) -> str:
    """A JSON Schema pattern, which may match anywhere, as an expression for the whole string."""
    inner = _DELIMITERS.sub(lambda found: _ESCAPES.get(found[0], found[0]), pattern)
    start = "" if inner.startswith("^") else _ANY_STRING
    backslashes = len(inner) - 1 - len(inner[:-1].rstrip("\\"))
    end = "" if inner.endswith("$") and backslashes % 2 == 0 else _ANY_STRING
    inner = inner.removeprefix("^")
    inner = inner if end else inner.removesuffix("$")
    return f"{start}({inner}){end}"


_DELIMITERS = re.compile(r"\\.|[/\n\r]", re.DOTALL)  # what would end the expression
_ESCAPES = {"/": "\\/", "\n": "\\n", "\r": "\\r", "\\\n": "\\n", "\\\r": "\\r"}


def _unsupported(tool: ToolSpec, message: str) -> Problem:
    return Problem(400, f"tool {tool.name!r}: {message}", code="unsupported_schema", param="tools")
