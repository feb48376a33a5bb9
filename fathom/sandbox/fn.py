"""Function calls: interpreters that wait in containers, one call at a time in each, no state kept.

    async with await client.functions(Fn(workers=2)) as functions:
        result = await functions.call("def main(x): return x + 1", 41, timeout=1)

A call that takes too long, or leaves what cannot be cleaned, costs its container; the pool starts
another one when a call needs it. Calls beyond the workers wait, or have one more started up to
`Fn.maximum`.

An answer is believed because of where it comes from: a call holds no end of the line to the host,
only a pipe to the interpreter, which frames one answer with the nonce of the request. That nonce is
new for each request and never reaches a call. A line with anything else on it costs the container.

Paper: §5.2.5 (function calls in pre-created containers).
"""

from __future__ import annotations

import functools
import json
import math
import secrets
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import anyio

from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox import fn_worker, seccomp
from fathom.sandbox.process import Process
from fathom.sandbox.request import check_seconds
from fathom.sandbox.sandbox import Sandbox
from fathom.sandbox.types import Container, Fn

_REQUEST = struct.Struct(f"<{fn_worker.NONCE}sI")
_ANSWER = struct.Struct(f"<{fn_worker.NONCE}sBI")
_LIFETIME = 1e8
_READY_TIMEOUT = 30.0
# For removing what a call left; one that takes longer is not waited for by the next caller.
_CLEAN_TIMEOUT = 5.0
OUTPUT_CAP = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FnResult:
    """How a call ended: a `value`, or an `error` (its traceback), or `timed_out`."""

    value: Any = None
    error: str = ""
    output: str = ""
    truncated: bool = False
    timed_out: bool = False
    duration: float = 0.0


class _Worker:
    """One interpreter in a container of its own."""

    def __init__(self, sandbox: Sandbox, process: Process) -> None:
        self.sandbox = sandbox
        self._process = process
        self._held = bytearray()
        self._nonce = bytes(fn_worker.NONCE)
        self._ready = False

    async def _hear(self, *kinds: int) -> tuple[int, bytes]:
        """Return the kind and content of the interpreter's next message. Raises SandboxLost."""
        while len(self._held) < _ANSWER.size:
            await self._more()
        nonce, kind, size = _ANSWER.unpack_from(self._held)
        if nonce != self._nonce or kind not in kinds or size > fn_worker.ANSWER_LIMIT:
            raise SandboxLost("a function sandbox is not in step")
        while len(self._held) < _ANSWER.size + size:
            await self._more()
        content = bytes(self._held[_ANSWER.size : _ANSWER.size + size])
        del self._held[: _ANSWER.size + size]
        return kind, content

    async def _more(self) -> None:
        piece = await self._process.read()
        if piece is None:
            raise SandboxLost("a function sandbox ended")
        if piece[0] == "stdout":
            self._held += piece[1]

    async def ready(self) -> None:
        """Wait until the process of the next call is there. Raises SandboxLost."""
        if not self._ready:
            await self._hear(fn_worker.READY)
            if self._held:
                raise SandboxLost("a function sandbox said something that nobody asked for")
            self._ready = True

    async def ask(self, request: bytes) -> dict[str, Any] | None:
        """Have one call done; None where it ended without an answer. Raises SandboxLost.

        The interpreter must be ready.
        """
        self._ready = False
        self._nonce = secrets.token_bytes(fn_worker.NONCE)
        await self._process.write(_REQUEST.pack(self._nonce, len(request)) + request)
        kind, content = await self._hear(fn_worker.ANSWERED, fn_worker.ENDED)
        if kind == fn_worker.ENDED:
            return None
        try:
            answer: object = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise SandboxLost("a function call answered with something that is no JSON") from error
        if not isinstance(answer, dict):
            raise SandboxLost("a function call answered with something that is no answer")
        return cast("dict[str, Any]", answer)

    async def close(self) -> None:
        """End the container."""
        await self._process.close()
        await self.sandbox.stop()


