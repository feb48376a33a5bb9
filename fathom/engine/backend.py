"""A loaded model as the engine of a server: all completions go through one engine together.

One thread owns the engine and steps as long as there is work; event loops hand requests over and
wait for their tokens.

With a log, completions that a killed process left behind wait for whoever asks the same again, and
go on where they were; after a day their logs are deleted.

Paper: none (inference interface).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from fathom.chat.generation import (
    BackendInfo,
    GenerationEnd,
    GenerationRequest,
    Output,
    Prefilled,
    TokenMask,
    TokenOutput,
)
from fathom.chat.tokenizer import IncrementalDecoder, Tokenizer
from fathom.engine.request import Request
from fathom.engine.sampler import SamplingParams
from fathom.engine.wal_format import Logged, rules_of
from fathom.errors import BackendError, CacheError, FathomError

if TYPE_CHECKING:
    from fathom.engine.engine import Engine
    from fathom.engine.llm import LLM


LOG_SECONDS = 24 * 3600  # that a log waits for somebody to ask again


class LocalBackend:
    """Generates with the engine of an `LLM`. Closing a generator cancels its completion."""

    def __init__(self, llm: LLM, *, name: str | None = None) -> None:
        self._llm = llm
        self._info = BackendInfo(
            name=name or llm.name, context_tokens=llm.config.max_position_embeddings
        )
        self._tokenizer = llm.tokenizer
        self._interrupted: list[Logged] | None = None  # None: nobody has looked yet
        self._orders: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._active: dict[str, _Completion] = {}
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def info(self) -> BackendInfo:
        """Name, context and abilities."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def prepare(self) -> None:
        """Make the engine and look through its log, before anybody asks for anything.

        Raises ConfigError for memory that there is not, CacheError for folders that cannot be used.
        """
        engine, self._interrupted = self._llm.engine, []
        if engine.wal is not None:
            for logged in engine.interrupted():
                useful = logged.rules != "" and logged.finish_reason in (None, "stop", "length")
                if not engine.wal.drop(logged, LOG_SECONDS) and useful:
                    self._interrupted.append(logged)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Output, None]:
        """Generate on the engine's thread. Raises GenerationError, and BackendError for a bug."""
        completion = _Completion(request, self._tokenizer, asyncio.get_running_loop())
        await self._order(lambda engine: self._submit(engine, completion))
        try:
            while True:
                for item in await completion.mailbox.take():
                    if isinstance(item, FathomError):
                        raise item
                    if isinstance(item, BaseException):
                        raise BackendError(f"the model failed: {item!r}") from item
                    yield item
                    if isinstance(item, GenerationEnd):
                        return
        finally:
            completion.mailbox.closed.set()
            # Without a thread nothing of it runs, and nothing is to be cancelled.
            self._orders.put(lambda engine: self._cancel(engine, completion))

    async def metrics_text(self) -> str:
        """The engine's counters in Prometheus' text format."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[str] = loop.create_future()

        def answer(text: str | None, error: Exception | None) -> None:
            if found.cancelled():
                return
            found.set_exception(error) if error is not None else found.set_result(text or "")

        def tell(engine: Engine) -> None:
            text, problem = None, None
            try:
                text = engine.metrics_text()
            except Exception as error:
                problem = error
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(answer, text, problem)

        await self._order(tell)
        return await found

    async def aclose(self) -> None:
        """Let running completions go and the engine's thread end."""
        if self._thread is not None:
            self._orders.put(None)

    async def _order(self, order: Callable[[Engine], None]) -> None:
        """Hand something to the engine's thread, and start it where there is none.

        In this order: a thread that is ending looks at the orders once more before it goes.
        """
        if self._interrupted is None:  # it may have to be compiled; what fails fails its caller
            await asyncio.to_thread(self.prepare)
        engine = self._llm.engine
        self._orders.put(order)
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, args=(engine,), name="fathom-engine", daemon=True
                )
                self._thread.start()

    def _work(self, engine: Engine) -> None:
        while True:
            try:
                if not self._take_orders(engine):
                    with self._starting:
                        if self._orders.empty():
                            self._thread = None
                            return
                elif self._active:
                    engine.step()
                    self._hand_out(engine)
            except Exception as error:  # a bug of the model: all hear of it, and the thread goes on
                self._fail_all(engine, error)

    def _fail_all(self, engine: Engine, error: Exception) -> None:
        failed = list(self._active.values())
        self._active.clear()
        for completion in failed:
            if completion.running is not None:
                with contextlib.suppress(Exception):  # the engine may be as broken as the step
                    engine.forget(completion.running)
            completion.mailbox.put(error)

    def _take_orders(self, engine: Engine) -> bool:
        """Carry out what has been asked for, waiting when there is nothing else to do."""
        while True:
            try:
                order = self._orders.get(block=not self._active)
            except queue.Empty:
                return True
            if order is None:
                for completion in self._active.values():
                    if completion.running is not None:
                        engine.forget(completion.running)
                self._hand_out(engine)
                self._active.clear()
                return False
            order(engine)
            if self._orders.empty() and self._active:
                return True

    def _submit(self, engine: Engine, completion: _Completion) -> None:
        if completion.mailbox.closed.is_set():
            return
        asked = completion.request
        try:
            params = SamplingParams(
                max_tokens=asked.max_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=asked.seed,
                top_logprobs=asked.top_logprobs,
                stop_token_ids=(self._llm.config.eos_token_id, *asked.stop_token_ids),
                **asked.shaping.changes(),
            )
            prompt = list(asked.prompt)
            completion.running = self._go_on(engine, prompt, params, asked.mask) or engine.submit(
                prompt, params, mask=asked.mask
            )
        except Exception as error:  # its caller's alone
            completion.mailbox.put(error)
            return
        self._active[completion.running.id] = completion
        if completion.running.finished:  # no tokens were asked for
            self._hand_out(engine)

    def _go_on(
        self, engine: Engine, prompt: list[int], params: SamplingParams, mask: TokenMask | None
    ) -> Request | None:
        """An interrupted completion that was asked for in the same words, taken up again."""
        room = max(0, self._info.context_tokens - len(prompt))
        params = replace(params, max_tokens=min(params.max_tokens, room))
        for logged in self._interrupted or ():
            seed = params.seed if params.seed is not None else logged.params.seed
            same = logged.params == replace(params, seed=seed) and logged.prompt == prompt
            if same and logged.rules == rules_of(mask):
                assert self._interrupted is not None
                self._interrupted.remove(logged)
                with contextlib.suppress(CacheError):  # another server was quicker
                    return engine.go_on(logged, mask)
        return None

    def _cancel(self, engine: Engine, completion: _Completion) -> None:
        if completion.running is not None:
            engine.forget(completion.running)
            self._active.pop(completion.running.id, None)

    def _hand_out(self, engine: Engine) -> None:
        for completion in list(self._active.values()):
            if completion.mailbox.closed.is_set():
                self._cancel(engine, completion)
            elif completion.hand_out():
                self._cancel(engine, completion)


