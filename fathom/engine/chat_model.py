"""A loaded model as something that answers chat messages: messages in, a parsed reply out.

This is the in-process counterpart of a chat-completions server, and to an agent the two are equal.
Each turn hands over the whole conversation; with tools it extends the last one token by token, so
the model's prefix cache makes only the new part cost anything.

Paper: §5.1.1 (reasoning is kept across tool calls, which also makes prompts append-only).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from fathom.chat import StreamParser
from fathom.chat.events import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    Event,
    ReasoningDelta,
)
from fathom.chat.messages import Message
from fathom.chat.reply import FinishReason, OnPiece, Piece, Reply, Sampling, Timings, Usage

if TYPE_CHECKING:
    from fathom.engine.llm import LLM, TokenPiece

GREEDY = Sampling(temperature=0.0, top_p=1.0)


class LocalModel:
    """Answers chat messages with an `LLM`; replies asked for at once are computed together.

    `defaults` fills in what a request leaves open; the model card's temperature is 1.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        name: str | None = None,
        defaults: Sampling = Sampling(temperature=1.0, top_p=1.0),  # noqa: B008 (immutable)
    ) -> None:
        self._llm = llm
        self._name = name or llm.name
        self._defaults = defaults

    @property
    def name(self) -> str:
        """The name it was loaded by."""
        return self._name

    @property
    def context_tokens(self) -> int:
        """How many tokens prompt and reply may have together."""
        return self._llm.config.max_position_embeddings

    def count_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: str = "high",
    ) -> int:
        """The length of the prompt. Raises ChatError for messages that cannot be rendered."""
        return len(self._prompt(messages, tools, thinking))

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: str = "high",
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        on_piece: OnPiece | None = None,
    ) -> Reply:
        """Write the next message in a worker thread; `on_piece` is called from there.

        When this call is cancelled, generation stops at the next token. Raises ChatError for
        messages that cannot be rendered, TokenizerError for a model without a tokenizer and
        GenerationError for impossible sampling values.
        """
        stopped = threading.Event()

        work = partial(
            self.reply, messages, tools=tools, thinking=thinking, max_tokens=max_tokens,
            sampling=sampling, on_piece=on_piece, stopped=stopped,
        )  # fmt: skip
        try:
            return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
        finally:
            stopped.set()

    def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: str = "high",
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        on_piece: OnPiece | None = None,
        stopped: threading.Event | None = None,
    ) -> Reply:
        """`complete` without an event loop; a `stopped` that is set ends the reply early."""
        started = time.perf_counter()
        prompt = self._prompt(messages, tools, thinking)
        room = self.context_tokens - len(prompt)
        if room < 1:
            return Reply(message=Message(), finish_reason="context")

        generation = self._llm.stream(
            prompt,
            max_tokens=room if max_tokens is None else min(max_tokens, room),
            temperature=_first(sampling.temperature, self._defaults.temperature, 1.0),
            top_p=_first(sampling.top_p, self._defaults.top_p, 1.0),
            seed=_first(sampling.seed, self._defaults.seed, None),
        )
        # The answer to a quick instruction carries no thoughts in any mode.
        start = "content" if messages and messages[-1].get("task") else None
        parser = StreamParser(thinking, start=start, tools=bool(tools), stream_arguments=True)
        generated = 0
        first_piece: float | None = None
        for token in generation:
            generated += 1
            first_piece = first_piece or time.perf_counter() - started
            _tell(self._feed(parser, token), on_piece)
            if stopped is not None and stopped.is_set():
                break
        _tell(parser.close(truncated=generation.finish_reason == "length"), on_piece)

        return Reply(
            message=parser.message,
            finish_reason=_finish_reason(generation.finish_reason, parser.message),
            usage=Usage(
                prompt_tokens=len(prompt),
                cached_tokens=generation.cached_tokens,
                completion_tokens=generated,
            ),
            timings=Timings(first_piece=first_piece, total=time.perf_counter() - started),
        )

    def _prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        thinking: str,
    ) -> list[int]:
        return self._llm.tokenizer.encode_prompt(messages, tools=tools or None, thinking=thinking)

    def _feed(self, parser: StreamParser, token: TokenPiece) -> list[Event]:
        # Only the id tells markup from text that spells it. The engine leaves the stop token's
        # text out, and puts an unfinished character in front of a special token's.
        tokenizer = self._llm.tokenizer
        if token.token_id not in tokenizer.special_ids:
            return parser.feed(token.text, False)
        marker = tokenizer.decode([token.token_id])
        if not token.text.endswith(marker):
            return parser.feed(token.text, False)
        before = parser.feed(token.text.removesuffix(marker), False)
        return before + parser.feed(marker, True)


def _tell(events: list[Event], on_piece: OnPiece | None) -> None:
    if on_piece is None:
        return
    for event in events:
        match event:
            case ReasoningDelta(text):
                on_piece(Piece(kind="reasoning", text=text))
            case ContentDelta(text):
                on_piece(Piece(kind="content", text=text))
            case CallStarted(name=name):
                on_piece(Piece(kind="call", text=f"{name} "))
            case ArgumentsDelta(text=text):
                on_piece(Piece(kind="call", text=text))
            case _:
                pass


def _finish_reason(reason: str, message: Message) -> FinishReason:
    if reason == "length":
        return "length"
    return "tool_calls" if message.tool_calls else "stop"


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
