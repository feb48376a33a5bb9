"""A machine's network: the same policies as a container's, held outside of the guest."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from fathom.sandbox import Net, SyncClient, SyncSandbox
from tests.sandbox.test_net import Handler
from tests.sandbox.vm.conftest import SPEC

TIMEOUT = 30.0
pytestmark = pytest.mark.usefixtures("need_machines")


@pytest.fixture
def here() -> str:
    """An address of this machine that is not loopback: a guest's loopback is its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(sock.getsockname()[0])


@pytest.fixture
def ports(here: str) -> Iterator[tuple[int, int]]:
    """Two servers of this machine, of which one will be allowed."""
    servers = [ThreadingHTTPServer((here, 0), Handler) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield servers[0].server_address[1], servers[1].server_address[1]
    for server in servers:
        server.shutdown()
        server.server_close()


def get(sandbox: SyncSandbox, host: str, port: int, path: str = "/") -> str:
    ask = f"GET {path} HTTP/1.0\\r\\nHost: x.example\\r\\n\\r\\n"
    command = f"exec 3<>/dev/tcp/{host}/{port} && printf '{ask}' >&3 && cat <&3"
    return sandbox.exec(["timeout", "4", "bash", "-c", command], timeout=TIMEOUT).stdout


def test_a_policy_holds_for_a_machine(options: dict[str, Path], here: str, ports: tuple[int, int]):
    allowed, other = ports
    mirrors = {"pypi": f"http://{here}:{allowed}/index"}
    with SyncClient(mirrors=mirrors, **options) as client:
        sandbox = client.create(SPEC, net=Net.deny().address(here, allowed).mirror("pypi"))
        assert "GET /" in get(sandbox, here, allowed)
        index = sandbox.exec("echo $PIP_INDEX_URL", timeout=TIMEOUT).stdout.strip()
        assert index.startswith("http://10.0.2.2:")
        proxy = int(index.split(":")[2].split("/")[0])
        assert "GET /index/simple/a" in get(sandbox, "10.0.2.2", proxy, "/mirror/pypi/simple/a")
        # Neither this machine's other ports, nor addresses that the emulator has of its own.
        for host, port in ((here, other), ("10.0.2.2", 22)):
            assert get(sandbox, host, port) == ""
        outside = get(sandbox, "10.0.2.2", proxy, f"http://{here}:{other}/")
        assert "403" in outside or outside == ""
        # A copy has a network of its own, and no policy.
        with sandbox.fork()[0] as copy:
            assert get(copy, here, allowed) == ""
            assert copy.exec("cat /proc/net/route | wc -l", timeout=TIMEOUT).stdout == "1\n"
        sandbox.phase("closed")
        assert get(sandbox, here, allowed) == ""
        sandbox.phase("open again", net=Net.deny().address(here, allowed))
        assert "GET /" in get(sandbox, here, allowed)
