"""An API process that was taken over: what it asks of the parent, and what it must not get."""

from __future__ import annotations

import array
import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import PolicyDenied, Unsupported
from fathom.sandbox.edge import MESSAGE_LIMIT, channel
from fathom.sandbox.edge.channel import Channel
from fathom.sandbox.edge.keeper import Keeper
from fathom.sandbox.edge.tokens import Tokens
from fathom.sandbox.edge.work import Work
from fathom.sandbox.host import LocalHost
from fathom.sandbox.substrates.choice import program_of, suited

DECOY = "sb-1-0123456789"
# Limits that bubblewrap holds none of are not asked for without root.
SMALL = {"type": "container", **({"memory": "32MiB", "pids": 16} if os.geteuid() == 0 else {})}


class Forger:
    """The wrong end of a real parent's channel."""

    def __init__(self, keeper: Keeper, tokens: Tokens | None = None) -> None:
        self.keeper = keeper
        self.work = Work(8)
        self.tokens = tokens
        self.number = 0
        self.connect()

    def connect(self) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(60)
        self.parent = Channel(theirs, self.keeper, self.tokens, self.work)
        self.thread = threading.Thread(target=self.parent.serve)
        self.thread.start()

    def ask(self, op: Any, **values: Any) -> dict[str, Any]:
        self.number += 1
        self.sock.send(json.dumps({"n": self.number, "op": op, **values}).encode())
        while True:
            files = array.array("i")
            data, ancillary, _, _ = self.sock.recvmsg(1 << 18, socket.CMSG_SPACE(4))
            for _, _, payload in ancillary:
                files.frombytes(payload)
            for fd in files:
                os.close(fd)
            answer: dict[str, Any] = json.loads(data)
            if answer["n"] == self.number:
                return answer

    def hang_up(self) -> None:
        self.sock.close()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.parent.release()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The one folder below which work folders are allowed, with a way out of it."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    (folder / "out").symlink_to("/etc")
    (folder / "fine").mkdir()
    return folder


@pytest.fixture
def forger(runtime_dir: Path, cache_dir: Path, work: Path) -> Iterator[Forger]:
    if not any(program_of(name) for name in suited()):
        pytest.skip("no sandbox on this machine")
    runtime_dir.mkdir(mode=0o711, exist_ok=True)
    keeper = Keeper(LocalHost("auto", cache_dir, runtime_dir), most=4, spare=0, work=(work,))
    made = Forger(keeper)
    yield made
    made.hang_up()
    made.work.shutdown()
    for name in list(keeper.entries):
        keeper.do("destroy", {"id": name})
    keeper.host.link.close()
    for path in runtime_dir.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)


# What is no request at all: the parent ends the process that sends it.
BROKEN = [
    b"x",
    b"[]",
    b"5",
    b"{}",
    b"[" * 100_000,
    b'{"a":' * 15_000,
    b'{"op": "list"}',
    b'{"n": 0, "op": "list"}',
    b'{"n": true, "op": "list"}',
    b'{"n": -1, "op": "list"}',
    b'{"n": 1e3, "op": "list"}',
    b'{"n": "1", "op": "list"}',
    b'{"n": %d, "op": "list"}' % (1 << 60),
    b'{"n": 1%s, "op": "list"}' % (b"0" * 6000),
    b'{"n": 1, "op": "list", "x": "%s"}' % (b"y" * MESSAGE_LIMIT),
    b"\xff\xfe",
    b"\0" * 100,
]


def test_what_is_no_request_ends_the_process(forger: Forger):
    for data in BROKEN:
        forger.sock.send(data)
        assert forger.sock.recv(1000) == b"", data[:50]
        forger.hang_up()
        forger.connect()
        assert forger.ask("list") == {"n": forger.number, "sandboxes": [], "left": {}}


# Operations of the node, of the host, and others that there are none of.
OTHERS: list[Any] = (
    "adopt save capture keep net release do find _destroy __init__ door tend".split()
)
OTHERS += ["mount", "exec", "", None, 5, ["list"], {"op": "list"}, "list\0", "LIST"]


