"""Trajectories that a person can come back to: one folder each, with its log and its holders.

    <id>/log/        the log
    <id>/holder-1/   the first sandbox: its holder's socket and journal; a second one if it was lost

Paper: §5.2.5 (resuming after preemption).
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fathom.errors import SandboxLost, Unsupported
from fathom.sandbox import paths
from fathom.sandbox.trajectory.errors import LogLocked, StateDiffers, TrajectoryError
from fathom.sandbox.trajectory.held import (
    DEFAULT_IDLE,
    DeadJournal,
    HeldExecutor,
    hold,
    reconnect,
)
from fathom.sandbox.trajectory.log import Durability, Log
from fathom.sandbox.trajectory.reader import Reader, is_locked
from fathom.sandbox.trajectory.record import Kind
from fathom.sandbox.trajectory.segment import SUFFIX
from fathom.sandbox.trajectory.session import Session
from fathom.sandbox.trajectory.tape import read_outcome, read_request, read_tape
from fathom.sandbox.types import Container, Kept

LOG = "log"
GONE = ".gone"  # what is being removed, behind a name that no trajectory has
SEGMENT_SIZE = 1 << 19
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# What to do when the sandbox of a trajectory is gone. "continue": use a fresh one, which is right
# where the work lies in a folder of the host. "rebuild": run everything again in a fresh one and
# go on if it came out the same.
OnLost = Literal["fail", "continue", "rebuild"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A trajectory on this machine. `running`: a living process writes it."""

    id: str
    fields: dict[str, Any]
    operations: int
    first_wall_ns: int
    last_wall_ns: int
    ended: bool
    running: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """A trajectory that is open for work. `resumed`: how many entries were recorded before.

    `ending` is what its last record will say, for the worker to fill.
    """

    id: str
    session: Session
    executor: HeldExecutor
    resumed: int | None = None
    replaced: bool = False
    ending: dict[str, Any] = field(default_factory=dict[str, Any])


