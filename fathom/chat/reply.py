"""What a model gives back for one turn: the message, why it ended, its cost in tokens and time.

Every model that answers chat messages returns this, in the same process or behind a URL, so that
an agent or a terminal treats them alike.

Paper: §5.1.1 (a turn is reasoning, content and tool calls).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from fathom.chat.messages import Message, ToolCall

# "context" means that the conversation no longer fits the model, so there is no message to use.
FinishReason = Literal["stop", "tool_calls", "length", "context"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a reply as it arrives. A "notice" is not the model's: it is news of the wire."""

    kind: Literal["reasoning", "content", "call", "notice"]
    text: str


OnPiece = Callable[[Piece], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn; None leaves a value to the model's own default."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one turn; None where the model did not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds from the request to the first piece of text and to the end of the turn."""

    first_piece: float | None = None
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One assistant turn."""

    message: Message
    finish_reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)


def executable_calls(message: Message, *, allow_repaired: bool = False) -> list[ToolCall]:
    """Return the calls that may be run: never one that was cut off, a repaired one if allowed."""
    return [
        call
        for call in message.tool_calls
        if not call.partial and (allow_repaired or not call.repaired)
    ]


def finish_reason(
    message: Message, *, at_limit: bool, allow_repaired: bool = False
) -> Literal["stop", "tool_calls", "length"]:
    """Return why a reply ended, in the API's words; `at_limit`: the token limit ended it.

    The limit counts before calls: a client must not take a reply for finished that was cut off.
    """
    if at_limit:
        return "length"
    return "tool_calls" if executable_calls(message, allow_repaired=allow_repaired) else "stop"
