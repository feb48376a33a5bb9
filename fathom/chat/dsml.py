"""The DSML grammar: how tool calls are written, and how one tag is read.

    block  = LF LF <D tool_calls> LF invoke (LF invoke)* LF </D tool_calls>
    invoke = <D invoke name="NAME"> LF [param (LF param)*] LF </D invoke>
    param  = <D parameter name="KEY" string="true|false"> VALUE </D parameter>

where D is the marker token, without a space after it. Nothing is escaped: a string runs raw to the
next closing parameter tag. `TagReader` reads one tag behind its marker, however the text is cut.

Paper: §5.1.1 (tool-call schema).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fathom.chat.messages import ToolCall
from fathom.chat.protocol import DSML, Revision, Tags
from fathom.chat.segments import Segment
from fathom.errors import ChatError

_MARK = Segment(DSML, special=True)
_NAME = re.compile(r"[A-Za-z_]*")
_ATTRIBUTE = re.compile(r"""\s+(\w+)\s*=\s*("[^"]*"|'[^']*')""")
_HEADER_END = re.compile(r"\s*(/?)>?")
_INVOKE_END = re.compile('">')
_PARAMETER_END = re.compile('" string="(?:true|false)">')
_CANONICAL_INVOKE = re.compile(' name="([^"]*)">', re.DOTALL)
_CANONICAL_PARAMETER = re.compile(' name="(.*?)" string="(true|false)">', re.DOTALL)
_LONGEST_NAME = 32
_LONGEST_END = len('" string="false">')