def new_name() -> str:
    """A name for a trajectory: when it begins, and a little chance."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class Store:
    """The trajectories in one folder."""

    def __init__(self, folder: Path | None = None, *, durability: Durability = "power") -> None:
        self.folder = paths.trajectory_folder() if folder is None else folder
        self.durability: Durability = durability

    def path(self, id_: str) -> Path:
        """The folder of a trajectory. Raises TrajectoryError for a name that cannot be one."""
        if not _ID.fullmatch(id_):
            raise TrajectoryError(f"{id_!r} cannot name a trajectory: see `fathom sandbox logs`")
        return self.folder / id_

    def read(self, id_: str) -> Reader:
        """The log of a trajectory. Raises TrajectoryError when there is none, LogCorrupt."""
        path = self.path(id_) / LOG
        if not path.is_dir():
            raise self._missing(id_)
        return Reader(path)

    def list(self) -> list[Known]:
        """Every trajectory that can be read, the oldest first."""
        found: list[Known] = []
        for path in sorted(self.folder.glob("*")):
            with contextlib.suppress(TrajectoryError, OSError):
                found.append(self.known(path.name))
        return sorted(found, key=lambda known: known.first_wall_ns)

    def known(self, id_: str) -> Known:
        """What there is of one trajectory. Raises TrajectoryError."""
        with self.read(id_) as log:
            summary = next((s for s in log.sandboxes() if s.sandbox == id_), None)
            if summary is None:
                raise TrajectoryError(f"the trajectory {id_} never began: forget it")
            first = next(log.records(id_))
            return Known(
                id=id_,
                fields=log.body(first).fields,
                operations=summary.operations,
                first_wall_ns=summary.first_wall_ns,
                last_wall_ns=summary.last_wall_ns,
                ended=summary.ended,
                running=is_locked(self.path(id_) / LOG),
            )

    def unlisted(self) -> dict[str, str]:
        """The folders that `list` leaves out: "never begun", or "damaged" where nobody can tell."""
        found: dict[str, str] = {}
        for path in sorted(self.folder.glob("*")):
            try:
                self.known(path.name)
            except (TrajectoryError, OSError):
                if path.is_dir() and _ID.fullmatch(path.name):
                    found[path.name] = "damaged" if _has_records(path) else "never begun"
        return found

    def last(self, fields: Mapping[str, Any]) -> str | None:
        """The latest trajectory that began with `fields`, ended or not; None where none did."""
        return next((k.id for k in reversed(self.list()) if k.fields == dict(fields)), None)

    def ending(self, id_: str) -> dict[str, Any] | None:
        """The words with which a trajectory ended, None before that. Raises TrajectoryError."""
        if not _has_records(self.path(id_)) or not self.known(id_).ended:
            return None
        with self.read(id_) as log:
            return log.body(list(log.records(id_))[-1]).fields

    async def release(self, id_: str) -> None:
        """End the sandbox of a trajectory, where whoever ended it was killed before that."""
        for folder in _holders(self.path(id_)):
            if (executor := await reconnect(folder)) is not None:
                await executor.stop()

    async def forget(self, id_: str) -> None:
        """End the sandbox of a trajectory and remove its log.

        Raises LogLocked while it runs, TrajectoryError when there is none.
        """
        path = self.path(id_)
        if not path.is_dir():
            raise self._missing(id_)
        # Held to the end, lest somebody goes on with it in between.
        with Log(path / LOG, durability="process", segment_size=SEGMENT_SIZE):
            await self.release(id_)
            _remove(path)

    def _missing(self, id_: str) -> TrajectoryError:
        return TrajectoryError(
            f"there is no trajectory {id_} in {self.folder}: see `fathom sandbox logs`"
        )

    @asynccontextmanager
    async def work(
        self,
        fields: Mapping[str, Any],
        spec: Kept,
        *,
        resume: str | None = None,
        name: str | None = None,
        on_lost: OnLost = "fail",
        substrate: str = "auto",
        idle: float = DEFAULT_IDLE,
    ) -> AsyncGenerator[Open]:
        """A trajectory to work on: a new one (called `name`), or the one named `resume`.

        `fields` say what is done and must be the same when it is resumed; `spec` says what
        sandbox it needs. Afterwards the trajectory has ended and the sandbox is gone; when an error
        leaves this block, both stay for `idle` seconds, so that it can be resumed, unless nothing
        had happened yet. Raises TrajectoryError, SandboxLost by `on_lost`, SandboxError.
        """
        id_ = resume or name or new_name()
        path = self.path(id_)
        if resume is None and path.exists():
            raise TrajectoryError(f"there is a trajectory {id_}: resume it or choose another name")
        log = self._open_log(id_, path, new=resume is None)
        with log:
            begin = _Beginning(log, id_, path, spec, substrate, idle)
            opened = await (begin.new(fields) if resume is None else begin.again(fields, on_lost))
            try:
                yield opened
            except BaseException:
                if opened.session.recorded == 0:
                    await opened.executor.stop()
                raise
            await opened.session.end(opened.ending)
            await opened.executor.stop()

    def _open_log(self, id_: str, path: Path, *, new: bool) -> Log:
        if not new and not path.is_dir():
            raise self._missing(id_)
        try:
            if new:
                for left in self.folder.glob(f".*{GONE}"):
                    shutil.rmtree(left, ignore_errors=True)
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise Unsupported(
                    f"the run cannot be written down in {self.folder} ({error.strerror}): set "
                    "XDG_STATE_HOME to a folder that can be written to"
                ) from error
            return Log(path / LOG, segment_size=SEGMENT_SIZE, durability=self.durability)
        except LogLocked as error:
            raise LogLocked(
                f"the trajectory {id_} is being worked on: follow it with `fathom sandbox replay "
                f"{id_} --follow`"
            ) from error


def _remove(path: Path) -> None:
    """Remove a trajectory in one step: whoever is killed meanwhile leaves no half of a log, which
    would look damaged. What is left then goes when the next trajectory begins.
    """
    gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}{GONE}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _has_records(path: Path) -> bool:
    """Whether a log was begun below `path`, readable or not."""
    log = path / LOG
    if not any(log.glob(f"*{SUFFIX}")):
        return False
    try:
        with Reader(log) as reader:
            return bool(reader.sandboxes())
    except (TrajectoryError, OSError):
        return True


def check_same(id_: str, recorded: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raise TrajectoryError where a trajectory began with something else than `fields`."""
    other = sorted(
        name for name in recorded.keys() | fields.keys() if recorded.get(name) != fields.get(name)
    )
    if other:
        told = "; ".join(f"{name} was {recorded.get(name)!r}" for name in other)
        raise TrajectoryError(f"{id_} began with another command ({told[:600]}): repeat it")


