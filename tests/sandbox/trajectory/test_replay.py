"""Recorded runs in real sandboxes: shown again, done again, and which operation changed what."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import pytest
from typer.testing import CliRunner

from fathom.cli.main import app
from fathom.errors import SandboxError, Unsupported
from fathom.sandbox import Container, SandboxFileMissing
from fathom.sandbox.trajectory import replay
from fathom.sandbox.trajectory.changes import Change
from fathom.sandbox.trajectory.errors import LogFull, LogLocked, OperationConflict, TrajectoryError
from fathom.sandbox.trajectory.executor import Finished, Lost, NeverSeen
from fathom.sandbox.trajectory.held import DeadJournal, HeldExecutor, reconnect
from fathom.sandbox.trajectory.log import Log
from fathom.sandbox.trajectory.operation import Outcome, exec_request
from fathom.sandbox.trajectory.record import Kind
from fathom.sandbox.trajectory.recorded import RecordedSandbox
from fathom.sandbox.trajectory.segment import SUFFIX
from fathom.sandbox.trajectory.session import Session
from fathom.sandbox.trajectory.store import Store, _Beginning


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield Store()


def record(store: Store, work: Callable[[RecordedSandbox], Awaitable[None]]) -> str:
    async def main() -> str:
        try:
            async with store.work({"task": "a task"}, Container()) as opened:
                await work(RecordedSandbox(opened.session))
                return opened.id
        except Unsupported as error:
            pytest.skip(f"no sandbox on this machine: {error}")

    return anyio.run(main)


async def session(sandbox: RecordedSandbox) -> None:
    await sandbox.exec("mkdir d; printf 'a\\xff\\n' > d/a; echo out; echo err >&2", timeout=20)
    await sandbox.files.write("/work/d/b", b"\0\1\2")
    assert await sandbox.files.read("d/b") == b"\0\1\2"
    with pytest.raises(SandboxFileMissing):
        await sandbox.files.read("none")
    await sandbox.exec("echo more >> d/b; rm d/a; (sleep 0.2; echo bg > late) &", timeout=20)
    await anyio.sleep(1)
    await sandbox.exec("head -c 9000 /dev/zero | tr '\\0' x; exit 3", timeout=20)


@pytest.fixture(scope="module")
def run(store: Store) -> str:
    return record(store, session)


def invoke(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["sandbox", *arguments])
    assert found.exit_code == 0, found.output
    return found.stdout


def test_replay_gives_back_what_was_recorded(store: Store, run: str) -> None:
    with store.read(run) as log:
        events = list(replay.events(log, run))
    outcomes = [event.outcome for event in events if event.outcome is not None]
    assert [o.fields.get("exit_code") for o in outcomes] == [0, None, None, None, 0, 3]
    assert outcomes[0].blobs == {"stdout": b"out\n", "stderr": b"err\n"}
    assert outcomes[2].blobs["data"] == b"\0\1\2"
    assert outcomes[3].error is not None
    assert outcomes[3].error[0] == SandboxFileMissing.code
    assert outcomes[5].blobs["stdout"] == b"x" * 9000
    assert [e.record.kind for e in events].count(Kind.INTENT) == 6
    assert events[-1].record.kind is Kind.END


def test_every_change_has_its_operation(store: Store, run: str) -> None:
    with store.read(run) as log:
        found = replay.provenance(log, run)
    told = [(o.key, o.background, o.change) for o in found]
    assert told == [
        ("op/1", False, Change(path="/work/d", what="added")),
        ("op/1", False, Change(path="/work/d/a", what="added", size=3)),
        ("op/2", False, Change(path="/work/d/b", what="added", size=3)),
        ("op/5", False, Change(path="/work/d/a", what="removed")),
        ("op/5", False, Change(path="/work/d/b", what="changed", size=8)),
        ("op/6", True, Change(path="/work/late", what="added", size=3)),
    ]
    assert all(origin.certain for origin in found)


def test_planted_links_lead_the_watcher_nowhere(store: Store) -> None:
    """What a tenant plants in its folders shows nothing of the host, and hides nothing."""

    async def plant(sandbox: RecordedSandbox) -> None:
        text = "ln -s / root; ln -s /proc/self/root up; mkfifo pipe; touch $'odd\\nname' $'\\xff'"
        await sandbox.exec(text, timeout=20)

    run = record(store, plant)
    with store.read(run) as log:
        paths = {origin.change.path for origin in replay.provenance(log, run)}
    names = ("root", "up", "pipe", "odd\nname", "\ufffd")
    assert paths == {f"/work/{name}" for name in names}


def test_the_commands_show_it(store: Store, run: str) -> None:
    assert run in invoke("logs")
    (listed,) = [k for k in json.loads(invoke("logs", "--json")) if k["run"] == run]
    assert (listed["task"], listed["operations"], listed["state"]) == ("a task", 6, "ended")
    assert "exit 3" in invoke("logs", run)
    assert [o["exit_code"] for o in json.loads(invoke("logs", run, "--json"))][-1] == 3
    assert "in the background" in invoke("logs", run, "--files")
    assert len(json.loads(invoke("logs", run, "--files", "--json"))) == 6
    assert "all whole" in invoke("logs", run, "--verify")
    shown = invoke("replay", run)
    assert "[exit code 3]" in shown
    assert "    out\n    err\n" in shown
    events = [json.loads(line) for line in invoke("replay", run, "--json").splitlines()]
    assert events[0]["fields"] == {"task": "a task"}
    assert {"hex": "0001 02".replace(" ", "")} not in events
    written = next(e for e in events if e.get("request", {}).get("verb") == "write")
    assert written["request"]["data"] == "\0\1\2"
    assert invoke("replay", run, "--follow").count("receipt") == 6


def test_done_again_it_comes_out_the_same(run: str) -> None:
    lines = [json.loads(line) for line in invoke("replay", run, "--again", "--json").splitlines()]
    assert [line["verdict"] for line in lines] == ["same"] * 6, lines


def test_what_the_background_did_is_held_against_nobody() -> None:
    """It comes at its own time: then between two operations, now within one, or the reverse."""
    late, own = (Change(path=f"/work/{name}", what="added", size=3) for name in ("late", "own"))
    without, with_it = (Outcome(changes=changes) for changes in ((own,), (own, late)))
    for then, now, when in ((without, with_it, "now"), (with_it, without, "then")):
        assert list(replay.compare(then, now)) == [f"file /work/late: added (3 bytes) only {when}"]
        assert list(replay.compare(then, now, {late})) == []
        assert list(replay.compare(then, now, {own})) != []


def test_what_comes_out_differently_is_said(store: Store) -> None:
    async def chance(sandbox: RecordedSandbox) -> None:
        await sandbox.exec(
            "echo first; cat /proc/sys/kernel/random/uuid | tee f$RANDOM", timeout=20
        )
        await sandbox.exec("echo same", timeout=20)

    run = record(store, chance)
    found = CliRunner().invoke(app, ["sandbox", "replay", run, "--again"])
    assert found.exit_code == 1
    assert "stdout: line 2 was" in found.stdout
    assert "only then" in found.stdout
    assert "same         op/2" in found.stdout


def test_damage_is_said(store: Store) -> None:
    async def much(sandbox: RecordedSandbox) -> None:
        await sandbox.exec("head -c 9000 /dev/zero | tr '\\0' y", timeout=20)

    run = record(store, much)
    (blob,) = [p for p in (store.path(run) / "log" / "blobs").rglob("*") if p.is_file()]
    blob.write_bytes(b"z" * 9000)
    found = CliRunner().invoke(app, ["sandbox", "logs", run, "--verify", "--json"])
    assert found.exit_code == 1
    assert json.loads(found.stdout)["error"]["code"] == "trajectory_log_corrupt"
    (segment,) = (store.path(run) / "log").glob("*.log")
    data = bytearray(segment.read_bytes())
    data[200] ^= 1
    segment.write_bytes(data)
    found = CliRunner().invoke(app, ["sandbox", "replay", run])
    assert found.exit_code == 1
    assert "damaged" in found.stderr


def test_forgetting(store: Store) -> None:
    async def nothing(sandbox: RecordedSandbox) -> None:
        await sandbox.exec("true", timeout=20)

    run = record(store, nothing)
    invoke("forget", run)
    assert not store.path(run).exists()
    for wrong in ("../escape", "", "a/b", ".hidden"):
        found = CliRunner().invoke(app, ["sandbox", "forget", wrong])
        assert (found.exit_code, "cannot name" in found.stderr) == (1, True)


REQUEST = exec_request("cat /tmp/f", timeout=5)


async def _interrupted(store: Store) -> HeldExecutor:
    """The executor of a client that gave up after one operation."""
    with contextlib.suppress(KeyError):
        async with store.work({"task": "t"}, Container()) as opened:
            await RecordedSandbox(opened.session).exec("echo kept > /tmp/f", timeout=20)
            raise KeyError
    return opened.executor


def test_a_holder_outlives_its_client_and_its_journal_outlives_it(store: Store) -> None:
    digest = REQUEST.digest()

    async def main() -> Path:
        executor = await _interrupted(store)
        again = await reconnect(executor.folder)
        assert again is not None
        assert (again.epoch, again.generation) == (executor.epoch, 1)
        run = again.dispatch
        outcome = await run("k", digest, REQUEST, lambda: None)
        assert outcome.blobs["stdout"] == b"kept\n"
        repeated = await run("k", digest, exec_request("never", timeout=5), lambda: None)
        assert repeated.same_as(outcome)
        with pytest.raises(OperationConflict):
            await run("k", b"x" * 32, exec_request("never", timeout=5), lambda: None)
        await again.stop()
        assert await reconnect(executor.folder) is None
        # The same executor now answers from the journal.
        assert isinstance(await again.query("k", REQUEST), Finished)
        return executor.folder

    folder = anyio.run(main)
    journal = DeadJournal(folder)
    assert isinstance(anyio.run(journal.query, "k", REQUEST), Finished)
    assert isinstance(anyio.run(journal.query, "other", REQUEST), NeverSeen)
    (segment,) = (folder / "journal").glob("*.log")
    data = bytearray(segment.read_bytes())
    data[80] ^= 1
    segment.write_bytes(data)
    answer = anyio.run(DeadJournal(folder).query, "other", REQUEST)
    assert isinstance(answer, Lost)
    assert "cannot be read" in answer.reason


def test_what_was_prepared_and_not_promised_has_not_begun(store: Store) -> None:
    """A client that dies, or whose log is full, after it sent an operation and before it counts."""

    async def fail() -> None:
        raise LogFull("no room for the intent")

    request = exec_request("echo ran >> f; cat f", timeout=5)

    async def main() -> None:
        executor = await _interrupted(store)
        with pytest.raises(LogFull):
            await executor.dispatch("new", request.digest(), request, lambda: None, fail)
        assert isinstance(await executor.query("new", request), NeverSeen)
        seen: list[object] = []

        async def commit() -> None:
            # At this moment, in which the intent becomes durable, nothing has begun.
            await anyio.sleep(0.2)
            seen.append(await executor.query("new", request))

        outcome = await executor.dispatch("new", request.digest(), request, lambda: None, commit)
        assert isinstance(seen[0], NeverSeen)
        assert outcome.blobs["stdout"] == b"ran\n"
        # What is safe in the log is given up with the next operation, and not run again.
        await executor.acknowledge("new")
        other = exec_request("cat f", timeout=5)
        assert (await executor.dispatch("x", other.digest(), other, lambda: None)).blobs["stdout"]
        again = await executor.query("new", request)
        assert isinstance(again, Finished)
        assert again.outcome.blobs == {}
        await executor.stop()

    anyio.run(main)


def test_a_sandbox_that_does_not_start_leaves_nothing(store: Store) -> None:
    async def main() -> None:
        async with store.work({"task": "t"}, Container(memory="1KiB")):
            raise AssertionError

    before = sorted(store.folder.iterdir())
    with pytest.raises(SandboxError, match="at least 16MiB"):
        anyio.run(main)
    assert sorted(store.folder.iterdir()) == before


def test_what_another_process_began_meanwhile_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "one"
    with Log(path / "log", segment_size=1 << 16, durability="process") as log:
        Session.declare(log, "one", {"task": "another"})
        beginning = _Beginning(log, "one", path, Container(), "auto", 1.0)
        with pytest.raises(TrajectoryError, match="resume it"):
            anyio.run(beginning.new, {"task": "t"})
    assert Store(tmp_path).known("one").fields == {"task": "another"}


def test_nobody_goes_on_with_what_is_being_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Store(tmp_path, durability="process")
    with Log(kept.path("one") / "log", segment_size=1 << 16, durability="process") as log:
        Session.declare(log, "one")

    async def release(_: Store, id_: str) -> None:
        with pytest.raises(LogLocked):
            kept._open_log(id_, kept.path(id_), new=False)  # pyright: ignore

    monkeypatch.setattr(Store, "release", release)
    anyio.run(kept.forget, "one")
    assert list(tmp_path.iterdir()) == []


def test_killed_while_a_failed_beginning_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half of a log is left under its name, which would look damaged; the rest goes later."""
    kept, removed = Store(tmp_path / "runs"), shutil.rmtree

    async def fails(_: object) -> None:
        raise TrajectoryError("no sandbox")

    def dies(path: Path, ignore_errors: bool = False) -> None:
        for segment in Path(path).rglob(f"*{SUFFIX}"):
            segment.unlink()
        raise SystemExit("killed")

    async def begin(name: str) -> None:
        async with kept.work({}, Container(), name=name):
            pass

    monkeypatch.setattr("fathom.sandbox.trajectory.store._Beginning._hold", fails)
    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(SystemExit):
        anyio.run(begin, "one")
    assert not kept.path("one").exists()
    assert kept.unlisted() == {}
    monkeypatch.setattr(shutil, "rmtree", removed)
    with pytest.raises(TrajectoryError, match="no sandbox"):
        anyio.run(begin, "one")  # not refused as damaged
    assert list(kept.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_says_what_to_do():
    async def main() -> None:
        async with Store(Path("/proc/nowhere")).work({}, Container()):
            pytest.fail("there is nothing that it is written to")

    with pytest.raises(Unsupported, match=r"/proc/nowhere .*set XDG_STATE_HOME"):
        anyio.run(main)
