"""Clients of other machines: the same requests over TLS, each with a bearer token.

    POST /v1/OPERATION        the request's fields as JSON; so is the answer
    POST /v1/open             with `Upgrade: fathom-line`: the connection becomes a line to an agent
    GET /metrics              the metrics as text
    GET /, GET /overview      the page with the sandboxes, and its data

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import PolicyDenied, SandboxError
from fathom.sandbox.edge import LOOKING, http
from fathom.sandbox.edge.events import event
from fathom.sandbox.edge.front import Front
from fathom.sandbox.edge.guard import Guard, source
from fathom.sandbox.edge.tokens import digest_of

_HANDSHAKE = 5.0  # seconds, each: to agree on keys, to send a head, to send a body
_HEAD = 5.0
_BODY = 20.0
_WRITE = 30.0
_IDLE = 60.0  # seconds for which a connection that has shown a token may wait
_LOOK = 1.0  # seconds after which open connections' tokens are looked at again
_CHUNK = 1 << 16
PAGE = Path(__file__).resolve().parents[1] / "page"
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Site:
    """What must be read from files before there are none: the certificate and the page."""

    tls: ssl.SSLContext
    files: dict[str, tuple[str, bytes]]


def load(certificate: str, key: str) -> Site:
    """Load a certificate, its key and the page. Raises SandboxError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise SandboxError(
            f"{certificate} and {key} are no certificate and key: {error}"
        ) from error
    files = {
        f"/{path.name}": (_TYPES[path.suffix], path.read_bytes())
        for path in PAGE.iterdir()
        if path.suffix in _TYPES
    }
    return Site(context, {**files, "/": files["/index.html"]})


@dataclass(eq=False, slots=True)
class _Client:
    """One connection. `digest` and `name`: of the token that it has shown last."""

    address: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    digest: str = ""
    name: str = ""