def test_there_are_no_other_operations(forger: Forger):
    for op in OTHERS:
        assert forger.ask(op)["error"] == Unsupported.code, op


def spec(**values: Any) -> dict[str, Any]:
    return {"spec": {**SMALL, **values}}


FORGED: list[tuple[str, dict[str, Any]]] = [
    # A launch, or parts of one: programs, folders, users, namespaces.
    *(
        ("create", spec(**{name: value}))
        for name, value in {
            "launch": {"substrate": "crun", "program": "/bin/sh"},
            "folder": "/etc",
            "program": "/bin/sh",
            "rootfs": "/",
            "agent": "/bin/sh",
            "netns": "/proc/1/ns/net",
            "ids": 0,
            "store": "/etc",
            "layers": ["../../x"],
            "privileged": True,
            "capabilities": ["CAP_SYS_ADMIN"],
            "mounts": [],
            "outlive": False,
            "template": "/etc",
            "__class__": "x",
        }.items()
    ),
    ("create", {**spec(), "launch": {}}),
    ("create", {**spec(), "folder": "/etc"}),
    ("create", {**spec(), "fork": "x", "saved": "/etc"}),
    ("create", {}),
    ("create", {"spec": None}),
    ("create", {"spec": "container"}),
    ("create", {"spec": []}),
    # Values that a check of their own might let through by their type.
    *(
        ("create", spec(**{name: value}))
        for name, value in [
            ("type", "launch"),
            ("type", 5),
            ("image", "../../../etc"),
            ("image", "/etc"),
            ("image", "a/../../b"),
            ("image", "x\0y"),
            ("image", ["base"]),
            ("image", ""),
            ("hostname", "a;reboot"),
            ("hostname", "a\nb"),
            ("hostname", {"a": 1}),
            ("hostname", 5),
            ("memory", True),
            ("memory", -1),
            ("memory", 0),
            ("memory", 1 << 70),
            ("memory", "9" * 5000),
            ("memory", "512MiB\n"),
            ("memory", 1.5),
            ("memory", [1]),
            ("disk", "1GiB"),
            ("pids", True),
            ("pids", 0),
            ("pids", 1 << 40),
            ("pids", "5"),
            ("cpu", float("nan")),
            ("cpu", float("inf")),
            ("cpu", -1),
            ("cpu", "1"),
            ("ttl", float("nan")),
            ("ttl", -5),
            ("ttl", "x"),
            ("idle_ttl", []),
            ("user", "root"),
        ]
    ),
    ("create", {**spec(), "key": 5}),
    ("create", {**spec(), "key": "x" * 300}),
    ("create", {**spec(), "key": "a\nlevel=INFO event=created"}),
    ("create", {**spec(), "group": ["x"]}),
    ("create", {**spec(), "group": "\ud800"}),
    # Names of sandboxes that are paths, or of others.
    *(
        (op, {"id": name, **({"phase": "x"} if op == "phase" else {})})
        for op in ("destroy", "stats", "snapshot", "netlog", "attach", "open", "idle", "phase")
        for name in ("../../etc", "", ".", "/etc", "sb-1-0123456789/..", "sb-1-ABCDEF0123", 5, None)
    ),
    ("stats", {"id": DECOY}),
    ("open", {"id": DECOY}),
    ("netlog", {"id": DECOY}),
    ("freeze", {"ids": [DECOY]}),
    ("freeze", {"ids": ["../x"]}),
    ("freeze", {"ids": "x"}),
    ("thaw", {"ids": [[DECOY]]}),
    ("fork", {"id": DECOY, "count": 1}),
    ("fork", {"id": DECOY, "count": 1 << 30}),
    ("fork", {"id": DECOY, "count": True}),
    ("fork", {"id": DECOY}),
    ("prewarm", {**spec(), "count": 1 << 30}),
    ("prewarm", {**spec(), "count": 500}),
    ("prewarm", {**spec(), "count": -1}),
    # Names of snapshots and images that are paths.
    *(
        ("restore", {**spec(), "snapshot": name})
        for name in ("../../etc", "", ".", "snap-../../x", "snap-" + "0" * 16, "/etc", None, 5)
    ),
    *(
        ("pack", {"id": DECOY, "name": name})
        for name in ("../x", "/etc/x", "a b", "", "x" * 400, 5, {"a": 1})
    ),
    ("list", {"id": "x"}),
    ("metrics", {"path": "/etc/passwd"}),
    ("token", {"digest": "0" * 64}),
    ("token", {"digest": "../x"}),
    ("ready", {"x": 1}),
]


