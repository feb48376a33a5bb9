"""Server-sent events: an HTTP response that is written while the reply is generated.

One `EventStream` serves one request. The connection is watched all the time: a client that leaves
ends the generation at once, one that does not read is cut off after a while, and one that waits
gets a sign of life. Headers go out with the first bytes, so that trouble before the first token is
still an HTTP error.

Paper: none (API conventions).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fathom.server.problems import Problem, as_problem

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or proxies collect the events
]
_LAST_WORD = 2.0  # seconds for the event that tells of a failure


class EventStream(Response):
    """Writes what `source` yields.

    keep_alive: bytes that mean nothing, sent every `interval` seconds of silence. fail: makes the
    last event from an exception after the first byte; before it the exception goes on, to become
    an HTTP error. patience: seconds that a write may take.
    """

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        *,
        keep_alive: bytes,
        interval: float,
        patience: float,
        fail: Callable[[Exception], bytes],
        headers: dict[str, str],
        on_first: Callable[[], None],
        on_end: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._source = source
        self._keep_alive = keep_alive
        self._interval = interval
        self._patience = patience
        self._fail = fail
        self._extra = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        self._on_first = on_first
        self._on_end = on_end
        self._started = False
        self._direct: Send | None = None
        self._last = 0.0  # when something was written
        self._writing: float | None = None  # since when a write is under way
        self._stopped = False  # by the end of the server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        self._last = asyncio.get_running_loop().time()
        # Every layer of middleware would cost as much per token as making the event does.
        self._direct = scope.get("state", {}).get("send", send)
        error: Exception | None = None
        outcome = "left"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, receive, tasks.cancel_scope)
            tasks.start_soon(self._tick, send, scope, tasks.cancel_scope)
            tasks.start_soon(self._end_with_server, scope, tasks.cancel_scope)
            try:
                await self._write_all(send)
                outcome = "done"
            except Exception as caught:
                error, outcome = caught, "failed"
            finally:
                with anyio.CancelScope(shield=True):
                    await self._source.aclose()
            tasks.cancel_scope.cancel()
        if self._stopped and outcome == "left":
            error, outcome = stopping_problem(), "stopped"
        self._on_end(outcome)
        if error is not None:
            await self._report(error, send)

    async def _write_all(self, send: Send) -> None:
        loop, direct = asyncio.get_running_loop(), self._direct or send
        first = True
        async for data in self._source:
            if first:
                first = False
                self._on_first()
                if not self._started:
                    await self._start(send)
            self._writing = self._last = loop.time()
            await direct({"type": "http.response.body", "body": data, "more_body": True})
            self._writing = None
        if not self._started:
            await self._start(send)
        await send({"type": "http.response.body", "body": b""})

    async def _start(self, send: Send) -> None:
        self._started = True
        await send(
            {"type": "http.response.start", "status": 200, "headers": _HEADERS + self._extra}
        )

    async def _report(self, error: Exception, send: Send) -> None:
        if not self._started:
            raise as_problem(error) from error
        body = self._fail(error)
        with anyio.move_on_after(_LAST_WORD):  # for a client that does not read
            await send({"type": "http.response.body", "body": body})

    async def _watch(self, receive: Receive, scope: anyio.CancelScope) -> None:
        message: Message = {}
        while message.get("type") != "http.disconnect":
            message = await receive()
        scope.cancel()

    async def _end_with_server(self, scope: Scope, cancel: anyio.CancelScope) -> None:
        await _stopping(scope)
        self._stopped = True
        cancel.cancel()

    async def _tick(self, send: Send, scope: Scope, cancel: anyio.CancelScope) -> None:
        loop = asyncio.get_running_loop()
        step = min(self._interval, self._patience) / 2
        while True:
            await anyio.sleep(step)
            now = loop.time()
            if self._writing is not None:
                if now - self._writing > self._patience:
                    abort = scope.get("state", {}).get("abort")
                    if abort is not None:
                        abort()  # closing would wait for the bytes that nobody reads
                    cancel.cancel()
                    return
            elif now - self._last >= self._interval:
                if not self._started:
                    await self._start(send)
                self._last = now
                await send(
                    {"type": "http.response.body", "body": self._keep_alive, "more_body": True}
                )


async def until_disconnect(request: Request, work: Callable[[], Awaitable[Any]]) -> Any:
    """Await `work()`, cancelling it when the client leaves; the request body must be read.

    Returns None for a client that left. Raises Problem when the server ends first.
    """
    result: Any = None
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        async def end_with_server() -> None:
            nonlocal failure
            await _stopping(request.scope)
            failure = stopping_problem()
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        tasks.start_soon(end_with_server)
        try:
            result = await work()
        except Exception as error:  # out of the group, which would wrap it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result


async def _stopping(scope: Scope) -> None:
    """Returns when the server begins to end."""
    stopping = scope.get("state", {}).get("stopping")
    await (stopping.wait() if stopping is not None else anyio.sleep_forever())


def stopping_problem() -> Problem:
    """What is told to a client whose reply the end of the server cuts off."""
    return Problem(503, "the server is shutting down", code="shutting_down")
