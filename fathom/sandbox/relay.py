"""The relay: makes the connections that policies allow, refuses and logs all others.

One process without privileges per node. Its listening sockets lie inside the sandboxes' network
namespaces, its own connections start from this machine. Every connection is judged here, whatever
rules a namespace has, and every judgement is one line of JSON in the sandbox's log. A policy that
is replaced ends the connections that the new one would not allow.

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import ipaddress
import json
import os
import resource
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from fathom.sandbox import messages
from fathom.sandbox.carry import Pump, join

_ORIGINAL_DST = 80
_HEAD_LIMIT = 1 << 16
_CONNECT_TIMEOUT = 20.0
_LOG_LIMIT = 16 << 20  # bytes of a sandbox's network log
_NOBODY = 65534
_READING = ("GET", "HEAD")
# Connections of one sandbox at the same time, each with two descriptors and buffers of ours: one
# tenant's flood must leave the relay to the others.
MOST_CONNECTIONS = 128
Verdict = Callable[[dict[str, Any]], bool]


@dataclass(slots=True)
class Place:
    """One sandbox's sockets, its policy and the connections that are open."""

    name: str
    policy: dict[str, Any]
    version: int
    log: int
    noted: int = 0
    connections: int = 0
    full: bool = False
    servers: list[asyncio.Server] = field(default_factory=list["asyncio.Server"])
    open: dict[asyncio.Task[None], Verdict] = field(
        default_factory=dict["asyncio.Task[None]", Verdict]
    )

    def note(self, **values: Any) -> None:
        """Write one line to the sandbox's log, which a tenant must not make endless."""
        line = {"time": round(time.time(), 3), "policy": self.version, **values}
        data = (json.dumps(line) + "\n").encode()
        if self.noted > _LOG_LIMIT:
            return
        self.noted += len(data)
        if self.noted > _LOG_LIMIT:
            data = b'{"time": %d, "kind": "log_full", "allowed": false}\n' % time.time()
        with contextlib.suppress(OSError):
            os.write(self.log, data)

    def take(self) -> bool:
        """Count one more connection, unless there are too many; that is noted once a time."""
        if self.connections >= MOST_CONNECTIONS:
            if not self.full:
                self.note(kind="too_many", most=MOST_CONNECTIONS, allowed=False)
            self.full = True
            return False
        self.full = self.full and self.connections > MOST_CONNECTIONS // 2
        self.connections += 1
        return True


def allows_address(host: str, port: int) -> Verdict:
    """Return the judgement on a TCP connection to an address."""
    return lambda policy: [host, port] in policy["addresses"]


def allows_domain(name: str, port: int) -> Verdict:
    """Return the judgement on a connection to a domain."""
    wanted = name.lower().rstrip(".")

    def judge(policy: dict[str, Any]) -> bool:
        if allows_address(wanted, port)(policy):
            return True
        return any(
            port in ports
            and (wanted == entry or (entry.startswith("*.") and wanted.endswith(entry[1:])))
            for entry, ports in policy["domains"]
        )

    return judge


