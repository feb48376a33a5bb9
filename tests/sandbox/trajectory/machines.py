"""A machine that runs real commands in a folder, and a client that can die at any point.

The machine outlives its clients: it counts what it ran, keeps a journal and can lose it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fathom.errors import SandboxLost
from fathom.sandbox.trajectory.executor import (
    Answer,
    Commit,
    Finished,
    Lost,
    NeverSeen,
    Running,
    at_once,
)
from fathom.sandbox.trajectory.log import Log
from fathom.sandbox.trajectory.operation import Operation, Outcome, Request, exec_request
from fathom.sandbox.trajectory.record import Kind, Record


class Crash(BaseException):
    """The client process ends here."""


@dataclass
class Machine:
    """`crash` names the point at which the client (or the machine's agent) dies next."""

    folder: Path
    epoch: str = "machine-1"
    crash: str | None = None
    generation: int = 0
    journal: dict[str, Outcome | None] = field(default_factory=dict)
    running: dict[str, Callable[[], None]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    snapshots: int = 0

    def __post_init__(self) -> None:
        (self.folder / "work").mkdir(parents=True, exist_ok=True)

    def _run(self, request: Request) -> Outcome:
        done = subprocess.run(
            ["bash", "-c", str(request.arguments["command"])],
            cwd=self.folder / "work",
            capture_output=True,
            check=False,
        )
        self.generation += 1
        return Outcome(
            fields={"exit_code": done.returncode},
            blobs={"stdout": done.stdout, "stderr": done.stderr},
            generation=self.generation,
        )

    async def dispatch(
        self,
        key: str,
        digest: bytes,
        request: Request,
        on_started: Callable[[], None],
        commit: Commit = at_once,
    ) -> Outcome:
        await commit()
        if key in self.journal:
            return await self.wait(key, request)
        self._maybe(f"unsent {key}")
        self.ran.append(key)
        self.journal[key] = None
        on_started()

        def finish() -> None:
            self.journal[key] = self._run(request)

        if self.crash == f"running {key}":
            self.running[key] = finish
            self._maybe(f"running {key}")
        if self.crash == f"agent {key}":
            # The command ran, and whoever watched it died before it wrote that down.
            self._run(request)
            self.crash = None
            raise SandboxLost("the agent died")
        finish()
        self._maybe(f"done {key}")
        outcome = self.journal[key]
        assert outcome is not None
        return outcome

    async def query(self, key: str, request: Request) -> Answer:
        if key not in self.journal:
            return NeverSeen()
        outcome = self.journal[key]
        if outcome is not None:
            return Finished(outcome=outcome)
        return Running() if key in self.running else Lost(reason="it has a start and no end")

    async def wait(self, key: str, request: Request) -> Outcome:
        if key in self.running:
            self.running.pop(key)()
        outcome = self.journal[key]
        if outcome is None:
            raise SandboxLost("its outcome is gone")
        return outcome

    async def acknowledge(self, key: str) -> None:
        self.acknowledged.append(key)

    async def snapshot(self) -> str:
        self.snapshots += 1
        name = f"snapshot-{self.snapshots}"
        shutil.copytree(self.folder / "work", self.folder / name)
        return name

    async def restore(self, name: str) -> None:
        shutil.rmtree(self.folder / "work")
        shutil.copytree(self.folder / name, self.folder / "work")

    def lose_journal(self) -> None:
        self.journal = {key: None for key in self.journal}

    def _maybe(self, point: str) -> None:
        if self.crash == point:
            self.crash = None
            raise Crash(point)


class MortalLog(Log):
    """A log whose process dies before or after it wrote a record of some kind."""

    crash: str | None = None

    def append(self, kind: Kind, sandbox: str, **values: Any) -> Record:
        point = f"{kind.name} {values.get('key', '')}"
        if self.crash == f"before {point}":
            raise Crash(point)
        record = super().append(kind, sandbox, **values)
        if self.crash == f"after {point}":
            raise Crash(point)
        return record

    def die(self) -> None:
        """What the kernel does with the files of a process that was killed."""
        for fd in (self._fd, self._lock, *self._files.values()):
            os.close(fd)
        self._fd = self._lock = -1
        self._files = {}
        self._index._db.close()


def command(number: int, effect: Any = "once") -> Operation:
    """Add a line to the file of this operation, so that running it twice shows."""
    text = f"echo ran >> {number}; echo out {number}"
    return Operation(key=f"s{number}", request=exec_request(text, timeout=5), effect=effect)


def times_run(machine: Machine, number: int) -> int:
    path = machine.folder / "work" / str(number)
    return len(path.read_text().split()) if path.exists() else 0


def without_generation(outcome: Outcome) -> Outcome:
    return replace(outcome, generation=None, cached=False)
