"""The daemon: its sandboxes outlive clients and itself, expire, and are admitted or refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from shutil import rmtree

import anyio
import pytest

from fathom.errors import DaemonLost, KeyConflict, PolicyDenied, SandboxLost, Unsupported
from fathom.sandbox import Client, Container, Net, SyncClient, messages, state
from fathom.sandbox.edge import SOCKET
from fathom.sandbox.images import ImageError, Store
from tests.sandbox.edge.daemon import REPOSITORY, Daemon, environment


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
        assert client.create(Container(), key="job/1", group="job").id == sandbox.id
        with pytest.raises(KeyConflict, match="other values"):
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
        assert client.create(Container(), key="job/1", group="job").id == name
        if sandbox.caps.fork:
            (copy,) = sandbox.fork()
            assert copy.exec("cat f", timeout=20).stdout == "kept\n"
            assert {e["parent"] for e in client.list()} == {"", name}
        sandbox.stop()
        with pytest.raises(SandboxLost):
            client.attach(name)


def test_sandboxes_outlive_a_daemon_that_was_told_to_end(daemon: Daemon):
    with daemon.client() as client:
        name = client.create(Container()).id
        client.attach(name).exec("echo kept > f", timeout=20)
    daemon.end(signal.SIGTERM)
    daemon.start()
    with daemon.client() as client:
        assert client.attach(name).exec("cat f", timeout=20).stdout == "kept\n"


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
@pytest.mark.parametrize("what", ["daemon", "node"])
def test_what_was_deleted_stays_deleted_in_copies_after_an_adoption(daemon: Daemon, what: str):
    name = f"adoption-test/{what}"
    spec = Container(image=name, memory="64MiB", disk="8MiB")
    listing = "find . | sort; cat d/*"
    try:
        with daemon.client() as client:
            with client.create(Container(memory="64MiB", disk="8MiB")) as base:
                files = "echo old > secret; mkdir d e; echo old > d/old; echo old > e/old"
                base.exec(files, timeout=20)
                base.pack_diff(name=name)
            sandbox = client.create(spec)
            sandbox.exec("rm -r secret d e; mkdir d; echo new > d/new", timeout=20)
            shown = sandbox.exec(listing, timeout=20).stdout
            assert shown == ".\n./d\n./d/new\nnew\n"
            if what == "node":
                (node,) = daemon.processes("fathom.sandbox.node")
                os.kill(node, signal.SIGKILL)
        if what == "daemon":
            daemon.end(signal.SIGKILL)
            daemon.start()
        with daemon.client() as client:
            (entry,) = [one for one in client.list() if one["id"] == sandbox.id]
            sandbox = client.attach(entry["id"])
            assert sandbox.exec(listing, timeout=20).stdout == shown
            (fork,) = sandbox.fork()
            assert fork.exec(listing, timeout=20).stdout == shown
            kept = sandbox.snapshot()
            restored = client.restore(kept, spec)
            assert restored.exec(listing, timeout=20).stdout == shown
            sandbox.pack_diff(name=f"{name}/later")
            later = client.create(replace(spec, image=f"{name}/later"))
            assert later.exec(listing, timeout=20).stdout == shown
            rmtree(daemon.cache / "snapshots" / kept.id)
    finally:
        with Store(daemon.cache / "store") as store:
            for one in (name, f"{name}/later"):
                with suppress(ImageError):
                    store.untag(one)


@pytest.mark.usefixtures("need_root")
def test_the_folder_that_an_agent_keeps_leads_nowhere(daemon: Daemon):
    with daemon.client() as client:
        sandbox = client.create(Container())
        session = json.loads((daemon.folder / sandbox.id / "session.json").read_text())
        kept = f"/proc/{session['pid']}/fd/100"
        above = os.path.join(kept, "..", "..")
        assert os.path.samefile(kept, above)
        assert sorted(os.listdir(kept)) == sorted(os.listdir(above)) == ["tmp", "work"]
        # No command has it, and none reaches that of the agent.
        look = "ls /proc/self/fd /proc/1/fd; ls /proc/1/fd/100/; ls /proc/self/fd/100/"
        result = sandbox.exec(look, timeout=20)
        assert "100" not in result.stdout.split()
        assert result.stderr.count("ermission denied") >= 2


@pytest.mark.usefixtures("need_root")
def test_a_killed_node_is_replaced(daemon: Daemon):
    """Its sandboxes go on; the next node knows them and their policies again."""
    with socket.create_server(("127.0.0.6", 0)) as server, daemon.client() as client:
        address = server.getsockname()
        sandbox = client.create(Container(image="python"), net=Net.deny().address(*address))
        (node,) = daemon.processes("fathom.sandbox.node")
        os.kill(node, signal.SIGKILL)
        assert sandbox.exec("echo there", timeout=20).stdout == "there\n"
        reach = f"import socket; socket.create_connection({address!r}, 5)"
        deadline = time.monotonic() + 20
        while sandbox.exec(["python3", "-c", reach], timeout=20).exit_code:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        sandbox.pause()
        assert sandbox.exec("echo again", timeout=20).stdout == "again\n"


def test_a_killed_api_process_is_replaced(daemon: Daemon):
    """Who is connecting waits for the next one; a command that runs is not even disturbed."""
    with daemon.client() as client:
        sandbox = client.create(Container(), key="k")
        with sandbox.run("read x; echo got $x", timeout=30) as process:
            for _ in range(3):
                (api,) = daemon.processes("fathom.sandbox.edge.api")
                os.kill(api, signal.SIGKILL)
                deadline = time.monotonic() + 20
                while True:
                    try:
                        assert client.create(Container(), key="k").id == sandbox.id
                        break
                    except DaemonLost:
                        assert time.monotonic() < deadline
            process.write("word\n")
            assert process.read() == ("stdout", b"got word\n")
        assert sandbox.exec("echo on", timeout=20).stdout == "on\n"


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
            with contextlib.suppress(SandboxLost):
                idle.stats()  # who only looks keeps nothing from being idle
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


def test_those_that_wait_count(daemon: Daemon):
    """What was made in advance is handed out, never more than admitted, and gone afterwards."""
    with daemon.client() as client:
        spec = Container(hostname="waits")
        with pytest.raises(PolicyDenied):
            client.prewarm(spec, 7)
        client.prewarm(spec, 5)
        assert client.list() == []
        client.create(Container())
        with pytest.raises(PolicyDenied, match="6 sandboxes of 6"):
            client.create(Container())
        for _ in range(5):
            client.create(spec)
        with pytest.raises(PolicyDenied):
            client.create(spec)
        assert len(client.list()) == 6


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
        daemon.command(5),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env=environment(),
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


def test_odd_requests_of_a_daemon(daemon: Daemon):
    """What a client of another language may send."""
    host = Client("edge", runtime_dir=daemon.folder)._host  # pyright: ignore
    for name, value in [
        ("ttl", "soon"),
        ("pids", "many"),
        ("cpu", [1]),
        ("memory", {"a": 1}),
        ("image", 7),
        ("workdir", 5),
        ("hostname", [1]),
    ]:
        request = {"spec": {"type": "container", name: value}}
        answer = anyio.run(host.ask, "create", request)  # pyright: ignore
        assert answer["error"].startswith("sandbox"), name
        for words in ("must be real", "argument of type", "NoneType", "unpack", "not supported"):
            assert words not in answer["message"]
    for net in (5, {"domains": [[]]}, {"addresses": [1]}, {"mirrors": 3}):
        request = {"spec": {"type": "container"}, "net": net}
        answer = anyio.run(host.ask, "create", request)  # pyright: ignore
        assert "unpack" not in answer["message"]
        assert "iterable" not in answer["message"]
