"""Clients elsewhere: with a token they can do over TLS what clients here can; others nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from fathom.errors import DaemonLost, PolicyDenied, SandboxError, SandboxLost, Unsupported
from fathom.sandbox import Client, Container, Fn, SyncClient, conformance
from fathom.sandbox.edge import certificate, guard
from fathom.sandbox.edge.tokens import Tokens, digest_of
from tests.sandbox.edge.daemon import Daemon


@pytest.fixture(scope="module")
def token(far: Daemon) -> str:
    return far.tokens.new("tests")


@pytest.fixture
def client(far: Daemon, token: str) -> Iterator[SyncClient]:
    with SyncClient(far.url, token=token, fingerprint=far.fingerprint) as made:
        yield made
        for entry in made.list():
            made.attach(entry["id"]).stop()


def trusting(far: Daemon, token: str) -> SyncClient:
    return SyncClient(far.url, token=token, fingerprint=far.fingerprint)


def raw(far: Daemon) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sock = socket.create_connection(("127.0.0.1", far.port), 20)
    return context.wrap_socket(sock)


def exchange(far: Daemon, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes and return the answer's status, headers and body."""
    with raw(far) as sock:
        sock.sendall(data)
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = sock.recv(1 << 16)
            assert piece, answer
            answer += piece
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        while len(body) < int(headers["content-length"]):
            body += sock.recv(1 << 16)
        return int(first.split()[1]), headers, body


