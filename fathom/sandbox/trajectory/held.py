"""The client's end of a holder: starting one, coming back to one, reading what a dead one left.

Paper: §5.2.5 (reconnecting to a sandbox after a preemption).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import plain
from fathom.sandbox.trajectory.errors import OperationConflict, TrajectoryError
from fathom.sandbox.trajectory.executor import (
    Answer,
    Finished,
    Lost,
    NeverSeen,
    OnStarted,
    Running,
)
from fathom.sandbox.trajectory.frames import Frame, connect
from fathom.sandbox.trajectory.holder import HELD, JOURNAL
from fathom.sandbox.trajectory.log import Reader
from fathom.sandbox.trajectory.operation import Outcome, Request, from_wire
from fathom.sandbox.trajectory.record import Kind, Record
from fathom.sandbox.trajectory.tape import read_outcome
from fathom.sandbox.types import Kept

DEFAULT_IDLE = 1800.0
ALIVE = "alive"
_PACKAGE = str(Path(__file__).parents[3])
_CODE = (
    "import sys; sys.path += {paths!r}; from fathom.sandbox.trajectory.holder import main; main()"
)


class HeldExecutor:
    """An executor whose sandbox belongs to a holder and outlives this process."""

    def __init__(self, folder: Path, hello: Mapping[str, Any]) -> None:
        self.folder = folder
        self.sandbox: str = hello["sandbox"]
        self.substrate: str = hello["substrate"]
        self.pid: int = hello["pid"]
        self.epoch: str = hello["epoch"]
        # How many operations had ended there when it was last heard of.
        self.generation: int = hello["generation"]

    async def dispatch(
        self, key: str, digest: bytes, request: Request, on_started: OnStarted
    ) -> Outcome:
        """See `Executor.dispatch`. A caller who gives up does not end the operation."""
        head: dict[str, Any] = {"ask": "run", "key": key, "digest": digest.hex()}
        head |= {**request.to_json(), "has_data": request.data is not None}
        async with connect(self.folder) as line:
            with self._translated():
                await line.send(head, request.data or b"")
                answer = await line.receive()
                if answer is not None and answer[0]["is"] == "conflict":
                    raise OperationConflict(f"the key {key} was used for another request")
                if answer is not None and answer[0]["is"] == "running":
                    on_started()
                    answer = await line.receive()
        return self._outcome(answer)

    async def query(self, key: str, request: Request) -> Answer:
        """See `Executor.query`. When the holder has died, its journal answers."""
        try:
            async with connect(self.folder) as line:
                with self._translated():
                    await line.send({"ask": "query", "key": key})
                    answer = await line.receive()
        except SandboxLost:
            answer = None
        if answer is None:
            return await DeadJournal(self.folder).query(key, request)
        match answer[0]["is"]:
            case "never":
                return NeverSeen()
            case "running":
                return Running()
            case "lost":
                return Lost(reason=answer[0]["reason"])
            case _:
                return Finished(outcome=self._outcome(answer))

    async def wait(self, key: str, request: Request) -> Outcome:
        """See `Executor.wait`."""
        async with connect(self.folder) as line:
            with self._translated():
                await line.send({"ask": "wait", "key": key})
                answer = await line.receive()
        return self._outcome(answer)

    async def acknowledge(self, key: str) -> None:
        """See `Executor.acknowledge`."""
        with contextlib.suppress(SandboxLost):
            async with connect(self.folder) as line:
                with self._translated():
                    await line.send({"ask": "done", "key": key})
                    await line.receive()

    async def stop(self) -> None:
        """End the sandbox and its holder, and wait until both are gone."""
        with contextlib.suppress(SandboxLost):
            async with connect(self.folder) as line:
                with self._translated():
                    await line.send({"ask": "stop"})
                    await line.receive()
        await anyio.to_thread.run_sync(_await_end, self.pid)

    def _outcome(self, answer: Frame | None) -> Outcome:
        if answer is None:
            raise SandboxLost("the holder of the sandbox died while an operation ran")
        head, data = answer
        if head["is"] != "ended":
            raise SandboxLost(f"the sandbox was lost while an operation ran: {head.get('reason')}")
        outcome = from_wire(data)
        self.generation = max(self.generation, outcome.generation or 0)
        return outcome

    @contextlib.contextmanager
    def _translated(self) -> Any:
        try:
            yield
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise SandboxLost("the holder of the sandbox is gone") from error


class DeadJournal:
    """What a holder that is gone knew about its operations; it runs nothing."""

    def __init__(self, folder: Path) -> None:
        self._ends: dict[str, Outcome] = {}
        self._begun: set[str] = set()
        self.epoch = ""  # stays empty where the holder died before it had one
        self.generation = None  # its sandbox is gone
        try:
            with Reader(folder / JOURNAL) as log:
                for record in log.records(HELD):
                    self._take(log, record)
            self._readable = True
        except TrajectoryError as error:
            self._readable, self._problem = False, str(error)

    def _take(self, log: Reader, record: Record) -> None:
        if record.kind is Kind.CREATE:
            self.epoch = log.body(record).fields["epoch"]
        elif record.kind is Kind.INTENT:
            self._begun.add(record.key)
        elif record.kind is Kind.RECEIPT:
            self._ends[record.key] = read_outcome(log, record)

    async def dispatch(
        self, key: str, digest: bytes, request: Request, on_started: OnStarted
    ) -> Outcome:
        """Always raises SandboxLost."""
        raise SandboxLost("the sandbox is gone: its holder died")

    async def query(self, key: str, request: Request) -> Answer:
        """See `Executor.query`."""
        if key in self._ends:
            return Finished(outcome=self._ends[key])
        if not self._readable:
            return Lost(reason=f"the journal of its sandbox cannot be read: {self._problem}")
        if key in self._begun:
            return Lost(reason="the sandbox was lost while it ran")
        return NeverSeen()

    async def wait(self, key: str, request: Request) -> Outcome:
        """See `Executor.wait`: nothing runs here."""
        raise SandboxLost("the sandbox is gone: its holder died")

    async def acknowledge(self, key: str) -> None:
        """Does nothing: the journal stays as it is."""


async def hold(
    folder: Path,
    spec: Kept,
    *,
    substrate: str = "auto",
    cache_dir: Path,
    runtime_dir: Path,
    idle: float = DEFAULT_IDLE,
) -> HeldExecutor:
    """Start a holder in `folder` with a sandbox by `spec`.

    Without a client and an operation for `idle` seconds it ends. Raises SandboxError or Unsupported
    when the sandbox does not start; then no process is left.
    """
    order = {
        "folder": str(folder),
        "spec": plain.spec_out(spec),
        "substrate": substrate,
        "cache_dir": str(cache_dir),
        "runtime_dir": str(runtime_dir),
        "idle": idle,
    }
    answer = await anyio.to_thread.run_sync(_start, order)
    if "error" in answer:
        kinds: dict[str, type[SandboxError]] = {Unsupported.code: Unsupported}
        raise kinds.get(answer["error"], SandboxError)(answer["message"])
    executor = await reconnect(folder)
    if executor is None:
        raise SandboxLost(f"the holder in {folder} ended as soon as it had begun")
    return executor


def _start(order: dict[str, Any]) -> dict[str, Any]:
    order["folder"] = os.path.abspath(order["folder"])
    os.makedirs(order["folder"], mode=0o700)
    alive = os.open(
        os.path.join(order["folder"], ALIVE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        # The holder inherits the lock: from its first moment to its last it can be seen to live.
        fcntl.flock(alive, fcntl.LOCK_EX)
        return _spawn(order, alive)
    finally:
        os.close(alive)


def _spawn(order: dict[str, Any], alive: int) -> dict[str, Any]:
    # Exactly the libraries of this process; the package first, the standard library before it.
    paths = [_PACKAGE, *(path for path in sys.path if os.path.isabs(path))]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CODE.format(paths=paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        cwd="/",
        pass_fds=(alive,),
        # Neither Ctrl-C in a terminal nor the terminal's end reaches it.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin, process.stdout, process.stderr:
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
        line = process.stdout.readline()
        if line and "ready" in (answer := json.loads(line)):
            _children.append(process)
            return answer
        said = process.stderr.read().decode(errors="replace").strip()[-1500:]
        process.wait()
    return json.loads(line) if line else {"error": SandboxError.code, "message": said}


# Holders that this process started: whoever waits for one of them to end must reap it as well.
_children: list[subprocess.Popen[bytes]] = []


def _await_end(pid: int) -> None:
    for process in [p for p in _children if p.pid == pid]:
        process.wait()
        _children.remove(process)
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            select.select([pidfd], [], [], 15.0)
        finally:
            os.close(pidfd)


async def reconnect(folder: Path) -> HeldExecutor | None:
    """The executor of the holder in `folder`, None when that holder is gone.

    One that is still starting, for a client that died meanwhile, is awaited.
    """
    while (hello := await _hello(folder)) is None:
        if not _lives(folder):
            return None
        await anyio.sleep(0.05)
    return HeldExecutor(folder, hello)


def _lives(folder: Path) -> bool:
    try:
        fd = os.open(folder / ALIVE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


async def _hello(folder: Path) -> dict[str, Any] | None:
    try:
        async with connect(folder) as line:
            await line.send({"ask": "hello"})
            answer = await line.receive()
    except (SandboxLost, OSError, anyio.BrokenResourceError):
        return None
    return None if answer is None else answer[0]
