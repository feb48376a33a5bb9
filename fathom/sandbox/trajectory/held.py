"""The client's end of a holder: starting one, coming back to one, reading what a dead one left.

Paper: §5.2.5 (reconnecting to a sandbox after a preemption).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from fathom.errors import SandboxLost
from fathom.sandbox import plain
from fathom.sandbox.nodelink import raise_error
from fathom.sandbox.trajectory import detached
from fathom.sandbox.trajectory.errors import LogFull, OperationConflict, TrajectoryError
from fathom.sandbox.trajectory.executor import (
    Answer,
    Commit,
    Finished,
    Lost,
    NeverSeen,
    OnStarted,
    Running,
    at_once,
)
from fathom.sandbox.trajectory.frames import Frame, connect
from fathom.sandbox.trajectory.holder import HELD, JOURNAL
from fathom.sandbox.trajectory.operation import Outcome, Request, from_wire
from fathom.sandbox.trajectory.reader import Reader
from fathom.sandbox.trajectory.record import Kind, Record
from fathom.sandbox.trajectory.tape import read_outcome
from fathom.sandbox.types import Kept

DEFAULT_IDLE = 1800.0
_MODULE = "fathom.sandbox.trajectory.holder"


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
        self._safe: list[str] = []

    async def dispatch(
        self,
        key: str,
        digest: bytes,
        request: Request,
        on_started: OnStarted,
        commit: Commit = at_once,
    ) -> Outcome:
        """See `Executor.dispatch`. A caller who gives up does not end the operation."""
        head: dict[str, Any] = {"ask": "run", "key": key, "digest": digest.hex()}
        head |= {**request.to_json(), "has_data": request.data is not None, "done": self._safe}
        self._safe = []
        async with connect(self.folder) as line:
            with self._translated():
                await line.send(head, request.data or b"")
                # Meanwhile the holder reads it and looks around; it begins with the second word.
                await commit()
                await line.send({"ask": "go"})
                answer = await line.receive()
                if answer is not None and answer[0]["is"] == "conflict":
                    raise OperationConflict(f"the key {key} was used for another request")
                if answer is not None and answer[0]["is"] == "refused":
                    kind = LogFull if answer[0]["code"] == LogFull.code else TrajectoryError
                    raise kind(f"the holder of the sandbox began nothing: {answer[0]['message']}")
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
        self._safe.append(key)

    async def stop(self) -> None:
        """End the sandbox and its holder, and wait until both are gone."""
        with contextlib.suppress(SandboxLost):
            async with connect(self.folder) as line:
                with self._translated():
                    await line.send({"ask": "stop"})
                    await line.receive()
        await anyio.to_thread.run_sync(detached.await_end, self.pid)

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
        self,
        key: str,
        digest: bytes,
        request: Request,
        on_started: OnStarted,
        commit: Commit = at_once,
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
    raise_error(answer)
    executor = await reconnect(folder)
    if executor is None:
        raise SandboxLost(f"the holder in {folder} ended as soon as it had begun")
    return executor


def _start(order: dict[str, Any]) -> dict[str, Any]:
    folder = Path(order["folder"]).absolute()
    folder.mkdir(mode=0o700, parents=True)
    answer = detached.start(_MODULE, folder, {**order, "folder": str(folder)})
    assert answer is not None  # the folder is new
    return answer


async def reconnect(folder: Path) -> HeldExecutor | None:
    """The executor of the holder in `folder`, None when that holder is gone.

    One that is still starting, for a client that died meanwhile, is awaited.
    """
    while (hello := await _hello(folder)) is None:
        if not detached.lives(folder):
            return None
        await anyio.sleep(0.05)
    return HeldExecutor(folder, hello)


async def _hello(folder: Path) -> dict[str, Any] | None:
    try:
        async with connect(folder) as line:
            await line.send({"ask": "hello"})
            answer = await line.receive()
    except (SandboxLost, OSError, anyio.BrokenResourceError):
        return None
    return None if answer is None else answer[0]
