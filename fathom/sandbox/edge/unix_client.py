"""The daemon of this machine, over its Unix socket: a connection for each request.

A line to an agent is a socket that comes with the answer and leads there directly.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import array
import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import anyio

from fathom.errors import DaemonLost, SandboxLost
from fathom.sandbox import cgroups
from fathom.sandbox.edge import SOCKET
from fathom.sandbox.edge.client import EdgeHost
from fathom.sandbox.line import Line, connect
from fathom.sandbox.nodelink import raise_error

_CHUNK = 1 << 18


class UnixHost(EdgeHost):
    """The daemon whose socket is in the folder `runtime`."""

    def __init__(self, runtime: Path) -> None:
        super().__init__()
        self.runtime = runtime

    async def ask(self, op: str, values: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer, which may be an error. Raises DaemonLost."""
        sock = await self._dial()
        with sock:
            return (await self._exchange(sock, {**values, "op": op}))[0]

    async def open(self, name: str) -> Line:
        """Open a line to an agent. Raises SandboxLost, DaemonLost."""
        sock = await self._dial()
        try:
            answer, agent = await self._exchange(sock, {"op": "open", "id": name})
            raise_error(answer)
            if agent is None:
                raise DaemonLost(f"the daemon in {self.runtime} gave no line: is it an older one?")
            # For as long as the other socket is open, the daemon takes the sandbox to be in use.
            return Line(agent, along=sock)
        except BaseException:
            sock.close()
            raise

    async def _dial(self) -> socket.socket:
        try:
            return await connect(self.runtime, SOCKET)
        except SandboxLost as error:
            raise DaemonLost(
                f"no daemon answers in {self.runtime} ({error}): "
                "start one with `fathom sandbox edge`"
            ) from error

    async def _exchange(
        self, sock: socket.socket, request: dict[str, Any]
    ) -> tuple[dict[str, Any], socket.socket | None]:
        view = memoryview(json.dumps(request).encode() + b"\n")
        text = b""
        agent: socket.socket | None = None
        try:
            while view:
                try:
                    view = view[sock.send(view) :]
                except BlockingIOError:
                    await anyio.wait_writable(sock)
            while not text.endswith(b"\n"):
                try:
                    data, files = _receive(sock)
                except BlockingIOError:
                    await anyio.wait_readable(sock)
                    continue
                if files:
                    agent = socket.socket(fileno=files[0])
                if not data:
                    raise ConnectionResetError("it closed the connection")
                text += data
            return json.loads(text), agent
        except OSError as error:
            if agent is not None:
                agent.close()
            raise DaemonLost(
                f"the daemon in {self.runtime} went away ({error}): where none comes back, start "
                "one with `fathom sandbox edge`"
            ) from error
        except BaseException:
            if agent is not None:
                agent.close()
            raise

    async def oom_count(self, name: str) -> int:
        """Return how many processes of the sandbox were killed for memory so far."""
        layout = cgroups.current_layout()
        if layout is None:
            return 0
        with contextlib.suppress(OSError):
            return cgroups.oom_count(cgroups.Group(layout, name).oom_file.read_text())
        return 0

    def close_at_exit(self) -> None:
        """Do nothing: no connection is kept."""


def _receive(sock: socket.socket) -> tuple[bytes, array.array[int]]:
    files = array.array("i")
    room = socket.CMSG_SPACE(files.itemsize)
    data, ancillary, _, _ = sock.recvmsg(_CHUNK, room, socket.MSG_CMSG_CLOEXEC)
    for _, _, payload in ancillary:
        files.frombytes(payload)
    return data, files