def request(op: str, token: str = "", body: bytes = b"{}", *more: str) -> bytes:
    head = [f"POST /v1/{op} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    head += [f"Authorization: Bearer {token}"] if token else []
    return ("\r\n".join([*head, *more]) + "\r\n\r\n").encode() + body


# What a client can do ------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_conformance(far: Daemon, token: str):
    async def run() -> conformance.Report:
        async with Client(far.url, token=token, fingerprint=far.fingerprint) as client:
            return await conformance.run(lambda: client.create(Container()))

    report = anyio.run(run)
    assert report.passed, str(report)


def test_streams_terminals_ports_and_copies(client: SyncClient):
    sandbox = client.create(Container(image="python"), group="g")
    with sandbox.run("cat; echo end", timeout=30) as process:
        process.write("as it comes\n")
        assert process.read() == ("stdout", b"as it comes\n")
        process.write(b"x" * 3_000_000)
        process.close_input()
        assert sum(len(data) for _, data in process) == 3_000_004
    size = ["python3", "-c", "import os; print(*os.get_terminal_size())"]
    with sandbox.pty(size, timeout=30, rows=33, columns=99) as process:
        assert b"99 33" in b"".join(data for _, data in process)
    serve = "python3 -m http.server 8000 > /dev/null 2>&1 & echo hello > page; sleep 1"
    sandbox.exec(serve, timeout=30)
    with sandbox.forward(8000, timeout=30) as where:
        deadline = time.monotonic() + 20
        while True:
            with socket.create_connection(where, 10) as sock:
                sock.sendall(b"GET /page HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda sock=sock: sock.recv(4096), b""))
            if answer.endswith(b"hello\n"):
                break
            assert time.monotonic() < deadline, answer
            time.sleep(0.2)
    assert client.attach(sandbox.id).files.read("page") == b"hello\n"
    sandbox.files.write("big", b"z" * 5_000_000)
    assert len(sandbox.files.read("big")) == 5_000_000
    if sandbox.caps.fork:
        (copy,) = sandbox.fork()
        assert copy.files.read("page") == b"hello\n"
        sandbox.pause()
        assert sandbox.exec("echo on", timeout=20).stdout == "on\n"
        snapshot = sandbox.snapshot()
        later = client.restore(snapshot, Container(image="python"))
        assert later.files.read("page") == b"hello\n"


def test_functions_keys_and_killed_for_memory(client: SyncClient):
    with client.functions(Fn(workers=1, maximum=1)) as functions:
        assert functions.call("def main(x): return x + 1", 41, timeout=20).value == 42
    sandbox = client.create(Container(memory="64MiB"), key="tls/1")
    assert client.create(Container(memory="64MiB"), key="tls/1").id == sandbox.id
    first = sandbox.exec("echo $RANDOM", timeout=20, op="o/1")
    again = sandbox.exec("echo $RANDOM", timeout=20, op="o/1")
    assert (again.stdout, again.replayed) == (first.stdout, True)
    if sandbox.caps.reports_oom:
        eat = "head -c 256M /dev/zero | tail -c 1G > /dev/null"
        assert sandbox.exec(eat, timeout=30).oom_killed
        assert not sandbox.exec("true", timeout=30).oom_killed
    with pytest.raises(SandboxLost):
        client.attach("sb-1-0123456789")
    with pytest.raises(PolicyDenied, match="--work"):
        client.create(Container(workdir="/etc"))


# Who may -------------------------------------------------------------------------------------


@pytest.fixture
def fresh(cache_dir: Path, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of a test's own, where refused tokens shall not count for other tests."""
    base = Path("/run" if os.geteuid() == 0 else "/tmp")
    made = Daemon(base / f"fathom-fresh-test-{os.getpid()}", cache_dir, tls=tmp_path)
    made.start()
    yield made
    made.remove()


def test_without_a_good_token_nothing_is_told(fresh: Daemon):
    far, token = fresh, fresh.tokens.new("good")

    def denied(text: str) -> None:
        with trusting(far, text) as client, pytest.raises(PolicyDenied, match="token"):
            client.list()

    for text in (token[:-1], token + "x", digest_of(token)):
        denied(text)
    with pytest.raises(SandboxError, match="token="):
        SyncClient(far.url, fingerprint=far.fingerprint)
    with pytest.raises(SandboxError, match="token="):
        SyncClient(far.url, token="a\r\nX: y", fingerprint=far.fingerprint)
    for path in ("list", "create", "open", "nothing", "../metrics"):
        status, headers, body = exchange(far, request(path))
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert set(json.loads(body)) == {"error", "message"}


def test_tokens_end(far: Daemon):
    """By their time, and when they are revoked: open lines as well, within two seconds."""
    text = far.tokens.new("short", days=2 / 86400)
    with trusting(far, text) as client:
        client.list()
        time.sleep(2.2)
        with pytest.raises(PolicyDenied):
            client.list()
    text = far.tokens.new("gone")
    with pytest.raises(SandboxError, match="already"):
        far.tokens.new("gone")
    with trusting(far, text) as client:
        sandbox = client.create(Container())
        with sandbox.run("sleep 60", timeout=60) as process:
            far.tokens.revoke("gone")
            began = time.monotonic()
            with pytest.raises(SandboxLost):
                process.read() and process.read()
            assert time.monotonic() - began < 3
        with pytest.raises(PolicyDenied):
            client.list()
    with far.client() as near:
        near.attach(sandbox.id).stop()
    with pytest.raises(SandboxError, match="no token"):
        far.tokens.revoke("nobody")


def test_a_token_for_looking_changes_nothing(far: Daemon, client: SyncClient):
    sandbox = client.create(Container())
    text = far.tokens.new("eyes", scope="look")
    with trusting(far, text) as looking:
        assert [entry["id"] for entry in looking.list()] == [sandbox.id]
        with pytest.raises(PolicyDenied, match="not good for create"):
            looking.create(Container())
        with pytest.raises(PolicyDenied, match="not good for attach"):
            looking.attach(sandbox.id)
    for op in ("destroy", "open", "freeze", "token", "idle", "ready"):
        body = json.dumps({"id": sandbox.id, "ids": [sandbox.id]}).encode()
        status, _, answer = exchange(far, request(op, text, body, "Upgrade: fathom-line"))
        assert (status, json.loads(answer)["error"]) == (403, PolicyDenied.code), op
    assert sandbox.exec("echo alive", timeout=20).stdout == "alive\n"


def test_what_the_parent_does_for_the_api_process_alone(far: Daemon, token: str):
    for op in ("token", "idle", "ready"):
        status, _, body = exchange(far, request(op, token, b'{"digest": "%s"}' % (b"0" * 64)))
        assert (status, json.loads(body)["error"]) == (501, Unsupported.code), op


def test_tokens_at_rest(far: Daemon, token: str):
    data = far.tokens.path.read_text()
    assert token not in data
    assert digest_of(token) in data
    assert far.tokens.path.stat().st_mode & 0o777 == 0o600
    far.tokens.path.chmod(0o644)
    try:
        with pytest.raises(SandboxError, match="mode 600"):
            far.tokens.list()
    finally:
        far.tokens.path.chmod(0o600)


def test_token_files(tmp_path: Path):
    tokens = Tokens(tmp_path / "t" / "tokens.json")
    assert tokens.list() == []
    text = tokens.new("a", days=1)
    assert tokens.find(digest_of(text)).name == "a"
    tokens.revoke("a")
    with pytest.raises(PolicyDenied):
        tokens.find(digest_of(text))
    assert tokens.find(digest_of(tokens.new("a"))).scope == "use"
    for name in ("", "a b", "../x", "a\n", "x" * 65):
        with pytest.raises(SandboxError):
            tokens.new(name)
    tokens.path.write_text("{")
    with pytest.raises(SandboxError, match="damaged"):
        tokens.find(digest_of(text))


# Whom a client trusts ------------------------------------------------------------------------


def test_certificates(far: Daemon, token: str, tmp_path: Path):
    assert far.tls is not None
    own = far.tls / "certificate.pem"
    with SyncClient(far.url, token=token, ca=own) as client:
        client.list()
    with SyncClient(far.url.replace("127.0.0.1", "localhost"), token=token, ca=own) as client:
        client.list()
    certificate.own(tmp_path, "127.0.0.1")
    other = tmp_path / "certificate.pem"
    wrong: list[dict[str, Any]] = [
        {"ca": other},
        {"fingerprint": certificate.fingerprint(other)},
        {"fingerprint": "sha256:" + "0" * 64},
        {},
    ]
    for how in wrong:
        with SyncClient(far.url, token=token, **how) as client:
            with pytest.raises(DaemonLost, match="certificate"):
                client.list()
    for bad in ("", "sha256:00", "x" * 64):
        with pytest.raises(SandboxError, match="fingerprint"):
            SyncClient(far.url, token=token, fingerprint=bad)
    with pytest.raises(SandboxError, match="certificates"):
        SyncClient(far.url, token=token, ca=tmp_path / "none")
    for address in ("https://", "https://x/y", "http://127.0.0.1:1"):
        with pytest.raises(SandboxError):
            SyncClient(address, token=token)


def test_a_stranger_who_answers_gets_no_token(far: Daemon, token: str, tmp_path: Path):
    """The certificate is compared before anything is sent."""
    certificate.own(tmp_path, "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            sock, _ = server.accept()
            with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as tls:
                tls.settimeout(10)
                heard.append(tls.recv(4096))

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        with SyncClient(url, token=token, fingerprint=far.fingerprint) as client:
            with pytest.raises(DaemonLost, match="somebody else"):
                client.list()
        thread.join(20)
    assert b"".join(heard) == b""


# Abuse ---------------------------------------------------------------------------------------


def test_plain_text_on_the_port(far: Daemon, client: SyncClient, token: str):
    for data in (request("list", token), b"\0" * 5000, b"\x16\x03\x01" + b"\xff" * 3000, b""):
        with socket.create_connection(("127.0.0.1", far.port), 20) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := sock.recv(4096):
                    answer += piece
        assert b"HTTP" not in answer
        assert b"sandboxes" not in answer
    assert client.list() == []
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", far.port), 20) as sock:
        with pytest.raises(ssl.SSLError):
            old.wrap_socket(sock)


MALFORMED: list[tuple[bytes, int]] = [
    (b"POST /v1/list HTTP/1.1\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431),
    (b"POST /v1/list HTTP/1.1\r\n" + b"X: y\r\n" * 4000 + b"\r\n", 431),
    (b"GET " + b"/x" * 9000 + b" HTTP/1.1\r\n\r\n", 431),
    (b"nonsense\r\n\r\n", 400),
    (b"POST /v1/list HTTP/1.0\r\n\r\n", 400),
    (b"POST http://x/v1/list HTTP/1.1\r\n\r\n", 400),
    (b"POST /v1/list HTTP/1.1\r\nno colon\r\n\r\n", 400),
    (b"POST /v1/list HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", 400),
    (b"POST /v1/list HTTP/1.1\r\nA : b\r\n\r\n", 400),
    (b"POST /v1/list HTTP/1.1\r\nA: b\0c\r\n\r\n", 400),
    (b"POST /v1/list HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    (b"POST /v1/list HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST /v1/list HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", 400),
    (b"POST /v1/list HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n", 413),
    (b"POST /v1/list HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 413),
    (b"POST /v1/list HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
]


def test_malformed_requests(far: Daemon, client: SyncClient):
    for data, status in MALFORMED:
        assert exchange(far, data)[0] == status, data[:60]
    assert client.list() == []


def test_malformed_bodies(far: Daemon, token: str, client: SyncClient):
    for body in (b"[", b"[]", b"5", b"\xff", b"[" * 50_000, b'{"a":' * 10_000):
        status, _, answer = exchange(far, request("create", token, body))
        assert (status, json.loads(answer)["error"]) == (400, SandboxError.code), body[:20]
    for op, more in (("open", ""), ("nothing", ""), ("../list", ""), ("list/", "")):
        assert exchange(far, request(op, token, b"{}"))[0] in (400, 404, 501), (op, more)
    for line in ("GET /v1/list", "PUT /v1/list", "POST /list", "POST /overview", "GET /../key.pem"):
        head = f"{line} HTTP/1.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        assert exchange(far, head)[0] in (400, 404), line
    # A body with the fields of a request in it is that request and no other.
    status, _, answer = exchange(far, request("list", token, b'{"op": "destroy", "id": "x"}'))
    assert status == 400
    assert client.list() == []


def test_slow_clients_hold_nobody_up(far: Daemon, client: SyncClient):
    """One address may have so many connections that say nothing; then they are ended."""
    slow: list[socket.socket] = []
    assert client.list() == []
    took: list[float] = []

    def drip() -> None:
        began = time.monotonic()
        with contextlib.suppress(OSError), raw(far) as sock:
            for byte in request("list"):
                sock.sendall(bytes([byte]))
                time.sleep(0.3)
        took.append(time.monotonic() - began)

    dripping = threading.Thread(target=drip)
    dripping.start()
    time.sleep(0.2)
    try:
        for number in range(guard.STRANGERS_EACH + 10):
            sock = socket.create_connection(("127.0.0.1", far.port), 20)
            sock.sendall(b"\x16\x03\x01" if number % 2 else b"")
            slow.append(sock)
        # Who has shown a token already is served all the while.
        assert client.list() == []
        time.sleep(0.5)
        assert sum(_is_ended(sock) for sock in slow) >= 8
        began = time.monotonic()
        while sum(_is_ended(sock) for sock in slow) < len(slow):
            assert time.monotonic() - began < 20
            assert client.list() == []
            time.sleep(0.5)
    finally:
        for sock in slow:
            sock.close()
    dripping.join(30)
    assert took[0] < 12


def _is_ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(4096) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_the_page_and_the_metrics(far: Daemon, client: SyncClient, token: str):
    sandbox = client.create(Container(), group="shown")
    status, headers, body = exchange(far, b"GET / HTTP/1.1\r\n\r\n")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert b"<html" in body
    assert exchange(far, b"GET /overview HTTP/1.1\r\n\r\n")[0] == 401
    with_token = f"Authorization: Bearer {token}\r\n\r\n".encode()
    status, _, body = exchange(far, b"GET /overview HTTP/1.1\r\n" + with_token)
    assert status == 200
    assert [entry["id"] for entry in json.loads(body)["sandboxes"]] == [sandbox.id]
    status, headers, body = exchange(far, b"GET /metrics HTTP/1.1\r\n" + with_token)
    lines = dict(line.rsplit(" ", 1) for line in body.decode().splitlines())
    assert lines["fathom_sandboxes"] == "1"
    assert int(lines["fathom_tokens_refused_total"]) > 0
    assert int(lines['fathom_requests_total{op="create",code="ok"}']) > 0


def test_guessing_is_slowed(fresh: Daemon):
    """After so many refused tokens of an address not even the good one is looked at for a while."""
    good = fresh.tokens.new("good")
    with trusting(fresh, good) as client:
        client.list()
    statuses = [exchange(fresh, request("list", f"x{n}"))[0] for n in range(guard.FAILURES + 3)]
    assert statuses == [401] * guard.FAILURES + [429] * 3
    status, headers, _ = exchange(fresh, request("list", good))
    assert status == 429
    assert 0 < int(headers["retry-after"]) <= guard.WINDOW
    with fresh.client() as near:  # who is on this machine has another door
        assert near.list() == []


def test_addresses_that_count_as_one():
    assert guard.source("::ffff:10.0.0.1") == "10.0.0.1"
    assert guard.source("2001:db8:1:2:3::1") == guard.source("2001:db8:1:2::9")
    assert guard.source("2001:db8:1:2::1") != guard.source("2001:db8:1:3::1")
    made = guard.Guard()
    for number in range(10_000):
        made.fail(f"10.0.{number >> 8}.{number & 255}")
    assert len(made._failures) <= 4096
