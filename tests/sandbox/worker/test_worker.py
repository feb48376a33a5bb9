"""Loops in workers: killed clients, attendants, daemons and workers, and no command runs twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import anyio
import pytest

from fathom.errors import DaemonLost, SandboxLost
from fathom.sandbox import Container, MicroVM, state
from fathom.sandbox.trajectory.errors import TrajectoryError
from fathom.sandbox.trajectory.record import Kind
from fathom.sandbox.trajectory.store import Store
from fathom.sandbox.types import Kept
from fathom.sandbox.worker.attendant import LoopFailed
from fathom.sandbox.worker.worker import PLAN, Loop, Worker
from tests.agent.chat_server import Respond, Server, answer, serving, status, tool_call
from tests.machines import skip_without_machines
from tests.sandbox.edge.daemon import Daemon

PATIENCE = 60.0
FIRST = tool_call("bash", command="echo one >> log; echo first")
SLOW = tool_call("bash", command="echo two >> log; touch started; sleep 0.7; echo three >> log")
LOOK = tool_call("bash", command="cat log")
SCRIPT: tuple[Respond, ...] = (FIRST, SLOW, LOOK, answer("Fine."))
ONCE = "one\ntwo\nthree"


def loop_of(server: Server) -> Loop:
    order = {
        "task": "a task",
        "url": server.url,
        "model": "m",
        "thinking": "high",
        "sampling": {},
        "limits": {},
    }
    return Loop(model=server.url, order=order)


def begin(node: Daemon, store: Store, server: Server, target: Kept | None = None) -> Worker:
    return anyio.run(
        partial(
            Worker.begin,
            {"task": "a task"},
            target or Container(),
            loop_of(server),
            name="run",
            edge_dir=node.folder,
            cache_dir=node.cache,
            store=store,
        )
    )


def attach(store: Store, **options: object) -> Worker:
    return anyio.run(partial(Worker.attach, "run", store=store, **options))  # type: ignore[arg-type]


def wait(worker: Worker) -> dict[str, object]:
    async def bounded() -> dict[str, object]:
        with anyio.fail_after(PATIENCE):
            return await worker.wait()

    return anyio.run(bounded)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def began(worker: Worker, key: str) -> Callable[[], bool]:
    """Whether an operation was begun, as the log tells."""

    def look() -> bool:
        events = worker._read(0)
        return any(e.record.kind is Kind.INTENT and e.record.key == key for e in events)

    return look


def box(node: Daemon, what: str) -> str:
    """The daemon's name of the target or of the worker."""
    with node.client() as client:
        (found,) = [e["id"] for e in client.list() if e["key"] == f"run/{what}"]
    return found


def attendant(store: Store) -> int:
    return int((store.path("run") / "alive").read_text())


def check_once(worker: Worker, server: Server) -> None:
    assert wait(worker) == {"status": "answered", "answer": "Fine."}
    assert server.bodies[-1]["messages"][-1]["content"] == ONCE
    kinds = [e.record.kind for e in worker._read(0)]
    assert Kind.UNKNOWN not in kinds
    assert kinds.count(Kind.END) == 1


def test_a_run_from_its_beginning_to_its_end(node: Daemon, store: Store):
    with serving(*SCRIPT) as server:
        worker = begin(node, store, server)
        check_once(worker, server)
    assert worker.state == "ended"
    told = [(e.record.kind, e.record.key) for e in worker._read(0)]
    assert [key for kind, key in told if kind is Kind.INTENT] == ["op/1", "op/2", "op/3"]
    (report,) = [e for e in worker._read(0) if e.record.key == "report"]
    assert report.blobs is not None
    assert json.loads(report.blobs["report"])["steps"] == 4
    # What each operation changed was seen from outside.
    first = next(e for e in worker._read(0) if e.outcome is not None)
    assert first.outcome is not None
    assert [c.path for c in first.outcome.changes or ()] == ["/work/log"]
    until(lambda: not list_of(node))


def list_of(node: Daemon) -> list[str]:
    with node.client() as client:
        return [entry["id"] for entry in client.list()]


CLIENT = """
import json, sys, anyio
from functools import partial
from pathlib import Path
from fathom.sandbox import Container
from fathom.sandbox.trajectory.store import Store
from fathom.sandbox.worker.worker import Loop, Worker
order = json.loads(sys.argv[1])
loop = Loop(model=order["url"], order=order["order"])
store = Store(Path(order["store"]), durability="process")
async def main():
    worker = await Worker.begin({"task": "a task"}, Container(), loop, name="run", store=store,
        edge_dir=Path(order["edge"]), cache_dir=Path(order["cache"]))
    await worker.wait()
anyio.run(main)
"""


@pytest.mark.parametrize("point", ["plan", "attendant", "target", "op/2"])
def test_the_client_is_killed(node: Daemon, store: Store, point: str):
    with serving(*SCRIPT) as server:
        loop = loop_of(server)
        told = {"url": server.url, "order": dict(loop.order), "store": str(store.folder)}
        told |= {"edge": str(node.folder), "cache": str(node.cache)}
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, json.dumps(told)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        worker = Worker("run", store)
        ready = {
            "plan": (store.folder / "run" / PLAN).exists,
            "attendant": (store.folder / "run" / "alive").exists,
            "target": lambda: bool(list_of(node)),
        }
        until(ready.get(point, began(worker, point)))
        client.kill()
        client.wait()
        if point == "op/2":
            # Nothing has to be done for the loop to go on; whoever comes finds it live.
            assert attach(store).state in ("running", "ended")
        else:
            # An attendant that has not heard all of its order ends again.
            until(lambda: attach(store).state == "ended")
        check_once(worker, server)


