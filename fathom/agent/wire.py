"""The chat-completions format, apart from the network: request bodies out, chunks in.

Servers differ in the names of two things. Reasoning travels as `reasoning_content` (DeepSeek,
SGLang) or `reasoning` (vLLM), and thinking is switched by `thinking`, by a template argument or not
at all. A request carries every form that its readers are known to ignore when foreign, and
`unwanted_field` reads from a refusal which of them a stricter server does not take.

Paper: §5.1.1 (reasoning is kept across tool calls, so it has to travel back).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fathom.chat import Message, ToolCall
from fathom.chat.reply import FinishReason, Piece, Reply, Sampling, Timings, Usage
from fathom.errors import AgentError

# Fields that not every server knows. Leaving one out changes how a reply is made, never its form.
OPTIONAL_FIELDS = (
    "chat_template_kwargs", "stream_options", "reasoning_effort", "thinking", "seed", "top_p",
    "temperature",
)  # fmt: skip

_REFUSAL = re.compile(
    r"unrecogni[sz]ed|unknown|unexpected|unsupported|not supported|not permitted|extra", re.I
)
_OVERFLOW = re.compile(
    r"context[_ ]length|context[_ ](window|size)|maximum context|prompt is too long", re.I
)


class UnreadableReply(Exception):
    """A server's answer is not a chat completion. The message says what was found."""


def endpoint(url: str) -> str:
    """The address below which `/chat/completions` and `/models` lie.

    Takes a server's root, its `/v1` or the full address. Raises AgentError for anything but http
    and https.
    """
    trimmed = url.strip().rstrip("/").removesuffix("/chat/completions")
    if not re.match(r"https?://[^/\s]+", trimmed):
        raise AgentError(f"{url!r} is not an http:// or https:// address")
    has_path = "/" in trimmed.split("://", 1)[1]
    return trimmed if has_path else f"{trimmed}/v1"


