"""Operations: written down before and after they happen, run at most once, never made up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import pytest

from fathom.errors import SandboxLost, Unsupported
from fathom.sandbox.trajectory import segment
from fathom.sandbox.trajectory.changes import Change
from fathom.sandbox.trajectory.errors import (
    Diverged,
    LogFull,
    OperationConflict,
    OutcomeUnknown,
    StateDiffers,
    TrajectoryError,
)
from fathom.sandbox.trajectory.executor import DirectExecutor
from fathom.sandbox.trajectory.log import Log
from fathom.sandbox.trajectory.operation import Operation, Outcome, exec_request
from fathom.sandbox.trajectory.reader import Reader
from fathom.sandbox.trajectory.record import Kind
from fathom.sandbox.trajectory.session import RolledBack, Session
from fathom.sandbox.trajectory.tape import read_outcome, read_tape
from tests.sandbox.trajectory.machines import Crash, Machine, MortalLog, command, times_run

SIZE = 1 << 18


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


def open_log(folder: Path) -> MortalLog:
    return MortalLog(folder, segment_size=SIZE, durability="process")


async def attach(log: Log, machine: Machine, **options: bool) -> Session:
    if log.head("sb") is None:
        return await Session.begin(log, "sb", machine)
    return await Session.attach(log, "sb", machine, **options)


async def run_all(session: Session, count: int, first: int = 0) -> list[Outcome]:
    return [await session.run(command(number)) for number in range(first, count)]


def kinds(folder: Path) -> list[str]:
    with Reader(folder) as log:
        return [record.kind.name for record in log.records("sb")]


def test_an_operation_is_written_down_before_and_after(folder, machine):
    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            outcome = await session.run(command(1))
            assert outcome.blobs["stdout"] == b"out 1\n"
            assert not outcome.cached

    anyio.run(main)
    assert kinds(folder) == ["CREATE", "ATTACH", "INTENT", "STARTED", "RECEIPT"]
    assert machine.acknowledged == ["s1"]


def test_fast_forward_returns_what_was_recorded_and_then_goes_live(folder, machine):
    async def live(count: int) -> list[Outcome]:
        with open_log(folder) as log:
            session = await attach(log, machine)
            return await run_all(session, count)

    first = anyio.run(live, 3)
    second = anyio.run(live, 5)
    assert [o.cached for o in second] == [True, True, True, False, False]
    assert all(a.same_as(b) for a, b in zip(first, second, strict=False))
    assert machine.ran == ["s0", "s1", "s2", "s3", "s4"]
    assert [times_run(machine, n) for n in range(5)] == [1] * 5


@dataclass(frozen=True)
class Row:
    """One row of the crash table: where it crashes, how often operation 1 ran by then, and after.

    `then`: what the next client gets for operation 1.
    """

    crash: str
    ran_before: int
    then: str
    ran_after: int = 1
    client: bool = True


TABLE = [
    Row("before INTENT s1", 0, "run"),
    Row("after INTENT s1", 0, "run"),
    Row("unsent s1", 0, "run"),
    Row("before STARTED s1", 0, "unknown", 0),
    Row("running s1", 0, "recovered"),
    Row("done s1", 1, "recovered"),
    Row("before RECEIPT s1", 1, "recovered"),
    Row("after RECEIPT s1", 1, "cached"),
    Row("agent s1", 1, "unknown", client=False),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.crash)
@pytest.mark.parametrize("journal", [True, False], ids=["journal", "journal lost"])
def test_crash_table(folder, machine, row, journal):
    """At whatever point somebody dies: at most one run, and no outcome that was not observed."""

    async def first_life() -> None:
        log = open_log(folder)
        session = await attach(log, machine)
        await session.run(command(0))
        log.crash = machine.crash = row.crash
        try:
            with pytest.raises(Crash if row.client else OutcomeUnknown):
                await session.run(command(1))
        finally:
            log.die()

    async def next_life() -> str:
        with open_log(folder) as log:
            session = await attach(log, machine)
            assert (await session.run(command(0))).cached
            try:
                outcome = await session.run(command(1))
            except OutcomeUnknown:
                return "unknown"
            assert outcome.blobs["stdout"] == b"out 1\n"
            await session.run(command(2))
            receipt = next(r for r in log.records("sb") if r.key == "s1" and r.kind is Kind.RECEIPT)
            if log.body(receipt).fields.get("recovered"):
                return "recovered"
            return "cached" if outcome.cached else "run"

    anyio.run(first_life)
    assert times_run(machine, 1) == row.ran_before
    if not journal:
        machine.lose_journal()
        machine.running.clear()
    began = row.crash not in ("before INTENT s1", "after INTENT s1", "unsent s1")
    expected, ran_after = row.then, row.ran_after
    if not journal and expected == "recovered":
        expected, ran_after = "unknown", row.ran_before
    for _ in range(3):
        assert anyio.run(next_life) == expected
        assert times_run(machine, 1) == ran_after
        assert times_run(machine, 0) == 1
        assert machine.ran.count("s1") <= 1
        assert began or machine.ran.count("s1") == 1
        if expected == "run":
            expected = "cached"
        machine.running.clear()


def test_a_new_sandbox_makes_what_was_open_unknown(folder, machine, tmp_path):
    """The next sandbox never saw the operation, which says nothing about the one that is gone."""

    async def first_life() -> None:
        log = open_log(folder)
        session = await attach(log, machine)
        await session.run(command(0))
        machine.crash = "done s1"
        with pytest.raises(Crash):
            await session.run(command(1))
        log.die()

    anyio.run(first_life)
    other = Machine(tmp_path / "other", epoch="machine-2")

    async def next_life() -> None:
        with open_log(folder) as log:
            with pytest.raises(StateDiffers):
                await attach(log, other)
            session = await attach(log, other, replaced=True)
            assert (await session.run(command(0))).cached
            with pytest.raises(OutcomeUnknown, match="is gone"):
                await session.run(command(1))
            assert session.unknown == ("s1",)

    anyio.run(next_life)
    assert other.ran == []

    async def with_the_old_journal() -> None:
        with open_log(folder) as log:
            session = await Session.attach(log, "sb", other, replaced=True, earlier=[machine])
            assert (await session.run(command(0))).cached
            with pytest.raises(OutcomeUnknown):
                await session.run(command(1))

    anyio.run(with_the_old_journal)


def test_the_journal_of_a_dead_sandbox_still_counts(folder, machine, tmp_path):
    async def first_life(crash: str) -> None:
        log = open_log(folder)
        session = await attach(log, machine)
        machine.crash = crash
        with pytest.raises(Crash):
            await session.run(command(1))
        log.die()

    async def next_life(other: Machine) -> Outcome:
        with open_log(folder) as log:
            session = await Session.attach(log, "sb", other, replaced=True, earlier=[machine])
            return await session.run(command(1))

    anyio.run(first_life, "unsent s1")
    second = Machine(tmp_path / "second", epoch="machine-2")
    assert not anyio.run(next_life, second).cached  # never begun there: run here
    assert (times_run(machine, 1), times_run(second, 1)) == (0, 1)


def test_what_finished_in_a_dead_sandbox_is_recovered(folder, machine, tmp_path):
    async def first_life() -> None:
        log = open_log(folder)
        session = await attach(log, machine)
        machine.crash = "done s1"
        with pytest.raises(Crash):
            await session.run(command(1))
        log.die()

    async def next_life(other: Machine) -> Outcome:
        with open_log(folder) as log:
            session = await Session.attach(log, "sb", other, replaced=True, earlier=[machine])
            return await session.run(command(1))

    anyio.run(first_life)
    second = Machine(tmp_path / "second", epoch="machine-2")
    assert anyio.run(next_life, second).blobs["stdout"] == b"out 1\n"
    assert second.ran == []


def make_unknown(folder: Path, machine: Machine, operation: Operation) -> None:
    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            machine.crash = f"agent {operation.key}"
            with pytest.raises(OutcomeUnknown):
                await session.run(operation)

    anyio.run(main)


def in_next_life(
    folder: Path, machine: Machine, body: Callable[[Session], Awaitable[Outcome]]
) -> Outcome:
    async def main() -> Outcome:
        with open_log(folder) as log:
            return await body(await attach(log, machine))

    return anyio.run(main)


@pytest.mark.parametrize("effect", ["pure", "idempotent"])
def test_what_was_declared_harmless_is_run_again(folder, machine, effect):
    """Declared harmless: the same call simply runs again, as another attempt."""

    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            machine.crash = "agent s1"
            with pytest.raises(OutcomeUnknown):
                await session.run(command(1, effect))

    anyio.run(main)
    outcome = in_next_life(folder, machine, lambda s: s.run(command(1, effect)))
    assert outcome.blobs["stdout"] == b"out 1\n"
    assert machine.ran == ["s1", "s1#2"]
    assert in_next_life(folder, machine, lambda s: s.run(command(1, effect))).cached


@pytest.mark.parametrize("policy", ["fail", "retry"])
def test_retry_does_not_repeat_what_must_not_be(folder, machine, policy):
    make_unknown(folder, machine, command(1))
    with pytest.raises(OutcomeUnknown):
        in_next_life(folder, machine, lambda s: s.run(command(1), on_unknown=policy))
    assert times_run(machine, 1) == 1


def test_a_probe_decides(folder, machine):
    make_unknown(folder, machine, command(1))

    async def saw_it(operation: Operation) -> Outcome | None:
        assert operation == command(1)
        return Outcome(fields={"exit_code": 0}) if times_run(machine, 1) else None

    run = partial(in_next_life, folder, machine)
    assert run(lambda s: s.run(command(1), on_unknown=saw_it)).fields == {"exit_code": 0}
    assert run(lambda s: s.run(command(1))).cached
    assert times_run(machine, 1) == 1


def test_a_probe_that_finds_nothing_lets_it_run(folder, machine):
    make_unknown(folder, machine, command(1))
    (machine.folder / "work" / "1").unlink()

    async def saw_nothing(operation: Operation) -> Outcome | None:
        return None

    outcome = in_next_life(folder, machine, lambda s: s.run(command(1), on_unknown=saw_nothing))
    assert outcome.blobs["stdout"] == b"out 1\n"
    assert times_run(machine, 1) == 1


def test_rollback_goes_back_to_the_last_snapshot(folder, machine):
    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            await run_all(session, 2)
            await session.snapshot("good")
            await session.run(command(2))
            machine.crash = "agent s3"
            with pytest.raises(OutcomeUnknown):
                await session.run(command(3))
            with pytest.raises(RolledBack) as caught:
                await session.run(command(3), on_unknown="rollback")
            assert caught.value.position == 2
            assert [times_run(machine, n) for n in range(4)] == [1, 1, 0, 0]

    anyio.run(main)

    async def again() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            assert [o.cached for o in await run_all(session, 4)] == [True, True, False, False]

    anyio.run(again)
    assert [times_run(machine, n) for n in range(4)] == [1] * 4


def test_a_full_disk_takes_what_came_of_an_operation_without_every_name(
    folder, machine, monkeypatch
):
    names = tuple(Change(path=f"/work/{'d' * 200}/{n}", what="added") for n in range(1000))
    dispatch = machine.dispatch

    async def many(*args: object) -> Outcome:
        outcome = await dispatch(*args)
        monkeypatch.setattr(segment, "create", full)
        return replace(outcome, changes=names, background=names)

    def full(*_: object, **__: object) -> None:
        raise LogFull("no room for a segment")

    async def main() -> None:
        with MortalLog(folder, segment_size=1 << 16, durability="process") as log:
            session = await attach(log, machine)
            machine.dispatch = many
            await session.run(command(0))

    anyio.run(main)
    with Reader(folder) as log:
        (entry,) = read_tape(log, "sb").entries
        assert read_outcome(log, entry.end).blobs["stdout"] == b"out 0\n"


def test_what_ran_during_a_rollback_leaves_the_log_readable(folder, machine):
    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            await session.run(command(0))
            await session.snapshot("good")
            machine.crash = "agent s1"
            with pytest.raises(OutcomeUnknown):
                await session.run(command(1))
            begun, release = anyio.Event(), anyio.Event()
            dispatch = machine.dispatch

            async def slowly(*args: object) -> Outcome:
                outcome = await dispatch(*args)
                begun.set()
                await release.wait()
                return outcome

            machine.dispatch = slowly
            async with anyio.create_task_group() as group:
                group.start_soon(session.run, command(2))
                await begun.wait()
                with pytest.raises(RolledBack):
                    await session.run(command(1), on_unknown="rollback")
                release.set()

    anyio.run(main)
    assert kinds(folder)[-1] == "RECEIPT"
    with Reader(folder) as log:
        assert [entry.key for entry in read_tape(log, "sb").entries] == ["s0"]


def test_rollback_without_a_snapshot_stays_unknown(folder, machine):
    make_unknown(folder, machine, command(1))
    with pytest.raises(OutcomeUnknown, match="no snapshot"):
        in_next_life(folder, machine, lambda s: s.run(command(1), on_unknown="rollback"))


def test_settling_records_the_word_of_the_caller(folder, machine):
    make_unknown(folder, machine, command(1))

    async def settle(session: Session) -> Outcome:
        with pytest.raises(TrajectoryError):
            await session.settle("s9", Outcome(), "no such operation")
        with pytest.raises(OutcomeUnknown):
            await session.run(command(1))
        await session.settle("s1", Outcome(fields={"exit_code": 7}), "a person looked")
        return await session.run(command(1))

    assert in_next_life(folder, machine, settle).fields == {"exit_code": 7}
    assert in_next_life(folder, machine, lambda s: s.run(command(1))).fields == {"exit_code": 7}


def test_another_request_under_the_same_key(folder, machine):
    other = Operation(key="s1", request=exec_request("echo other", timeout=5))

    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            await session.run(command(1))
            with pytest.raises(OperationConflict):
                await session.run(other)
        with open_log(folder) as log:
            session = await attach(log, machine)
            with pytest.raises(Diverged) as caught:
                await session.run(other)
            assert caught.value.position == 0
            assert caught.value.snapshot is None
            assert (await session.run(command(1))).cached

    anyio.run(main)
    assert machine.ran == ["s1"]


def test_another_way_is_noticed_and_may_fork(folder, machine, tmp_path):
    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            await run_all(session, 1)
            await session.snapshot("one")
            await run_all(session, 3, first=1)
        with open_log(folder) as log:
            session = await attach(log, machine)
            await session.run(command(0))
            with pytest.raises(Diverged, match="fork it there from the snapshot one") as caught:
                await session.run(command(7))
            assert (caught.value.position, caught.value.snapshot) == (1, "one")
            other = Machine(tmp_path / "other", epoch="machine-2")
            fork = await Session.fork(log, "sb", "sb-fork", other, position=1)
            assert (await fork.run(command(0))).cached
            assert not (await fork.run(command(7))).cached
        assert other.ran == ["s7"]
        with open_log(folder) as log:
            fork = await Session.attach(log, "sb-fork", other)
            assert (await fork.run(command(0))).cached
            assert (await fork.run(command(7))).cached
            assert [e.key for e in read_tape(log, "sb").entries] == ["s0", "s1", "s2"]
            assert [e.key for e in read_tape(log, "sb-fork").entries] == ["s0", "s7"]

    anyio.run(main)


def test_operations_at_the_same_time_may_return_in_any_order(folder, machine):
    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            async with anyio.create_task_group() as group:
                for number in range(6):
                    group.start_soon(session.run, command(number))
        with open_log(folder) as log:
            session = await attach(log, machine)
            for number in reversed(range(6)):
                assert (await session.run(command(number))).cached
            assert not session.replaying

    anyio.run(main)


def test_a_sandbox_that_somebody_else_changed_is_refused(folder, machine):
    async def main() -> None:
        with open_log(folder) as log:
            await run_all(await attach(log, machine), 2)
        machine.generation += 1
        with open_log(folder) as log:
            with pytest.raises(StateDiffers, match="3 times"):
                await attach(log, machine)

    anyio.run(main)


def test_values_are_decided_once(folder, machine):
    digest = b"v" * 32

    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            assert await session.recall("turn", digest) is None
            await session.remember("turn", digest, {"a": 1}, {"text": b"x" * 9000})
        with open_log(folder) as log:
            session = await attach(log, machine)
            value = await session.recall("turn", digest)
            assert value is not None
            assert (value.fields, value.blobs) == ({"a": 1}, {"text": b"x" * 9000})
            with pytest.raises(OperationConflict):
                await session.recall("turn", b"w" * 32)

    anyio.run(main)


def test_an_ended_trajectory_is_not_continued(folder, machine):
    async def main() -> None:
        with open_log(folder) as log:
            session = await attach(log, machine)
            await session.run(command(0))
            await session.end()
            with pytest.raises(TrajectoryError, match="has ended"):
                await attach(log, machine)
            with pytest.raises(TrajectoryError, match="no trajectory"):
                await Session.attach(log, "nobody", machine)
            with pytest.raises(TrajectoryError, match="has a trajectory"):
                await Session.begin(log, "sb", machine)

    anyio.run(main)


def test_who_did_not_see_an_operation_begin_does_not_run_it_again(folder):
    """A second object for the same sandbox knows nothing of what the first one began."""
    ran: list[str] = []

    class Sandbox:
        async def exec(self, argv: object, **options: object) -> None:
            ran.append(str(argv))
            await anyio.sleep(60)

    async def main() -> None:
        sandbox = Sandbox()
        with open_log(folder) as log:
            session = await Session.begin(log, "sb", DirectExecutor(sandbox))
            with anyio.move_on_after(0.02):
                await session.run(command(1))
        with open_log(folder) as log:
            with pytest.raises(StateDiffers):
                await Session.attach(log, "sb", DirectExecutor(sandbox))
            session = await Session.attach(log, "sb", DirectExecutor(sandbox), replaced=True)
            with pytest.raises(OutcomeUnknown):
                await session.run(command(1), on_unknown="fail")

    anyio.run(main)
    assert len(ran) == 1


def test_a_sandbox_that_ends_before_it_began_is_no_unknown(folder):
    class Gone:
        stopped = True

        async def exec(self, *_: object, **__: object) -> None:
            raise SandboxLost("stopped")

    async def main() -> None:
        with open_log(folder) as log:
            session = await Session.begin(log, "sb", DirectExecutor(Gone()))
            with pytest.raises(OutcomeUnknown):
                await session.run(command(1))
            with pytest.raises(Unsupported):
                await session.snapshot()

    anyio.run(main)