def refuse_constant(name: str) -> Any:
    """Reject NaN and Infinity, which Python reads but JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def is_json(text: str) -> bool:
    """Whether `text` is one JSON value, strictly."""
    try:
        # Integers stay text: Python refuses to convert very long ones, JSON allows them.
        json.loads(text, parse_constant=refuse_constant, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return False
    return True


def quote(text: str) -> str:
    """Return `text` as a JSON string that can always be written as UTF-8."""
    quoted = json.dumps(text, ensure_ascii=False)
    if quoted.isascii():
        return quoted
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", quoted)


# Rendering ------------------------------------------------------------------------------------


def render_calls(
    calls: Iterable[ToolCall], revision: Revision, blank_line: bool = True
) -> list[Segment]:
    """Return the DSML block of `calls`, without the blank line before it.

    With `blank_line` a call without arguments has an empty line where they would stand.
    Raises ChatError for a name that would break a tag and for arguments that are no object.
    """
    tags = revision.tags
    segments = [*_open(f"{tags.block}>\n")]
    for index, call in enumerate(calls):
        if index:
            segments.append(Segment("\n"))
        segments += _render_call(call, revision, blank_line)
    return [*segments, Segment("\n"), *_close(tags.block)]


def fits_tag(name: str) -> bool:
    """Whether the name of a tool can be written in a tag."""
    return bool(name) and not re.search('["<>\r\n]|' + DSML, name)


def _render_call(call: ToolCall, revision: Revision, blank_line: bool) -> list[Segment]:
    tags = revision.tags
    if not fits_tag(call.name):
        raise ChatError(f"tool name {call.name!r} cannot be written in a tag: rename the tool")
    segments = _open(f'{tags.invoke} name="{call.name}">\n')
    arguments = read_arguments(call, revision)
    for index, (key, value) in enumerate(arguments.items()):
        if index:
            segments.append(Segment("\n"))
        segments += _render_parameter(key, value, tags)
    ending = Segment("\n" if arguments or blank_line else "")
    return [*segments, ending, *_close(tags.invoke)]


def _render_parameter(key: str, value: Any, tags: Tags) -> list[Segment]:
    if DSML in key or _PARAMETER_END.search(key):
        raise ChatError(f"argument name {key!r} cannot be written in a tag: rename the argument")
    closing = f"</{DSML}{tags.parameter}>"
    is_string = isinstance(value, str) and closing not in value
    # Inside JSON a closing tag can be spelled differently without changing the value; raw text
    # has no such way out, so a string holding the tag is written as JSON.
    text = value if is_string else _dump(value).replace(closing, "\\u003c" + closing[1:])
    header = f'{tags.parameter} name="{key}" string="{"true" if is_string else "false"}">'
    return [*_open(header), Segment(text), *_close(tags.parameter)]


def read_arguments(call: ToolCall, revision: Revision) -> dict[str, Any]:
    """Return the arguments of a past call as an object.

    Text that is not JSON becomes one argument named `arguments` where the revision allows it.
    Raises ChatError otherwise, and for JSON that is no object.
    """
    try:
        value = json.loads(call.arguments, parse_constant=refuse_constant, parse_int=_read_integer)
        _dump(value)
    except (ValueError, RecursionError) as error:
        if revision.strict_arguments:
            raise ChatError(f"arguments of a call of {call.name!r} are not JSON: {error}") from None
        return {"arguments": call.arguments}
    if not isinstance(value, dict):
        raise ChatError(f"arguments of a call of {call.name!r} must be a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


def _read_integer(digits: str) -> int | float:
    """Return a whole number. Python has no negative zero among them, JSON does."""
    return -0.0 if digits == "-0" else int(digits)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _open(rest: str) -> list[Segment]:
    return [Segment("<"), _MARK, Segment(rest)]


def _close(name: str) -> list[Segment]:
    return [Segment("</"), _MARK, Segment(f"{name}>")]


# Reading --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """One tag. `literal` is its text, `exact` says whether it is in canonical form.

    unread: attributes that say nothing known: other names, a second one of the same name, a
    `string` that is neither true nor false.
    """

    name: str
    closing: bool
    literal: str
    attributes: dict[str, str] = field(default_factory=dict[str, str])
    exact: bool = True
    self_closing: bool = False
    by_id: bool = False
    unread: str = ""


class TagReader:
    """Reads one tag from the text behind its marker.

    `feed` and `end` return a Tag, or None while more text is needed; `failed` is set when the text
    is no tag. What was not used up is in `rest`, what was is in `literal`.
    """

    def __init__(self, tags: Tags, *, closing: bool, one_line: bool, by_id: bool) -> None:
        self.failed = False
        self.rest = ""
        self._tags = tags
        self.closing = closing
        self._one_line = one_line
        self._by_id = by_id
        self._name = ""
        self._in_header = False
        self._header: list[str] = []
        self._window = ""

    @property
    def literal(self) -> str:
        """The tag's text so far, with the marker."""
        head = "</" if self.closing else "<"
        return f"{head}{DSML}{self._name}{''.join(self._header)}"

    def feed(self, text: str) -> Tag | None:
        """Take more text."""
        if not self._in_header:
            used = _NAME.match(text).end()  # pyright: ignore[reportOptionalMemberAccess]
            self._name += text[:used]
            text = text[used:]
            if len(self._name) > _LONGEST_NAME:
                return self._fail(text)
            if not text:
                return None
            if not self._has_attributes() or text[0] == ">":
                return self._short_tag(text)
            if text[0] not in " \t/":
                return self._fail(text)
            self._in_header = True
        return self._feed_header(text)

    def end(self) -> Tag | None:
        """Take note that the next marker came: whatever is here must be the whole tag."""
        if not self._in_header:
            return self._fail("")
        header = "".join(self._header)
        attributes: dict[str, str] = {}
        unread: list[str] = []
        at = 0
        while found := _ATTRIBUTE.match(header, at):
            name, value = found[1], found[2][1:-1]
            known = name == "name" or (name == "string" and value.lower() in ("true", "false", ""))
            if known and name not in attributes:
                attributes[name] = value
            else:
                unread.append(found[0].strip())
            at = found.end()
        ending = _HEADER_END.match(header, at)
        assert ending is not None  # the pattern matches the empty text
        self._header = [header[: ending.end()]]
        self.rest = header[ending.end() :]
        return self._tag(
            attributes, exact=False, self_closing=bool(ending[1]), unread=" ".join(unread)
        )

    def _has_attributes(self) -> bool:
        return not self.closing and self._name in (self._tags.invoke, self._tags.parameter)

    def _short_tag(self, text: str) -> Tag | None:
        if text[0] != ">" or not self._name:
            return self._fail(text)
        self._header = [">"]
        self.rest = text[1:]
        return self._tag({}, exact=not self._has_attributes())

    def _feed_header(self, text: str) -> Tag | None:
        is_invoke = self._name == self._tags.invoke
        window = self._window + text
        found = (_INVOKE_END if is_invoke else _PARAMETER_END).search(window)
        used = len(text) if found is None else found.end() - len(self._window)
        if self._one_line and "\n" in text[:used]:
            return self._end_of_line(text)
        self._header.append(text[:used])
        if found is None:
            self._window = window[-_LONGEST_END:]
            return None
        header = "".join(self._header)
        canonical = (_CANONICAL_INVOKE if is_invoke else _CANONICAL_PARAMETER).fullmatch(header)
        if canonical is None:
            tag = self.end()
            self.rest += text[used:]
            return tag
        self.rest = text[used:]
        return self._tag(dict(zip(("name", "string"), canonical.groups(), strict=False)))

    def _end_of_line(self, text: str) -> Tag | None:
        at = text.index("\n")
        self._header.append(text[:at])
        if not "".join(self._header).endswith(">"):
            return self._fail(text[at:])
        tag = self.end()
        self.rest += text[at:]
        return tag

    def _tag(
        self,
        attributes: dict[str, str],
        *,
        exact: bool = True,
        self_closing: bool = False,
        unread: str = "",
    ) -> Tag:
        return Tag(
            name=self._name,
            closing=self.closing,
            literal=self.literal,
            attributes=attributes,
            exact=exact,
            self_closing=self_closing,
            by_id=self._by_id,
            unread=unread,
        )

    def _fail(self, rest: str) -> None:
        self.failed = True
        self.rest = rest
