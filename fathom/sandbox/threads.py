"""Threads that never keep a program from ending: blocking calls, and the loop of the sync surface.

The interpreter waits for ordinary threads before it runs exit handlers. A program that forgot to
close its client would wait forever, so both kinds here are daemon threads; what they leave undone,
the nodes do when they see the process end.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import partial
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.lowlevel
from anyio.from_thread import BlockingPortal

from fathom.errors import SandboxError, SandboxLost

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking call in a thread of its own and wait for its end, cancelled or not."""
    results: list[T] = []
    errors: list[BaseException] = []
    read_end, write_end = os.pipe()

    def work() -> None:
        try:
            results.append(function(*args, **kwargs))
        except BaseException as error:
            errors.append(error)
        finally:
            os.close(write_end)

    try:
        threading.Thread(target=work, name="fathom-sandbox-call", daemon=True).start()
        with anyio.CancelScope(shield=True):
            await anyio.wait_readable(read_end)
    finally:
        os.close(read_end)
    if errors:
        raise errors[0]
    return results[0]


async def whole(
    work: Callable[[], Coroutine[Any, Any, T]], undo: Callable[[T], Coroutine[Any, Any, None]]
) -> T:
    """Await `work` to its end; where this task was cancelled meanwhile, `undo` what came of it.

    What a caller gave up must be nobody's: no one else could ever reach it.
    """
    result = await _shielded(work, undo)
    try:
        await anyio.lowlevel.checkpoint_if_cancelled()
    except BaseException:
        with anyio.CancelScope(shield=True):
            await undo(result)
        raise
    return result


async def _shielded(
    work: Callable[[], Coroutine[Any, Any, T]], undo: Callable[[T], Coroutine[Any, Any, None]]
) -> T:
    results: list[T] = []
    with anyio.CancelScope(shield=True):
        results.append(await (_kept_going(work, undo) if _in_asyncio() else work()))
    return results[0]


def _in_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _kept_going(
    work: Callable[[], Coroutine[Any, Any, T]], undo: Callable[[T], Coroutine[Any, Any, None]]
) -> T:
    # A scope's shield holds against scopes alone, not against asyncio's own way to cancel a task.
    task = asyncio.ensure_future(work())
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled() and task.exception() is None:
        await undo(task.result())
    raise cancelled


class Portal:
    """An event loop on a thread of its own, started at the first call."""

    def __init__(self) -> None:
        self._portal: BlockingPortal | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self.closed = False

    @property
    def is_open(self) -> bool:
        """Whether calls can be made."""
        return not self.closed and os.getpid() == self._owner

    def call(self, method: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any) -> T:
        """Run one asynchronous call to its end; whoever is interrupted (Ctrl-C) gives it up.

        Raises SandboxLost after `close`, SandboxError in a fork of the process that made this.
        """
        future = self._usable().start_task_soon(partial(method, *args, **kwargs))
        try:
            return future.result()
        except BaseException:
            # Does nothing to one that has ended, in whatever way.
            future.cancel()
            raise

    def _usable(self) -> BlockingPortal:
        if os.getpid() != self._owner:
            raise SandboxError("this client was made before a fork: make another one")
        with self._lock:
            if self.closed:
                raise SandboxLost("this client was closed: make another one")
            return self._portal or self._start()

    def manage(self, manager: AbstractAsyncContextManager[T, Any]) -> AbstractContextManager[T]:
        """Return the same manager without `await`, entered and left on the event loop.

        Raises SandboxLost after `close`, SandboxError in a fork of the process that made this.
        """
        return self._usable().wrap_async_context_manager(manager)

    def close(self) -> None:
        """End the thread. Does nothing the second time, nor in a fork."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self.closed = True
            portal, thread = self._portal, self._thread
            self._portal = self._thread = None
        if portal is not None and thread is not None:
            portal.call(portal.stop)
            thread.join()

    def _start(self) -> BlockingPortal:
        ready = threading.Event()

        async def run() -> None:
            async with BlockingPortal() as portal:
                self._portal = portal
                ready.set()
                await portal.sleep_until_stopped()

        self._thread = threading.Thread(
            target=anyio.run, args=(run,), name="fathom-sandbox-loop", daemon=True
        )
        self._thread.start()
        ready.wait()
        assert self._portal is not None
        return self._portal
