"""The holder of a sandbox: what it cannot write down has not begun, and the sandbox goes on."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from fathom.sandbox.trajectory import segment
from fathom.sandbox.trajectory.changes import Change, look
from fathom.sandbox.trajectory.errors import LogFull, TrajectoryError
from fathom.sandbox.trajectory.executor import Finished, NeverSeen
from fathom.sandbox.trajectory.frames import SOCKET, connect
from fathom.sandbox.trajectory.held import DeadJournal, HeldExecutor
from fathom.sandbox.trajectory.holder import JOURNAL, JOURNAL_SEGMENT, Holder
from fathom.sandbox.trajectory.log import Log
from fathom.sandbox.trajectory.operation import exec_request
from fathom.sandbox.types import ExecResult

REQUEST = exec_request("true", timeout=5)
LONG = "d" * 200


@dataclass
class Box:
    """A sandbox whose commands do nothing."""

    ran: list[str] = field(default_factory=list)

    async def exec(self, command: str, **_: Any) -> ExecResult:
        self.ran.append(command)
        return ExecResult(exit_code=0, stdout="out", stderr="", output="out")


class Many:
    """A watcher that sees more names each time than there is room for in a receipt."""

    def changes(self) -> list[Change]:
        return [Change(path=f"/work/{LONG}/{n}", what="added", size=n) for n in range(1000)]


Use = Callable[[HeldExecutor, Box], Awaitable[None]]


def held(folder: Path, use: Use, watcher: Any = None) -> Box:
    """Have a holder in `folder` serve `use` until it returns."""
    box = Box()

    async def main() -> None:
        with Log(folder / JOURNAL, segment_size=JOURNAL_SEGMENT, durability="process") as journal:
            holder = Holder(box, journal, "epoch", 60.0, watcher)  # type: ignore[arg-type]
            listener = await anyio.create_unix_listener(folder / SOCKET, mode=0o600)
            async with listener, anyio.create_task_group() as group:
                holder.group = group
                group.start_soon(listener.serve, holder.serve)
                hello = {"sandbox": "sb", "substrate": "none", "pid": os.getpid()}
                hello |= {"epoch": "epoch", "generation": 0}
                await use(HeldExecutor(folder, hello), box)
                group.cancel_scope.cancel()

    anyio.run(main)
    return box


async def run(executor: HeldExecutor, key: str) -> None:
    await executor.dispatch(key, REQUEST.digest(), REQUEST, lambda: None)


async def fill(executor: HeldExecutor) -> None:
    for number in range(1000):
        await run(executor, f"{number}-{'k' * 200}")


def full(*_: object, **__: object) -> None:
    raise LogFull("no room for a segment")


def test_a_full_journal_refuses_what_would_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(executor: HeldExecutor, box: Box) -> None:
        await run(executor, "first")
        with monkeypatch.context() as patch:
            patch.setattr(segment, "create", full)
            with pytest.raises(LogFull, match="began nothing"):
                await fill(executor)
        assert isinstance(await executor.query(f"999-{'k' * 200}", REQUEST), NeverSeen)
        await run(executor, "last")

    assert len(held(tmp_path, use).ran) < 1000


@pytest.mark.parametrize("key", ["k" * 256, "\ud800"])
def test_a_key_that_fits_no_journal_costs_nobody_the_sandbox(tmp_path: Path, key: str) -> None:
    async def use(executor: HeldExecutor, box: Box) -> None:
        with pytest.raises(TrajectoryError, match="began nothing"):
            await run(executor, key)
        assert box.ran == []
        await run(executor, "next")

    held(tmp_path, use)


def test_words_that_make_no_sense_cost_nobody_the_sandbox(tmp_path: Path) -> None:
    async def use(executor: HeldExecutor, box: Box) -> None:
        for head in ({}, {"ask": "wait", "key": "never"}, {"ask": "run", "done": 5}, [1]):
            async with connect(tmp_path) as line:
                await line.send(head)  # type: ignore[arg-type]
                answer = await line.receive()
                assert answer is not None
                assert answer[0]["is"] == "refused"
        await run(executor, "next")

    held(tmp_path, use)


@pytest.mark.parametrize("has_room", [True, False])
def test_names_that_a_tenant_chose_cost_no_receipt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    async def use(executor: HeldExecutor, box: Box) -> None:
        await run(executor, "first")
        with monkeypatch.context() as patch:
            if not has_room:
                patch.setattr(segment, "create", full)
            await run(executor, "second")
        answer = await executor.query("second", REQUEST)
        assert isinstance(answer, Finished)

    watcher = Many()
    held(tmp_path, use, watcher)
    answer = anyio.run(DeadJournal(tmp_path).query, "second", REQUEST)
    assert isinstance(answer, Finished)
    assert answer.outcome.blobs["stdout"] == b"out"
    assert (answer.outcome.changes is None) != has_room


def test_folders_that_lie_too_deep_are_not_looked_at(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "work" / "/".join("d" * 200)).mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    assert look(tmp_path) is not None
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    assert look(tmp_path) is None
