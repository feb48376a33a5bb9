"""The attendant of a worker: it answers at its door, writes the log and awaits the end of the loop.

It is a client of the daemon and holds nothing that it could not find again: both sandboxes are the
daemon's, under keys; the loop runs in the worker under a key; every operation is in the log. Killed
at any point and started again, it goes on, and the loop has only waited.

Paper: §5.2.5 (V4.1: the loop outside of the preemptible process).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import anyio

from fathom.errors import DaemonLost, FathomError, SandboxError, SandboxLost
from fathom.sandbox import Client, Container, Sandbox, plain
from fathom.sandbox.trajectory import detached
from fathom.sandbox.trajectory.changes import watch
from fathom.sandbox.trajectory.errors import StateDiffers
from fathom.sandbox.trajectory.executor import AgentExecutor
from fathom.sandbox.trajectory.log import Log
from fathom.sandbox.trajectory.session import Session
from fathom.sandbox.trajectory.store import LOG, SEGMENT_SIZE
from fathom.sandbox.trajectory.tape import read_tape
from fathom.sandbox.types import ExecResult, Kept
from fathom.sandbox.worker.door import Door
from fathom.sandbox.worker.toolkit import CERTIFICATES, LIBRARY

SOCKETS, TROUBLE = "door", "trouble.json"
# How often a worker may be lost before its run is given up.
_LIVES = 3
_LONGEST = 7 * 86400.0
_PAUSE = 0.2
_GONE = 1.0  # seconds in which the daemon notices the end of a sandbox
_MEMORY = "512MiB"
_KEPT_OUTPUT = 1 << 16


class LoopFailed(SandboxError):
    """The loop in a worker ended before its work was done."""

    code = "worker_loop_failed"


@dataclass(slots=True)
class Attendant:
    """One run: its plan, as it was written down, and the daemon's client."""

    plan: dict[str, Any]
    order: dict[str, Any]
    client: Client
    log: Log
    folder: Path
    door: Door | None = None
    boxes: list[Sandbox] = field(default_factory=list[Sandbox])

    @property
    def id(self) -> str:
        """The name of the run."""
        return str(self.plan["id"])

    async def run(self) -> None:
        """Bring the run to its end. Raises SandboxError."""
        if self.log.head(self.id) is not None and read_tape(self.log, self.id).ended:
            detached.report({"ready": self.id})
            await self._clear()
            return
        target = await self._create(plain.spec_in(self.plan["target"]), "target")
        session = await self._session(target)
        self.door = Door(session, self.order, tuple(self.plan["model"]), lambda: self.lives(target))
        sockets = self.folder / SOCKETS
        sockets.mkdir(mode=0o755, exist_ok=True)
        sockets.chmod(0o755)
        async with anyio.create_task_group() as group:
            ready = anyio.Event()
            group.start_soon(_until_told, group.cancel_scope)
            group.start_soon(self._serve, sockets, ready)
            group.start_soon(self._stay, target)
            await ready.wait()
            worker = await self._worker()
            detached.report({"ready": self.id})
            await self._loop(worker)
            await self._clear()
            group.cancel_scope.cancel()

    async def _serve(self, sockets: Path, ready: anyio.Event) -> None:
        assert self.door is not None
        await self.door.serve(sockets, started=ready.set)

    async def _session(self, target: Sandbox) -> Session:
        executor = await AgentExecutor.open(target, watch(Path(self.plan["edge"]), target))
        if self.log.head(self.id) is None:
            return await Session.begin(self.log, self.id, executor, self.plan["fields"])
        try:
            return await Session.attach(self.log, self.id, executor, live=True)
        except StateDiffers as error:
            if self.plan["on_lost"] == "continue":
                return await Session.attach(self.log, self.id, executor, replaced=True, live=True)
            await target.stop()
            raise SandboxLost(
                f"the sandbox of {self.id} is gone, with everything in it: say --on-lost continue "
                "to go on without"
            ) from error

    # The sandboxes -----------------------------------------------------------------------------

    async def _create(self, spec: Kept, what: str) -> Sandbox:
        while True:
            try:
                made = await self.client.create(spec, key=f"{self.id}/{what}", group=self.id)
            except DaemonLost:
                if self.door is None:
                    raise
                await anyio.sleep(_PAUSE)  # the run has begun: it waits for the daemon
                continue
            self.boxes.append(made)
            return made

    async def _worker(self) -> Sandbox:
        spec = Container(
            image=self.plan["image"],
            door=str(self.folder / SOCKETS),
            memory=_MEMORY,
            hostname="worker",
            idle_ttl=self.plan["idle"],
        )
        return await self._create(spec, "worker")

    async def lives(self, box: Sandbox) -> bool:
        """Wait until the daemon answers; whether it still has the sandbox."""
        while True:
            try:
                await self.client.attach(box.id)
            except DaemonLost:
                await anyio.sleep(_PAUSE)
            except SandboxLost:
                return False
            else:
                # One that has just died is noticed in a moment.
                await anyio.sleep(_PAUSE)
                return True

    async def _stay(self, target: Sandbox) -> None:
        """Let the daemon know that somebody needs the target, however long the model thinks."""
        while True:
            await anyio.sleep(self.plan["idle"] / 4)
            try:
                await target.stats()
            except (DaemonLost, SandboxLost):
                continue

    async def _clear(self) -> None:
        for entry in await self.client.list():
            if entry["group"] == self.id:
                await (await self.client.attach(entry["id"])).stop()

    # The loop ----------------------------------------------------------------------------------

    async def _loop(self, worker: Sandbox) -> None:
        """Await the end of the loop, in another worker where one is lost. Raises SandboxError."""
        assert self.door is not None
        number = _failures(self.folder) + 1
        for life in range(_LIVES):
            try:
                end = await self._follow(worker, f"loop/{number}")
            except SandboxLost as error:
                if self.door.ended:
                    return
                if life + 1 == _LIVES:
                    raise LoopFailed(f"the worker was lost {_LIVES} times: {error}") from error
                await anyio.sleep(_GONE)
                worker = await self._worker()  # its loop goes through what the log holds first
                continue
            if self.door.ended:
                return
            note_trouble(self.folder, number, self._trouble(end))
            raise self._trouble(end)

    def _trouble(self, end: ExecResult) -> LoopFailed:
        assert self.door is not None
        if self.door.failure is not None:
            return LoopFailed(f"{self.door.failure[1]} ({self.door.failure[0]})")
        said = end.stderr.strip()[-800:] or f"exit code {end.exit_code}"
        said = "it ran out of memory" if end.oom_killed else said
        return LoopFailed(f"the loop of {self.id} ended before its work was done: {said}")

    async def _follow(self, worker: Sandbox, key: str) -> ExecResult:
        assert self.door is not None
        code = f"import sys; sys.path.insert(0, {LIBRARY!r}); "
        code += f"from {self.plan['module']} import main; main()"
        while True:
            try:
                if (await worker.receipt(key)).state == "never":
                    # A loop that begins goes through what the log holds, in its order.
                    self.door.session.begin_again()
                # Under one key: it runs once, whoever asks, and whoever comes back is connected
                # to what runs.
                return await worker.exec(
                    ["python3", "-I", "-c", code],
                    op=key,
                    timeout=_LONGEST,
                    env={"SSL_CERT_FILE": CERTIFICATES},
                    cap=_KEPT_OUTPUT,
                )
            except (SandboxLost, DaemonLost):
                if not await self.lives(worker):
                    raise SandboxLost(f"the worker of {self.id} is gone") from None


