"""The holder: a process that owns one sandbox, so that its clients may come, die and come back.

It runs each operation at most once, under the key that the client chose, and keeps a journal of
what began and how it ended in a folder beside its socket. A client that lost its connection asks by
key. The holder ends when it is told to, when nobody came for a while, or with its sandbox; the
journal stays.

Paper: §5.2.5 (the sandbox outlives the process that uses it).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import SocketStream, TaskGroup

from fathom.errors import FathomError, SandboxError, SandboxLost
from fathom.sandbox import Client, Sandbox, plain
from fathom.sandbox.trajectory import detached
from fathom.sandbox.trajectory.changes import Change, Watcher, watch
from fathom.sandbox.trajectory.errors import LogFull, TrajectoryError
from fathom.sandbox.trajectory.frames import SOCKET, Frame, Line, is_own_user
from fathom.sandbox.trajectory.log import Log
from fathom.sandbox.trajectory.operation import (
    Outcome,
    Request,
    encode_outcome,
    perform,
    to_wire,
)
from fathom.sandbox.trajectory.record import Kind

JOURNAL = "journal"
JOURNAL_SEGMENT = 1 << 18
# The name under which the journal's records stand.
HELD = "held"
_LOOK = 0.5


@dataclass(slots=True)
class _Op:
    """An operation: `outcome` or `failure` is there once `ended` is set."""

    digest: str
    ended: anyio.Event = field(default_factory=anyio.Event)
    outcome: Outcome | None = None
    failure: str | None = None


class Holder:
    """Serves one sandbox to its user's processes."""

    def __init__(
        self, sandbox: Sandbox, journal: Log, epoch: str, idle: float, watcher: Watcher | None
    ) -> None:
        self.sandbox = sandbox
        self.journal = journal
        self.epoch = epoch
        self.idle = idle
        self.watcher = watcher
        self.generation = 0
        # What changed in the background and was told with no outcome yet; None where that is not
        # known.
        self.background: tuple[Change, ...] | None = ()
        self.ops: dict[str, _Op] = {}
        self.guests = 0
        self.last_seen = time.monotonic()
        self.stopping = anyio.Event()
        self.group: TaskGroup | None = None

    async def serve(self, stream: SocketStream) -> None:
        """Answer one connection."""
        async with stream:
            if not is_own_user(stream):
                return
            self.guests += 1
            line = Line(stream)
            try:
                while (frame := await line.receive()) is not None:
                    await self._try_to_answer(line, frame)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                pass  # the client is gone; what it began goes on
            finally:
                self.guests -= 1
                self.last_seen = time.monotonic()

    async def _try_to_answer(self, line: Line, frame: Frame) -> None:
        try:
            await self._answer(line, frame)
        except (FathomError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            # What cannot be written down, or makes no sense, has not begun. The sandbox, with all
            # that is in it, goes on.
            code = error.code if isinstance(error, FathomError) else TrajectoryError.code
            await line.send({"is": "refused", "code": code, "message": str(error) or repr(error)})

    async def _answer(self, line: Line, frame: Frame) -> None:
        head, data = frame
        match head["ask"]:
            case "hello":
                await line.send(
                    {
                        "epoch": self.epoch,
                        "generation": self.generation,
                        "sandbox": self.sandbox.id,
                        "substrate": self.sandbox.caps.substrate,
                        "pid": os.getpid(),
                    }
                )
            case "run":
                for key in head["done"]:
                    self._give_up(key)
                request = Request.from_json(head, data if head["has_data"] else None)
                self._look(request)
                word = await line.receive()
                if word is None or word[0]["ask"] != "go":
                    return  # its caller is gone and has promised nothing
                op = self.ops.get(head["key"])
                if op is None:
                    op = self._begin(head["key"], bytes.fromhex(head["digest"]), request)
                elif op.digest != head["digest"]:
                    await line.send({"is": "conflict"})
                    return
                await line.send({"is": "running"})
                await self._send_end(line, op)
            case "wait":
                await self._send_end(line, self.ops[head["key"]])
            case "query":
                await self._send_state(line, self.ops.get(head["key"]))
            case _:
                self.stopping.set()
                await line.send({"is": "stopping"})

    def _give_up(self, key: str) -> None:
        """Keep no more of an outcome than that there was one."""
        if (op := self.ops.get(key)) is not None:
            op.outcome = None if op.outcome is None else Outcome()

    def _begin(self, key: str, digest: bytes, request: Request) -> _Op:
        op = _Op(digest.hex())
        # Written before anything happens, so that a holder that dies leaves no doubt about it.
        record = self.journal.append(Kind.INTENT, HELD, key=key, digest=digest, reserve=True)
        self.ops[key] = op
        assert self.group is not None
        self.group.start_soon(self._run, key, op, request, record.node_sequence)
        return op

    async def _run(self, key: str, op: _Op, request: Request, intent: int) -> None:
        try:
            background, self.background = self.background, ()
            outcome = await perform(self.sandbox, request)
            self.generation += 1
            outcome = replace(
                outcome,
                generation=self.generation,
                changes=self._changes(request),
                background=background,
            )
            try:
                self._write_receipt(key, intent, outcome)
            except LogFull:
                self._write_receipt(key, intent, outcome.least())
            op.outcome = outcome
        except (FathomError, OSError) as error:
            op.failure = str(error)
            if isinstance(error, SandboxLost):
                self.stopping.set()
        finally:
            op.ended.set()
            self.last_seen = time.monotonic()

    def _write_receipt(self, key: str, intent: int, outcome: Outcome) -> None:
        self.journal.append(
            Kind.RECEIPT,
            HELD,
            key=key,
            parent=intent,
            fields=encode_outcome(outcome),
            blobs=outcome.blobs,
        )

    def _look(self, request: Request) -> None:
        """Take note of what changed since the last operation, before the next one begins."""
        found = self._changes(request)
        known = self.background
        self.background = None if found is None or known is None else (*known, *found)

    def _changes(self, request: Request) -> tuple[Change, ...] | None:
        if self.watcher is None:
            return None
        if request.verb == "read":
            return ()  # reading changes nothing, and what the background did is seen next time
        found = self.watcher.changes()
        return None if found is None else tuple(found)

    async def _send_end(self, line: Line, op: _Op) -> None:
        await op.ended.wait()
        await self._send_state(line, op)

    async def _send_state(self, line: Line, op: _Op | None) -> None:
        if op is None:
            await line.send({"is": "never"})
        elif not op.ended.is_set():
            await line.send({"is": "running"})
        elif op.outcome is None:
            await line.send({"is": "lost", "reason": op.failure or "it was given up"})
        else:
            await line.send({"is": "ended"}, to_wire(op.outcome))

    async def watch(self) -> None:
        """Return when it is time to end."""
        while not self.stopping.is_set():
            with anyio.move_on_after(_LOOK):
                await self.stopping.wait()
            busy = self.guests or any(not op.ended.is_set() for op in self.ops.values())
            if not busy and time.monotonic() - self.last_seen > self.idle:
                return


async def _hold(order: dict[str, Any]) -> None:
    folder = Path(order["folder"])
    epoch = secrets.token_hex(8)
    os.chdir(folder)
    client = Client(
        "local",
        substrate=order["substrate"],
        cache_dir=order["cache_dir"],
        runtime_dir=order["runtime_dir"],
    )
    journal = Log(folder / JOURNAL, segment_size=JOURNAL_SEGMENT, durability="process")
    with journal:
        async with client:
            sandbox = await client.create(plain.spec_in(order["spec"]))
            journal.append(Kind.CREATE, HELD, fields={"epoch": epoch, "sandbox": sandbox.id})
            listener = await anyio.create_unix_listener(SOCKET, mode=0o600)
            watcher = watch(Path(order["runtime_dir"]), sandbox)
            holder = Holder(sandbox, journal, epoch, order["idle"], watcher)
            async with anyio.create_task_group() as group:
                holder.group = group
                group.start_soon(_until_signal, holder)
                group.start_soon(listener.serve, holder.serve)
                detached.report({"ready": epoch})
                await holder.watch()
                group.cancel_scope.cancel()
            await listener.aclose()
            (folder / SOCKET).unlink(missing_ok=True)


async def _until_signal(holder: Holder) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            holder.stopping.set()


def main() -> None:
    """Run a holder; its order comes on standard input."""
    order = json.loads(sys.stdin.read())
    try:
        anyio.run(_hold, order)
    except FathomError as error:
        detached.report({"error": error.code, "message": str(error)})
    except OSError as error:
        detached.report({"error": SandboxError.code, "message": str(error)})