class Refused(Exception):
    """A request that is not carried out; `status` is its HTTP answer."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class Relay:
    """All sandboxes of one node."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}

    async def apply(self, message: dict[str, Any], fds: list[int]) -> None:
        """Set or drop one sandbox's policy; the first time its sockets and log come along."""
        name = message["id"]
        if message["op"] == "drop":
            await self._drop(name)
            return
        place = self.places.get(name)
        if place is None:
            relay, proxy, log = fds
            place = self.places[name] = Place(name, message["policy"], message["version"], log)
            for fd, serve in ((relay, self._direct), (proxy, self._proxy)):
                place.servers.append(await self._listen(place, fd, serve))
        else:
            for fd in fds:
                os.close(fd)
        place.policy, place.version = message["policy"], message["version"]
        for task, judge in list(place.open.items()):
            if not judge(place.policy):
                task.cancel()

    async def _listen(self, place: Place, fd: int, serve: Any) -> asyncio.Server:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not place.take():
                writer.transport.abort()
                return
            try:
                await serve(place, reader, writer)
            except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError):
                pass
            except asyncio.LimitOverrunError:
                pass
            finally:
                task = asyncio.current_task()
                if task is not None:
                    place.open.pop(task, None)
                place.connections -= 1
                writer.close()

        return await asyncio.start_server(accept, sock=socket.socket(fileno=fd), limit=_HEAD_LIMIT)

    async def _drop(self, name: str) -> None:
        place = self.places.pop(name, None)
        if place is None:
            return
        for server in place.servers:
            server.close()
        for task in list(place.open):
            task.cancel()
        os.close(place.log)

    # Judging -----------------------------------------------------------------------------------

    def _admit(self, place: Place, judge: Verdict, **values: Any) -> None:
        task = asyncio.current_task()
        allowed = judge(place.policy)
        place.note(**values, allowed=allowed)
        if not allowed or task is None:
            raise Refused("403 Forbidden")
        place.open[task] = judge

    async def _dial(
        self, place: Place, host: str, port: int, tls: bool = False
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to a name that was admitted, at an address that may be reached."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Refused("502 Bad Gateway") from error
        for _, _, _, _, address in found:
            where = str(address[0])
            ip = ipaddress.ip_address(where)
            named = [where, port] in place.policy["addresses"]
            if not (ip.is_global or named or place.policy["private"]):
                # A name that leads to this machine or its neighbours is an attack, or a mistake.
                place.note(kind="private", host=host, address=where, allowed=False)
                continue
            with contextlib.suppress(OSError, TimeoutError):
                context = _tls_context() if tls else None
                async with asyncio.timeout(_CONNECT_TIMEOUT):
                    return await asyncio.open_connection(
                        where, port, ssl=context, server_hostname=host if tls else None
                    )
        raise Refused("502 Bad Gateway")

    # Connections -------------------------------------------------------------------------------

    async def _direct(
        self, place: Place, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry a connection that the namespace's rules turned here."""
        sock = writer.get_extra_info("socket")
        where = sock.getsockopt(socket.IPPROTO_IP, _ORIGINAL_DST, 16)
        (port,) = struct.unpack_from("!H", where, 2)
        host = socket.inet_ntoa(where[4:8])
        with contextlib.suppress(Refused):
            self._admit(place, allows_address(host, port), kind="address", host=host, port=port)
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                far = await asyncio.open_connection(host, port)
            await join(reader, writer, *far)

    async def _proxy(
        self, place: Place, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve one request of an HTTP client, then close."""
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *headers = head.rstrip("\r\n").split("\r\n")
            method, _, rest = first.partition(" ")
            target, _, version = rest.rpartition(" ")
            # A line that hides a second one would be a second request to whoever reads it next.
            if " " in target or any(c in line for line in (first, *headers) for c in "\r\n\0"):
                raise Refused("400 Bad Request")
            if not version.startswith("HTTP/1."):
                raise Refused("400 Bad Request")
            if method == "CONNECT":
                await self._tunnel(place, target, reader, writer)
            elif target.startswith("/mirror/"):
                await self._mirror(place, method, target, headers, writer)
            else:
                await self._forward(place, method, target, headers, reader, writer)
        except Refused as refused:
            body = f"{refused.status}: not allowed by this sandbox's network policy\n"
            writer.write(
                f"HTTP/1.1 {refused.status}\r\nContent-Length: {len(body)}\r\n"
                f"Connection: close\r\n\r\n{body}".encode()
            )
            with contextlib.suppress(OSError):
                await writer.drain()

    async def _tunnel(
        self,
        place: Place,
        target: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        host, _, port = target.rpartition(":")
        if not port.isdigit():
            raise Refused("400 Bad Request")
        judge = allows_domain(host, int(port))
        self._admit(place, judge, kind="connect", host=host[:255], port=int(port))
        far = await self._dial(place, host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await join(reader, writer, *far)

    async def _forward(
        self,
        place: Place,
        method: str,
        target: str,
        headers: list[str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        parts = urlsplit(target)
        if parts.scheme != "http" or not parts.hostname:
            raise Refused("400 Bad Request")
        port = parts.port or 80
        judge = allows_domain(parts.hostname, port)
        self._admit(place, judge, kind="http", method=method, url=target[:2000])
        far_reader, far_writer = await self._dial(place, parts.hostname, port)
        path = parts._replace(scheme="", netloc="").geturl() or "/"
        far_writer.write(_head(method, path, parts.netloc, headers))
        await join(reader, writer, far_reader, far_writer)

    async def _mirror(
        self,
        place: Place,
        method: str,
        target: str,
        headers: list[str],
        writer: asyncio.StreamWriter,
    ) -> None:
        name, _, path = target.removeprefix("/mirror/").partition("/")

        def judge(policy: dict[str, Any]) -> bool:
            plain = unquote(unquote(path))
            inside = ".." not in plain and "\\" not in plain
            return name in policy["mirrors"] and method in _READING and inside

        self._admit(place, judge, kind="mirror", method=method, url=target[:2000])
        parts = urlsplit(str(place.policy["mirrors"][name]))
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        context = _tls_context() if tls else None
        async with asyncio.timeout(_CONNECT_TIMEOUT):
            # The mirror's place is this machine's own choice: it may well be a private one.
            far_reader, far_writer = await asyncio.open_connection(
                parts.hostname, port, ssl=context
            )
        try:
            far_writer.write(_head(method, f"{parts.path}/{path}", parts.netloc, headers))
            await Pump().run(far_reader, writer)
        finally:
            far_writer.close()


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _head(method: str, path: str, host: str, headers: list[str]) -> bytes:
    """Return a request's head for the other side: one request per connection."""
    dropped = ("host", "connection", "proxy-connection", "proxy-authorization", "keep-alive")
    kept = [line for line in headers if line.partition(":")[0].strip().lower() not in dropped]
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *kept]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _serve(control: socket.socket) -> None:
    relay = Relay()
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    jobs: asyncio.Queue[tuple[dict[str, Any], list[int]]] = asyncio.Queue()

    def readable() -> None:
        message, fds = messages.receive(control)
        if message is None:
            loop.remove_reader(control.fileno())
            ended.set_result(None)
        else:
            jobs.put_nowait((message, fds))

    async def work() -> None:
        while True:
            message, fds = await jobs.get()
            await relay.apply(message, fds)
            with contextlib.suppress(OSError):
                messages.send(control, {"done": message["id"]})

    loop.add_reader(control.fileno(), readable)
    worker = loop.create_task(work())
    await asyncio.wait([ended, worker], return_when=asyncio.FIRST_COMPLETED)
    worker.cancel()


def main(argv: list[str]) -> None:
    """Run the relay: its control socket comes as an argument."""
    control = socket.socket(fileno=int(argv[0]))
    # Enough for every sandbox of a node to have all of its connections.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if os.geteuid() == 0:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))
            most = 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Whoever we become may not be able to read this interpreter's own files: load all of it now.
    concurrent.futures.ThreadPoolExecutor(1).submit(socket.getaddrinfo, "localhost", 1).result()
    _tls_context()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    asyncio.run(_serve(control))


if __name__ == "__main__":
    main(sys.argv[1:])
