"""The relay alone: what one sandbox does to it, another one must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fathom.sandbox import names
from fathom.sandbox.net import Net
from fathom.sandbox.public import is_public
from fathom.sandbox.relay import Relay

REPOSITORY = Path(__file__).resolve().parents[2]
Served = Callable[["Proxy"], Awaitable[None]]


class Proxy:
    """A relay, and the addresses of the proxies of its sandboxes."""

    def __init__(self, folder: Path) -> None:
        self.relay = Relay()
        self.folder = folder
        self.ports: dict[str, int] = {}
        self.version = 0

    async def set(self, name: str, net: Net) -> None:
        fds: tuple[int, ...] = ()
        if name not in self.ports:
            listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
            self.ports[name] = listeners[1].getsockname()[1]
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            fds = (*(one.detach() for one in listeners), os.open(self.folder / name, flags, 0o600))
        self.version += 1
        message = {"op": "set", "id": name, "policy": net.as_json({}), "version": self.version}
        await self.relay.apply(message, list(fds))

    async def drop(self, name: str) -> None:
        await self.relay.apply({"op": "drop", "id": name}, [])

    async def ask(self, name: str, data: bytes, timeout: float = 8.0) -> bytes:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[name])
            try:
                writer.write(data)
                return await reader.read()
            finally:
                writer.close()

    def log(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def run(folder: Path, scenario: Served) -> None:
    async def whole() -> None:
        proxy = Proxy(folder)
        try:
            await scenario(proxy)
        finally:
            for name in list(proxy.ports):
                await proxy.drop(name)

    asyncio.run(whole())


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server on this machine's loopback that notes heads and answers each with "ok"."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok")
            await writer.drain()
        writer.close()

    made = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield made.sockets[0].getsockname()[1], seen
    finally:
        made.close()


def test_slow_names_of_one_sandbox_delay_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Names whose server never answers keep threads, and each sandbox has a few of its own."""
    gate, asked = threading.Event(), []
    plain = socket.getaddrinfo

    def slow(host: str, *more: Any, **named: Any) -> Any:
        if host.endswith(".attacker.test"):
            asked.append(host)
            gate.wait(30)
            raise socket.gaierror("no answer")
        return plain(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(names, "TIMEOUT", 1.0)

    async def scenario(proxy: Proxy) -> None:
        async with server() as (port, _):
            await proxy.set("evil", Net.deny().domain("*.attacker.test"))
            await proxy.set("good", Net.deny().domain("localhost", port, private=True))
            heads = [
                b"CONNECT h%d.attacker.test:443 HTTP/1.1\r\n\r\n" % number for number in range(100)
            ]
            attack = [asyncio.create_task(proxy.ask("evil", head)) for head in heads]
            await asyncio.sleep(0.3)
            head = b"GET http://localhost:%d/x HTTP/1.1\r\n\r\n" % port
            assert (await proxy.ask("good", head, timeout=0.9)).endswith(b"ok")
            assert len(asked) == names.AT_ONCE
            # Whoever waits for a name is told so in time, and its threads stay as few.
            answers = await asyncio.gather(*attack)
            assert all(answer.startswith(b"HTTP/1.1 504 ") for answer in answers)
            assert len(asked) == names.AT_ONCE
            # A name that was not found is not asked for again at once.
            again = await proxy.ask("evil", heads[0])
            assert again.startswith(b"HTTP/1.1 502 ")
            gate.set()

    try:
        run(tmp_path, scenario)
    finally:
        gate.set()


def test_private_holds_for_one_domain_alone(tmp_path: Path):
    async def scenario(proxy: Proxy) -> None:
        async with server() as (port, seen):
            head = b"GET http://localhost:%d/x HTTP/1.1\r\n\r\n" % port
            net = Net.deny().domain("db.internal", 5432, private=True)
            await proxy.set("a", net.domain("localhost", port))
            assert b" 502 " in await proxy.ask("a", head)
            assert seen == []
            assert proxy.log("a")[-1]["kind"] == "private"
            await proxy.set("a", net.domain("localhost", port, private=True))
            assert (await proxy.ask("a", head)).endswith(b"ok")
            await proxy.set("a", net.domain("*.localhost", port, private=True))
            assert b" 403 " in await proxy.ask("a", head)

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "where",
    [
        *("127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
        *("255.255.255.255", "::1", "fe80::1%lo", "fd00::1", "ff0e::1", "::ffff:127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b:1::a01:203", "2002:7f00:1::1", "2002:a01:203::1"),
        "2001:0:808:808:0:ffff:80ff:fffe",
    ],
)
def test_addresses_that_no_name_may_lead_to(where: str):
    assert not is_public(where)


def test_this_machines_own_public_address_is_not_public(need_root: None):
    code = (
        "from fathom.sandbox.public import is_public as p; print(*(p(a) for a in "
        "('93.184.216.34', '2606:4700::1', '64:ff9b::5db8:d822', '93.184.216.35', '2606:4700::2')))"
    )
    script = (
        "ip link set lo up && ip addr add 93.184.216.34/32 dev lo && "
        'ip addr add 2606:4700::1/128 dev lo nodad && exec "$0" -c "$1"'
    )
    command = ["unshare", "--net", "sh", "-c", script, sys.executable, code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=True, cwd=REPOSITORY
    )
    assert done.stdout.split() == ["False", "False", "False", "True", "True"]


def test_an_open_private_connection_ends_when_its_domain_may_not_be_private(tmp_path: Path):
    async def scenario(proxy: Proxy) -> None:
        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        far = await asyncio.start_server(hold, "127.0.0.1", 0)
        port = far.sockets[0].getsockname()[1]
        await proxy.set("a", Net.deny().domain("localhost", port, private=True))
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports["a"])
        writer.write(b"CONNECT localhost:%d HTTP/1.1\r\n\r\n" % port)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"
        await proxy.set("a", Net.deny().domain("localhost", port))
        async with asyncio.timeout(3):
            assert await reader.read() == b""
        writer.close()
        far.close()

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("target", "first", "host"),
    [
        ("http://localhost:%d?q", "GET /?q HTTP/1.1", "localhost:%d"),
        ("http://localhost:%d", "GET / HTTP/1.1", "localhost:%d"),
        ("http://evil.test@localhost:%d/a?b#c", "GET /a?b HTTP/1.1", "localhost:%d"),
        ("http://LOCALHOST:%d/a", "GET /a HTTP/1.1", "LOCALHOST:%d"),
    ],
)
def test_requests_are_passed_on_in_one_meaning(tmp_path: Path, target: str, first: str, host: str):
    async def scenario(proxy: Proxy) -> None:
        async with server() as (port, seen):
            await proxy.set("a", Net.deny().domain("localhost", port, private=True))
            head = f"GET {target % port} HTTP/1.1\r\nHost: other.test\r\n\r\n"
            assert (await proxy.ask("a", head.encode())).endswith(b"ok")
            (line, named, *_) = seen[0].decode().split("\r\n")
            assert (line, named) == (first, f"Host: {host % port}")
            assert seen[0].lower().count(b"\nhost:") == 1

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("CONNECT localhost:\u00b2 HTTP/1.1\r\n\r\n".encode("latin-1"), b"400"),
        (b"CONNECT localhost:0 HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT localhost:99999 HTTP/1.1\r\n\r\n", b"400"),
        (b"CONNECT localhost HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://[::1 HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://localhost:x/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://local\thost/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://a@b@localhost/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET https://localhost/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /x HTTP/1.1\r\n\r\n", b"400"),
        (b"GE T http://localhost/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://localhost/ HTTP/2.0\r\n\r\n", b"400"),
        (b"CONNECT %s:443 HTTP/1.1\r\n\r\n" % (b"a" * 64 + b".attacker.test"), b"502"),
        (b"GET http://localhost/ HTTP/1.1\r\nX: %s\r\n\r\n" % (b"x" * 200_000), b"431"),
        (b"GET http://localhost/ HTTP/1.1\r\n continued\r\nA: b\r\n\r\n", b"400"),
        (b"GET http://localhost/ HTTP/1.1\r\nA: b\r\n\tc: d\r\n\r\n", b"400"),
        (b"GET http://localhost/ HTTP/1.1\r\nHost : a\r\n\r\n", b"400"),
        (b"GET http://localhost/ HTTP/1.1\r\nno colon\r\n\r\n", b"400"),
        (b"GET http://localhost/ HTTP/1.1\r\n: b\r\n\r\n", b"400"),
        (b"PUT http://localhost/ HTTP/1.1\r\nContent-Length: +1\r\n\r\n", b"400"),
        (b"PUT http://localhost/ HTTP/1.1\r\n" + b"Content-Length: 1\r\n" * 2 + b"\r\n", b"400"),
        (b"PUT http://localhost/ HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n", b"400"),
        (b"PUT http://localhost/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", b"400"),
        (
            b"PUT http://localhost/ HTTP/1.1\r\nContent-Length: 1\r\n"
            b"transfer-encoding: Chunked\r\n\r\n",
            b"400",
        ),
    ],
)
def test_requests_that_are_none_are_answered(tmp_path: Path, head: bytes, status: bytes):
    async def scenario(proxy: Proxy) -> None:
        await proxy.set("a", Net.deny().domain("localhost").domain("*.attacker.test"))
        assert (await proxy.ask("a", head)).startswith(b"HTTP/1.1 " + status + b" ")

    run(tmp_path, scenario)