def test_the_attendant_is_killed_while_a_command_runs(node: Daemon, store: Store):
    with serving(*SCRIPT) as server:
        worker = begin(node, store, server)
        until(began(worker, "op/2"))
        os.kill(attendant(store), signal.SIGKILL)
        until(lambda: worker.state == "stopped early")
        before = box(node, "worker")
        time.sleep(1.5)  # the command ends with nobody there
        again = attach(store)
        assert box(node, "worker") == before
        check_once(again, server)
    assert len(server.bodies) == 4  # the loop was connected to, not replayed


def test_the_daemon_is_killed_while_a_command_runs(node: Daemon, store: Store):
    """Nobody has to do anything but start another one."""
    with serving(*SCRIPT) as server:
        worker = begin(node, store, server)
        until(began(worker, "op/2"))
        node.end(signal.SIGKILL)
        time.sleep(1.2)
        assert worker.state == "running"
        node.start(most=64)
        check_once(worker, server)
    assert len(server.bodies) == 4


def test_the_daemon_and_the_attendant_are_killed_while_the_model_thinks(node: Daemon, store: Store):
    asked, go_on = threading.Event(), threading.Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        go_on.wait(PATIENCE)

    with serving(FIRST, hang, SLOW, LOOK, answer("Fine.")) as server:
        worker = begin(node, store, server)
        assert asked.wait(PATIENCE)
        os.kill(attendant(store), signal.SIGKILL)
        node.end(signal.SIGKILL)
        until(lambda: worker.state == "stopped early")
        go_on.set()
        with pytest.raises(DaemonLost):
            attach(store)
        node.start(most=64)
        attach(store)
        check_once(worker, server)


def test_a_worker_that_is_lost_is_replaced_and_goes_through_the_log(node: Daemon, store: Store):
    with serving(*SCRIPT) as server:
        worker = begin(node, store, server)
        until(began(worker, "op/2"))
        pid = state.first_process(node.folder / box(node, "worker"))
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        check_once(worker, server)
    assert len(server.bodies) == 4  # no turn was asked for a second time


def test_a_target_that_is_lost_is_said(node: Daemon, store: Store):
    with serving(*SCRIPT, answer("Fine.")) as server:
        worker = begin(node, store, server)
        until(began(worker, "op/2"))
        pid = state.first_process(node.folder / box(node, "target"))
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LoopFailed, match="sandbox"):
            wait(worker)
        # The model was told that nobody knows whether it took effect.
        assert "may have taken effect or not" in server.bodies[-1]["messages"][-1]["content"]
        with pytest.raises(SandboxLost, match="--on-lost continue"):
            attach(store)
        attach(store, on_lost="continue")
        assert wait(worker) == {"status": "answered", "answer": "Fine."}


def test_a_model_that_refuses_stops_the_run_and_it_can_go_on(node: Daemon, store: Store):
    with serving(FIRST, status(401, "who are you"), SLOW, LOOK, answer("Fine.")) as server:
        worker = begin(node, store, server)
        with pytest.raises(LoopFailed, match="who are you"):
            wait(worker)
        assert worker.state == "stopped early"
        check_once(attach(store), server)


def test_a_client_follows_from_where_it_was(node: Daemon, store: Store):
    async def follow(after: int, enough: int = 1 << 30) -> list[int]:
        seen: list[int] = []
        async for event in worker.follow(after):
            seen.append(event.record.node_sequence)
            if len(seen) == enough:
                break
        return seen

    with serving(*SCRIPT) as server:
        worker = begin(node, store, server)
        first = anyio.run(follow, 0, 4)
        rest = anyio.run(follow, first[-1])
    assert [*first, *rest] == list(range(1, len(first) + len(rest) + 1))
    assert worker.state == "ended"


def test_a_run_is_stopped(node: Daemon, store: Store):
    with serving(FIRST, tool_call("bash", command="sleep 100"), status(500)) as server:
        worker = begin(node, store, server)
        until(began(worker, "op/2"))
        anyio.run(worker.stop)
    assert list_of(node) == []
    assert worker.state == "stopped early"


def test_a_target_that_is_a_virtual_machine(node: Daemon, store: Store):
    skip_without_machines(node.cache)
    target = MicroVM(memory="160MiB", disk="32MiB")
    with serving(*SCRIPT) as server:
        worker = begin(node, store, server, target)
        until(began(worker, "op/2"))
        node.end(signal.SIGKILL)
        node.start(most=64)
        check_once(worker, server)


def test_what_cannot_begin_leaves_nothing(node: Daemon, store: Store, tmp_path: Path):
    with serving() as server:
        with pytest.raises(DaemonLost, match="fathom sandbox edge"):
            anyio.run(
                partial(
                    Worker.begin,
                    {},
                    Container(),
                    loop_of(server),
                    name="run",
                    edge_dir=tmp_path,
                    store=store,
                )
            )
        with pytest.raises(Exception, match="no image"):
            begin(node, store, server, Container(image="no-such-image"))
        with pytest.raises(TrajectoryError, match="no run"):
            attach(store)
    assert not (store.folder / "run").exists()
    assert list_of(node) == []
