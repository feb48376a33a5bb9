"""The host's end of an interpreter of a function sandbox.

An answer is believed because of where it comes from. `Direct`: each call has a socket of its own,
which the interpreter sends before the call's code is known; a call holds the other end of that one
and of no other. `Relayed`, where no open file can be sent (a daemon on another machine): a call has
a line to the interpreter alone, which frames one answer with the nonce of the request. That nonce
is new for each request and never reaches a call. Anything else on the line ends the container.

Paper: §5.2.5 (function calls in pre-created containers).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import struct
from abc import ABC, abstractmethod

from fathom.errors import SandboxLost
from fathom.sandbox import fn_worker
from fathom.sandbox.line import Line
from fathom.sandbox.process import Process
from fathom.sandbox.sandbox import Sandbox

_REQUEST = struct.Struct(f"<{fn_worker.NONCE}sI")
_ANSWER = struct.Struct(f"<{fn_worker.NONCE}sBI")
_PIECE = 1 << 18


class Link(ABC):
    """One interpreter, with its process of the next call."""

    @abstractmethod
    async def ready(self) -> None:
        """Wait until the process of the next call is there. Raises SandboxLost."""

    @abstractmethod
    async def ask(self, request: bytes) -> bytes | None:
        """Have one call done; None where it ended without an answer. Raises SandboxLost.

        The interpreter must be ready.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of the interpreter."""


async def connect(sandbox: Sandbox, program: str, filter_: bytes, *, timeout: float) -> Link:
    """Start the interpreter of a function sandbox. Raises SandboxError, SandboxLost."""
    argv = ["python3", "-I", "-c", program]
    line = await sandbox.hand_line([*argv, "direct", filter_.hex()], timeout=timeout, cwd="/")
    if line is not None:
        return Direct(line)
    command = [*argv, "relay", filter_.hex()]
    return Relayed(await sandbox.run(command, timeout=timeout, cwd="/"))


class Direct(Link):
    """Asks the process of each call itself, on the socket that came for it."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._call: Line | None = None

    async def ready(self) -> None:
        """Wait until the process of the next call is there. Raises SandboxLost."""
        if self._call is not None:
            return
        try:
            data, files = await self._line.receive_files(len(fn_worker.NEXT) + 1)
        except OSError as error:
            raise SandboxLost(f"a function sandbox ended ({error.strerror})") from error
        if not data:
            raise SandboxLost("a function sandbox ended")
        call = _take(data, files)
        try:
            said = await _exactly(call, len(fn_worker.WARM))
        except BaseException:
            call.close()
            raise
        if said != fn_worker.WARM:
            call.close()
            raise SandboxLost("the process of the next call did not start")
        self._call = call

    async def ask(self, request: bytes) -> bytes | None:
        """Have one call done; None where it ended without an answer. Raises SandboxLost."""
        call, self._call = self._call, None
        assert call is not None
        try:
            answer = await _ask(call, request)
        finally:
            call.close()
        with contextlib.suppress(SandboxLost):
            # The interpreter ends the call where it has not ended by itself.
            await self._line.send(fn_worker.DONE)
        return answer

    async def close(self) -> None:
        """Let go of the interpreter."""
        self._line.close()
        if self._call is not None:
            self._call.close()
            self._call = None


def _take(data: bytes, files: list[int]) -> Line:
    """Take a call's socket as it came. Raises SandboxLost where it is anything else."""
    try:
        # A file of another kind could block whoever reads it.
        one = data == fn_worker.NEXT and len(files) == 1
        if not one or not stat.S_ISSOCK(os.fstat(files[0]).st_mode):
            raise SandboxLost("a function sandbox is not in step")
        sock = socket.socket(fileno=files.pop())
    finally:
        for file in files:
            os.close(file)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise SandboxLost("a function sandbox is not in step")
    return Line(sock)


async def _ask(call: Line, request: bytes) -> bytes | None:
    try:
        await call.send(fn_worker.SIZE.pack(len(request)) + request)
    except SandboxLost:
        return None
    held = bytearray()
    size = -1
    while size < 0 or len(held) < size:
        piece = await call.receive_some(_PIECE if size < 0 else min(_PIECE, size - len(held)))
        if not piece:
            return None
        held += piece
        if size < 0 and len(held) >= fn_worker.SIZE.size:
            (size,) = fn_worker.SIZE.unpack_from(held)
            del held[: fn_worker.SIZE.size]
            if size > fn_worker.ANSWER_LIMIT:
                raise SandboxLost(f"a function call announced an answer of {size} bytes")
    # More than it announced is dropped: nobody else hears this socket.
    return bytes(held[:size])


async def _exactly(line: Line, size: int) -> bytes:
    """Return so many bytes, fewer at the end of a line."""
    found = b""
    while len(found) < size and (piece := await line.receive_some(size - len(found))):
        found += piece
    return found


class Relayed(Link):
    """Asks the interpreter, which carries request and answer."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._held = bytearray()
        self._nonce = bytes(fn_worker.NONCE)
        self._ready = False

    async def ready(self) -> None:
        """Wait until the process of the next call is there. Raises SandboxLost."""
        if not self._ready:
            await self._hear(fn_worker.READY)
            if self._held:
                raise SandboxLost("a function sandbox said something that nobody asked for")
            self._ready = True

    async def ask(self, request: bytes) -> bytes | None:
        """Have one call done; None where it ended without an answer. Raises SandboxLost."""
        self._ready = False
        self._nonce = secrets.token_bytes(fn_worker.NONCE)
        await self._process.write(_REQUEST.pack(self._nonce, len(request)) + request)
        kind, content = await self._hear(fn_worker.ANSWERED, fn_worker.ENDED)
        return None if kind == fn_worker.ENDED else content

    async def close(self) -> None:
        """Let go of the interpreter."""
        await self._process.close()

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
