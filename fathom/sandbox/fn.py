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
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import anyio

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import fn_command, fn_link, fn_worker, seccomp
from fathom.sandbox.fn_link import Link
from fathom.sandbox.request import check_seconds, form_request, to_bytes
from fathom.sandbox.sandbox import Sandbox
from fathom.sandbox.stateless import Stateless
from fathom.sandbox.types import Caps, Container, ExecResult, Fn

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

    def __init__(self, sandbox: Sandbox, link: Link) -> None:
        self.sandbox = sandbox
        self.ready = link.ready
        self._link = link

    async def ask(self, request: bytes) -> dict[str, Any] | None:
        """Have one call done; None where it ended without an answer. Raises SandboxLost.

        The interpreter must be ready.
        """
        content = await self._link.ask(request)
        if content is None:
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
        await self._link.close()
        await self.sandbox.stop()


class Functions(Stateless):
    """A pool of interpreters. Made by `Client.functions`."""

    def __init__(self, spec: Fn, make: Callable[[Container], Awaitable[Sandbox]]) -> None:
        self._spec = spec
        self._make = make
        self._idle: deque[_Worker] = deque()
        self._count = 0
        self._waiting: deque[anyio.Event] = deque()
        self._closed = False
        self._caps: Caps | None = None

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
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

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
            await self._undo()
            raise errors.exceptions[0] from None
        except BaseException:
            await self._undo()  # the caller gave up, and nobody else could end what has started
            raise

    async def _undo(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.close()

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
            guard = seccomp.compile_call_filter()
            link = await fn_link.connect(sandbox, _program(), guard, timeout=_LIFETIME)
            worker = _Worker(sandbox, link)
            with anyio.move_on_after(_READY_TIMEOUT):
                await worker.ready()
                self._caps = sandbox.caps
                return worker
            raise SandboxError("the interpreter of a function sandbox did not start")
        except BaseException:
            with anyio.CancelScope(shield=True):
                await sandbox.stop()
            raise

    async def _take(self) -> _Worker:
        while True:
            if self._closed:
                raise SandboxLost("these functions were closed")
            if self._idle:
                # The one that waits longest has certainly been cleaned.
                return self._idle.popleft()
            if self._count < self._spec.maximum:
                self._count += 1
                break
            await self._change()
        try:
            return await self._start()
        except BaseException:
            self._forget()
            raise

    async def _change(self) -> None:
        """Wait until an interpreter is free, or there is room for another one."""
        told = anyio.Event()
        self._waiting.append(told)
        try:
            await told.wait()
        except BaseException:
            if told.is_set():
                self._tell()  # somebody else may have what this caller gives up
            else:
                self._waiting.remove(told)
            raise

    def _tell(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()

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
        try:
            with anyio.CancelScope(shield=True):
                await worker.close()
        finally:
            self._forget()

    async def _give_back(self, worker: _Worker) -> None:
        if self._closed:
            await worker.close()
        else:
            self._idle.append(worker)
            self._tell()

    def _forget(self) -> None:
        self._count -= 1
        self._tell()

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

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        timeout: float,
        cwd: str | None = None,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        merge: bool = False,
        cap: int = OUTPUT_CAP,
        spill: int = 0,
        op: str | None = None,
    ) -> ExecResult:
        """Run a command in an interpreter's sandbox, from its start to its end; see `Sandbox.exec`.

        What it wrote and left running is gone with its end. Raises SandboxError, SandboxLost, and
        Unsupported for `spill` and `op`.
        """
        if spill or op is not None:
            raise Unsupported("a pool of interpreters keeps neither output nor receipts")
        request = form_request(command, timeout=timeout, cwd=cwd, env=env)
        data = to_bytes(stdin)
        if cap < 0:
            raise SandboxError(f"cap is {cap}: give the number of bytes to keep")
        argument = fn_command.argument(request, data, merge=merge, cap=cap)
        result = await self.call(fn_command.CODE, argument, timeout=timeout, cap=1000)
        if result.timed_out:
            return ExecResult(
                exit_code=137,
                stdout="",
                stderr="",
                output="",
                timed_out=True,
                duration=result.duration,
            )
        if result.error:
            raise SandboxError(f"the command did not run: {result.error.strip()[-500:]}")
        return fn_command.ended(result.value, result.duration)

    @property
    def caps(self) -> Caps:
        """What each interpreter's sandbox really does, less what a pool cannot offer.

        Raises SandboxLost before `open` and after `close`.
        """
        if self._caps is None:
            raise SandboxLost("there are no interpreters: open the pool")
        return replace(
            self._caps,
            timeout_kills="sandbox",
            networks=frozenset({"none"}),
            snapshot="",
            fork="",
            pause=False,
            pty=False,
        )

    async def stop(self) -> None:
        """End every interpreter, as `close`."""
        await self.close()

    async def close(self) -> None:
        """End every interpreter. Does nothing the second time."""
        self._closed = True
        idle = list(self._idle)
        self._idle.clear()
        while self._waiting:
            self._tell()
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