class _Completion:
    """One request on its way through the engine, and where its tokens go."""

    def __init__(
        self, request: GenerationRequest, tokenizer: Tokenizer, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.request, self.mailbox = request, _Mailbox(loop)
        self.running: Request | None = None
        self._decoder: IncrementalDecoder = tokenizer.incremental_decoder()
        self._shown = 0

    def hand_out(self) -> bool:
        """Send what is new; True when that was the end."""
        running = self.running
        assert running is not None
        if (running.output or running.finished) and not self._shown:
            self.mailbox.put(
                Prefilled(prompt_tokens=len(running.prompt), cached_tokens=running.cached_tokens)
            )
        for drawn in running.output[self._shown :]:
            stops = drawn.token in running.params.stop_token_ids
            text = self._decoder.flush() if stops else self._decoder.push(drawn.token)
            self.mailbox.put(
                TokenOutput(token_id=drawn.token, text=text, logprob=drawn.logprob, top=drawn.top)
            )
        self._shown = len(running.output)
        if not running.finished:
            return False
        if running.error is not None:
            self.mailbox.put(running.error)
        else:
            self.mailbox.put(
                GenerationEnd(
                    finish_reason=running.finish_reason or "stop",
                    prompt_tokens=len(running.prompt),
                    cached_tokens=running.cached_tokens,
                    completion_tokens=len(running.output),
                )
            )
        return True


class _Mailbox:
    """Carries items from a thread to an event loop; waking it once for all that wait there."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.closed = threading.Event()
        self._loop = loop
        self._items: deque[Output | BaseException] = deque()
        self._arrived = asyncio.Event()

    def put(self, item: Output | BaseException) -> None:
        self._items.append(item)
        if self.closed.is_set():
            return
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # the loop was closed: nobody waits any more
            self.closed.set()

    async def take(self) -> list[Output | BaseException]:
        await self._arrived.wait()
        self._arrived.clear()
        items: list[Output | BaseException] = []
        while self._items:
            items.append(self._items.popleft())
        return items