class Functions:
    """A pool of interpreters. Made by `Client.functions`."""

    def __init__(self, spec: Fn, make: Callable[[Container], Awaitable[Sandbox]]) -> None:
        self._spec = spec
        self._make = make
        self._idle: list[_Worker] = []
        self._count = 0
        self._changed = anyio.Condition()
        self._closed = False

    async def __aenter__(self) -> Functions:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def idle(self) -> int:
        """How many interpreters wait for a call."""
        return len(self._idle)

    @property
    def size(self) -> int:
        """How many interpreters there are."""
        return self._count

    async def open(self) -> None:
        """Start the interpreters. Raises SandboxError, Unsupported."""
        try:
            async with anyio.create_task_group() as group:
                for _ in range(self._spec.workers):
                    group.start_soon(self._add)
        except BaseExceptionGroup as errors:
            with anyio.CancelScope(shield=True):
                await self.close()
            raise errors.exceptions[0] from None

    async def _add(self) -> None:
        self._count += 1
        try:
            worker = await self._start()
        except BaseException:
            self._count -= 1
            raise
        await self._give_back(worker)

    async def _start(self) -> _Worker:
        spec = self._spec
        sandbox = await self._make(
            Container(image="python", memory=spec.memory, pids=spec.pids, cpu=spec.cpu)
        )
        try:
            argv = ["python3", "-I", "-c", _program(), seccomp.compile_call_filter().hex()]
            worker = _Worker(sandbox, await sandbox.run(argv, timeout=_LIFETIME, cwd="/"))
            with anyio.move_on_after(_READY_TIMEOUT):
                await worker.ready()
                return worker
            raise SandboxError("the interpreter of a function sandbox did not start")
        except BaseException:
            with anyio.CancelScope(shield=True):
                await sandbox.stop()
            raise

    async def _take(self) -> _Worker:
        async with self._changed:
            while True:
                if self._closed:
                    raise SandboxLost("these functions were closed")
                if self._idle:
                    # The one that waits longest has certainly been cleaned.
                    return self._idle.pop(0)
                if self._count < self._spec.maximum:
                    self._count += 1
                    break
                await self._changed.wait()
        try:
            return await self._start()
        except BaseException:
            await self._forget()
            raise

    async def _take_ready(self) -> _Worker:
        """Take an interpreter whose next process is there; one that does not come back is ended."""
        while True:
            worker = await self._take()
            try:
                with anyio.move_on_after(_CLEAN_TIMEOUT):
                    await worker.ready()
                    return worker
            except SandboxLost:
                pass
            except BaseException:
                await self._end(worker)
                raise
            # No request was sent to it, so nobody loses a call with it.
            await self._end(worker)

    async def _end(self, worker: _Worker) -> None:
        with anyio.CancelScope(shield=True):
            await worker.close()
        await self._forget()

    async def _give_back(self, worker: _Worker) -> None:
        async with self._changed:
            if not self._closed:
                self._idle.append(worker)
                self._changed.notify()
                return
        await worker.close()

    async def _forget(self) -> None:
        with anyio.CancelScope(shield=True):
            async with self._changed:
                self._count -= 1
                self._changed.notify()

    async def call(
        self,
        code: str,
        argument: Any = None,
        *,
        timeout: float,
        function: str = "main",
        cap: int = OUTPUT_CAP,
    ) -> FnResult:
        """Run `code`, call its `function` with `argument`, and return what it returns.

        Argument and value are what JSON can say. `timeout` in seconds does not count the wait for
        an interpreter. `cap`: bytes kept of what the call prints.
        Raises SandboxError for what is no JSON, SandboxLost when the interpreter ended.
        """
        check_seconds(timeout)
        values = {"code": code, "argument": argument, "function": function, "cap": cap}
        try:
            request = json.dumps(values).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise SandboxError(f"the argument cannot be sent as JSON: {error}") from error
        if len(request) > fn_worker.REQUEST_LIMIT:
            raise SandboxError(f"the call has {len(request)} bytes: {fn_worker.REQUEST_LIMIT} go")
        worker = await self._take_ready()
        began = time.perf_counter()
        whole = False
        try:
            with anyio.move_on_after(timeout):
                answer = await worker.ask(request)
                whole = True
                return _result(answer, time.perf_counter() - began, cap)
            return FnResult(timed_out=True, duration=time.perf_counter() - began)
        finally:
            if whole:
                await self._give_back(worker)
            else:
                await self._end(worker)

    async def close(self) -> None:
        """End every interpreter. Does nothing the second time."""
        async with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        async with anyio.create_task_group() as group:
            for worker in idle:
                group.start_soon(worker.close)


@functools.cache
def _program() -> str:
    """Return the text of the interpreter's program."""
    return Path(fn_worker.__file__).read_text()


def _result(answer: dict[str, Any] | None, seconds: float, cap: int) -> FnResult:
    if answer is None:
        error = "the process of the call ended without an answer"
        return FnResult(error=error, duration=seconds)
    output, error = answer.get("output", ""), answer.get("error", "")
    output = output if isinstance(output, str) else ""
    return FnResult(
        value=answer.get("value"),
        error=error if isinstance(error, str) else "",
        output=output[:cap],
        truncated=bool(answer.get("truncated")) or len(output) > cap,
        duration=seconds,
    )


def check(spec: Fn) -> None:
    """Refuse values that no pool could have. Raises SandboxError."""
    if not 1 <= spec.workers <= spec.maximum or not math.isfinite(spec.maximum):
        raise SandboxError(
            f"workers is {spec.workers}, maximum is {spec.maximum}: give at least 1, and a maximum "
            "that is not below"
        )
