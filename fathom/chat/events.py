"""What `StreamParser` reports while a completion arrives.

Joined in order, the texts of the events are the fields of the final message, but for calls that
are partial or repaired: of these only `CallFinished` tells all.

Paper: none (streaming is a matter of the API).
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.chat.messages import Diagnostic, ToolCall


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A tool call begins; its arguments follow. None for one that is in doubt from the start."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments. All of them joined are `ToolCall.arguments`.

    Of a call that turns out to be partial or repaired they are a beginning that is no JSON.
    """

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallFinished:
    """A tool call is complete, or as complete as it will be."""

    index: int
    call: ToolCall


@dataclass(frozen=True, slots=True)
class Diagnosed:
    """Something that is neither message nor well-formed markup."""

    diagnostic: Diagnostic


Event = ReasoningDelta | ContentDelta | CallStarted | ArgumentsDelta | CallFinished | Diagnosed


class Report:
    """Collects the events of a parser, and its diagnostics once more for the message."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []
        self._events: list[Event] = []

    def add(self, event: Event) -> None:
        """Report an event."""
        self._events.append(event)

    def diagnose(self, code: str, text: str = "") -> None:
        """Report something irregular; `text` is what appears nowhere else."""
        diagnostic = Diagnostic(code, text)
        self.diagnostics.append(diagnostic)
        self._events.append(Diagnosed(diagnostic))

    def take(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events
