"""Network policies: what is allowed works, all else does not, and a policy is replaced whole.

Every server here listens on the loopback device of this machine; 127.0.0.2 and its like are not the
sandbox's own loopback once a policy names them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from fathom.errors import SandboxError, Unsupported
from fathom.sandbox import Container, Net, SyncClient, SyncSandbox
from fathom.sandbox.net import PROXY_PORT, RELAY_PORT
from fathom.sandbox.relay import MOST_CONNECTIONS

FETCH = """
import sys, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=4).read().decode())
except urllib.error.HTTPError as error:
    print("HTTP", error.code)
except OSError as error:
    print("no", error)
"""
RAW = """
import socket, sys
host, port, text = sys.argv[1], int(sys.argv[2]), sys.argv[3]
try:
    with socket.create_connection((host, port), timeout=2) as s:
        s.settimeout(4)
        s.sendall(text.encode().decode("unicode_escape").encode())
        answer = b""
        while piece := s.recv(4096):
            answer += piece
        print(answer.decode(errors="replace"))
except OSError as error:
    print("no", error)
"""


class Handler(BaseHTTPRequestHandler):
    seen: ClassVar[list[str]] = []

    def _answer(self) -> None:
        Handler.seen.append(f"{self.command} {self.path}")
        body = f"{self.command} {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.2", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(autouse=True)
def _root(need_root: None) -> None:
    Handler.seen.clear()


@pytest.fixture(scope="module")
def box(runtime_dir: Path, cache_dir: Path, port: int) -> Iterator[SyncSandbox]:
    mirrors = {"pypi": f"http://127.0.0.2:{port}/index"}
    with SyncClient(runtime_dir=runtime_dir, cache_dir=cache_dir, mirrors=mirrors) as client:
        sandbox = client.create(Container(image="python"))
        sandbox.phase("warm", net=Net.deny().mirror("pypi"))  # starts what a policy needs
        yield sandbox


def fetch(sandbox: SyncSandbox, url: str) -> str:
    return sandbox.exec(["python3", "-c", FETCH, url], timeout=20).output.strip()


def raw(
    sandbox: SyncSandbox, host: str, port: int, text: str = "GET / HTTP/1.0\\r\\n\\r\\n"
) -> str:
    return sandbox.exec(["python3", "-c", RAW, host, str(port), text], timeout=20).output


def test_an_address_is_reached_and_its_neighbours_are_not(box: SyncSandbox, port: int):
    before = len(box.network_log())
    version = box.phase("a", net=Net.deny().address("127.0.0.2", port))
    assert fetch(box, f"http://127.0.0.2:{port}/x") == "GET /x"
    assert Handler.seen == ["GET /x"]
    with socket.create_server(("127.0.0.3", port)), socket.create_server(("127.0.0.2", 0)) as near:
        assert raw(box, "127.0.0.3", port).startswith("no")
        assert raw(box, "127.0.0.2", near.getsockname()[1]).startswith("no")
    judged = [entry for entry in box.network_log()[before:] if "port" in entry]
    assert judged
    for entry in judged:
        assert entry["allowed"] == (entry["port"] == port)
    assert box.phase("b", net=Net.deny()) == version + 1


def test_a_policy_replaces_the_former_as_a_whole(box: SyncSandbox, port: int):
    box.phase("a", net=Net.deny().address("127.0.0.2", port).mirror("pypi"))
    assert fetch(box, f"http://127.0.0.2:{port}/1") == "GET /1"
    box.phase("b", net=Net.deny().address("127.0.0.9", 9))
    assert fetch(box, f"http://127.0.0.2:{port}/2").startswith("no")
    assert fetch(box, f"http://127.0.0.1:{PROXY_PORT}/mirror/pypi/x") == "HTTP 403"
    box.phase("c")
    assert fetch(box, f"http://127.0.0.2:{port}/3").startswith("no")
    assert Handler.seen == ["GET /1"]


FLOOD = """
import os, socket, sys, time
held = []
for _ in range(int(sys.argv[1])):
    try:
        held.append(socket.create_connection((sys.argv[2], int(sys.argv[3])), timeout=5))
    except OSError:
        pass