def _holders(path: Path) -> list[Path]:
    """The folders of the holders of a trajectory, the latest last."""
    return sorted(path.glob("holder-*"), key=lambda p: int(p.name.partition("-")[2]))


@dataclass(slots=True)
class _Beginning:
    """How a trajectory begins or goes on."""

    log: Log
    id: str
    path: Path
    spec: Kept
    substrate: str
    idle: float

    async def new(self, fields: Mapping[str, Any]) -> Open:
        """Start a trajectory and its sandbox."""
        if self.log.head(self.id) is not None:
            # Another process began and left it just now; it is not ours to remove.
            raise TrajectoryError(f"there is a trajectory {self.id}: resume it")
        try:
            # In this order: a client that is killed next leaves no sandbox that nobody knows about.
            Session.declare(self.log, self.id, fields)
            executor = await self._hold()
        except BaseException:
            self.log.close()
            _remove(self.path)
            raise
        session = await Session.attach(self.log, self.id, executor)
        return Open(id=self.id, session=session, executor=executor)

    async def again(self, fields: Mapping[str, Any], on_lost: OnLost) -> Open:
        """Come back to the sandbox, or make another one as `on_lost` says."""
        if self.log.head(self.id) is None:
            Session.declare(self.log, self.id, fields)  # killed before its first record
        first = next(self.log.records(self.id))
        if first.kind is Kind.CREATE:
            check_same(self.id, self.log.body(first).fields, fields)
        # Without any operation nothing was in the sandbox that could be lost with it.
        worked = bool(read_tape(self.log, self.id).entries)
        holders = _holders(self.path)
        executor = await reconnect(holders[-1]) if holders else None
        if executor is not None:
            session = await self._attach(executor, holders[:-1])
            return Open(id=self.id, session=session, executor=executor, resumed=session.recorded)
        if worked and on_lost == "fail":
            raise SandboxLost(
                f"the sandbox of {self.id} is gone, with everything in it: say --on-lost rebuild "
                "to run its commands again in a fresh one, or --on-lost continue to go on without"
            )
        executor = await self._hold()
        try:
            if on_lost == "rebuild":
                await self._rebuild(executor)
            session = await self._attach(executor, holders)
        except BaseException:
            await executor.stop()
            raise
        return Open(
            id=self.id,
            session=session,
            executor=executor,
            resumed=session.recorded,
            replaced=worked,
        )

    async def _attach(self, executor: HeldExecutor, gone: Sequence[Path]) -> Session:
        earlier = [DeadJournal(folder) for folder in gone]
        return await Session.attach(
            self.log, self.id, executor, replaced=bool(gone), earlier=earlier
        )

    async def _hold(self) -> HeldExecutor:
        number = len(_holders(self.path)) + 1
        return await hold(
            self.path / f"holder-{number}",
            self.spec,
            substrate=self.substrate,
            cache_dir=paths.cache_folder(),
            runtime_dir=paths.runtime_folder(),
            idle=self.idle,
        )

    async def _rebuild(self, executor: HeldExecutor) -> None:
        """Bring a fresh sandbox into the recorded state by doing everything again."""
        if isinstance(self.spec, Container) and self.spec.workdir is not None:
            raise TrajectoryError(
                f"{self.id} works in a folder of this machine, which has kept what was done: say "
                "--on-lost continue"
            )
        tape = read_tape(self.log, self.id)
        intents = {
            record.node_sequence: record
            for record in self.log.records(self.id)
            if record.kind is Kind.INTENT
        }
        for entry in tape.entries:
            if entry.is_value:
                continue
            if entry.end is None:
                # The sandbox in which it may have happened is gone, and with it the effect.
                fields = {"back_to": entry.position, "generation": executor.generation}
                self.log.append(Kind.RESUME, self.id, key="rebuild", fields=fields)
                return
            request, _ = read_request(self.log, intents[entry.intent])
            outcome = await executor.dispatch(
                f"rebuild/{entry.key}", entry.digest, request, lambda: None
            )
            if not outcome.same_as(read_outcome(self.log, entry.end)):
                raise StateDiffers(
                    f"{entry.key} ({request.describe()[:80]!r}) came out differently this time: "
                    "the state of the lost sandbox cannot be rebuilt"
                )