def request_body(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]],
    thinking: str,
    max_tokens: int | None,
    sampling: Sampling,
    reasoning_field: str,
) -> dict[str, Any]:
    """One streaming request. `thinking` is "off", "high" or "max"."""
    on = thinking != "off"
    body: dict[str, Any] = {
        "model": model,
        "messages": [_outgoing(message, reasoning_field if on else None) for message in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "thinking": {"type": "enabled" if on else "disabled"},
        "chat_template_kwargs": {"thinking": on, "enable_thinking": on},
    }
    optional = {
        "tools": list(tools) or None,
        "reasoning_effort": thinking if on else None,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    return body | {name: value for name, value in optional.items() if value is not None}


def _outgoing(message: Mapping[str, Any], reasoning_field: str | None) -> dict[str, Any]:
    out = {name: value for name, value in message.items() if name != "reasoning_content"}
    # An empty string is sent too: servers refuse an assistant turn with calls that lacks the field.
    if message["role"] == "assistant" and reasoning_field is not None:
        out[reasoning_field] = message.get("reasoning_content") or ""
    return out


def unwanted_field(body: Mapping[str, Any], refusal: str) -> str | None:
    """The field of `body` that the text of a refusal (HTTP 400 or 422) complains about, if any."""
    if not _REFUSAL.search(refusal):
        return None
    if "max_tokens" in body and "max_completion_tokens" in refusal:
        return "max_tokens"
    named = (name for name in OPTIONAL_FIELDS if name in body)
    return next((name for name in named if re.search(rf"\b{name}\b", refusal)), None)


def is_overflow(refusal: str) -> bool:
    """Whether a refusal says that the conversation does not fit the model's context."""
    return _OVERFLOW.search(refusal) is not None


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: str = ""

    def finished(self, number: int, cut_off: bool) -> ToolCall:
        call_id = self.id or f"call_{number}"
        if not self.arguments.strip() and not cut_off:
            return ToolCall(id=call_id, name=self.name, arguments="{}")
        try:
            valid = isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            valid = False
        if valid:
            return ToolCall(id=call_id, name=self.name, arguments=self.arguments)
        return ToolCall(
            id=call_id, name=self.name, arguments="{}", partial=cut_off, repaired=not cut_off
        )


class ReplyBuilder:
    """Puts a reply together from the chunks of a stream, or from one whole completion."""

    def __init__(self) -> None:
        self.reasoning_field: str | None = None
        self.finish_reason: str | None = None
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: dict[int, _Call] = {}
        self._usage = Usage()

    def add(self, chunk: Any) -> list[Piece]:
        """Take in one decoded chunk and return what it adds to the reply.

        Raises UnreadableReply when the chunk is an error or has not the form of a completion.
        """
        try:
            fields = _object(chunk)
            if error := fields.get("error"):
                raise UnreadableReply(f"the server reported: {_shorten(error)}")
            self._count(_object(fields.get("usage")))
            pieces: list[Piece] = []
            for choice in map(_object, _array(fields.get("choices"))[:1]):
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                pieces += self._delta(_object(choice.get("delta") or choice.get("message")))
            return pieces
        except (TypeError, ValueError) as error:
            raise UnreadableReply(f"not a chat completion: {_shorten(chunk)}") from error

    def _delta(self, delta: dict[str, Any]) -> list[Piece]:
        pieces: list[Piece] = []
        for name in ("reasoning_content", "reasoning"):
            if isinstance(delta.get(name), str):
                self.reasoning_field = name
                self._reasoning.append(delta[name])
                pieces.append(Piece(kind="reasoning", text=delta[name]))
                break
        if content := delta.get("content"):
            self._content.append(_text(content))
            pieces.append(Piece(kind="content", text=_text(content)))
        for part in map(_object, _array(delta.get("tool_calls"))):
            pieces.append(self._call(part))
        return [piece for piece in pieces if piece.text]

    def _call(self, part: dict[str, Any]) -> Piece:
        # Some servers leave the index out and send each call whole.
        index = part.get("index")
        if index is None:
            index = len(self._calls)
        if not isinstance(index, int):
            raise TypeError(f"expected the number of a call, found {type(index).__name__}")
        call = self._calls.setdefault(index, _Call())
        function = _object(part.get("function"))
        name, arguments = _text(function.get("name")), _text(function.get("arguments"))
        call.id = call.id or _text(part.get("id"))
        call.name += name
        call.arguments += arguments
        return Piece(kind="call", text=f"{name} {arguments}" if name else arguments)

    def _count(self, usage: dict[str, Any]) -> None:
        if not usage:
            return
        details = _object(usage.get("prompt_tokens_details"))
        self._usage = Usage(
            prompt_tokens=_tokens(usage.get("prompt_tokens")),
            cached_tokens=_tokens(
                details.get("cached_tokens", usage.get("prompt_cache_hit_tokens"))
            ),
            completion_tokens=_tokens(usage.get("completion_tokens")),
        )

    def reply(self, timings: Timings) -> Reply:
        """The finished reply.

        A call whose arguments are not a JSON object is marked as partial when the reply was cut off
        and as repaired otherwise, and carries no arguments.
        """
        cut_off = self.finish_reason == "length"
        calls = [
            call.finished(number, cut_off)
            for number, (_, call) in enumerate(sorted(self._calls.items()))
        ]
        reason: FinishReason = "tool_calls" if calls else "stop"
        return Reply(
            message=Message(
                reasoning="".join(self._reasoning),
                content="".join(self._content),
                tool_calls=calls,
            ),
            finish_reason="length" if cut_off else reason,
            usage=self._usage,
            timings=timings,
        )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return value


def _tokens(value: Any) -> int | None:
    """A count of tokens; what is none is not told. A reply is worth more than its account."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 53 else None


def _object(value: Any) -> dict[str, Any]:
    """`value` as an object, where null stands for an empty one. Raises TypeError."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _array(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError(f"expected an array, found {type(value).__name__}")
    return cast("list[Any]", value)


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}..."
