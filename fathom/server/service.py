"""From a decoded request body to running completions: the part that all APIs share.

    body -> fathom.chat.requests -> bounds, restored reasoning -> prompt ids -> Turn

Paper: §5.1.1 (reasoning efforts), §5.3.1 (context of Think Max).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from fathom.chat.requests import (
    PromptRequest,
    RequestOptions,
    read_chat,
    read_messages,
    read_responses,
)
from fathom.chat.segments import Segment, join_text
from fathom.errors import ChatError
from fathom.server.backend import Backend, GenerationRequest, Shaping, TokenMask
from fathom.server.bounds import check_biases, check_body, check_request, off_loop
from fathom.server.constrain import Constrainer
from fathom.server.forced import ForcedBackend
from fathom.server.gateway import safe_text
from fathom.server.metrics import Metrics
from fathom.server.problems import Problem
from fathom.server.render import new_id
from fathom.server.settings import MAX_THINKING_FLOOR, Settings
from fathom.server.store import StoredResponse, TurnStore
from fathom.server.turn import Delivery, Turn

log = logging.getLogger(__name__)

_CALL_PREFIX = {"chat": "call_", "messages": "toolu_", "responses": "call_"}


def notice_header(notices: Iterable[str]) -> dict[str, str]:
    """The header that tells a client what was ignored or changed, if anything was."""
    joined = "; ".join(notices)[:1000].encode("ascii", "replace").decode()
    text = "".join(c for c in joined if c.isprintable())
    return {"x-fathom-notice": text} if text else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request ready to run: its prompt, and what its client should be told in headers."""

    request: PromptRequest
    prompt: list[int]
    text: str
    max_tokens: int
    notices: tuple[str, ...]
    repaired_calls: bool
    masks: tuple[TokenMask | None, ...]
    force: bool

    def headers(self) -> dict[str, str]:
        """What the server did on its own account."""
        headers: dict[str, str] = {}
        if self.request.restored:
            headers["x-fathom-restored-reasoning"] = str(self.request.restored)
        return headers | notice_header(self.notices)


