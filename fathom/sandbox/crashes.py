"""Crash injection: processes of a sandbox killed at random points around commands that really run.

A client begins operations one after another in a sandbox of a daemon. Again and again one of five
is killed by SIGKILL: the client, the daemon's privileged parent, its API process, its node, or the
agent inside.
The next client resumes from the log. Each command adds a line to a file of its own in a folder of
the host, so what ran twice shows there, whatever the logs say. At the end every operation must have
a receipt or be unknown, and no file two lines.

Paper: none (a test; §5.2.5 promises that no command runs twice).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from fathom.errors import DaemonLost, FathomError
from fathom.sandbox import Client, Container, state
from fathom.sandbox.edge.keeper import Keeper
from fathom.sandbox.edge.parent import Parent
from fathom.sandbox.host import LocalHost
from fathom.sandbox.sandbox import Sandbox
from fathom.sandbox.trajectory.errors import OutcomeUnknown
from fathom.sandbox.trajectory.executor import AgentExecutor
from fathom.sandbox.trajectory.log import Log, Reader
from fathom.sandbox.trajectory.operation import Operation, exec_request
from fathom.sandbox.trajectory.session import Session
from fathom.sandbox.trajectory.tape import read_outcome, read_tape

# An agent takes what runs in its sandbox along: that outcome is unknown, and no wit can change it.
SHARES = {"client": 0.74, "daemon": 0.10, "api": 0.10, "node": 0.05, "agent": 0.01}
# A client reads the whole trajectory; a longer one would measure reading.
PER_ROUND = 100
_NAME = "crashes"
_SEGMENT = 1 << 20
_PATIENCE = 30.0
_DELAY = 0.03  # seconds after a sign of progress within which the kill comes


@dataclass(slots=True)
class Report:
    """What was found so far. Lists name operations as round/number."""

    kills: Counter[str] = field(default_factory=Counter[str])
    operations: int = 0
    recovered: int = 0
    duplicates: list[str] = field(default_factory=list[str])
    lost: list[str] = field(default_factory=list[str])
    made_up: list[str] = field(default_factory=list[str])
    unknown: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        """Whether nothing ran twice, no receipt is lost or made up, and 1% at most is unknown."""
        broken = self.duplicates or self.lost or self.made_up
        return not broken and len(self.unknown) <= max(1, self.operations // 100)


class Crasher:
    """The processes and their folder. Forks, so the process that has it must have one thread."""

    def __init__(self, folder: Path, cache: Path, seed: int, shares: Mapping[str, float]) -> None:
        self.cache = cache
        self.runtime = folder / "run"
        self.work = folder / "work"
        self.logs = folder / "logs"
        for path in (self.runtime, self.work, self.logs):
            path.mkdir(mode=0o711)
        self.work.chmod(0o777)
        self.shares = dict(shares)
        self.chance = random.Random(seed)
        self.report = Report()
        self.daemon = 0
        self.client = 0
        # The number of the client's last operation that has come to its end.
        self.progress = mmap.mmap(-1, 8)

    # Processes ---------------------------------------------------------------------------------

    def start_daemon(self) -> None:
        """Start the daemon; it may take a moment until it answers."""
        if not self.daemon:
            self.daemon = _child(self._serve)

    def _serve(self) -> None:
        host = LocalHost("auto", self.cache, self.runtime)
        Parent(Keeper(host, spare=0, work=(self.work,))).run()

    def start_client(self, number: int, until: int | None = None) -> None:
        """Start a client of round `number`, which ends after operation `until` if that is given."""
        if not self.client:
            self.client = _child(lambda: anyio.run(self._work, number, until))

    def helper(self, module: bytes) -> int | None:
        """The process of the daemon that runs now which runs `module`."""
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if not any(b"from " + module + b" import" in word for word in words):
                    continue
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == self.daemon:
                    return int(path.name)
        return None

    def node(self) -> int | None:
        """The node of the daemon that runs now."""
        return self.helper(b"fathom.sandbox.node")

    def agent(self) -> int | None:
        """The first process of the sandbox."""
        for folder in self.runtime.glob("sb-*"):
            if (pid := state.first_process(folder)) is not None:
                return pid
        return None

    # The client --------------------------------------------------------------------------------

    async def _work(self, number: int, until: int | None) -> None:
        async with Client("edge", runtime_dir=self.runtime, cache_dir=self.cache) as client:
            sandbox, executor = await self._connect(client)
            folder = self.logs / str(number)
            with Log(folder, durability="process", segment_size=_SEGMENT) as log:
                if log.head(_NAME) is None:
                    session = await Session.begin(log, _NAME, executor)
                else:
                    session = await Session.attach(log, _NAME, executor, replaced=True)
                done, recorded = 0, session.recorded
                while until is None or done < until:
                    await self._run(session, sandbox, number, done + 1)
                    done += 1
                    if done >= recorded:
                        # Live from here on: kills shall fall there, not into what is read back.
                        self.progress[:] = done.to_bytes(8, "little")

    async def _connect(self, client: Client) -> tuple[Sandbox, AgentExecutor]:
        spec = Container(workdir=str(self.work))
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                sandbox = await client.create(spec, key=_NAME)
                return sandbox, await AgentExecutor.open(sandbox)
            except FathomError:
                # No daemon yet, or one that has not seen yet that the sandbox is gone.
                if time.monotonic() > deadline:
                    raise
                await anyio.sleep(0.01)

    async def _run(self, session: Session, sandbox: Sandbox, number: int, step: int) -> None:
        # The effect comes in the middle, so that a kill falls before, into and after it.
        request = exec_request(f"echo $$ >> {number}-{step}; echo out {step}", timeout=20)
        operation = Operation(key=f"{number}/{step}", request=request)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                outcome = await session.run(operation)
                assert outcome.blobs["stdout"] == b"out %d\n" % step, outcome
                return
            except DaemonLost:
                if time.monotonic() > deadline:
                    raise
                await anyio.sleep(0.01)
            except OutcomeUnknown:
                with contextlib.suppress(DaemonLost):
                    await sandbox.ping()  # where it is lost, another client begins with another one
                return

    # Killing -----------------------------------------------------------------------------------

    def round(self, number: int, kills: int) -> None:
        """Kill so often while one trajectory grows, let it come to an end, and judge it."""
        names, weights = list(self.shares), list(self.shares.values())
        for _ in range(kills):
            self.start_daemon()
            self.start_client(number)
            self._await_progress()
            time.sleep(self.chance.uniform(0.0, _DELAY))
            self._kill(self.chance.choices(names, weights)[0])
        self._end_client()
        with Reader(self.logs / str(number)) as log:
            wanted = len(read_tape(log, _NAME).entries) + 3
        deadline = time.monotonic() + 4 * _PATIENCE
        while True:
            self.start_daemon()
            self.start_client(number, wanted)
            _, status = os.waitpid(self.client, 0)
            self.client = 0
            if status == 0:
                break
            assert time.monotonic() < deadline, f"no client of round {number} came to its end"
        self._judge(number, wanted)

    def _kill(self, victim: str) -> None:
        pids: dict[str, Callable[[], int | None]] = {
            "client": lambda: self.client or None,
            "daemon": lambda: self.daemon,
            "api": lambda: self.helper(b"fathom.sandbox.edge.api"),
            "node": self.node,
            "agent": self.agent,
        }
        pid = pids[victim]()
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.report.kills[victim] += 1
        if victim == "client":
            self._end_client()
        elif victim == "daemon":
            os.waitpid(self.daemon, 0)
            self.daemon = 0

    def _end_client(self) -> None:
        if self.client:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.client, signal.SIGKILL)
            os.waitpid(self.client, 0)
            self.client = 0

    def _await_progress(self) -> None:
        """Wait until the client has come on, or has ended because its sandbox did."""
        before, deadline = self.progress[:], time.monotonic() + _PATIENCE
        while self.progress[:] == before and time.monotonic() < deadline:
            pid, _ = os.waitpid(self.client, os.WNOHANG)
            if pid:
                self.client = 0
                return
            time.sleep(0.001)

    # Judging -----------------------------------------------------------------------------------

    def _judge(self, number: int, operations: int) -> None:
        """Compare the log of a round with what really happened."""
        report = self.report
        lines = {
            path.name.partition("-")[2]: len(path.read_text().split())
            for path in self.work.glob(f"{number}-*")
        }
        report.duplicates += [f"{number}/{step}" for step, count in lines.items() if count > 1]
        with Reader(self.logs / str(number)) as log:
            tape = read_tape(log, _NAME)
            report.operations += len(tape.entries)
            missing = operations - len(tape.entries)
            report.lost += [f"{number}/missing"] * missing
            for entry in tape.entries:
                step = entry.key.partition("/")[2]
                name = f"{number}/{step}"
                if entry.end is None:
                    (report.lost if entry.unknown is None else report.unknown).append(name)
                    continue
                report.recovered += bool(log.body(entry.end).fields.get("recovered"))
                said = read_outcome(log, entry.end).blobs["stdout"]
                if said != f"out {step}\n".encode() or lines.get(step) != 1:
                    report.made_up.append(name)
        shutil.rmtree(self.logs / str(number))
        for path in self.work.glob(f"{number}-*"):
            path.unlink()

    def close(self) -> None:
        """End every process and remove every sandbox."""
        self._end_client()
        node = self.node() if self.daemon else None
        if self.daemon:
            os.kill(self.daemon, signal.SIGKILL)
            os.waitpid(self.daemon, 0)
            self.daemon = 0
        deadline = time.monotonic() + _PATIENCE
        while node is not None and Path(f"/proc/{node}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        state.reap(self.runtime)


def run(
    kills: int, folder: Path, cache: Path, seed: int = 1, shares: Mapping[str, float] = SHARES
) -> Iterator[Report]:
    """Kill so often; gives the same report after each round. `folder`: empty, passable for all."""
    crasher = Crasher(folder, cache, seed, shares)
    try:
        for number in range(-(-kills // PER_ROUND)):
            crasher.round(number, min(PER_ROUND, kills - number * PER_ROUND))
            yield crasher.report
    finally:
        crasher.close()


def _child(work: Callable[[], None]) -> int:
    """Do `work` in a child process; a fork, so that it starts at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 2)
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return pid
