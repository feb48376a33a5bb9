"""A port of this machine leads to a server inside, for every substrate and without any network."""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest

from fathom.errors import SandboxError
from fathom.sandbox import Client, Container, SyncClient, SyncSandbox
from fathom.sandbox.substrates.choice import suited

each_substrate = pytest.mark.parametrize("substrate", suited(), indirect=True)
ECHO = """
import socket, threading
server = socket.create_server(("127.0.0.1", 7000), backlog=64)
def serve(one):
    with one:
        while data := one.recv(65536):
            one.sendall(data)
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],)).start()
"""


@pytest.fixture
def echo(client: SyncClient) -> Iterator[SyncSandbox]:
    sandbox = client.create(Container(image="python"))
    with sandbox.run(["python3", "-c", ECHO], timeout=60) as process:
        assert process.read() == ("stdout", b"ready\n")
        yield sandbox


@each_substrate
def test_a_web_server_answers(client: SyncClient):
    sandbox = client.create(Container(image="python"))
    sandbox.files.write("page/index.html", "<p>hello</p>")
    server = ["python3", "-m", "http.server", "--bind", "127.0.0.1", "8000", "-d", "page"]
    with (
        sandbox.run(server, timeout=60),
        sandbox.forward(8000, timeout=30) as (host, port),
    ):
        for _ in range(100):
            try:
                answer = urllib.request.urlopen(f"http://{host}:{port}/", timeout=10).read()
                break
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)  # it has not begun to listen yet
        assert answer == b"<p>hello</p>"
        with ThreadPoolExecutor(8) as pool:
            urls = [f"http://{host}:{port}/" for _ in range(16)]
            answers = list(pool.map(lambda url: urllib.request.urlopen(url).read(), urls))
        assert answers == [b"<p>hello</p>"] * 16
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), timeout=5)


def test_large_data_goes_both_ways_at_once(echo: SyncSandbox):
    data = bytes(range(256)) * (32 << 10)  # 8 MiB, far beyond every window
    with (
        echo.forward(7000, timeout=60) as address,
        socket.create_connection(address, timeout=20) as line,
    ):

        def send() -> None:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)

        threading.Thread(target=send).start()
        received = bytearray()
        while piece := line.recv(1 << 16):
            received += piece
    assert received == data


def test_who_does_not_read_holds_up_nobody_else(echo: SyncSandbox):
    with echo.forward(7000, timeout=60) as address:
        stuck = socket.create_connection(address, timeout=2)
        with stuck:
            with pytest.raises(TimeoutError):
                stuck.sendall(bytes(256 << 20))  # more than all buffers of the kernel
            with socket.create_connection(address, timeout=10) as line:
                line.sendall(b"still there")
                assert line.recv(100) == b"still there"


def test_a_port_where_nobody_listens(sandbox: SyncSandbox):
    with (
        sandbox.forward(9, timeout=20) as address,
        socket.create_connection(address, timeout=10) as line,
    ):
        assert line.recv(10) == b""
    assert sandbox.exec("echo fine", timeout=10).stdout == "fine\n"


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_no_port(shared: SyncSandbox, port: int):
    with pytest.raises(SandboxError, match="1 to 65535"):
        shared.forward(port, timeout=5)


def test_the_end_of_the_sandbox_ends_its_connections(substrate: str, options):
    async def main() -> None:
        async with Client(substrate=substrate, **options) as client:
            sandbox = await client.create(Container(image="python"))
            process = await sandbox.run(["python3", "-c", ECHO], timeout=60)
            await process.read()
            async with sandbox.forward(7000, timeout=60) as (host, port):
                stream = await anyio.connect_tcp(host, port)
                await stream.send(b"one")
                assert await stream.receive() == b"one"
                await sandbox.stop()
                with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    await stream.receive()
                await stream.aclose()
            await process.close()

    anyio.run(main)
