"""The API process's end of the line to its parent: questions, answers, and sockets of agents.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable
from typing import Any

from fathom.errors import SandboxError, SandboxTimeout
from fathom.sandbox.edge import MESSAGE_LIMIT

_PACKET = 1 << 18
_FILES = 4
_PATIENCE = 600.0
_RETRY = 0.02


class Upcall:
    """Asks the parent. `gone` is called with the name of each sandbox that ended."""

    def __init__(self, sock: socket.socket, gone: Callable[[str], None]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._sock = sock
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], int]]] = {}
        self._sending = asyncio.Lock()
        self._last = 0
        self.ended = asyncio.Event()
        self._loop.add_reader(sock.fileno(), self._hear)

    async def ask(self, op: str, values: dict[str, Any]) -> dict[str, Any]:
        """Have the parent do something; its answer may be an error. Raises SandboxError."""
        answer, fd = await self._ask(op, values)
        if fd >= 0:
            os.close(fd)
        return answer

    async def open(self, name: str) -> tuple[dict[str, Any], socket.socket | None]:
        """Get a line to an agent, past its HELLO; without one the answer is an error."""
        deadline = self._loop.time() + _PATIENCE
        while True:
            answer, fd = await self._ask("open", {"id": name})
            if fd >= 0:
                return answer, socket.socket(fileno=fd)
            if not answer.get("again"):
                return answer, None
            # A sandbox stands still while it is copied, and only so many may wait for it.
            if self._loop.time() > deadline:
                text = f"sandbox {name} did not answer within {_PATIENCE:g} s"
                return {"error": SandboxTimeout.code, "message": text}, None
            await asyncio.sleep(_RETRY)

    async def _ask(self, op: str, values: dict[str, Any]) -> tuple[dict[str, Any], int]:
        self._last += 1
        number = self._last
        data = json.dumps({**values, "n": number, "op": op}).encode()
        if len(data) > MESSAGE_LIMIT:
            raise SandboxError(f"the request has {len(data)} bytes: ask for less at once")
        answer = self._waiting[number] = self._loop.create_future()
        try:
            try:
                self._sock.send(data)
            except BlockingIOError:
                async with self._sending:
                    await self._loop.sock_sendall(self._sock, data)
            return await answer
        finally:
            del self._waiting[number]

    def _hear(self) -> None:
        while True:
            files = array.array("i")
            room = socket.CMSG_SPACE(_FILES * files.itemsize)
            try:
                data, ancillary, _, _ = self._sock.recvmsg(_PACKET, room, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, ancillary = b"", []
            for _, _, payload in ancillary:
                files.frombytes(payload[: len(payload) - len(payload) % files.itemsize])
            if not data:
                self._loop.remove_reader(self._sock.fileno())
                self.ended.set()
                return
            self._take(json.loads(data), files[0] if files else -1)

    def _take(self, answer: dict[str, Any], fd: int) -> None:
        number = answer.pop("n")
        if answer.pop("long", False):
            answer = json.loads(_read_all(fd))
            answer.pop("n")
            fd = -1
        if "gone" in answer and number == 0:
            self._gone(answer["gone"])
            return
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result((answer, fd))
        elif fd >= 0:  # whoever asked has gone meanwhile
            os.close(fd)


def _read_all(fd: int) -> bytes:
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, size, 0)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
