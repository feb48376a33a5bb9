"""Messages to prompts and tokens, completions to messages.

`encode` and `parse` are the two directions in text; `Tokenizer` adds the ids and `StreamParser`
reads a completion while it arrives. Nothing here imports torch.

Paper: §5.1.1 (reasoning efforts, tool-call schema, interleaved thinking, quick instructions).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fathom.chat.encode import encode, encode_segments, render
from fathom.chat.events import (
    ArgumentsDelta,
    CallFinished,
    CallStarted,
    ContentDelta,
    Diagnosed,
    Event,
    ReasoningDelta,
)
from fathom.chat.messages import Diagnostic, Message, ToolCall
from fathom.chat.reply import executable_calls, finish_reason
from fathom.chat.segments import Segment
from fathom.chat.stream import StreamParser, parse

if TYPE_CHECKING:
    from fathom.chat.tokenizer import IncrementalDecoder, Tokenizer

__all__ = [
    "ArgumentsDelta",
    "CallFinished",
    "CallStarted",
    "ContentDelta",
    "Diagnosed",
    "Diagnostic",
    "Event",
    "IncrementalDecoder",
    "Message",
    "ReasoningDelta",
    "Segment",
    "StreamParser",
    "Tokenizer",
    "ToolCall",
    "encode",
    "encode_segments",
    "executable_calls",
    "finish_reason",
    "parse",
    "render",
]


def __getattr__(name: str) -> object:
    """Load the tokenizer on first use: only text for a model needs it. Raises AttributeError."""
    if name not in ("IncrementalDecoder", "Tokenizer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fathom.chat import tokenizer

    return getattr(tokenizer, name)