time.sleep(0.3)
alive = 0
for one in held:
    one.setblocking(False)
    try:
        one.recv(1)
    except BlockingIOError:
        alive += 1
    except OSError:
        pass
print(alive, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("where", ["proxy", "address"])
def test_a_flood_of_connections_stays_small(
    box: SyncSandbox, client: SyncClient, port: int, where: str
):
    """What one sandbox holds open is bounded, and the others do not notice."""
    other = client.create(Container(image="python"))
    other.phase("a", net=Net.deny().address("127.0.0.2", port))
    with socket.create_server(("127.0.0.5", 0), backlog=512) as server:
        box.phase("a", net=Net.deny().address("127.0.0.2", port).address(*server.getsockname()))
        target = ("127.0.0.1", PROXY_PORT) if where == "proxy" else server.getsockname()
        flood = ["python3", "-c", FLOOD, "400", target[0], str(target[1])]
        with box.run(flood, timeout=60) as process:
            said = process.read()
            assert said is not None
            assert int(said[1]) == MOST_CONNECTIONS
            assert fetch(box, f"http://127.0.0.2:{port}/own").startswith("no")
            assert fetch(other, f"http://127.0.0.2:{port}/x") == "GET /x"
    for _ in range(20):
        if fetch(box, f"http://127.0.0.2:{port}/after") == "GET /after":
            break
    assert fetch(box, f"http://127.0.0.2:{port}/again") == "GET /again"
    assert [e for e in box.network_log() if e.get("kind") == "too_many"]


def test_open_connections_end_with_their_policy(box: SyncSandbox, port: int):
    with socket.create_server(("127.0.0.4", 0)) as server:
        where = server.getsockname()[1]
        box.phase("a", net=Net.deny().address("127.0.0.4", where))
        code = (
            f"import socket; s = socket.create_connection(('127.0.0.4', {where})); "
            "import os; os.write(1, b'up'); os.write(1, repr(s.recv(9)).encode())"
        )
        with box.run(["python3", "-u", "-c", code], timeout=20) as process:
            assert process.read() == ("stdout", b"up")
            far, _ = server.accept()
            with far:
                box.phase("b")
                assert process.read() == ("stdout", b"b''")


def test_mirrors_are_read_and_never_written(box: SyncSandbox, port: int):
    box.phase("a", net=Net.deny().mirror("pypi"))
    base = f"http://127.0.0.1:{PROXY_PORT}/mirror"
    assert fetch(box, f"{base}/pypi/simple/numpy/") == "GET /index/simple/numpy/"
    assert fetch(box, f"{base}/npm/x") == "HTTP 403"
    for head in (
        "POST /mirror/pypi/x HTTP/1.1\\r\\n\\r\\n",
        "PUT /mirror/pypi/x HTTP/1.1\\r\\n\\r\\n",
        "GET /mirror/pypi/../../secret HTTP/1.1\\r\\n\\r\\n",
        f"GET http://127.0.0.2:{port}/x HTTP/1.1\\r\\n\\r\\n",
        f"CONNECT 127.0.0.2:{port} HTTP/1.1\\r\\n\\r\\n",
    ):
        assert " 403 " in raw(box, "127.0.0.1", PROXY_PORT, head), head
    for head in (  # a second request hidden in the first, and a way out in other letters
        "GET /mirror/pypi/x HTTP/1.1\\nFoo: b\\n\\nPOST /y HTTP/1.1\\r\\n\\r\\n",
        "GET /mirror/pypi/x HTTP/1.1\\r\\nFoo: b\\n\\nPOST /y HTTP/1.1\\r\\n\\r\\n",
        "GET /mirror/pypi/%2e%2e/secret HTTP/1.1\\r\\n\\r\\n",
        "GET /mirror/pypi/%252e%252e/secret HTTP/1.1\\r\\n\\r\\n",
    ):
        answer = raw(box, "127.0.0.1", PROXY_PORT, head)
        assert " 400 " in answer or " 403 " in answer, head
    assert Handler.seen == ["GET /index/simple/numpy/"]
    shown = box.exec("echo $PIP_INDEX_URL", timeout=10).stdout
    assert shown == f"{base}/pypi/simple/\n"


def test_domains_by_the_proxy(box: SyncSandbox, port: int):
    box.phase("a", net=Net.deny().domain("localhost", port, private=True))
    head = f"GET http://localhost:{port}/d HTTP/1.1\\r\\nHost: other\\r\\n\\r\\n"
    # The name leads to 127.0.0.1, where nothing of ours listens; that it was tried is enough here.
    assert " 502 " in raw(box, "127.0.0.1", PROXY_PORT, head)
    for name in ("example.org", "localhost.example.org", "xlocalhost", "127.0.0.2"):
        head = f"CONNECT {name}:{port} HTTP/1.1\\r\\n\\r\\n"
        assert " 403 " in raw(box, "127.0.0.1", PROXY_PORT, head), name
    assert " 403 " in raw(box, "127.0.0.1", PROXY_PORT, "CONNECT localhost:1 HTTP/1.1\\r\\n\\r\\n")


def test_a_name_that_leads_to_this_machine_is_no_way_in(box: SyncSandbox, port: int):
    """Whoever owns an allowed name could let it point at this machine's own services."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = server.server_address[1]
        box.phase("a", net=Net.deny().domain("localhost", where))
        head = f"GET http://localhost:{where}/d HTTP/1.1\\r\\n\\r\\n"
        assert " 502 " in raw(box, "127.0.0.1", PROXY_PORT, head)
        box.phase("b", net=Net.deny().domain("localhost", where, private=True))
        assert "GET /d" in raw(box, "127.0.0.1", PROXY_PORT, head)
        server.shutdown()
    assert Handler.seen == ["GET /d"]
    kinds = [entry["kind"] for entry in box.network_log() if not entry["allowed"]]
    assert "private" in kinds


@pytest.mark.parametrize(
    "text",
    [
        "\\r\\n\\r\\n",
        "GET\\r\\n\\r\\n",
        "CONNECT x HTTP/1.1\\r\\n\\r\\n",
        "\\x16\\x03\\x01\\r\\n\\r\\n",
    ],
)
def test_nonsense_to_the_proxy(box: SyncSandbox, port: int, text: str):
    box.phase("a", net=Net.deny().mirror("pypi"))
    answer = raw(box, "127.0.0.1", PROXY_PORT, text)
    assert " 400 " in answer or " 403 " in answer
    assert fetch(box, f"http://127.0.0.1:{PROXY_PORT}/mirror/pypi/ok") == "GET /index/ok"


def test_the_relay_cannot_be_asked_for_more_than_the_rules_turn_to_it(box: SyncSandbox, port: int):
    box.phase("a", net=Net.deny().address("127.0.0.2", port))
    assert "GET" not in raw(box, "127.0.0.1", RELAY_PORT)
    assert Handler.seen == []


def test_other_ways_out_stay_closed_under_a_policy(box: SyncSandbox, port: int):
    box.phase("a", net=Net.deny().address("127.0.0.2", port).mirror("pypi"))
    code = """
import socket, sys
def tried(name, work):
    try:
        work()
        print(name)
    except OSError:
        pass
def udp(host, port, family=socket.AF_INET):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(1)
    s.connect((host, port))
    s.send(b"x")
    s.recv(10)
tried("dns", lambda: udp("1.1.1.1", 53))
tried("dns of the host", lambda: udp("127.0.0.53", 53))
tried("udp to the allowed", lambda: udp("127.0.0.2", int(sys.argv[1])))
tried("ipv6", lambda: udp("2606:4700:4700::1111", 53, socket.AF_INET6))
tried("ipv6 tcp", lambda: socket.create_connection(("::ffff:1.1.1.1", 80), timeout=1))
tried("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
tried("packet", lambda: socket.socket(17, 3, 0))
tried("metadata", lambda: socket.create_connection(("169.254.169.254", 80), timeout=1))
tried("nft", lambda: socket.socket(16, 3, 12))
"""
    result = box.exec(["python3", "-c", code, str(port)], timeout=40)
    assert (result.stdout, result.stderr) == ("", "")
    assert box.exec("ip link add x type dummy; nft flush ruleset", timeout=10).exit_code != 0


def test_what_cannot_be_a_policy():
    for make in (
        lambda: Net.deny().address("example.org", 80),
        lambda: Net.deny().address("1.2.3.4", 0),
        lambda: Net.deny().domain("1.2.3.4"),
        lambda: Net.deny().domain("a b"),
        lambda: Net.deny().domain("*"),
        lambda: Net.deny().domain("x.org", 99999),
        lambda: Net.deny().mirror("../x"),
        lambda: Net.deny().mirror(""),
    ):
        with pytest.raises(SandboxError):
            make()
    with pytest.raises(Unsupported, match="IPv6"):
        Net.deny().address("2001:db8::1", 80)


def is_ours(pid: int) -> bool:
    """Whether a process descends from this one: tests beside it have relays too."""
    while pid > 1 and pid != os.getpid():
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
    return pid == os.getpid()


def kill_relays() -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"fathom.sandbox.relay" in path.read_bytes() and is_ours(int(path.parent.name)):
                os.kill(int(path.parent.name), signal.SIGKILL)


def test_a_relay_that_dies_is_replaced_and_every_policy_holds_again(
    runtime_dir: Path, cache_dir: Path, port: int
):
    mirrors = {"pypi": f"http://127.0.0.2:{port}/index"}
    with SyncClient(runtime_dir=runtime_dir, cache_dir=cache_dir, mirrors=mirrors) as client:
        one, other, none = (client.create(Container(image="python")) for _ in range(3))
        one.phase("a", net=Net.deny().mirror("pypi"))
        other.phase("a", net=Net.deny().address("127.0.0.2", port))
        other.phase("b", net=Net.deny().address("127.0.0.2", port))
        none.phase("a", net=Net.deny().mirror("pypi"))
        none.phase("b")
        time.sleep(2.1)  # one that has just begun is replaced after a pause
        kill_relays()
        deadline = time.monotonic() + 10
        while not [e for e in one.network_log() if e["kind"] == "relay_restarted"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        base = f"http://127.0.0.1:{PROXY_PORT}/mirror"
        assert fetch(one, f"{base}/pypi/again") == "GET /index/again"
        assert fetch(other, f"http://127.0.0.2:{port}/x") == "GET /x"
        assert fetch(other, f"{base}/pypi/x") == "HTTP 403"
        assert fetch(none, f"{base}/pypi/x") == "HTTP 403"
        said = [e for e in other.network_log() if e["kind"] == "relay_restarted"]
        assert [(e["policy"], e["allowed"]) for e in said] == [(2, False)]
        # Killed again, and asked for a policy before anybody could replace it.
        kill_relays()
        assert other.phase("c", net=Net.deny().mirror("pypi")) == 3
        assert fetch(other, f"{base}/pypi/y") == "GET /index/y"
        assert fetch(one, f"{base}/pypi/z") == "GET /index/z"


def test_an_unknown_mirror(box: SyncSandbox):
    with pytest.raises(SandboxError, match="knows no mirror 'go' \\(known: pypi\\)"):
        box.phase("a", net=Net.deny().mirror("go"))


def test_a_sandbox_can_begin_with_a_policy(client: SyncClient, port: int):
    net = Net.deny().address("127.0.0.2", port)
    sandbox = client.create(Container(image="python"), net=net)
    assert fetch(sandbox, f"http://127.0.0.2:{port}/begin") == "GET /begin"
    (copy,) = sandbox.fork()
    assert fetch(copy, f"http://127.0.0.2:{port}/copy").startswith("no")