def test_no_forged_request_is_carried_out(forger: Forger, runtime_dir: Path):
    decoy = runtime_dir / DECOY
    decoy.mkdir()
    (decoy / "lock").touch()
    (decoy / "journal").write_text("kept")
    mounts = Path("/proc/self/mountinfo").read_text()
    etc = sorted(os.listdir("/etc"))
    for op, values in FORGED:
        answer = forger.ask(op, **values)
        # Ending what is not there is no error, but must touch nothing either.
        assert "error" in answer, (op, values, answer)
        assert "Traceback" not in answer["message"]
        assert "could not" not in answer["message"], answer  # no defect was met
    assert forger.ask("destroy", id=DECOY) == {"n": forger.number, "ended": False}
    assert (decoy / "journal").read_text() == "kept"
    assert sorted(path.name for path in runtime_dir.iterdir() if path.is_dir()) == [DECOY]
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert sorted(os.listdir("/etc")) == etc
    assert not forger.keeper.entries
    assert not len(forger.keeper.host.ready)


POLICIES: list[Any] = [
    5,
    [],
    {"addresses": "x"},
    {"addresses": [["10.0.0.1", 80, 5]]},
    {"addresses": [["10.0.0.1", "80"]]},
    {"addresses": [["10.0.0.1", True]]},
    {"addresses": [["10.0.0.1", 0]]},
    {"addresses": [["10.0.0.1", 70000]]},
    {"addresses": [["10.0.0.1 . 80 } } flush ruleset", 80]]},
    {"addresses": [["0.0.0.0/0", 80]]},
    {"addresses": [[5, 80]]},
    {"addresses": [["::1", 80]]},
    {"addresses": [["10.0.0.1", 80]] * 300},
    {"domains": [["a.example\nb", [443], False]]},
    {"domains": [["*", [443], False]]},
    {"domains": [["a.example", "443", False]]},
    {"domains": [["a.example", [443] * 100, False]]},
    {"domains": [[["a.example"], [443], False]]},
    {"domains": [["a.example", [443], 1]]},
    {"domains": [["a.example", [443]]]},
    {"mirrors": ["../x"]},
    {"mirrors": ["nobody-knows-it"]},
    {"mirrors": {"pypi": "http://evil.example"}},
    {"private": 1},
    {"everything": True},
]


def test_no_forged_policy_is_set(forger: Forger):
    made = forger.ask("create", **spec())
    for policy in POLICIES:
        answer = forger.ask("phase", id=made["id"], phase="x", net=policy)
        assert "error" in answer, policy
        assert "could not" not in answer["message"], answer
    assert forger.ask("attach", id=made["id"])["net"] is None


@pytest.mark.usefixtures("need_root")
def test_only_allowed_folders_are_bound(forger: Forger, work: Path, tmp_path: Path):
    (tmp_path / "secret").mkdir()
    refused = ["/", "/etc", "/root", str(tmp_path / "secret"), str(tmp_path), "relative", ".", ""]
    refused += [f"{work}/../secret", f"{work}/out", f"{work}/out/..", f"{work}/fine/../../secret"]
    refused += [f"{work}x", "/proc/1/root/etc", f"/proc/self/root{tmp_path}/secret", "/nonexistent"]
    for path in refused:
        answer = forger.ask("create", **spec(workdir=path))
        assert answer.get("error") == PolicyDenied.code, (path, answer)
    # Whether there is such a folder is not told either.
    texts = {forger.ask("create", **spec(workdir=p))["message"].partition("'")[0] for p in refused}
    assert len(texts) == 1
    made = forger.ask("create", **spec(workdir=f"{work}/fine"))
    assert "error" not in made