def _failures(folder: Path) -> int:
    try:
        return int(json.loads((folder / TROUBLE).read_text())["loop"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def note_trouble(folder: Path, loop: int, error: FathomError) -> None:
    """Leave word why a run stopped, for whoever comes back to it."""
    told = {"loop": loop, "code": error.code, "message": str(error)}
    fresh = folder / f"{TROUBLE}.new"
    fresh.write_text(json.dumps(told))
    fresh.rename(folder / TROUBLE)


async def _until_told(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()


async def _keep(given: dict[str, Any]) -> None:
    plan, folder = given["plan"], Path(given["folder"])
    os.chdir(folder)
    order = {**plan["order"], **given["secret"]}
    with Log(folder / LOG, segment_size=SEGMENT_SIZE, durability=plan["durability"]) as log:
        async with Client("edge", runtime_dir=plan["edge"], cache_dir=plan["cache"]) as client:
            attendant = Attendant(plan, order, client, log, folder)
            try:
                await attendant.run()
            except BaseException:
                if log.head(attendant.id) is None:
                    # Nothing has happened yet, so nothing is left.
                    with anyio.CancelScope(shield=True):
                        for box in attendant.boxes:
                            await box.stop()
                raise


def main() -> None:
    """Run an attendant; its order comes on standard input."""
    given = json.loads(sys.stdin.read())
    folder = Path(given["folder"])
    error: FathomError
    try:
        anyio.run(_keep, given)
        return
    except* FathomError as group:
        error = _first(group)
    except* OSError as group:
        error = SandboxError(str(_first(group)))
    detached.report({"error": error.code, "message": str(error)})
    if not isinstance(error, LoopFailed):
        note_trouble(folder, _failures(folder), error)


def _first(error: Any) -> Any:
    while isinstance(error, BaseExceptionGroup):
        error = cast("Any", error).exceptions[0]
    return error
