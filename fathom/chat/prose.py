"""Collecting reasoning and content, and deciding late what their ends are.

Line breaks before a block of calls belong to the block, and a tag may open one or be a quotation;
so both are held until what follows tells.

Paper: §5.1.1 (interleaved thinking: reasoning, then content, then calls).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from fathom.chat.dsml import Tag
from fathom.chat.events import ContentDelta, ReasoningDelta, Report
from fathom.chat.stops import StopFinder


class ProseReader:
    """Collects reasoning and content, and the tags in them that may turn out to open calls."""

    def __init__(
        self,
        stage: Literal["reasoning", "content"],
        report: Report,
        *,
        trim: bool,
        stop: Iterable[str] = (),
    ) -> None:
        self.stage: Literal["reasoning", "content"] = stage
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.candidate: Tag | None = None
        self._report = report
        self._trim = trim
        self._stops = StopFinder(stop)
        self._started = [False, False]  # content, reasoning
        self._newlines = 0  # at the end of the text, while a block may follow
        self._held: list[str] = []  # candidate and blanks, given back if no call follows
        self._held_newlines = 0

    @property
    def stopped(self) -> str | None:
        """The stop text that ended the content, None before."""
        return self._stops.found

    def add_text(self, text: str) -> None:
        """Take text in which nothing is markup."""
        if self._held:
            if text.isspace():
                self._held.append(text)
                return
            self._give_back()
        body = text.rstrip("\n")
        count = len(text) - len(body)
        if body:
            self._emit("\n" * self._newlines + body)
            self._newlines = 0
        self._newlines += count
        # The reference takes exactly two line breaks for part of the block that follows.
        if not self._trim and self._newlines > 2:
            self._emit("\n" * (self._newlines - 2))
            self._newlines = 2

    def hold(self, tag: Tag) -> None:
        """Keep a tag that opens calls if the next one says so."""
        if self._held:
            self._give_back()
        self._hold_text(tag.literal)
        self.candidate = tag

    def hold_cut(self, text: str) -> None:
        """Take the start of a tag that the end of the text cut off."""
        self._hold_text(text)

    def interrupt(self) -> None:
        """Take note that something came that is not shown: a tag before it opens no calls."""
        if self._held:
            self._give_back()

    def take_held(self) -> str:
        """Return what is held, with the line breaks before it, and forget it."""
        text = "\n" * self._held_newlines + "".join(self._held)
        self.candidate, self._held, self._held_newlines = None, [], 0
        return text

    def leave(self) -> None:
        """Take note that calls follow."""
        self.take_held()
        self._emit_content(self._stops.flush())

    def end_thinking(self) -> bool:
        """Go from reasoning to content. Returns whether there was reasoning to end."""
        if self._held:
            self._give_back()
        if self.stage == "content":
            return False
        if not self._trim:
            self._flush_newlines()
        self._newlines = 0
        self.stage = "content"
        return True

    def finish(self) -> None:
        """End the completion."""
        if self._held and self._held_newlines >= 2:
            # Where a block belongs, its beginning is no quotation.
            self._report.diagnose("truncated_block", self.take_held())
        elif self._held:
            self._give_back()
        self._flush_newlines()
        self._emit_content(self._stops.flush())

    def _hold_text(self, text: str) -> None:
        if not self._held:
            self._held_newlines, self._newlines = self._newlines, 0
        self._held.append(text)

    def _give_back(self) -> None:
        """Treat what is held as the text that it is."""
        self._report.diagnose("markup_in_text")
        self.add_text(self.take_held())

    def _emit(self, text: str) -> None:
        reasons = self.stage == "reasoning"
        if self._trim and not self._started[reasons]:
            text = text.lstrip("\n")
        if not text:
            return
        self._started[reasons] = True
        if reasons:
            self.reasoning.append(text)
            self._report.add(ReasoningDelta(text))
        else:
            self._emit_content(self._stops.push(text))

    def _emit_content(self, text: str) -> None:
        if text:
            self.content.append(text)
            self._report.add(ContentDelta(text))

    def _flush_newlines(self) -> None:
        count, self._newlines = self._newlines, 0
        self._emit("\n" * count)
