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

    def calls(self, tools: Sequence[ToolSpec], *, strict: bool, many: bool, opened: bool) -> str:
        """A block of calls of `tools`; `opened`: its first line is there already.

        strict: hold all tools to their schemas; otherwise only those that say so.
        """
        tag = self._marker
        calls = [self._call(tool, strict=strict or tool.strict) for tool in tools]
        call = self._rule(" | ".join(calls))
        rest = f' ("\\n" {call})*' if many else ""
        head = "" if opened else f'"<" {tag} "tool_calls>\\n" '
        return self._rule(f'{head}{call}{rest} "\\n</" {tag} "tool_calls>"')

    def text_then(self, tools: Sequence[ToolSpec], *, many: bool) -> str:
        """Text alone, or text up to the bracket of a block of calls, and that block."""
        tag = self._marker
        inside = self.calls(tools, strict=False, many=many, opened=True)
        plain, before = self.any_text(), self._terminal(f"/{_ANY_STRING}\\n\\n</")
        return f'{plain} | {before} {tag} "tool_calls>\\n" {inside}'

    def _call(self, tool: ToolSpec, *, strict: bool) -> str:
        tag = self._marker
        head = f'"<" {tag} {_literal(f"invoke name={_quoted(tool.name)}>")} "\\n"'
        tail = f'"</" {tag} "invoke>"'
        if not strict:
            return self._rule(f"{head} {self._free_parameter()}* {tail}")
        schema = tool.parameters
        raw = schema.get("properties")
        properties = cast("Mapping[str, Any]", raw) if isinstance(raw, Mapping) else {}
        required = cast("list[Any]", schema.get("required") or [])
        shared = {key: schema[key] for key in _SPECIAL_KEYS if key in schema}
        parts: list[str] = []
        for name, form in properties.items():
            parameter = self._parameter(tool, name, form, shared)
            parts.append(parameter if name in required else f"{parameter}?")
        return self._rule(" ".join([head, *parts, tail]))

    def _parameter(self, tool: ToolSpec, name: str, form: Any, shared: Mapping[str, Any]) -> str:
        if not name or re.search('["<>\r\n\uff5c]', name):
            raise Problem(
                400,
                f"tool {tool.name!r}: the argument name {name!r} cannot be enforced: rename it",
                code="unsupported_schema",
                param="tools",
            )
        tag = self._marker
        form = _resolve(form, shared)
        strings, others = _split(form)
        ways: list[str] = []
        if strings is not None:
            opening = _literal(f'parameter name="{name}" string="true">')
            ways.append(f"{opening} {self._string(strings)}")
        if others is not None:
            opening = _literal(f'parameter name="{name}" string="false">')
            value = self.json({**others, **shared} if isinstance(others, dict) else others)
            ways.append(f'{opening} {value} "</"')
        body = " | ".join(ways)
        return self._rule(f'"<" {tag} ({body}) {tag} "parameter>\\n"')

    def _string(self, form: Mapping[str, Any]) -> str:
        """A raw string with the `</` behind it."""
        values = _enumerated(form)
        if values is not None:
            options = " | ".join(_literal(f"{value}</") for value in values)
            return f"({options})"
        low, high = form.get("minLength"), form.get("maxLength")
        body = _ANY_STRING
        if isinstance(low, int) or isinstance(high, int):
            first = low if isinstance(low, int) else 0
            last = str(high) if isinstance(high, int) else ""
            body = f"(?s:.){{{first},{last}}}"
        pattern = form.get("pattern")
        if not isinstance(pattern, str):
            return self._terminal(f"/{body}<\\//")
        wanted = self._terminal(f"/{_anchored(pattern)}/")
        both = self._terminal(f"{wanted} & /{body}/")
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
    inner = pattern.replace("/", "\\/") if "\\/" not in pattern else pattern
    start = "" if inner.startswith("^") else _ANY_STRING
    end = "" if inner.endswith("$") and not inner.endswith("\\$") else _ANY_STRING
    inner = inner.removeprefix("^")
    inner = inner if end else inner.removesuffix("$")
    return f"{start}({inner}){end}"


def _resolve(form: Any, shared: Mapping[str, Any]) -> Any:
    """Follow a reference to one of the shared definitions, so that strings are seen as such."""
    for _ in range(16):
        reference = form.get("$ref") if isinstance(form, dict) else None
        match = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", reference or "")
        target = shared.get(match[1], {}).get(match[2]) if match else None
        if target is None:
            return form
        form = target
    return form


def _enumerated(form: Mapping[str, Any]) -> list[str] | None:
    if isinstance(form.get("const"), str):
        return [form["const"]]
    values = form.get("enum")
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else None


def _split(form: Any) -> tuple[dict[str, Any] | None, Any]:
    """The string part of a schema and the part for everything else; None where there is none."""
    if form is True or form == {} or not isinstance(form, dict):
        return {}, form if isinstance(form, dict) and form else {"not": {"type": "string"}}
    kind = form.get("type")
    for word in ("anyOf", "oneOf"):
        if isinstance(form.get(word), list) and kind is None:
            parts = [_split(option) for option in form[word]]
            strings = [s for s, _ in parts if s is not None]
            others = [o for _, o in parts if o is not None]
            joined = {word: others} if others else None
            return (_merge(strings) if strings else None), joined
    if isinstance(kind, list):
        rest = [k for k in kind if k != "string"]
        others = {**form, "type": rest} if rest else None
        if others is not None and isinstance(form.get("enum"), list):
            others["enum"] = [v for v in form["enum"] if not isinstance(v, str)]
        return ({**form, "type": "string"} if "string" in kind else None), others
    if kind == "string":
        return form, None
    if kind is None and ("enum" in form or "const" in form):
        values = [form["const"]] if "const" in form else form["enum"]
        strings = [v for v in values if isinstance(v, str)]
        others = [v for v in values if not isinstance(v, str)]
        return ({"enum": strings} if strings else None), ({"enum": others} if others else None)
    return None, form


def _merge(strings: list[dict[str, Any]]) -> dict[str, Any]:
    """One string schema that takes what any of several do."""
    if len(strings) == 1:
        return strings[0]
    values = [_enumerated(form) for form in strings]
    if all(v is not None for v in values):
        return {"enum": [value for found in values for value in found or []]}
    return {}