CLOSE = b"Connection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (b"A: b\r\n\r\n", b"A: b\r\n" + CLOSE),
        (b"Connection: x-a, Content-Length\r\nX-A: 1\r\nTE: trailers\r\n\r\n", CLOSE),
        (b"Content-Length: 3\r\n\r\nabc", b"Content-Length: 3\r\n" + CLOSE + b"abc"),
        (
            b"Transfer-Encoding: Chunked\r\n\r\n0A;x=1\r\n0123456789\r\n0\r\nA: b\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n" + CLOSE + b"a\r\n0123456789\r\n0\r\n\r\n",
        ),
        (
            b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcGET",
            b"Transfer-Encoding: chunked\r\n" + CLOSE,
        ),
    ],
)
def test_what_follows_a_request_goes_nowhere(tmp_path: Path, sent: bytes, received: bytes):
    """A second request on the same connection would neither be judged nor logged."""
    seen = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(0.1):
                while data := await reader.read(1 << 16):
                    seen.extend(data)
        writer.close()

    async def scenario(proxy: Proxy) -> None:
        far = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = far.sockets[0].getsockname()[1]
        await proxy.set("a", Net.deny().domain("localhost", port, private=True))
        second = b"GET http://other.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n"
        await proxy.ask("a", b"PUT http://localhost:%d/ HTTP/1.1\r\n%b%b" % (port, sent, second))
        assert bytes(seen) == b"PUT / HTTP/1.1\r\nHost: localhost:%d\r\n%b" % (port, received)
        assert len(proxy.log("a")) == 1
        far.close()

    run(tmp_path, scenario)


