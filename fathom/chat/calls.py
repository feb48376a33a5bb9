"""Reading the calls of a block: tags and text between them become `ToolCall` objects.

`CallBuilder` turns the parameters of one call into JSON text piece by piece; `CallReader` is the
part of the parser behind the opening of a block, with its stages

    block <-> invoke <-> value        block -> after

Paper: §5.1.1 (tool-call schema).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fathom.chat.dsml import Tag, is_json, quote
from fathom.chat.events import ArgumentsDelta, CallFinished, CallStarted, Report
from fathom.chat.messages import ToolCall
from fathom.chat.protocol import Tags


class CallBuilder:
    """Builds the arguments of one call. Each method returns the fragment of JSON that it added.

    The fragments joined are the arguments, and every prefix of them is a prefix of valid JSON:
    strings are escaped as they come, other values wait for their end because only then is it known
    whether they are JSON.
    """

    def __init__(self, name: str, *, repaired: bool) -> None:
        self.name = name
        self.repaired = repaired
        self._fragments: list[str] = []
        self._keys: set[str] = set()
        self._kind: str | None = None
        self._value: list[str] = []

    @property
    def is_empty(self) -> bool:
        """Whether no parameter was opened yet."""
        return not self._keys

    def open(self, key: str, kind: str) -> str:
        """Begin a parameter; `kind` is "true" (string), "false" (JSON) or "" (not stated)."""
        self.repaired |= key in self._keys
        start = ", " if self._keys else "{"
        self._keys.add(key)
        self._kind = kind
        return self._add(f"{start}{quote(key)}: " + ('"' if kind == "true" else ""))

    def add(self, text: str) -> str:
        """Add text to the open parameter."""
        if self._kind == "true":
            return self._add(quote(text)[1:-1])
        self._value.append(text)
        return ""

    def close(self, *, cut: bool = False) -> str:
        """End the open parameter; `cut` says that its text is not all there."""
        if self._kind == "true":
            return self._add('"')
        raw = "".join(self._value)
        self._value = []
        if is_json(raw):
            return self._add(raw)
        self.repaired |= not cut
        return self._add(quote(raw))

    def replace_all(self, text: str) -> str:
        """Use `text`, JSON of an object, as the whole arguments of a call without parameters."""
        self._keys.add("")
        self.repaired = True
        return self._add(text.strip()[:-1])

    def finish(self) -> str:
        """End the call."""
        return self._add("}" if self._keys else "{}")

    def call(self, call_id: str, *, partial: bool) -> ToolCall:
        """Return the finished call."""
        return ToolCall(
            name=self.name,
            arguments="".join(self._fragments),
            id=call_id,
            repaired=self.repaired,
            partial=partial,
        )

    def _add(self, fragment: str) -> str:
        self._fragments.append(fragment)
        return fragment


class CallReader:
    """Reads one or more blocks of calls.

    Text arrives by `add_text` and tags by `handle`; `finish` ends it. What is neither layout nor
    part of a call is reported. A call is reported when it is complete, or if it `streams` as it
    comes. One that is cut off or repaired is reported by its `CallFinished`; what was told of it
    before that became known is a beginning that no JSON ends, so that nobody takes it for whole.
    """

    def __init__(
        self, tags: Tags, report: Report, make_id: Callable[[int], str], *, streams: bool
    ) -> None:
        self.calls: list[ToolCall] = []
        self.stage: Literal["block", "invoke", "value", "after"] = "block"
        self._tags = tags
        self._report = report
        self._make_id = make_id
        self._streams = streams
        self._block_name = tags.block
        self._id = ""  # of the open call
        self._started = False  # the open call was reported, with some of its arguments
        self._doubtful = False  # calls of this block are not where calls belong
        self._call: CallBuilder | None = None
        self._junk: list[str] = []
        self._suspended: list[str] | None = None
        self._recovering = False

    def begin(self, block_name: str, *, doubtful: bool) -> None:
        """Take note of how the block was opened; by default it was in canonical form."""
        self._block_name = block_name
        self._doubtful = doubtful

    def add_text(self, text: str) -> None:
        """Take text in which nothing is markup."""
        if self._suspended is not None:
            self._suspended.append(text)
        elif self.stage == "value" and self._call is not None:
            self._add(self._call.add(text))
        else:
            self._junk.append(text)

    def handle(self, tag: Tag) -> None:
        """Take a tag."""
        if self._call is None:
            self._handle_outside(tag)
        elif self.stage == "value":
            self._handle_in_value(self._call, tag)
        else:
            self._handle_in_call(self._call, tag)

    def take_suspended(self) -> str | None:
        """At the end, return the text behind a value that was never closed, to be read again.

        From then on the closing tags of call and block end a value too: no proper one follows.
        """
        if self._suspended is None:
            return None
        text, self._suspended = "".join(self._suspended), None
        self._recovering = True
        return text

    def finish(self) -> None:
        """End the completion; an open call becomes a partial one."""
        if self._call is not None:
            if self._suspended is not None:
                text, self._suspended = "".join(self._suspended), None
                self._call.add(text)
            if self.stage == "value":
                self._call.close(cut=True)
            self._report.diagnose("truncated_call")
            self._close_call(self._call, partial=True)
        elif self.stage == "block" and self._block_name != self._tags.invoke:
            self._flush_junk()
            self._report.diagnose("block_not_closed")
        self._flush_junk()

    def _is_call(self, tag: Tag) -> bool:
        return tag.name == self._tags.invoke and not tag.closing and "name" in tag.attributes

    def _handle_outside(self, tag: Tag) -> None:
        """Handle a tag outside calls, in a block or behind one."""
        if self._is_call(tag):
            self._flush_junk()
            self._doubtful |= self.stage == "after"
            self._open_call(tag)
        elif tag.name == self._block_name and tag.closing and self.stage == "block":
            self._flush_junk()
            self.stage = "after"
        elif tag.name == self._tags.block and not tag.closing and self.stage == "after":
            self._flush_junk()
            self._report.diagnose("second_block")
            self.stage, self._doubtful = "block", True
        else:
            self._junk.append(tag.literal)

    def _handle_in_call(self, call: CallBuilder, tag: Tag) -> None:
        """Handle a tag inside a call but outside its values."""
        tags = self._tags
        if tag.name == tags.parameter and not tag.closing and "name" in tag.attributes:
            call.repaired |= self._flush_junk() or not tag.exact
            self._report_unread(tag)
            kind = tag.attributes.get("string", "").lower()
            self._add(call.open(tag.attributes["name"], kind))
            self.stage = "value"
            if tag.self_closing:
                self._close_value(call)
        elif tag.name == tags.invoke and tag.closing:
            self._close_call(call)
        elif tag.name in (tags.block, self._block_name) and tag.closing:
            call.repaired = True
            self._close_call(call)
            self.handle(tag)
        elif self._is_call(tag):
            # A call inside a call: neither is known to be whole.
            call.repaired = self._doubtful = True
            self._close_call(call)
            self._open_call(tag)
        else:
            call.repaired = True
            self._junk.append(tag.literal)

    def _handle_in_value(self, call: CallBuilder, tag: Tag) -> None:
        """Handle a tag inside a value.

        By its spelling alone only the closing tag of the parameter ends a value. Another closing
        tag is part of it if that one still comes, and a sign of a forgotten one if it never does;
        so the text is kept back from there. Where ids are known every tag is markup.
        """
        tags = self._tags
        if tag.name == tags.parameter and tag.closing:
            if self._suspended is not None:
                text, self._suspended = "".join(self._suspended), None
                self._add(call.add(text))
                self._report.diagnose("markup_in_value")
            self._close_value(call)
        elif tag.by_id or (self._recovering and tag.name in (tags.invoke, tags.block)):
            call.repaired = True
            self._close_value(call)
            self.handle(tag)
        else:
            if self._suspended is None and tag.name in (tags.invoke, tags.block):
                self._suspended = []
            self.add_text(tag.literal)

    def _open_call(self, tag: Tag) -> None:
        self._report_unread(tag)
        repaired = self._doubtful or not tag.exact
        call = CallBuilder(tag.attributes["name"], repaired=repaired)
        self._id = self._make_id(len(self.calls))
        self._call, self._started = call, False
        self.stage = "invoke"
        if tag.self_closing:
            self._close_call(call)

    def _close_value(self, call: CallBuilder) -> None:
        self._add(call.close())
        self.stage = "invoke"

    def _close_call(self, call: CallBuilder, *, partial: bool = False) -> None:
        index = len(self.calls)
        body = "".join(self._junk).strip()
        if call.is_empty and body.startswith("{") and is_json(body) and body[1:-1].strip():
            call.replace_all(body)
            self._junk = []
        call.repaired |= self._flush_junk()
        ending = call.finish()
        finished = call.call(self._id, partial=partial)
        if not partial:
            self._tell(ending if self._streams else finished.arguments)
        self.calls.append(finished)
        self._report.add(CallFinished(index, finished))
        self._call = None
        self.stage = "block"

    def _add(self, fragment: str) -> None:
        if fragment and self._streams:
            self._tell(fragment)

    def _tell(self, fragment: str) -> None:
        """Report more of the open call, as long as it is what it seems to be.

        A call begins with its first argument: a client would take a name alone, which may be all
        that ever comes, for a call without arguments.
        """
        call, index = self._call, len(self.calls)
        if call is None or call.repaired:
            return
        if not self._started:
            self._started = True
            self._report.add(CallStarted(index, self._id, call.name))
        self._report.add(ArgumentsDelta(index, fragment))

    def _report_unread(self, tag: Tag) -> None:
        if tag.unread:
            self._report.diagnose("attribute_not_read", tag.unread)

    def _flush_junk(self) -> bool:
        """Report text between tags and return whether there was any: blanks are only layout."""
        text = "".join(self._junk)
        self._junk = []
        if not text.strip():
            return False
        self._report.diagnose("text_in_block", text)
        return True
