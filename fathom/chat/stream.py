"""From a completion to a message, piece by piece: the only parser there is.

`parse` feeds a whole text to the same `StreamParser` that reads a stream, so both cannot differ. It
works on three levels: text is cut at the marker tokens; a marker behind `<` or `</` begins a tag,
read by `TagReader`; tags move the parser from reasoning and content, which `ProseReader` collects,
into the calls, which `CallReader` reads.

Nothing raises and nothing is lost: what is no markup stays in reasoning or content, what cannot
be placed becomes a diagnostic. Every character is looked at a bounded number of times.

Paper: §5.1.1 (tool-call schema).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from fathom.chat.calls import CallReader
from fathom.chat.dsml import Tag, TagReader
from fathom.chat.events import Event, Report
from fathom.chat.messages import Message
from fathom.chat.prose import ProseReader
from fathom.chat.protocol import DSML, EOS, THINK, THINK_END, Tags, check_thinking
from fathom.errors import ChatError

_MARKERS = (THINK_END, DSML, EOS)
_MARKER = re.compile("|".join(map(re.escape, _MARKERS)))
_PREFIXES = {marker[:size] for marker in _MARKERS for size in range(1, len(marker))}
_LONGEST = max(map(len, _PREFIXES))
_STAGES = ("reasoning", "content", "tool_calls")


def parse(text: str, thinking: str = "high", *, start: str | None = None) -> Message:
    """Return the assistant message that `text`, a completion, says. Never raises on model output.

    `start` is the stage in which a continued completion begins, see `StreamParser`.
    """
    parser = StreamParser(thinking, start=start)
    parser.feed(text)
    parser.close()
    return parser.message


class StreamParser:
    """Parses a completion that arrives in pieces.

    Args:
        thinking: the mode of the prompt; with any but "off" the text begins inside the thoughts.
        start: "reasoning", "content" or "tool_calls" for a completion that goes on from there
            (prefix continuation, or a prompt that opened the calls).
        tools: False leaves tool-call markup in the text, for prompts without tools.
        trim: drop line breaks around reasoning and before content, as the official API does.
            Without it the message holds exactly what was written.
        make_id: gives the id of the n-th call; the ids are "call_0", "call_1", ... by default.
        stream_arguments: report a call and its arguments while they come. By default it is reported
            once it is complete: clients repair and execute calls that were cut off. What is told
            of a call that is cut off, or turns out to need repair, stays without its end.
        stop: texts that end the content where they appear in it; reasoning and calls may hold them.
            `stopped` tells which one was met, and what follows it is ignored.

    Raises ChatError for an unknown mode or stage.
    """

    def __init__(
        self,
        thinking: str = "high",
        *,
        start: str | None = None,
        tools: bool = True,
        trim: bool = False,
        make_id: Callable[[int], str] | None = None,
        stream_arguments: bool = False,
        stop: Sequence[str] = (),
    ) -> None:
        check_thinking(thinking)
        if start not in (None, *_STAGES):
            raise ChatError(f"unknown stage {start!r}: use reasoning, content or tool_calls")
        self._tools = tools
        self._tags = Tags()
        self._report = Report()
        self._message: Message | None = None
        self._prose = ProseReader("reasoning", self._report, trim=trim, stop=stop)
        if start == "content" or (start is None and thinking == "off"):
            self._prose.stage = "content"
        self._calls = CallReader(
            self._tags, self._report, make_id or "call_{}".format, streams=stream_arguments
        )
        self._in_calls = start == "tool_calls"

        self._hold = ""  # the end of the text, while it may be the start of a marker
        self._eos = False  # an EOS was read; it is no end after all if more text follows
        self._eos_by_id = False
        self._angle = ""  # "<" or "</" at the end, while a marker may follow
        self._tag: TagReader | None = None

    @property
    def message(self) -> Message:
        """The message, after `close`. Raises ChatError before."""
        if self._message is None:
            raise ChatError("the message is known after close()")
        return self._message

    @property
    def stage(self) -> Literal["reasoning", "content", "tool_calls"]:
        """Where the completion is."""
        return "tool_calls" if self._in_calls else self._prose.stage

    @property
    def stopped(self) -> str | None:
        """The stop text that was met, None if none was."""
        return self._prose.stopped

    def feed(self, piece: str, special: bool | None = None) -> list[Event]:
        """Take the next piece and return what it brought.

        With `special` the caller knows token ids: True says that the piece is one special token,
        False that it is ordinary text, in which nothing is markup. None means that only text is
        known, and markup is recognised by its spelling. Of the other special tokens `<think>` is
        text anywhere, and all are text inside the block of calls, values above all; in reasoning
        and content they have no place and become a diagnostic. Raises ChatError after `close`.
        """
        if self._message is not None:
            raise ChatError("the parser is closed: make a new one for the next completion")
        if special is None:
            self._cut(piece)
        else:
            self._flush_hold()
            if special and piece in _MARKERS:
                self._mark(piece, by_id=True)
            elif special:
                self._special(piece)
            elif piece:
                self._text(piece)
        return self._report.take()

    def close(self, *, truncated: bool = False) -> list[Event]:
        """End the completion and return the last events. `message` is known afterwards.

        `truncated` says that the token limit ended it. A call that is open then is partial, without
        a guess at where its value may have ended.
        """
        if self._message is None:
            self._finish(truncated)
            self._message = Message(
                role="assistant",
                reasoning="".join(self._prose.reasoning),
                content="".join(self._prose.content),
                tool_calls=self._calls.calls,
                diagnostics=self._report.diagnostics,
            )
        return self._report.take()

    # Level 1: text is cut at markers

    def _cut(self, piece: str) -> None:
        text = self._hold + piece
        at = 0
        for found in _MARKER.finditer(text):
            if found.start() > at:
                self._text(text[at : found.start()])
            self._mark(found[0], by_id=False)
            at = found.end()
        end = len(text) - _length_of_hold(text[at:])
        self._hold = text[end:]
        if end > at:
            self._text(text[at:end])

    def _flush_hold(self) -> None:
        text, self._hold = self._hold, ""
        if text:
            self._text(text)

    # Level 2: markers begin tags

    def _mark(self, marker: str, *, by_id: bool) -> None:
        if self.stopped is not None:
            return
        self._flush_eos()
        if marker == EOS:
            self._eos, self._eos_by_id = True, by_id
            return
        if self._tag is not None:
            if marker == THINK_END and self._in_calls:
                self._text(marker)
                return
            self._end_tag(self._tag)
        if marker == THINK_END:
            self._end_thinking()
        elif self._begins_tag(by_id):
            self._tag = TagReader(
                self._tags,
                closing=self._angle == "</",
                one_line=not self._in_calls,
                by_id=by_id,
            )
            self._angle = ""
        else:
            self._flush_angle(marker)

    def _special(self, token: str) -> None:
        """Place a special token, known by its id, that is no markup."""
        if self.stopped is not None:
            return
        self._flush_eos()
        if self._tag is not None and not self._in_calls:
            self._end_tag(self._tag)
        if self._in_calls or token == THINK:
            self._text(token)
        else:
            # A role or search token has no place in an answer, and no reader a use for it.
            self._flush_angle()
            self._prose.interrupt()
            self._report.diagnose("special_token", token)

    def _begins_tag(self, by_id: bool) -> bool:
        if not self._tools or not self._angle:
            return False
        # A value may quote an opening tag; only the id of the marker could tell it from a real one.
        return not self._in_value() or by_id or self._angle == "</"

    def _text(self, text: str) -> None:
        if self.stopped is not None:
            return
        self._flush_eos()
        if self._tag is not None:
            reader = self._tag
            tag = reader.feed(text)
            if tag is None and not reader.failed:
                return
            self._leave_tag(reader, tag)
            text = reader.rest
        text = self._angle + text
        self._angle = "</" if text.endswith("</") else "<" if text.endswith("<") else ""
        self._place(text.removesuffix(self._angle))

    def _end_tag(self, reader: TagReader) -> None:
        tag = reader.end()
        self._leave_tag(reader, tag)
        self._text(reader.rest)

    def _leave_tag(self, reader: TagReader, tag: Tag | None) -> None:
        self._tag = None
        if tag is None:
            self._place(reader.literal)
        else:
            self._handle(tag)

    def _flush_eos(self) -> None:
        if self._eos:
            self._eos = False
            (self._special if self._eos_by_id else self._text)(EOS)

    def _flush_angle(self, following: str = "") -> None:
        text, self._angle = self._angle + following, ""
        self._place(text)

    # Level 3: text and tags reach their stage

    def _in_value(self) -> bool:
        return self._in_calls and self._calls.stage == "value"

    def _place(self, text: str) -> None:
        """Put text, in which nothing is markup, where the stage says."""
        if text:
            (self._calls if self._in_calls else self._prose).add_text(text)

    def _end_thinking(self) -> None:
        if self._in_value():
            self._text(THINK_END)
            return
        self._flush_angle()
        if self._in_calls or not self._prose.end_thinking():
            self._report.diagnose("stray_think_end", THINK_END)

    def _handle(self, tag: Tag) -> None:
        """Pass a tag on, and decide in prose whether it opens calls.

        A block opens when the tag of a call follows its opening tag; a call without a block needs
        a parameter or its closing tag behind it. Anything less is a quotation.
        """
        if self._in_calls:
            self._calls.handle(tag)
            return
        tags = self._tags
        before = self._prose.candidate
        is_call = tag.name == tags.invoke and not tag.closing and "name" in tag.attributes
        is_opener = not tag.closing and tag.name not in (tags.invoke, tags.parameter)
        if before is not None and before.name != tags.invoke and is_call:
            self._open_calls(before, tag)
        elif (
            before is not None
            and before.name == tags.invoke
            and (tag.name == (tags.invoke if tag.closing else tags.parameter))
        ):
            self._open_calls(before, before)
            self._calls.handle(tag)
        elif is_call or is_opener:
            self._prose.hold(tag)
        else:
            self._report.diagnose("markup_in_text")
            self._prose.add_text(tag.literal)

    def _open_calls(self, opener: Tag, call: Tag) -> None:
        in_reasoning = self._prose.stage == "reasoning"
        is_wrong = opener.name != self._tags.block
        if in_reasoning:
            self._report.diagnose("call_in_reasoning")
        if is_wrong:
            has_block = opener.name != self._tags.invoke
            self._report.diagnose("wrong_block_tag", opener.literal if has_block else "")
        self._prose.leave()
        self._in_calls = True
        self._calls.begin(opener.name, doubtful=in_reasoning or is_wrong)
        self._calls.handle(call)

    # The end

    def _finish(self, truncated: bool) -> None:
        if self.stopped is not None:
            return
        self._eos = False
        self._keep_cut_marker()
        self._flush_hold()
        suspended = None if truncated else self._calls.take_suspended()
        if suspended is not None:
            rest = self._tag.literal if self._tag is not None else ""
            text = suspended + rest + self._angle
            self._tag, self._angle = None, ""
            self._cut(text)
            self._flush_hold()
        tag, self._tag = self._tag, None
        if tag is not None and self._in_calls:
            self._report.diagnose("truncated_tag", tag.literal)
        elif tag is not None and tag.closing and self._prose.candidate is None:
            self._prose.add_text(tag.literal)
        elif tag is not None:
            self._prose.hold_cut(tag.literal)
        self._flush_angle()
        (self._calls if self._in_calls else self._prose).finish()

    def _keep_cut_marker(self) -> None:
        """Tell the start of a tag, at the very end, from text."""
        tail = self._angle + self._hold
        if not tail or self._tag or not f"<{DSML}".startswith(tail.replace("/", "", 1)):
            return
        if not self._in_calls:
            if self._prose.candidate is None:
                return
            self._prose.hold_cut(tail)
        elif self._in_value() and DSML[0] not in tail:
            return
        else:
            self._report.diagnose("truncated_tag", tail)
        self._angle = self._hold = ""


def _length_of_hold(text: str) -> int:
    """Return how many characters at the end may be the start of a marker."""
    tail = text[-_LONGEST:]
    if "<" not in tail and DSML[0] not in tail:
        return 0
    return next((size for size in range(len(tail), 0, -1) if tail[-size:] in _PREFIXES), 0)
