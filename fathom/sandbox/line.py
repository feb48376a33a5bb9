"""A line to an agent: a socket that carries frames, for one operation at a time.

Opening one costs less than sharing one would: no task that reads for all, nothing to undo when a
caller gives up. Closing it cancels the command that runs on it.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path

import anyio

from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox import frames
from fathom.sandbox.frames import Frame, Received, Tag

_CHUNK = 1 << 18
_RETRY = 0.002


class Refused(SandboxError):
    """The agent did not do what it was asked; `reason` is its own short name for why."""

    code = "sandbox_refused"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Line:
    """One connected socket. Not for two tasks at once, but for sending while another receives.

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

    async def send(self, data: bytes) -> None:
        """Send bytes of whole frames. Raises SandboxLost."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await anyio.wait_writable(self._sock)
            except OSError as error:
                raise SandboxLost(f"the line to the sandbox broke ({error.strerror})") from error

    async def receive(self) -> list[Received]:
        """Return the next frames, at least one; none at the end of the line."""
        if self._early:
            early, self._early = self._early, b""
            if found := self._splitter.feed(early):
                return found
        while True:
            try:
                data = self._sock.recv(_CHUNK)
            except (BlockingIOError, ssl.SSLWantReadError):
                await anyio.wait_readable(self._sock)
                continue
            except OSError:
                return []
            if not data:
                return []
            if found := self._splitter.feed(data):
                return found

    def close(self) -> None:
        """Close the socket. Does nothing the second time."""
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