class HttpsServer:
    """Serves the clients of one listening socket."""

    def __init__(self, listener: socket.socket, site: Site, front: Front) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._site = site
        self._front = front
        self._guard = Guard()
        self._loop = asyncio.get_running_loop()
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Accept clients until cancelled."""
        self._spawn(self._look_again())
        while True:
            try:
                sock, where = await self._loop.sock_accept(self._listener)
            except OSError as error:  # too many open files, say: later there may be fewer
                event(_log, logging.WARNING, "accept", error=error)
                await asyncio.sleep(0.05)
                continue
            self._spawn(self._serve_one(sock, source(str(where[0]))))

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_one(self, sock: socket.socket, address: str) -> None:
        if not self._guard.enter(address):
            event(_log, logging.WARNING, "too_many_connections", address=address)
            sock.close()
            return
        client: _Client | None = None
        try:
            client = await self._greet(sock, address)
            self._clients.add(client)
            while await self._serve_request(client):
                pass
        except http.Malformed as error:
            if client is not None:
                client.writer.write(http.refusal(error.status, SandboxError.code, str(error)))
        except (OSError, ssl.SSLError, TimeoutError, ValueError, EOFError) as error:
            event(_log, logging.DEBUG, "broken", address=address, error=repr(error))
        finally:
            self._guard.leave(address, known=client is not None and bool(client.digest))
            if client is None:
                sock.close()
            else:
                self._clients.discard(client)
                with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
                    client.writer.close()
                    async with asyncio.timeout(_WRITE):
                        await client.writer.wait_closed()
                client.writer.transport.abort()

    async def _greet(self, sock: socket.socket, address: str) -> _Client:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = asyncio.StreamReader(limit=http.HEAD_LIMIT)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=self._site.tls,
            ssl_handshake_timeout=_HANDSHAKE,
            ssl_shutdown_timeout=2.0,
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
        return _Client(address, reader, writer)

    async def _serve_request(self, client: _Client) -> bool:
        """Serve one request; whether another one may follow. Raises Malformed, OSError."""
        async with asyncio.timeout(_IDLE if client.digest else _HEAD):
            asked = await http.read_head(client.reader)
        if asked is None:
            return False
        length = asked.length
        if asked.method == "GET" and (file := self._site.files.get(asked.path)) is not None:
            await self._send(client, http.answer(200, file[1], file[0], last=True))
            return False
        scope = await self._admit(client, asked)
        if not scope:
            return False
        async with asyncio.timeout(_BODY):
            body = await client.reader.readexactly(length)
        if asked.method == "GET" and asked.path in ("/overview", "/metrics"):
            await self._show(client, asked.path)
            return True
        if asked.method != "POST" or not asked.path.startswith("/v1/"):
            raise http.Malformed(404, "there is nothing here: see docs/sandbox.md")
        op = asked.path.removeprefix("/v1/")
        if scope != "use" and op not in LOOKING:
            denied = {
                "error": PolicyDenied.code,
                "message": f"this token is not good for {op[:80]}",
            }
            await self._send(client, http.json_answer(denied))
            return True
        request = _json(body)
        if op == "open":
            if asked.headers.get("upgrade") != "fathom-line":
                raise http.Malformed(400, "a line needs the header Upgrade: fathom-line")
            return await self._open(client, request.get("id"))
        found = await self._front.answer({**request, "op": op}, client.name)
        await self._send(client, http.json_answer(found))
        return True

    async def _admit(self, client: _Client, asked: http.Asked) -> str:
        """Return what the client's token is good for; nothing where it was sent away."""
        if (wait := self._guard.wait(client.address)) > 0:
            later = f"Retry-After: {math.ceil(wait)}"
            text = "too many refused tokens came from this address: try again later"
            await self._send(client, http.refusal(429, PolicyDenied.code, text, later))
            return ""
        digest = digest_of(asked.token)
        found = await self._front.upcall.ask("token", {"digest": digest})
        if "error" in found:
            self._guard.fail(client.address)
            self._front.refused += 1
            event(_log, logging.WARNING, "token_refused", address=client.address)
            text = found["message"] if asked.token else "a token is needed: Authorization: Bearer"
            await self._send(
                client, http.refusal(401, PolicyDenied.code, text, "WWW-Authenticate: Bearer")
            )
            return ""
        if not client.digest:
            self._guard.known(client.address)
            event(_log, logging.INFO, "client", name=found["name"], address=client.address)
        client.digest, client.name = digest, str(found["name"])
        return str(found["scope"])

    async def _show(self, client: _Client, path: str) -> None:
        op = "metrics" if path == "/metrics" else "list"
        found = await self._front.answer({"op": op}, client.name)
        if "error" in found:
            await self._send(client, http.json_answer(found))
        elif op == "metrics":
            await self._send(client, http.answer(200, found["text"].encode(), "text/plain"))
        else:
            # Recorded runs are files of a user, which this process cannot see.
            await self._send(client, http.json_answer({**found, "runs": []}))

    async def _open(self, client: _Client, name: Any) -> bool:
        async with self._front.line(name, client.name) as (agent, answer):
            if agent is None:
                await self._send(client, http.json_answer(answer))
                return True
            agent.setblocking(False)
            head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
            client.writer.write(f"{head}Upgrade: fathom-line\r\n\r\n".encode())
            tasks = [
                self._loop.create_task(self._to_agent(client, agent)),
                self._loop.create_task(self._from_agent(client, agent)),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return False

    async def _to_agent(self, client: _Client, agent: socket.socket) -> None:
        while data := await client.reader.read(_CHUNK):
            await self._loop.sock_sendall(agent, data)

    async def _from_agent(self, client: _Client, agent: socket.socket) -> None:
        while data := await self._loop.sock_recv(agent, _CHUNK):
            client.writer.write(data)
            await client.writer.drain()

    async def _send(self, client: _Client, data: bytes) -> None:
        client.writer.write(data)
        async with asyncio.timeout(_WRITE):
            await client.writer.drain()

    async def _look_again(self) -> None:
        """Cut off whoever's token is good no more, lines that are open included."""
        while True:
            await asyncio.sleep(_LOOK)
            for digest in {client.digest for client in self._clients if client.digest}:
                found = await self._front.upcall.ask("token", {"digest": digest})
                for client in [c for c in self._clients if c.digest == digest]:
                    if "error" in found:
                        event(_log, logging.WARNING, "cut_off", name=client.name)
                        client.writer.transport.abort()


def _json(body: bytes) -> dict[str, Any]:
    try:
        found: Any = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise http.Malformed(400, "the body is no JSON") from error
    if not isinstance(found, dict):
        raise http.Malformed(400, "the body is no JSON object")
    return found  # type: ignore[no-any-return]
