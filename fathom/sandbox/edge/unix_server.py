"""Clients of this machine: one request per connection to the Unix socket, a line of JSON each way.

After `open` the answer brings a socket along that leads to the agent itself; the connection stays
for as long as the client uses it, and says so by that alone.

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import logging
import socket
from typing import Any, cast

from fathom.sandbox.edge import MESSAGE_LIMIT
from fathom.sandbox.edge.events import event
from fathom.sandbox.edge.front import Front

_PATIENCE = 30.0  # seconds for a client to say what it wants
_CHUNK = 1 << 16
_log = logging.getLogger(__name__)


class UnixServer:
    """Serves the clients of one listening socket."""

    def __init__(self, listener: socket.socket, front: Front) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._front = front
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Accept clients until cancelled."""
        while True:
            try:
                client, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:  # too many open files, say: later there may be fewer
                event(_log, logging.WARNING, "accept", error=error)
                await asyncio.sleep(0.05)
                continue
            task = self._loop.create_task(self._serve_one(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve_one(self, client: socket.socket) -> None:
        # Whatever goes wrong with one client must not end the daemon.
        try:
            with client:
                async with asyncio.timeout(_PATIENCE):
                    request = await self._read(client)
                if request is None:
                    return
                if request.get("op") == "open":
                    await self._open(client, request.get("id"))
                    return
                answer = await self._front.answer(request, "unix")
                async with asyncio.timeout(_PATIENCE):
                    await self._loop.sock_sendall(client, json.dumps(answer).encode() + b"\n")
        except (OSError, TimeoutError, ValueError, RecursionError) as error:
            event(_log, logging.DEBUG, "broken", error=repr(error))

    async def _open(self, client: socket.socket, name: Any) -> None:
        async with self._front.line(name, "unix") as (agent, answer):
            data = json.dumps(answer).encode() + b"\n"
            if agent is None:
                await self._loop.sock_sendall(client, data)
                return
            rights = array.array("i", [agent.fileno()])
            client.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            agent.close()
            with contextlib.suppress(OSError):
                while await self._loop.sock_recv(client, _CHUNK):
                    pass

    async def _read(self, client: socket.socket) -> dict[str, Any] | None:
        data = b""
        while not data.endswith(b"\n"):
            if len(data) > MESSAGE_LIMIT:
                raise ValueError("a request is too long")
            piece = await self._loop.sock_recv(client, _CHUNK)
            if not piece:
                return None
            data += piece
        found: Any = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError("a request is a JSON object")
        return cast("dict[str, Any]", found)
