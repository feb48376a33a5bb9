"""A model whose turns are written down: what it said once is not asked for again.

With a recorded sandbox beside it an agent that is started again goes through the same steps, from
the log, and then on from where it was. Each turn is recorded under the digest of everything the
model was shown, so a conversation that is not exactly the same is noticed.

Paper: §5.2.5 (fast-forward after preemption), §5.1.1 (the turns of a conversation).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from fathom.agent.model import Model
from fathom.chat import Message, ToolCall
from fathom.chat.messages import Diagnostic
from fathom.chat.reply import OnPiece, Piece, Reply, Sampling, Timings, Usage

if TYPE_CHECKING:
    from fathom.sandbox.trajectory.session import Value

_REPLY = "reply"


class Remembers(Protocol):
    """The part of a session that keeps values."""

    async def recall(self, key: str, digest: bytes) -> Value | None:
        """See `Session.recall`."""
        ...

    async def remember(
        self, key: str, digest: bytes, fields: Mapping[str, Any], blobs: Mapping[str, bytes]
    ) -> None:
        """See `Session.remember`."""
        ...


class RecordedModel:
    """A model behind a session; turns are numbered in the order in which they are asked for."""

    def __init__(self, model: Model, session: Remembers) -> None:
        self._model = model
        self._session = session
        self._turns = 0
        self._hashed: list[Mapping[str, Any]] = []
        self._hash = hashlib.blake2b(digest_size=32)

    @property
    def name(self) -> str:
        """The model's own name."""
        return self._model.name

    @property
    def context_tokens(self) -> int | None:
        """The model's own limit."""
        return self._model.context_tokens

    def count_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: str = "high",
    ) -> int | None:
        """The model's own count."""
        return self._model.count_tokens(messages, tools=tools, thinking=thinking)

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
        """The recorded turn, or the model's, which is on disk before it is returned.

        Raises Diverged when the conversation is another one than was recorded, LogFull, and
        whatever the model raises.
        """
        self._turns += 1
        key = f"turn/{self._turns}"
        rest = json.dumps([list(tools), thinking, max_tokens, asdict(sampling)], sort_keys=True)
        digest = self._digest(messages, rest)
        if (value := await self._session.recall(key, digest)) is not None:
            reply = reply_from_json(json.loads(value.blobs[_REPLY]))
            if on_piece is not None:
                _repeat(reply, on_piece)
            return reply
        reply = await self._model.complete(
            messages,
            tools=tools,
            thinking=thinking,
            max_tokens=max_tokens,
            sampling=sampling,
            on_piece=on_piece,
        )
        text = json.dumps(asdict(reply)).encode()
        await self._session.remember(key, digest, {"model": self.name}, {_REPLY: text})
        return reply

    def _digest(self, messages: Sequence[Mapping[str, Any]], rest: str) -> bytes:
        # A conversation only grows, so each message is hashed once; what changed after all is
        # hashed anew from the start.
        known = self._hashed
        if len(known) > len(messages) or any(a != b for a, b in zip(known, messages, strict=False)):
            self._hashed, self._hash = [], hashlib.blake2b(digest_size=32)
        for message in messages[len(self._hashed) :]:
            text = json.dumps(message, sort_keys=True)
            self._hash.update(f"{len(text)} {text}".encode("ascii"))
            self._hashed.append(dict(message))
        whole = self._hash.copy()
        whole.update(rest.encode("ascii"))
        return whole.digest()


def reply_from_json(value: Mapping[str, Any]) -> Reply:
    """The reply that `asdict` and JSON were made of, equal to it in every field."""
    message = dict(value["message"])
    message["tool_calls"] = [ToolCall(**call) for call in message["tool_calls"]]
    message["diagnostics"] = [Diagnostic(**found) for found in message["diagnostics"]]
    return Reply(
        message=Message(**message),
        finish_reason=value["finish_reason"],
        usage=Usage(**value["usage"]),
        timings=Timings(**value["timings"]),
    )


def _repeat(reply: Reply, on_piece: OnPiece) -> None:
    if reply.message.reasoning:
        on_piece(Piece(kind="reasoning", text=reply.message.reasoning))
    if isinstance(reply.message.content, str) and reply.message.content:
        on_piece(Piece(kind="content", text=reply.message.content))