@pytest.mark.usefixtures("need_root")
def test_a_folder_that_becomes_a_link_is_not_followed(
    forger: Forger, work: Path, monkeypatch: pytest.MonkeyPatch
):
    """A tenant of the folder above swaps it in the moment between judging and binding."""
    host, create = forger.keeper.host, LocalHost.do

    def swap(self: LocalHost, op: str, **values: Any) -> dict[str, Any]:
        (work / "fine").rmdir()
        (work / "fine").symlink_to("/etc")
        return create(self, op, **values)

    monkeypatch.setattr(LocalHost, "do", swap)
    answer = forger.ask("create", **spec(workdir=f"{work}/fine"))
    monkeypatch.undo()
    assert "error" in answer
    assert not forger.keeper.entries
    assert not len(host.ready)


def test_files_that_come_along_are_dropped(forger: Forger):
    before = len(os.listdir("/proc/self/fd"))
    read, write = os.pipe()
    for number in range(1, 20):
        data = json.dumps({"n": number + 1000, "op": "attach", "id": DECOY}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write] * 10))]
        forger.sock.sendmsg([data], rights)
        forger.sock.recv(1 << 16)
    os.close(write)
    assert os.read(read, 1) == b"", "the parent kept an end of the pipe"
    os.close(read)
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_more_are_made_than_admitted(forger: Forger):
    """Asked for at the same time, and by way of copies and of those that wait."""
    for number in range(1, 13):
        request = {"n": number, "op": "create", **spec()}
        forger.sock.send(json.dumps(request).encode())
    answers = [json.loads(forger.sock.recv(1 << 16)) for _ in range(12)]
    forger.number = 12
    assert len(forger.keeper.entries) == 4
    assert sorted(a.get("error", "") for a in answers) == [""] * 4 + [PolicyDenied.code] * 8
    name = next(iter(forger.keeper.entries))
    assert forger.ask("prewarm", **spec(), count=1)["error"] == PolicyDenied.code
    if forger.keeper.entries[name].caps.fork:
        assert forger.ask("fork", id=name, count=1)["error"] == PolicyDenied.code


def test_one_key_makes_one_sandbox_however_often_it_is_asked(forger: Forger):
    for number in range(1, 9):
        request = {"n": number, "op": "create", **spec(), "key": "k"}
        forger.sock.send(json.dumps(request).encode())
    made = {json.loads(forger.sock.recv(1 << 16))["id"] for _ in range(8)}
    assert len(made) == len(forger.keeper.entries) == 1


def test_who_takes_no_answers_is_cut_off(forger: Forger, monkeypatch: pytest.MonkeyPatch):
    """The parent neither hangs nor keeps what it cannot deliver."""
    monkeypatch.setattr(channel, "_PATIENCE", 1)
    forger.hang_up()
    forger.connect()
    forger.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    data = json.dumps({"n": 1, "op": "stats", "id": "x" * 50_000}).encode()
    began = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - began < 30:
            forger.sock.send(data)
    assert time.monotonic() - began < 25
    forger.thread.join(20)
    assert not forger.thread.is_alive()
    forger.hang_up()
    forger.connect()
    assert forger.ask("list")["sandboxes"] == []


def test_long_answers_come_as_a_file(forger: Forger, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channel, "_INLINE", 10)
    forger.sock.send(b'{"n": 1, "op": "list"}')
    data, ancillary, _, _ = forger.sock.recvmsg(1 << 16, socket.CMSG_SPACE(4))
    assert json.loads(data) == {"n": 1, "long": True}
    files = array.array("i")
    files.frombytes(ancillary[0][2])
    assert json.loads(os.pread(files[0], 1 << 16, 0)) == {"n": 1, "sandboxes": [], "left": {}}
    os.close(files[0])
