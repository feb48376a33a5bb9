"""`fathom agent --resume`: killed at any point, it goes on and runs no command a second time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import anyio
import pytest
from typer.testing import CliRunner

from fathom.cli.main import app
from fathom.sandbox import Container
from fathom.sandbox.paths import cache_folder, runtime_folder
from fathom.sandbox.trajectory.held import HeldExecutor, hold, reconnect
from fathom.sandbox.trajectory.store import Store
from fathom.sandbox.trajectory.tape import Entry, read_tape
from fathom.sandbox.worker.worker import PLAN, Worker
from tests.agent.chat_server import Respond, Server, answer, serving, tool_call
from tests.machines import skip_without_machines

PATIENCE = 60.0


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A state folder of this test; no holder is left when it ends."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    store = Store()
    yield store
    for folder in store.folder.glob("*/holder-*"):
        executor = anyio.run(reconnect, folder)
        if executor is not None:
            anyio.run(executor.stop)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


# Starting Python and importing the commands takes longer than a whole run of the agent, so one
# process does it once and forks for every command, which then is a process like any other.
ZYGOTE = """
import json, os, sys
import anyio._backends._asyncio, httpx2
import fathom.sandbox.trajectory.recorded, fathom.sandbox.trajectory.store
from fathom.cli.main import app
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        for number, path in ((1, order["out"]), (2, order["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(order["env"])
        code = 1
        try:
            app(order["arguments"], prog_name="fathom")
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(pid, flush=True)
"""


class Commands:
    """Runs commands in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.zygote = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, order: dict[str, object]) -> int:
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        self.zygote.stdin.write(json.dumps(order) + "\n")
        self.zygote.stdin.flush()
        return int(self.zygote.stdout.readline())

    def close(self) -> None:
        with self.zygote:
            assert self.zygote.stdin is not None
            self.zygote.stdin.close()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    made = Commands(tmp_path_factory.mktemp("outputs"))
    yield made
    made.close()


class Agent:
    """One `fathom agent`, running."""

    def __init__(self, commands: Commands, server: Server, *arguments: str) -> None:
        commands.count += 1
        self.commands = commands
        self.out, self.err = (commands.folder / f"{commands.count}.{n}" for n in ("out", "err"))
        whole = ["agent", "a task", "--url", server.url, "--model", "m", *arguments]
        order: dict[str, object] = {"arguments": whole, "out": str(self.out), "err": str(self.err)}
        order["env"] = {"XDG_STATE_HOME": os.environ["XDG_STATE_HOME"]}
        self.pid = commands.ask(order)

    def result(self) -> tuple[int, str, str]:
        code = self.commands.ask({"wait": self.pid})
        return code, self.out.read_text(), self.err.read_text()

    def kill_when(self, ready: Callable[[], bool], *others: Callable[[], int]) -> None:
        """Kill it, and the processes that `others` name, as soon as `ready`."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.005)
        for other in others:
            os.kill(other(), signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)
        assert self.result()[0] == -signal.SIGKILL


@pytest.fixture
def start(commands: Commands) -> Callable[..., Agent]:
    return partial(Agent, commands)


Start = Callable[..., Agent]


def holder(state: Store) -> int:
    """The process that holds the only sandbox."""
    (folder,) = state.folder.glob("*/holder-1")
    executor = anyio.run(reconnect, folder)
    assert executor is not None
    return executor.pid


FIRST = tool_call("bash", command="echo one >> log; echo first")
SLOW = tool_call("bash", command="echo two >> log; touch started; sleep 1; echo three >> log")


def test_killed_while_a_command_runs(start: Start, work: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    other.chmod(0o777)
    with serving(FIRST, SLOW, answer("Fine.")) as whole:
        assert start(whole, "--workdir", str(other)).result()[:2] == (0, "Fine.\n")
    with serving(FIRST, SLOW, answer("Fine.")) as server:
        start(server, "--workdir", str(work)).kill_when((work / "started").exists)
        code, out, err = start(server, "--workdir", str(work), "--resume").result()
    assert (code, out) == (0, "Fine.\n"), err
    assert "recorded before" in err
    assert (work / "log").read_text() == "one\ntwo\nthree\n"
    # The model is asked as if nothing had happened, and not about what it had said.
    assert [body["messages"] for body in server.bodies] == [b["messages"] for b in whole.bodies]


def test_killed_while_the_model_thinks(start: Start, work: Path, state: Store) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        go_on.wait(PATIENCE)

    with serving(FIRST, hang, SLOW, answer("Fine.")) as server:
        start(server, "--workdir", str(work)).kill_when(asked.is_set)
        go_on.set()
        code, out, err = start(server, "--workdir", str(work), "--resume", "--json").result()
        assert code == 0, err
        assert server.bodies[2]["messages"] == server.bodies[1]["messages"]
        assert '"answer": "Fine."' in out
        (known,) = state.list()
        assert known.ended
        # What is over is told again, byte for byte, and nothing is done.
        for which in ([], [known.id]):
            again = start(server, "--workdir", str(work), "--json", "--resume", *which).result()
            assert again[:2] == (0, out), again[2]
            assert f"{known.id} ended at" in again[2]
        code, _, err = start(server, "--resume", known.id).result()
        assert (code, "began with another command" in err) == (1, True), err
        assert len(server.bodies) == 4
    assert (work / "log").read_text() == "one\ntwo\nthree\n"
    assert [k.id for k in state.list()] == [known.id]


def test_killed_before_it_had_begun_or_when_it_was_over(
    start: Start, work: Path, state: Store
) -> None:
    """The sandbox is never without a record of who wants it, and its folder is never a riddle."""
    options = ("--workdir", str(work), "--resume")
    leftover = state.folder / "left"
    with serving(FIRST, answer("Fine.")) as server:
        start(server, *options).kill_when(lambda: any(state.folder.glob("*/holder-*")))
        (known,) = state.list()
        assert known.operations == 0
        code, out, err = start(server, *options).result()
        assert (code, out) == (0, "Fine.\n"), err
        assert [k.id for k in state.list()] == [known.id]
        # A folder that was made in the moment of the kill; the run gets it by its name.
        (leftover / "log").mkdir(parents=True)
        shown = CliRunner().invoke(app, ["sandbox", "logs"]).stdout
        assert "left" in shown
        assert "never begun" in shown
    with serving(answer("Fine too.")) as server:
        for _ in range(2):
            code, out, err = start(server, *options, "--name", "left").result()
            assert (code, out) == (0, "Fine too.\n"), err
        assert len(server.bodies) == 1
    assert (work / "log").read_text() == "one\n"


def test_a_worker_is_found_by_its_plan_before_it_has_a_record(state: Store) -> None:
    for name, plan in (("w", '{"fields": {"task": "t"}}'), ("broken", "{")):
        state.path(name).mkdir(parents=True)
        (state.path(name) / PLAN).write_text(plan)
    assert Worker.last({"task": "t"}, state) == "w"
    assert Worker.last({"task": "u"}, state) is None


def test_what_a_killed_end_leaves_is_ended_and_what_is_not_there_is_not_forgotten(
    start: Start, work: Path, state: Store
) -> None:
    with serving(answer("Fine.")) as server:
        assert start(server, "--workdir", str(work), "--name", "one").result()[0] == 0

        async def live() -> HeldExecutor:
            """Its sandbox, as if it had been killed just after its last record."""
            return await hold(
                state.path("one") / "holder-2",
                Container(workdir=work),
                cache_dir=cache_folder(),
                runtime_dir=runtime_folder(),
            )

        left = anyio.run(live)
        assert start(server, "--workdir", str(work), "--resume").result()[:2] == (0, "Fine.\n")
        assert anyio.run(reconnect, left.folder) is None
    found = CliRunner().invoke(app, ["sandbox", "forget", "nope"])
    assert (found.exit_code, "there is no trajectory nope" in found.stderr) == (1, True)
    assert not state.path("nope").exists()


def test_a_command_that_was_lost_with_its_sandbox_is_told_to_the_model(
    start: Start, work: Path, state: Store
) -> None:
    with serving(FIRST, SLOW, answer("Fine.")) as server:
        agent = start(server, "--workdir", str(work))
        agent.kill_when((work / "started").exists, lambda: holder(state))
        code, out, err = start(server, "--workdir", str(work), "--resume").result()
    assert (code, out) == (0, "Fine.\n"), err
    assert "in a fresh sandbox" in err
    assert (work / "log").read_text() == "one\ntwo\n"
    assert "may have taken effect or not" in server.bodies[2]["messages"][-1]["content"]
    (known,) = state.list()
    with state.read(known.id) as log:
        tape = read_tape(log, known.id)
    assert [entry.key for entry in tape.entries if entry.unknown] == ["op/2"]


@pytest.mark.parametrize("change", ["", "; echo $RANDOM-$$"])
def test_a_lost_sandbox_is_rebuilt_when_that_is_asked(
    start: Start, change: str, state: Store
) -> None:
    script: tuple[Respond, ...] = (
        tool_call("bash", command=f"echo one >> log; echo first{change}"),
        tool_call("bash", command="sleep 1; echo two >> log"),
        tool_call("bash", command="cat log"),
        answer("Fine."),
    )

    def second_began() -> bool:
        with_log = [k for k in state.list() if k.operations == 1]
        if not with_log:
            return False
        with state.read(with_log[0].id) as log:
            return any(e.key == "op/2" for e in read_tape(log, with_log[0].id).entries)

    with serving(*script) as server:
        start(server).kill_when(second_began, lambda: holder(state))
        code, _, err = start(server, "--resume").result()
        assert (code, "--on-lost rebuild" in err) == (1, True), err
        code, out, err = start(server, "--resume", "--on-lost", "rebuild").result()
    if change:
        assert (code, "came out differently" in err) == (1, True), err
        return
    assert (code, out) == (0, "Fine.\n"), err
    assert server.bodies[3]["messages"][-1]["content"] == "one\ntwo"


def test_killed_while_a_command_runs_in_a_virtual_machine(start: Start, state: Store) -> None:
    skip_without_machines(cache_folder())
    script: tuple[Respond, ...] = (
        tool_call("bash", command="echo one >> log; echo first"),
        tool_call("bash", command="echo two >> log; sleep 3; echo three >> log"),
        tool_call("bash", command="cat log"),
        answer("Fine."),
    )

    def second_began() -> bool:
        return any(e.key == "op/2" and e.started for e in _entries(state))

    with serving(*script) as server:
        start(server, "--sandbox", "microvm").kill_when(second_began)
        code, out, err = start(server, "--sandbox", "microvm", "--resume").result()
        assert (code, out) == (0, "Fine.\n"), err
    assert server.bodies[3]["messages"][-1]["content"] == "one\ntwo\nthree"


def _entries(state: Store) -> list[Entry]:
    for known in state.list():
        with state.read(known.id) as log:
            return read_tape(log, known.id).entries
    return []


def test_another_command_is_not_resumed(start: Start, work: Path, state: Store) -> None:
    with serving(FIRST, SLOW, answer("Fine.")) as server:
        start(server, "--workdir", str(work)).kill_when((work / "started").exists)
        (known,) = state.list()
        code, _, err = start(server, "--resume", known.id).result()
        assert (code, "began with another command" in err) == (1, True), err
        code, _, err = start(server, "--workdir", str(work), "--resume", "no-such-run").result()
        assert (code, "there is no trajectory" in err) == (1, True), err


def test_a_detached_run_is_followed_while_it_works(
    work: Path, state: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop lives on its own; who comes later is connected to it and replays nothing."""
    with serving(FIRST, SLOW, answer("Fine.")) as server:
        command = ["agent", "a task", "--url", server.url, "--model", "m", "--workdir", str(work)]
        monkeypatch.setattr(sys, "argv", ["fathom", *command, "--detach"])
        begun = CliRunner().invoke(app, [*command, "--detach"])
        assert begun.exit_code == 0, begun.output
        run = begun.stdout.strip()
        assert state.known(run).running
        found = CliRunner().invoke(app, ["sandbox", "replay", run, "--follow", "--json"])
        events = [json.loads(line) for line in found.stdout.splitlines()]
        assert events[-1]["kind"] == "end"
        assert events[-1]["fields"] == {"status": "answered", "answer": "Fine."}
        assert len(server.bodies) == 3
    assert (work / "log").read_text() == "one\ntwo\nthree\n"
    deadline = time.monotonic() + PATIENCE
    while state.known(run).running:
        assert time.monotonic() < deadline
        time.sleep(0.05)