class Service:
    """Everything behind the routes: the engine, the bounds, the store and the counters."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend = backend
        self.settings = settings
        self.metrics = Metrics()
        self.store = TurnStore(settings.stored_turns, settings.stored_bytes)
        tokenizer = backend.tokenizer
        masks = backend.info.masks and tokenizer is not None
        self._constrainer = Constrainer(tokenizer) if masks and tokenizer else None
        self._slots = anyio.Semaphore(settings.limits.running)
        self._waiting = 0
        self._options = RequestOptions(
            revision=settings.revision,
            # Without masks nothing but their absence keeps the model from calling.
            keep_tools_when_none=self._constrainer is not None,
            most_choices=settings.limits.choices,
            require_reasoning=settings.require_reasoning,
        )

    def read(self, api: str, body: Mapping[str, Any], owner: str) -> PromptRequest:
        """Read a body of "chat", "messages" or "responses". Raises RequestError or Problem."""
        check_body(body, self.settings.limits)
        known = {name: value for name, value in body.items() if name not in OWN_FIELDS}
        options = replace(self._options, recall=partial(self.store.recall, owner))
        if api == "responses":
            past = self._past(owner, body)
            request = read_responses(known, options, past.messages, past.found_tools)
        else:
            request = (read_chat if api == "chat" else read_messages)(known, options)
        check_request(request, self.settings.limits)
        check_biases(request.shaping.logit_bias, self.backend.tokenizer)
        return request

    async def prepare(self, api: str, body: Mapping[str, Any], owner: str) -> Prepared:
        """Read, restore, render and measure. Raises Problem for a prompt that does not fit."""
        size = getattr(body, "size", 0)
        request, notice = self._check_effort(await off_loop(size, self.read, api, body, owner))
        if request.top_logprobs is not None and not self.backend.info.logprobs:
            request = replace(request, top_logprobs=None)
            notice = (*notice, NO_LOGPROBS)
        if request.restored:
            self.metrics.restored.inc(request.restored)
        param = "input" if api == "responses" else "messages"
        try:
            segments = await off_loop(size, request.segments)
        except ChatError as error:  # about the conversation as a whole
            raise Problem(400, str(error), code=error.code, param=param) from None
        prompt = await self.tokenize(segments, param)
        room = self.check_length(len(prompt), param)
        wanted = request.max_tokens or request.default_max_tokens()
        masks, force, unenforced = await self._bind(request)
        return Prepared(
            request=request,
            prompt=prompt,
            text=safe_text(segments) if self.backend.tokenizer is None else join_text(segments),
            max_tokens=min(wanted, room, self.settings.limits.max_tokens),
            notices=(
                *notice,
                *unenforced,
                *self.without_effect(request.shaping),
                *request.warnings,
            ),
            repaired_calls=_flag(body, "repaired_calls", self.settings.repaired_calls),
            masks=masks,
            force=force,
        )

    async def _bind(
        self, request: PromptRequest
    ) -> tuple[tuple[TokenMask | None, ...], bool, tuple[str, ...]]:
        """How the reply is held to what the request demands: masks, or else a forced opening.

        An engine without masks can still be made to call, because a prompt can open the block of
        calls; schemas are then only asked for, and the client is told.
        """
        if self._constrainer is not None:
            make = partial(self._constrainer.mask, request)

            def masks() -> tuple[TokenMask | None, ...]:
                return tuple(make() for _ in range(request.n))

            if self._constrainer.needs_grammar(request):
                return await anyio.to_thread.run_sync(masks), False, ()
            return masks(), False, ()
        choice, told = request.tool_choice, list[str]()
        force = choice.mode == "required" and request.start != "content"
        if choice.mode == "required" and not force:
            told.append("tool_choice is not enforced: the answer goes on from its content")
        if request.response_format.kind != "text" or any(t.strict for t in request.tools):
            told.append("schemas are not enforced: the upstream offers no constrained decoding")
        return (None,) * request.n, force, tuple(told)

    def check_length(self, tokens: int, param: str) -> int:
        """How many tokens fit behind a prompt. Raises Problem for one that leaves no room."""
        context, limit = self.backend.info.context_tokens, self.settings.limits.prompt_tokens
        most = context - 1 if limit is None else min(limit, context - 1)
        if tokens > most:
            raise Problem(
                400,
                f"prompt is too long: {tokens} tokens > {most} maximum",
                code="context_length_exceeded",
                param=param,
            )
        return context - tokens

    def without_effect(self, shaping: Shaping) -> tuple[str, ...]:
        """What to tell a client who shapes the choice of tokens where the engine has none."""
        names = () if self.backend.info.shaping else shaping.changes()
        return tuple(f"{name} has no effect: this engine chooses no tokens" for name in names)

    def _past(self, owner: str, body: Mapping[str, Any]) -> StoredResponse:
        """The conversation that a Responses request goes on from."""
        previous = body.get("previous_response_id")
        if not isinstance(previous, str):
            # The reader says what is wrong with anything but null.
            return StoredResponse(messages=[], body={})
        stored = self.store.response(owner, previous)
        if stored is None:
            raise Problem(
                400,
                f"response {previous[:100]!r} is not known here (any more): send the conversation "
                "as input",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        return stored

    def start(self, prepared: Prepared, owner: str) -> list[Turn]:
        """The completions of a request, not yet running. Raises Problem when too many wait."""
        self.check_queue(prepared.request.n)
        return [self._turn(prepared, owner, at) for at in range(prepared.request.n)]

    def check_queue(self, completions: int) -> None:
        """Raises Problem when more completions would wait than may."""
        waiting = self._waiting + completions - self._slots.value
        if waiting > self.settings.limits.waiting:
            raise Problem(
                503,
                f"{self._waiting} completions are waiting already: try again later",
                code="overloaded",
                headers={"retry-after": "2"},
            )

    async def tokenize(self, segments: list[Segment], param: str) -> list[int]:
        """The ids of a prompt; a long one is made outside the event loop.

        Raises Problem, and makes none, for one that cannot fit whatever its tokens are.
        """
        tokenizer = self.backend.tokenizer
        if tokenizer is None:
            # Only its length matters, and only roughly: the upstream counts for itself.
            return [0] * (sum(len(segment.text) for segment in segments) // 4 + 1)
        size = sum(len(segment.text) for segment in segments)
        self.check_length(size // tokenizer.longest_token, param)
        return await off_loop(size, tokenizer.encode_segments, segments)

    def _turn(self, prepared: Prepared, owner: str, at: int) -> Turn:
        request, settings = prepared.request, self.settings
        sampling = request.default_sampling()
        at_once = request.stream_arguments
        generation = GenerationRequest(
            prompt=prepared.prompt,
            text=prepared.text,
            max_tokens=prepared.max_tokens,
            temperature=1.0 if sampling.temperature is None else sampling.temperature,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            shaping=request.shaping,
            seed=None if sampling.seed is None else (sampling.seed + at) % 2**63,
            logprobs=request.top_logprobs is not None,
            top_logprobs=request.top_logprobs or 0,
            mask=prepared.masks[at],
        )
        delivery = Delivery(
            at_once=settings.stream_arguments if at_once is None else at_once,
            repaired=prepared.repaired_calls,
            forbidden=request.tool_choice.mode == "none" or not request.tools,
            single=not request.tool_choice.parallel,
            names=frozenset(request.tool_choice.names),
        )
        prefix = _CALL_PREFIX[request.api]
        ids: dict[int, str] = {}

        def make_id(index: int) -> str:
            return ids.setdefault(index, new_id(prefix))

        backend = ForcedBackend(self.backend, request) if prepared.force else self.backend
        return Turn(backend, generation, request, delivery, make_id, self.watch(owner))

    def watch(self, owner: str) -> Callable[[Any], Any]:
        """What surrounds a completion: a slot before it, counters and the store behind it."""
        started = time.perf_counter()

        @asynccontextmanager
        async def watch(turn: Turn) -> AsyncIterator[None]:
            reason = "left"
            await self._take_slot()
            self.metrics.running.inc()
            try:
                yield
                reason = turn.account.finish_reason
            except Exception:
                reason = "failed"
                raise
            finally:
                self._slots.release()
                self.metrics.running.dec()
                self.metrics.count(turn.account, reason, started)
                account = turn.account
                if account.calls and account.reasoning:
                    ids = [call.id for call in account.calls]
                    self.store.keep_reasoning(owner, ids, "".join(account.reasoning))

        return watch

    async def _take_slot(self) -> None:
        self._waiting += 1
        self.metrics.waiting.inc()
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
            self.metrics.waiting.dec()

    def _check_effort(self, request: PromptRequest) -> tuple[PromptRequest, tuple[str, ...]]:
        """Think Max needs room: below the floor the effort is High, and the client is told."""
        context = self.backend.info.context_tokens
        if request.thinking != "max" or context >= MAX_THINKING_FLOOR:
            return request, ()
        note = (
            f"effort max became high: it needs a context of {MAX_THINKING_FLOOR} tokens, this "
            f"model has {context}"
        )
        return replace(request, thinking="high", effort="high"), (note,)


NO_LOGPROBS = "there are no logprobs: the upstream gives them by token id only"

# Fields that only this server knows; the readers of the APIs never see them.
OWN_FIELDS = ("repaired_calls",)


def _flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Problem(400, f"{name} must be true or false, not {value!r:.40}", param=name)
    return value
