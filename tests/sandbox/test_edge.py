"""The daemon: its sandboxes outlive clients and itself, expire, and are admitted or refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.errors import DaemonLost, PolicyDenied, SandboxError, SandboxLost, Unsupported
from fathom.sandbox import Container, Net, SyncClient, messages, state
from fathom.sandbox.edge import SOCKET

REPOSITORY = Path(__file__).resolve().parents[2]
SERVE = """
import sys
from pathlib import Path
from fathom.sandbox.edge.keeper import Keeper
from fathom.sandbox.edge.parent import Parent
from fathom.sandbox.host import LocalHost
folder, cache, most = sys.argv[1:]
Parent(Keeper(LocalHost("auto", Path(cache), Path(folder)), most=int(most), spare=0)).run()
"""


class Daemon:
    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, most: int = 6) -> None:
        arguments = [str(self.folder), str(self.cache), str(most)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *arguments],
            cwd=REPOSITORY,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                with SyncClient("edge", runtime_dir=self.folder) as client:
                    client.list()
                return
            except DaemonLost:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def end(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(20)

    def client(self) -> SyncClient:
        return SyncClient("edge", runtime_dir=self.folder)


@pytest.fixture
def daemon(cache_dir: Path) -> Iterator[Daemon]:
    base = Path("/run" if os.geteuid() == 0 else "/tmp")
    made = Daemon(base / f"fathom-edge-test-{os.getpid()}", cache_dir)
    made.start()
    yield made
    made.end(signal.SIGKILL)
    made.start()
    with made.client() as client:
        for entry in client.list():
            client.attach(entry["id"]).stop()
    made.end(signal.SIGTERM)
    left = [path for path in made.folder.iterdir() if path.is_dir()]
    assert left == []
    for path in made.folder.iterdir():
        path.unlink()
    made.folder.rmdir()


def test_no_client_ends_the_daemon(daemon: Daemon):
    """One that hangs up at once, one that nests too deep, and ones that ask for nonsense."""
    with daemon.client() as client:
        name = client.create(Container()).id
    opened = json.dumps({"op": "open", "id": name}).encode() + b"\n"
    deep = b"[" * 200_000 + b"\n"
    odd = json.dumps({"op": "create", "spec": 5, "net": "x"}).encode() + b"\n"
    for data in (b"", opened, deep, odd, b"5\n", b"\xff\n") * 3:
        with messages.connect(daemon.folder, SOCKET) as sock:
            sock.sendall(data)
    time.sleep(0.5)
    with daemon.client() as client:
        assert client.attach(name).exec("echo here", timeout=20).stdout == "here\n"


def test_sandboxes_outlive_clients_and_the_daemon(daemon: Daemon):
    with daemon.client() as client:
        sandbox = client.create(Container(), key="job/1", group="job")
        sandbox.exec("echo kept > f; (sleep 4321 > /dev/null 2>&1 &)", timeout=20)
        assert client.create(Container(), key="job/1").id == sandbox.id
        with pytest.raises(SandboxError, match="another kind"):
            client.create(Container(pids=9), key="job/1")
        name = sandbox.id
    daemon.end(signal.SIGKILL)
    with daemon.client() as client, pytest.raises(DaemonLost, match="fathom sandbox edge"):
        client.list()
    daemon.start()
    with daemon.client() as client:
        (entry,) = client.list()
        assert (entry["id"], entry["key"], entry["group"]) == (name, "job/1", "job")
        sandbox = client.attach(name)
        shown = sandbox.exec("cat f; pgrep -fc 'sleep 432[1]'", timeout=20).stdout
        assert shown == "kept\n1\n"
        assert client.create(Container(), key="job/1").id == name
        if sandbox.caps.fork:
            (copy,) = sandbox.fork()
            assert copy.exec("cat f", timeout=20).stdout == "kept\n"
            assert {e["parent"] for e in client.list()} == {"", name}
        sandbox.stop()
        with pytest.raises(SandboxLost):
            client.attach(name)


def test_a_result_under_a_key_survives_the_daemon(daemon: Daemon):
    """The command runs on without anybody, once, and its output is told to who asks again."""
    with daemon.client() as client:
        sandbox = client.create(Container())
        name = sandbox.id
        command = "echo begin >> log; sleep 1.5; echo done; echo end >> log"
        code = (
            "import sys; from fathom.sandbox import SyncClient; "
            f"SyncClient('edge', runtime_dir={str(daemon.folder)!r}).attach({name!r})"
            f".exec({command!r}, timeout=30, op='o/1')"
        )
        program = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
        while sandbox.exec("cat log", timeout=20).stdout != "begin\n":
            time.sleep(0.05)
        program.kill()
        program.wait()
    daemon.end(signal.SIGKILL)
    daemon.start()
    with daemon.client() as client:
        sandbox = client.attach(name)
        result = sandbox.exec(command, timeout=30, op="o/1")
        assert (result.exit_code, result.stdout) == (0, "done\n")
        assert sandbox.files.read("log") == b"begin\nend\n"
        assert sandbox.receipt("o/1").state == "finished"


def test_input_of_a_killed_client_is_not_read_twice(daemon: Daemon):
    """Whoever asks again sends all of the input; the command gets what had not come yet."""
    command = "head -c 1000000 > got; touch half; sleep 0.5; cat >> got; wc -c < got"
    with daemon.client() as client:
        sandbox = client.create(Container(disk="64MiB"))
        code = (
            "import sys; from fathom.sandbox import SyncClient; "
            f"SyncClient('edge', runtime_dir={str(daemon.folder)!r}).attach({sandbox.id!r})"
            f".exec({command!r}, timeout=30, op='o/1', stdin=b'x' * {3 << 20})"
        )
        program = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
        while sandbox.exec("test -e half", timeout=20).exit_code:
            time.sleep(0.02)
        program.kill()
        program.wait()
        assert sandbox.receipt("o/1").state == "running"
        result = sandbox.exec(command, timeout=30, op="o/1", stdin=b"x" * (3 << 20))
        assert (result.exit_code, result.stdout) == (0, f"{3 << 20}\n")


@pytest.mark.usefixtures("need_root")
def test_a_paused_sandbox_is_adopted_paused(daemon: Daemon):
    with daemon.client() as client:
        sandbox = client.create(Container())
        sandbox.exec("(while sleep 0.05; do echo >> beat; done) > /dev/null 2>&1 &", timeout=20)
        sandbox.pause()
    daemon.end(signal.SIGKILL)
    daemon.start()
    with daemon.client() as client:
        (entry,) = client.list()
        assert entry["paused"]
        assert client.attach(entry["id"]).exec("echo back", timeout=20).stdout == "back\n"
        assert not client.list()[0]["paused"]


@pytest.mark.usefixtures("need_root")
def test_a_killed_node_is_replaced(daemon: Daemon):
    """Its sandboxes go on; the next node knows them and their policies again."""
    with socket.create_server(("127.0.0.6", 0)) as server, daemon.client() as client:
        address = server.getsockname()
        sandbox = client.create(Container(image="python"), net=Net.deny().address(*address))
        assert daemon.process is not None
        owner = str(daemon.process.pid).encode()
        (node,) = (
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if b"fathom.sandbox.node" in (line := (path / "cmdline").read_bytes())
            and line.split(b"\0")[-2] == owner
        )
        os.kill(node, signal.SIGKILL)
        assert sandbox.exec("echo there", timeout=20).stdout == "there\n"
        reach = f"import socket; socket.create_connection({address!r}, 5)"
        deadline = time.monotonic() + 20
        while sandbox.exec(["python3", "-c", reach], timeout=20).exit_code:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        sandbox.pause()
        assert sandbox.exec("echo again", timeout=20).stdout == "again\n"


def test_time_to_live_and_idle_time(daemon: Daemon):
    with daemon.client() as client:
        short = client.create(Container(ttl=1.0))
        idle = client.create(Container(idle_ttl=1.5))
        kept = client.create(Container())
        with idle.run("sleep 30", timeout=60):
            deadline = time.monotonic() + 20
            while short.id in {entry["id"] for entry in client.list()}:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            time.sleep(1.5)
            assert idle.id in {entry["id"] for entry in client.list()}, "it was in use"
        while idle.id in {entry["id"] for entry in client.list()}:
            assert time.monotonic() < deadline + 20
            time.sleep(0.1)
        assert [entry["id"] for entry in client.list()] == [kept.id]
        with pytest.raises(SandboxLost):
            short.exec("true", timeout=5)


def test_admission(daemon: Daemon):
    with daemon.client() as client:
        made = [client.create(Container()) for _ in range(6)]
        with pytest.raises(PolicyDenied, match="6 sandboxes of 6"):
            client.create(Container())
        made[0].stop()
        client.create(Container())


def test_a_sandbox_that_died_while_nobody_looked(daemon: Daemon):
    with daemon.client() as client:
        sandbox = client.create(Container())
        first = int((daemon.folder / sandbox.id / "first").read_text().split()[0])
    daemon.end(signal.SIGKILL)
    os.kill(first, signal.SIGKILL)
    daemon.start()
    with daemon.client() as client:
        assert client.list() == []
    assert not (daemon.folder / sandbox.id).exists()


def test_nonsense_does_the_daemon_no_harm(daemon: Daemon):
    for data in (b"", b"\n", b"{}\n", b"[]\n", b"\xff\n", b'{"op": "create", "spec": {"x": 1}}\n'):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(daemon.folder / "edge.sock"))
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(10)
            answer = sock.recv(4096)
            assert not answer or "error" in json.loads(answer)
    with daemon.client() as client:
        assert client.list() == []
        with pytest.raises(SandboxLost):
            client.attach("../../etc")


def test_a_second_daemon_in_the_same_folder(daemon: Daemon):
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(daemon.folder), str(daemon.cache), "5"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert "answers in" in done.stderr
    with daemon.client() as client:
        assert client.list() == []


def test_what_needs_a_daemon(client: SyncClient):
    with pytest.raises(Unsupported, match="daemon"):
        client.attach("x")
    with pytest.raises(Unsupported, match="daemon"):
        client.list()


def test_other_clients_leave_a_daemon_s_sandboxes_alone(daemon: Daemon):
    with daemon.client() as client:
        sandbox = client.create(Container())
        assert state.reap(daemon.folder) == []
        assert sandbox.exec("echo alive", timeout=20).stdout == "alive\n"
