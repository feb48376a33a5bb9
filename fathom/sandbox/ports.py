"""A port of this machine that leads to a port inside a sandbox.

Every connection is carried by a process of the sandbox, made by its agent with the tenant's rights,
which connects to the sandbox's own loopback: it works for every type of sandbox and under every
network policy, and reaches nothing that the tenant could not reach.

Paper: §5.2.5 (the common surface; HTTP requests to what runs in a sandbox).
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from types import TracebackType

import anyio
from anyio.abc import TaskGroup

from fathom.errors import SandboxError
from fathom.sandbox import frames
from fathom.sandbox.frames import Flags, Frame, Tag
from fathom.sandbox.line import Line
from fathom.sandbox.process import NAMES, NUMBER, Order
from fathom.sandbox.request import Request, check_seconds

MOST_CONNECTIONS = 128
_HOST = "127.0.0.1"


def order(port: int, timeout: float) -> Order:
    """Return what the agent is told to carry one connection. Raises SandboxError."""
    check_seconds(timeout)
    if not 0 < port < 1 << 16:
        raise SandboxError(f"port is {port}: give a number from 1 to 65535")
    request = Request(
        argv=(str(port),), shell=False, timeout=timeout, cwd="/", env={}, builtin="connect"
    )
    return Order(request=request, cap=1 << 62, flags=Flags.STDIN)


class Forward:
    """Made by `Sandbox.forward`. `async with` gives the address on this machine, a host and a port.

    Other users of this machine can connect to it as well.
    """

    def __init__(self, dial: Callable[[], Awaitable[Line]], wanted: Order, listen: int) -> None:
        self._dial = dial
        self._wanted = wanted
        self._listen = listen
        self._listener: socket.socket | None = None
        self._group: TaskGroup | None = None
        self._slots = anyio.Semaphore(MOST_CONNECTIONS)

    async def __aenter__(self) -> tuple[str, int]:
        try:
            listener = socket.create_server((_HOST, self._listen), backlog=MOST_CONNECTIONS)
        except (OSError, OverflowError) as error:
            raise SandboxError(f"port {self._listen} cannot be listened on: {error}") from error
        listener.setblocking(False)
        self._listener = listener
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._accept, listener, self._group)
        return _HOST, listener.getsockname()[1]

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._listener is not None
        assert self._group is not None
        self._group.cancel_scope.cancel()
        try:
            # What went wrong for the caller is not the group's: it goes on as it is.
            await self._group.__aexit__(None, None, None)
        finally:
            self._listener.close()

    async def _accept(self, listener: socket.socket, group: TaskGroup) -> None:
        while True:
            # Whoever comes beyond the bound waits in the kernel's queue.
            await self._slots.acquire()
            while True:
                await anyio.wait_readable(listener)
                try:
                    near, _ = listener.accept()
                    break
                except BlockingIOError:
                    continue
                except OSError:  # too many open files, say: later there may be fewer
                    await anyio.sleep(0.05)
            group.start_soon(self._serve, near)

    async def _serve(self, near: socket.socket) -> None:
        near.setblocking(False)
        line: Line | None = None
        try:
            line = await self._dial()
            await line.send(self._wanted.frame())
            await _Carrier(near, line).run()
        except* (SandboxError, OSError):
            pass  # one side is gone; the other sees its connection end
        finally:
            near.close()
            if line is not None:
                line.close()
            self._slots.release()


class _Carrier:
    """Carries one connection both ways, as fast as either side takes it: it keeps nothing."""

    def __init__(self, near: socket.socket, line: Line) -> None:
        self._near = near
        self._line = line
        self._room = frames.WINDOW
        self._granted = anyio.Event()

    async def run(self) -> None:
        """Carry until the sandbox's side has ended. Raises SandboxLost, OSError."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._send)
            await self._receive()
            group.cancel_scope.cancel()

    async def _send(self) -> None:
        sent = 0
        while True:
            try:
                data = self._near.recv(frames.PIECE)
            except BlockingIOError:
                await anyio.wait_readable(self._near)
                continue
            except OSError:
                data = b""
            if not data:
                await self._line.send(frames.pack(NUMBER, Frame.EOF))
                return
            while sent + len(data) > self._room:
                self._granted = anyio.Event()
                await self._granted.wait()
            await self._line.send(frames.pack(NUMBER, Frame.STDIN, data))
            sent += len(data)

    async def _receive(self) -> None:
        while found := await self._line.receive():
            for frame in found:
                if frame.kind in NAMES:
                    view = memoryview(frame.payload)
                    while view:
                        try:
                            view = view[self._near.send(view) :]
                        except BlockingIOError:
                            await anyio.wait_writable(self._near)
                elif frame.kind == Frame.CREDIT:
                    taken = frames.number_of(frame.fields().get(Tag.CAP))
                    self._room = taken + frames.WINDOW
                    self._granted.set()
                elif frame.kind in (Frame.EXIT, Frame.ERROR):
                    return
