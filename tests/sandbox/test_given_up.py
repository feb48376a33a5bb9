"""Nothing is left running, or lost, where something fails or somebody gives up in the middle."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from fathom.errors import DaemonLost, MachineFull, SandboxError, SandboxLost
from fathom.sandbox import Container, Fn, Sandbox, SyncClient, SyncSandbox, fn_link, messages, names
from fathom.sandbox import nodelink as links
from fathom.sandbox import sandbox as sandboxes
from fathom.sandbox.client import Client
from fathom.sandbox.fn import Functions
from fathom.sandbox.line import Line
from fathom.sandbox.node import Node
from fathom.sandbox.nodelink import NodeLink
from fathom.sandbox.ready import Ready
from fathom.sandbox.threads import Portal
from fathom.sandbox.vm import jail

SPEC = Container()


@pytest.mark.usefixtures("need_root")
def test_copies_of_one_that_does_not_go_on_are_ended(
    client: SyncClient, sandbox: SyncSandbox, options: dict[str, Path], monkeypatch: Any
):
    link: NodeLink = client._client._host.link  # pyright: ignore
    request = link.request

    def ask(op: str, **values: Any) -> dict[str, Any]:
        answer = request(op, **values)
        if op == "thaw":
            raise SandboxLost("it ended meanwhile")
        return answer

    monkeypatch.setattr(link, "request", ask)
    with pytest.raises(SandboxLost, match="meanwhile"):
        sandbox.fork(2)
    assert [path.name for path in options["runtime_dir"].iterdir()] == [sandbox.id]


class Host:
    """A host whose first answer to each operation is an error."""

    is_ours = True

    def __init__(self, error: SandboxError) -> None:
        self.error = error
        self.asked: list[str] = []
        self.closed = False

    async def call(self, op: str, **_: Any) -> dict[str, Any]:
        self.asked.append(op)
        if self.asked.count(op) == 1:
            raise self.error
        return {}

    async def close(self) -> None:
        self.closed = True


def made(host: Host) -> Sandbox:
    return Sandbox(host, "sb", SimpleNamespace(), store=Path())  # type: ignore[arg-type]


def test_a_stop_that_failed_can_be_tried_again():
    host = Host(DaemonLost("no daemon"))
    sandbox = made(host)
    with pytest.raises(DaemonLost):
        anyio.run(sandbox.stop)
    assert not sandbox.stopped
    for _ in range(2):
        anyio.run(sandbox.stop)
    assert (sandbox.stopped, host.asked) == (True, ["destroy", "destroy"])


def test_a_client_lets_go_of_its_host_whatever_fails():
    client = Client()
    host = client._host = Host(SandboxError("full"))  # pyright: ignore
    client._sandboxes["sb"] = made(host)  # pyright: ignore
    with pytest.raises(BaseExceptionGroup):
        anyio.run(client.close)
    assert host.closed


def test_a_command_that_nobody_can_tell_about_has_no_outcome():
    with pytest.raises(SandboxLost):
        anyio.run(made(Host(SandboxError("the node is busy")))._stood_still)  # pyright: ignore


def test_an_agent_that_never_answers_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandboxes, "_PATIENCE", 0.01)
    stood = [1.0, 1.0]

    ends: list[socket.socket] = []

    class Silent(Host):
        async def call(self, op: str, **_: Any) -> dict[str, Any]:
            return {"stood": stood.pop()}

        async def open(self, _: str) -> Line:
            ours, theirs = socket.socketpair()
            ends.append(theirs)
            return Line(ours)

    silent = Silent(SandboxError(""))

    async def main() -> None:
        with anyio.fail_after(10):
            await made(silent).receipt("op")

    with pytest.raises(SandboxLost, match="in time"):
        anyio.run(main)
    assert len(ends) == 2  # it had stood still the first time
    for end in ends:
        end.close()


@pytest.mark.parametrize(("what", "error"), [("open", SandboxLost), ("call", DaemonLost)])
def test_a_timeout_counts_for_a_daemon_that_stands_still(
    monkeypatch: pytest.MonkeyPatch, what: str, error: type[SandboxError]
):
    monkeypatch.setattr(sandboxes, "_PATIENCE", 0.01)

    class Still(Host):
        async def call(self, op: str, **_: Any) -> dict[str, Any]:
            if what == "call":
                await anyio.sleep_forever()
            return {"stood": 0.0}

        async def open(self, _: str) -> Line:
            await anyio.sleep_forever()
            raise AssertionError

        async def oom_count(self, _: str) -> int:
            return 0

    async def main() -> None:
        with anyio.fail_after(10):
            await made(Still(SandboxError(""))).exec("true", timeout=0.01)

    with pytest.raises(error):
        anyio.run(main)


@pytest.mark.parametrize("scope", [True, False])
def test_a_pool_that_is_given_up_while_it_starts_leaves_no_interpreter(
    monkeypatch: pytest.MonkeyPatch, scope: bool
):
    stopped: list[int] = []
    begun: list[int] = []

    class Link:
        def __init__(self, number: int) -> None:
            self.number = number

        async def ready(self) -> None:
            if self.number:
                await anyio.sleep_forever()

        async def close(self) -> None:
            pass

    class Box:
        caps = None

        def __init__(self) -> None:
            self.number = len(begun)
            begun.append(self.number)

        async def stop(self) -> None:
            stopped.append(self.number)

    async def make(_: Container) -> Any:
        return Box()

    async def connect(sandbox: Box, *_: object, **__: object) -> Any:
        return Link(sandbox.number)

    monkeypatch.setattr(fn_link, "connect", connect)
    pool = Functions(Fn(workers=2), make)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(pool.open)
            while not pool.idle:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()

    async def timed() -> None:
        with anyio.move_on_after(0.05):
            await pool.open()

    anyio.run(main if scope else timed)
    assert sorted(stopped) == begun == [0, 1]


def test_a_call_that_is_interrupted_is_given_up(monkeypatch: pytest.MonkeyPatch):
    begun, cancelled = threading.Event(), threading.Event()
    result, asked = concurrent.futures.Future[Any].result, list[object]()

    async def work() -> None:
        try:
            begun.set()
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    async def once() -> int:
        return 1

    def interrupt(future: concurrent.futures.Future[Any]) -> Any:
        if asked.append(future) or len(asked) == 1:
            return result(future)  # the library's own, as it has the call begun
        begun.wait(10)
        monkeypatch.setattr(concurrent.futures.Future, "result", result)
        raise KeyboardInterrupt

    portal = Portal()
    assert portal.call(once) == 1
    monkeypatch.setattr(concurrent.futures.Future, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        portal.call(work)
    assert cancelled.wait(10)
    assert portal.call(once) == 1
    portal.close()


def test_names_are_looked_up_again_once_there_are_threads(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        found = names.Names()
        with monkeypatch.context() as patch:
            patch.setattr(names._pool, "submit", refuse)  # pyright: ignore
            for number in range(2 * names.AT_ONCE):
                with pytest.raises(OSError, match="cannot be looked up"):
                    await found.find(f"{number}.invalid", 80)
        with anyio.fail_after(5):
            assert await found.find("127.0.0.1", 80) == ["127.0.0.1"]

    anyio.run(main)


# Those that wait --------------------------------------------------------------------------------


class Waiting:
    """Sandboxes that are made and ended without any."""

    def __init__(self) -> None:
        self.alive: set[str] = set()
        self.made = 0
        self.ready = Ready(self._make, self.alive.__contains__, self.alive.discard)

    def _make(self, _: object) -> dict[str, Any]:
        self.made += 1
        self.alive.add(f"sb-{self.made}")
        return {"id": f"sb-{self.made}"}


def test_one_that_died_as_it_waited_is_not_handed_out():
    there = Waiting()
    there.ready.hold(SPEC, 2)
    there.alive.remove("sb-2")
    found = there.ready.take(SPEC)
    assert found == {"id": "sb-1"}
    there = Waiting()
    there.ready.hold(SPEC, 2)
    there.alive.clear()
    assert there.ready.take(SPEC) is None


def test_fewer_that_wait_are_fewer():
    there = Waiting()
    there.ready.hold(SPEC, 3)
    there.ready.hold(SPEC, 1)
    assert (len(there.ready), len(there.alive)) == (1, 1)
    there.ready.hold(SPEC, 0)
    assert (len(there.ready), len(there.alive)) == (0, 0)


# The node ---------------------------------------------------------------------------------------


def test_a_node_that_cannot_take_a_request_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(links, "_LAST_MOMENTS", 0.05)
    link = NodeLink(tmp_path)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(["sleep", "100"], stderr=subprocess.DEVNULL)
    link._sock, link._process = ours, process  # pyright: ignore

    def take() -> None:
        for fd in messages.receive(theirs)[1]:
            os.close(fd)

    try:
        thread = threading.Thread(target=take)
        thread.start()
        with pytest.raises(MachineFull, match="as many files open"):
            link.request("stats", id="sb")
        thread.join()
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        ours.close()
        theirs.close()


def test_a_machine_without_threads_ends_no_node(monkeypatch: pytest.MonkeyPatch):
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    begin: Callable[..., None] = Node._begin  # pyright: ignore
    begin(object.__new__(Node), done.append, 1)
    assert done == [1]


def test_an_emulator_s_last_words_are_those_of_a_file(tmp_path: Path):
    (tmp_path / jail.OWN).mkdir()
    log = tmp_path / jail.OWN / jail.LOG
    os.mkfifo(log)
    # A writer lets a reader in that would wait else.
    with contextlib.suppress(OSError):
        assert jail.said(tmp_path) == ""
    log.unlink()
    log.write_text("no memory")
    assert jail.said(tmp_path) == "no memory"