def test_a_connection_of_a_dropped_sandbox_writes_into_no_other_file(tmp_path: Path):
    """The log's descriptor gets a new owner as soon as it is closed."""

    async def scenario(proxy: Proxy) -> None:
        await proxy.set("a", Net.deny().domain("localhost"))
        place = proxy.relay.places["a"]
        number = place.log
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.ports["a"])
        writer.write(b"CONNECT no.example:443 HTTP/1.1\r\n")
        await asyncio.sleep(0.1)
        await proxy.drop("a")
        victim = os.open(tmp_path / "victim", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            if victim != number:
                os.dup2(victim, number)
            with contextlib.suppress(OSError):
                writer.write(b"\r\n")
                await writer.drain()
            place.note(kind="late")
            await asyncio.sleep(0.2)
            assert (tmp_path / "victim").read_bytes() == b""
            assert not place.tasks
        finally:
            os.close(victim)
            if victim != number:
                os.close(number)
        writer.close()

    run(tmp_path, scenario)


def test_a_sandbox_that_cannot_be_served_leaves_the_others_theirs(tmp_path: Path):
    async def scenario(proxy: Proxy) -> None:
        async with server() as (port, _):
            await proxy.set("good", Net.deny().domain("localhost", port, private=True))
            message = {"op": "set", "id": "bad", "policy": Net.deny().as_json({}), "version": 1}
            with pytest.raises(ValueError, match="did not come along"):
                await proxy.relay.apply(message, [])
            assert "bad" not in proxy.relay.places
            head = b"GET http://localhost:%d/x HTTP/1.1\r\n\r\n" % port
            assert (await proxy.ask("good", head)).endswith(b"ok")

    run(tmp_path, scenario)
