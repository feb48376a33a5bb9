"""A line to an agent: a socket that carries frames, for one operation at a time.

Opening one costs less than sharing one would: no task that reads for all, nothing to undo when a
caller gives up. Closing it cancels the command that runs on it.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from fathom.errors import ProcessClosed, SandboxError, SandboxLost
from fathom.sandbox import frames
from fathom.sandbox.frames import Frame, Received, Tag

_CHUNK = 1 << 18
_RETRY = 0.002
_MOST_FILES = 4


class Refused(SandboxError):
    """The agent did not do what it was asked; `reason` is its own short name for why."""

    code = "sandbox_refused"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Line:
    """One connected socket. Any task may send; one at a time may receive, while others send.

    `early`: what of the frames has come already; `along`: a socket that is closed together with it.
    """

    def __init__(
        self, sock: socket.socket, early: bytes = b"", along: socket.socket | None = None
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._along = along
        self._splitter = frames.Splitter()
        self._early = early
        self._out = bytearray()
        self._sending = anyio.Lock(fast_acquire=True)
        self._waiting = 0
        self._closed = False

    async def send(self, data: bytes) -> None:
        """Send bytes of whole frames. Raises SandboxLost, ProcessClosed.

        They are on their way from here on: a caller who gives up leaves no half of a frame behind,
        the next one to send sends the rest first.
        """
        self._check_open()
        self._out += data
        async with self._sending:
            while self._out:
                self._check_open()
                try:
                    del self._out[: self._sock.send(self._out)]
                except (BlockingIOError, ssl.SSLWantWriteError):
                    await self._until(anyio.wait_writable)
                except OSError as error:
                    raise SandboxLost(
                        f"the line to the sandbox broke ({error.strerror})"
                    ) from error

    async def receive(self) -> list[Received]:
        """Return the next frames, at least one; none at the end of the line.

        Raises ProcessClosed when it is closed here meanwhile.
        """
        self._check_open()
        if self._early:
            early, self._early = self._early, b""
            if found := self._splitter.feed(early):
                return found
        while True:
            try:
                data = self._sock.recv(_CHUNK)
            except (BlockingIOError, ssl.SSLWantReadError):
                await self._until(anyio.wait_readable)
                continue
            except OSError:
                return []
            if not data:
                return []
            if found := self._splitter.feed(data):
                return found

    async def _until(self, ready: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Wait for the socket. Raises ProcessClosed when it is closed here meanwhile."""
        self._waiting += 1
        try:
            await ready(self._sock)
        finally:
            self._waiting -= 1
            if self._closed and not self._waiting:
                self._let_go()
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise ProcessClosed("this command was closed, by this task or another one")

    def close(self) -> None:
        """End the line; whoever waits for it gets ProcessClosed. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        if not self._waiting:
            return self._let_go()
        # Closed under its waiters, the event loop would go on to wait for the descriptor's number,
        # and take the next socket for this one. Shut down, it wakes them; the last one closes.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        return None

    @property
    def passes_files(self) -> bool:
        """Whether open files can be passed along: it is a socket of this machine."""
        return self._sock.family == socket.AF_UNIX and not isinstance(self._sock, ssl.SSLSocket)

    async def receive_started(self, number: int) -> None:
        """Read up to the frame that says that `number` runs, and not a byte further.

        Raises Refused, SandboxLost, ProcessClosed.
        """
        missing = frames.HEADER_SIZE
        while True:
            piece = await self.receive_some(missing)
            if not piece:
                raise SandboxLost("the line to the sandbox ended")
            for frame in self._splitter.feed(piece):
                if frame.kind == Frame.ERROR:
                    raise refusal(frame)
                if frame.kind == Frame.STARTED and frame.number == number:
                    return
            missing = self._splitter.missing

    async def receive_some(self, size: int) -> bytes:
        """Return up to `size` bytes that are no frames; none at the end.

        Raises ProcessClosed when it is closed here meanwhile.
        """
        while True:
            self._check_open()
            try:
                return self._sock.recv(size)
            except BlockingIOError:
                await self._until(anyio.wait_readable)
            except OSError:
                return b""

    async def receive_files(self, size: int) -> tuple[bytes, list[int]]:
        """Do the same with the open files that came along, which are the caller's to close.

        Raises ProcessClosed.
        """
        while True:
            self._check_open()
            try:
                flags = socket.MSG_CMSG_CLOEXEC
                data, files, *_ = socket.recv_fds(self._sock, size, _MOST_FILES, flags)
            except BlockingIOError:
                await self._until(anyio.wait_readable)
            except OSError:
                return b"", []
            else:
                return data, files

    def _let_go(self) -> None:
        self._sock.close()
        if self._along is not None:
            self._along.close()


async def dial(folder: Path, name: str) -> Line:
    """Open a line to the Unix socket `name` in `folder`. Raises SandboxLost."""
    return Line(await connect(folder, name))


async def connect(folder: Path, name: str) -> socket.socket:
    """Connect to the Unix socket `name` in `folder`, without blocking. Raises SandboxLost."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        path = str(folder / name)
        fd = -1
        try:
            if len(os.fsencode(path)) > 100:
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                path = f"/proc/self/fd/{fd}/{name}"
            while True:
                try:
                    sock.connect(path)
                    return sock
                except BlockingIOError:
                    # More lines are waiting than the agent's queue holds.
                    await anyio.sleep(_RETRY)
        finally:
            if fd >= 0:
                os.close(fd)
    except OSError as error:
        sock.close()
        raise SandboxLost(f"nothing answers for it ({error.strerror})") from error
    except BaseException:
        sock.close()
        raise


def refusal(frame: Received) -> Refused:
    """Turn an ERROR frame into the exception to raise."""
    fields = frame.fields()
    said = frames.text_of(fields.get(Tag.MESSAGE)) or "it gave no reason"
    return Refused(said, frames.text_of(fields.get(Tag.CODE)))


async def answer(line: Line, number: int) -> Received:
    """Wait for the answer to `number`. Raises Refused, SandboxLost."""
    while found := await line.receive():
        for frame in found:
            if frame.kind == Frame.ERROR:
                raise refusal(frame)
            if frame.number == number and frame.kind == Frame.OK:
                return frame
    raise SandboxLost("the line to the sandbox ended")
