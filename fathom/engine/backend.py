"""A loaded model as the engine of a server: one completion at a time, in a worker thread.

Paper: none (inference interface).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from fathom.chat.generation import (
    BackendInfo,
    GenerationEnd,
    GenerationRequest,
    Output,
    Prefilled,
    TokenOutput,
)
from fathom.chat.tokenizer import Tokenizer
from fathom.errors import BackendError, FathomError

if TYPE_CHECKING:
    from fathom.engine.llm import LLM


class LocalBackend:
    """Generates with an `LLM`. Completions wait for each other: the model has one cache at a time.

    Closing a generator stops its completion at the next token.
    """

    def __init__(self, llm: LLM, *, name: str | None = None) -> None:
        self._llm = llm
        self._info = BackendInfo(
            name=name or llm.name, context_tokens=llm.config.max_position_embeddings
        )
        self._tokenizer = llm.tokenizer
        self._turn = threading.Lock()  # an LLM is not safe for threads

    @property
    def info(self) -> BackendInfo:
        """Name, context and abilities."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Output, None]:
        """Generate in a worker thread. Raises GenerationError, and BackendError for a bug."""
        loop = asyncio.get_running_loop()
        mailbox = _Mailbox(loop)
        worker = threading.Thread(
            target=self._work, args=(request, mailbox), name="fathom-generate", daemon=True
        )
        worker.start()
        try:
            while True:
                for item in await mailbox.take():
                    if isinstance(item, FathomError):
                        raise item
                    if isinstance(item, BaseException):
                        raise BackendError(f"the model failed: {item!r}") from item
                    yield item
                    if isinstance(item, GenerationEnd):
                        return
        finally:
            mailbox.closed.set()

    async def aclose(self) -> None:
        """Nothing to release: worker threads end with their completion."""

    def _work(self, request: GenerationRequest, mailbox: _Mailbox) -> None:
        try:
            # Waiting in slices, so that a completion whose client left never gets its turn.
            while not self._turn.acquire(timeout=0.05):
                if mailbox.closed.is_set():
                    return
            try:
                self._generate(request, mailbox)
            finally:
                self._turn.release()
        except BaseException as error:
            mailbox.put(error)

    def _generate(self, request: GenerationRequest, mailbox: _Mailbox) -> None:
        if mailbox.closed.is_set():
            return
        run = self._llm.stream(
            list(request.prompt),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
            top_k=request.top_k,
            top_logprobs=request.top_logprobs,
            mask=request.mask,
        )
        count = 0
        for piece in run:
            if not count:
                mailbox.put(
                    Prefilled(prompt_tokens=run.prompt_tokens, cached_tokens=run.cached_tokens)
                )
            count += 1
            mailbox.put(
                TokenOutput(
                    token_id=piece.token_id,
                    text=piece.text,
                    logprob=piece.logprob,
                    top=piece.top_logprobs,
                )
            )
            if mailbox.closed.is_set():
                return
        mailbox.put(
            GenerationEnd(
                finish_reason=run.finish_reason,
                prompt_tokens=run.prompt_tokens,
                cached_tokens=run.cached_tokens,
                completion_tokens=count,
            )
        )


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
