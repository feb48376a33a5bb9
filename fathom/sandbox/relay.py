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

from fathom.sandbox import messages, proxy_head
from fathom.sandbox.carry import Pump, join
from fathom.sandbox.names import Names
from fathom.sandbox.proxy_body import Body
from fathom.sandbox.proxy_head import Framing, Head, Refused
from fathom.sandbox.public import is_public

_ORIGINAL_DST = 80
_HEAD_LIMIT = 1 << 16
_CONNECT_TIMEOUT = 20.0
_END_TIMEOUT = 5.0
_LOG_LIMIT = 4 << 20  # bytes of a sandbox's network log
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
    names: Names = field(default_factory=Names)
    servers: list[asyncio.Server] = field(default_factory=list["asyncio.Server"])
    tasks: set[asyncio.Task[None]] = field(default_factory=set["asyncio.Task[None]"])
    open: dict[asyncio.Task[None], Verdict] = field(
        default_factory=dict["asyncio.Task[None]", Verdict]
    )

    def note(self, **values: Any) -> None:
        """Write one line to the sandbox's log, which a tenant must not make endless."""
        line = {"time": round(time.time(), 3), "policy": self.version, **values}
        data = (json.dumps(line) + "\n").encode()
        if self.noted > _LOG_LIMIT or self.log < 0:
            return
        self.noted += len(data)
        if self.noted > _LOG_LIMIT:
            data = b'{"time": %d, "kind": "log_full", "allowed": false}\n' % time.time()
        with contextlib.suppress(OSError):
            os.write(self.log, data)

    async def close(self) -> None:
        """End every connection, then let go of the log."""
        for server in self.servers:
            server.close()
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=_END_TIMEOUT)
        # The number may soon be another file's: whoever is still here must not write to it.
        log, self.log = self.log, -1
        os.close(log)

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


def _entries(policy: dict[str, Any], name: str, port: int) -> list[bool]:
    """Return of each entry that allows this domain whether it may lead to private addresses."""
    wanted = name.lower().rstrip(".")
    return [
        private
        for entry, ports, private in policy["domains"]
        if port in ports
        and (wanted == entry or (entry.startswith("*.") and wanted.endswith(entry[1:])))
    ]


def allows_domain(name: str, port: int) -> Verdict:
    """Return the judgement on a connection to a domain."""
    direct = allows_address(name.lower().rstrip("."), port)
    return lambda policy: direct(policy) or bool(_entries(policy, name, port))


def _allows_private(name: str, where: str, port: int) -> Verdict:
    """Return the judgement on a connection to a domain whose address is no public one."""
    direct = allows_address(where, port)
    return lambda policy: direct(policy) or any(_entries(policy, name, port))


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
            if len(fds) != 3:
                raise ValueError("its sockets and log did not come along")
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
            task = asyncio.current_task()
            if task is None or place.log < 0 or not place.take():
                writer.transport.abort()
                return
            place.tasks.add(task)
            try:
                await serve(place, reader, writer)
            except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError):
                pass
            except asyncio.CancelledError:
                pass  # the policy or the sandbox is gone, and this task ends here
            finally:
                place.open.pop(task, None)
                place.tasks.discard(task)
                place.connections -= 1
                writer.close()

        return await asyncio.start_server(accept, sock=socket.socket(fileno=fd), limit=_HEAD_LIMIT)

    async def _drop(self, name: str) -> None:
        place = self.places.pop(name, None)
        if place is not None:
            await place.close()

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
        try:
            found = await place.names.find(host, port)
        except TimeoutError as error:
            raise Refused("504 Gateway Timeout") from error
        except OSError as error:
            raise Refused("502 Bad Gateway") from error
        for where in found:
            if not is_public(where):
                judge = _allows_private(host, where, port)
                if not judge(place.policy):
                    # A name that leads to this machine or its neighbours: an attack or a mistake.
                    place.note(kind="private", host=host, address=where, allowed=False)
                    continue
                if (task := asyncio.current_task()) in place.open:
                    place.open[task] = judge
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
            head = await self._head(reader)
            if head.method == "CONNECT":
                await self._tunnel(place, head, reader, writer)
            elif head.target.startswith("/mirror/"):
                await self._mirror(place, head, writer)
            else:
                await self._forward(place, head, reader, writer)
        except Refused as refused:
            writer.write(refused.answer())
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.drain()
                    writer.write_eof()
                    # What comes and is not read would reset the connection, answer and all.
                    left = 16 * _HEAD_LIMIT
                    while left > 0 and (data := await reader.read(_HEAD_LIMIT)):
                        left -= len(data)

    async def _head(self, reader: asyncio.StreamReader) -> Head:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                return proxy_head.read_head(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.LimitOverrunError as error:
            raise Refused("431 Request Header Fields Too Large") from error
        except TimeoutError as error:
            raise Refused("408 Request Timeout") from error

    async def _tunnel(
        self, place: Place, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        to = proxy_head.tunnel(head.target)
        judge = allows_domain(to.host, to.port)
        self._admit(place, judge, kind="connect", host=to.host, port=to.port)
        far = await self._dial(place, to.host, to.port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await join(reader, writer, *far)

    async def _forward(
        self, place: Place, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        to, body = proxy_head.forward(head.target), proxy_head.framing(head)
        judge = allows_domain(to.host, to.port)
        self._admit(place, judge, kind="http", method=head.method, url=head.target[:2000])
        far_reader, far_writer = await self._dial(place, to.host, to.port)
        far_writer.write(proxy_head.ask(head, to.path, to.named, body))
        await join(Body(reader, body), writer, far_reader, far_writer)

    async def _mirror(self, place: Place, head: Head, writer: asyncio.StreamWriter) -> None:
        name, _, path = head.target.removeprefix("/mirror/").partition("/")

        def judge(policy: dict[str, Any]) -> bool:
            plain = unquote(unquote(path))
            inside = ".." not in plain and "\\" not in plain
            return name in policy["mirrors"] and head.method in _READING and inside

        self._admit(place, judge, kind="mirror", method=head.method, url=head.target[:2000])
        if proxy_head.framing(head) not in (Framing(), Framing(length=0)):
            raise Refused("400 Bad Request")
        parts = urlsplit(str(place.policy["mirrors"][name]))
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        context = _tls_context() if tls else None
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                # The mirror's place is this machine's own choice: it may well be a private one.
                far_reader, far_writer = await asyncio.open_connection(
                    parts.hostname, port, ssl=context
                )
        except (OSError, TimeoutError) as error:
            raise Refused("502 Bad Gateway") from error
        try:
            path = f"{parts.path}/{path}"
            far_writer.write(proxy_head.ask(head, path, parts.netloc, Framing()))
            await Pump().run(far_reader, writer)
        finally:
            far_writer.close()


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


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
            answer = {"done": message["id"]}
            try:
                await relay.apply(message, fds)
            except Exception as error:  # of one sandbox; the others' connections go on
                answer = {"error": f"{type(error).__name__}: {error}"[:500]}
            with contextlib.suppress(OSError):
                messages.send(control, answer)

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
    # A lookup that nobody answers would keep the interpreter for as long as the resolver waits.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
