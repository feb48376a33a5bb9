"""A session: operations on one sandbox that are written down before and after they happen.

    session = await Session.begin(log, "sb-1", executor)
    outcome = await session.run(Operation(key="s4", request=exec_request("make", timeout=60)))

The order is: the intent is durable, the executor is told, the receipt is durable, the caller gets
the outcome. Whoever dies in between, `Session.attach` finds out what happened:

    no intent               nothing happened: the operation is run when it is asked for
    intent, no receipt      the executor is asked. Finished: the receipt is written. Running: its
                            end is awaited. Never seen: it is run. Lost: its outcome is UNKNOWN
    receipt                 the recorded outcome is returned

An UNKNOWN outcome is never guessed and the operation is not run again unless it was declared to be
harmless or the caller's policy says how to decide. So an operation is begun at most once without
the caller's word, and no outcome is made up.

Paper: §5.2.5 (preemption: recorded results are returned, and commands are not run a second time).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import anyio
import anyio.to_thread

from fathom.errors import SandboxLost, Unsupported
from fathom.sandbox.trajectory.body import canonical
from fathom.sandbox.trajectory.errors import (
    Diverged,
    LogFull,
    OperationConflict,
    OutcomeUnknown,
    StateDiffers,
    TrajectoryError,
)
from fathom.sandbox.trajectory.executor import (
    Commit,
    Executor,
    Finished,
    Lost,
    Restorable,
    Running,
    at_once,
)
from fathom.sandbox.trajectory.log import Log
from fathom.sandbox.trajectory.operation import Operation, Outcome, Request, encode_outcome
from fathom.sandbox.trajectory.record import Kind, Record
from fathom.sandbox.trajectory.tape import Entry, Tape, read_outcome, read_tape

# A probe looks for traces of an operation. An outcome: it happened, with this result. None: it did
# not happen. To leave it open it raises.
Probe = Callable[[Operation], Awaitable[Outcome | None]]
# Without a sync a write of this size is done before a thread for it would have begun.
_AT_ONCE = 1 << 16
OnUnknown = Literal["fail", "retry", "rollback"] | Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """Something that was decided outside of the sandbox and must not be decided again."""

    fields: dict[str, Any]
    blobs: dict[str, bytes]


class RolledBack(TrajectoryError):
    """The sandbox was set back to a snapshot: ask again for everything from `position` on."""

    code = "trajectory_rolled_back"

    def __init__(self, message: str, *, position: int) -> None:
        super().__init__(message)
        self.position = position


class Session:
    """The operations of one sandbox. Made by `begin`, `attach` or `fork`; it owns neither part."""

    def __init__(self, log: Log, name: str, executor: Executor, tape: Tape) -> None:
        self.name = name
        self.executor = executor
        self._log = log
        self._tape = tape
        self._running: set[str] = set()
        self._earlier: dict[str, Executor] = {}
        self._life = max(tape.lives, default=0) + 1

    @classmethod
    async def begin(
        cls, log: Log, name: str, executor: Executor, fields: Mapping[str, Any] | None = None
    ) -> Session:
        """Start the trajectory of a new sandbox. Raises TrajectoryError when `name` has one."""
        cls.declare(log, name, fields)
        return await cls.attach(log, name, executor)

    @staticmethod
    def declare(log: Log, name: str, fields: Mapping[str, Any] | None = None) -> None:
        """Write down what a trajectory will be about, before it has a sandbox to attach to.

        Whoever dies while the sandbox starts has left word of it. Raises TrajectoryError when
        `name` has a trajectory.
        """
        if log.head(name) is not None:
            raise TrajectoryError(f"the log has a trajectory {name}: attach to it")
        log.append(Kind.CREATE, name, epoch=1, fields=dict(fields or {}))

    @classmethod
    async def attach(
        cls,
        log: Log,
        name: str,
        executor: Executor,
        *,
        replaced: bool = False,
        earlier: Sequence[Executor] = (),
        live: bool = False,
    ) -> Session:
        """Go on with a trajectory: recorded outcomes first, then live.

        `replaced` is the caller's word that `executor` runs another sandbox than before, and that
        what the earlier one left outside of shared folders may be gone. `earlier` can still be
        asked what became of operations there; those that nobody can tell about are UNKNOWN. `live`:
        the caller never ended, so it need not ask for anything a second time. Raises
        TrajectoryError when there is no such trajectory or it has ended, and StateDiffers for a
        sandbox in another state.
        """
        if log.head(name) is None:
            raise TrajectoryError(f"the log has no trajectory {name}: begin it")
        tape = read_tape(log, name)
        if tape.ended:
            raise TrajectoryError(f"the trajectory {name} has ended: fork it to go on from it")
        session = cls(log, name, executor, tape)
        session._earlier = {other.epoch: other for other in earlier}
        # Without any life, a crash came between the first two records: nothing has run yet.
        same = not tape.lives or tape.lives[max(tape.lives)] == executor.epoch
        if not same and not replaced:
            raise StateDiffers(
                f"{name} ran in another sandbox (or its journal was lost): say replaced=True to go "
                "on without what it held, or fork from a snapshot"
            )
        undecided = tape.undecided
        for entry in undecided:
            log.keep(entry.intent)
        if same and not undecided:
            expected, counted = tape.generation(executor.epoch), executor.generation
            if None not in (expected, counted) and expected != counted:
                raise StateDiffers(
                    f"{name} was changed {counted} times and the log knows of {expected}: somebody "
                    "else used the sandbox; fork from a snapshot"
                )
        await session._note_attachment(replaced=not same)
        if live:
            tape.present(True)
        return session

    @classmethod
    async def fork(
        cls, log: Log, origin: str, name: str, executor: Executor, *, position: int | None = None
    ) -> Session:
        """A new trajectory that shares the first `position` operations of another (default: all).

        `executor` runs a sandbox in the state after them: restored from a snapshot, or rebuilt by
        running them again. Raises TrajectoryError when one of them has no outcome.
        """
        if log.head(name) is not None:
            raise TrajectoryError(f"the log has a trajectory {name}: choose another name")
        tape = read_tape(log, origin)
        kept = tape.entries if position is None else tape.entries[:position]
        if any(entry.end is None for entry in kept):
            raise TrajectoryError(f"an operation of {origin} has no outcome: fork before it")
        through = max((e.end.node_sequence for e in kept if e.end), default=0)
        late = [e for e in tape.entries[len(kept) :] if e.intent <= through]
        if late:
            raise TrajectoryError(
                f"{late[0].key} ran at the same time as the operations before it: fork elsewhere"
            )
        session = cls(log, name, executor, tape)
        tape.cut(len(kept))
        await session._append(Kind.FORK, fields={"from": origin, "through": through})
        await session._note_attachment(replaced=True)
        return session

    def begin_again(self) -> None:
        """Expect a caller who asks for everything from the first operation on."""
        self._tape.present(False)

    @property
    def recorded(self) -> int:
        """How many operations and values the trajectory holds."""
        return len(self._tape.entries)

    @property
    def replaying(self) -> bool:
        """Whether recorded outcomes wait to be asked for."""
        return any(not entry.presented for entry in self._tape.entries)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The keys of operations whose outcome cannot be decided."""
        return tuple(entry.key for entry in self._tape.entries if entry.unknown is not None)

    async def run(self, operation: Operation, *, on_unknown: OnUnknown = "fail") -> Outcome:
        """Run an operation once, or return what came of it before.

        Raises OutcomeUnknown, Diverged, OperationConflict, RolledBack by the policy, LogFull before
        anything began, and SandboxLost when the sandbox ended before this was begun.
        """
        digest = operation.request.digest()
        if operation.key in self._running:
            raise OperationConflict(f"the operation {operation.key} is running: await it")
        entry = self._find(operation.key, digest)
        self._running.add(operation.key)
        try:
            if entry is None:
                return await self._begin(operation, digest)
            if entry.end is None and entry.unknown is None:
                await self._decide(entry, operation.request)
            if entry.end is not None:
                return read_outcome(self._log, entry.end)
            if entry.unknown is not None:
                return await self._resolve(operation, digest, entry, on_unknown)
            if self._tape.lives[entry.life] != self.executor.epoch:
                return await self._begin(operation, digest)
            return await self._dispatch(operation, digest, entry.ticket, [entry])
        finally:
            self._running.discard(operation.key)

    async def recall(self, key: str, digest: bytes) -> Value | None:
        """A recorded value, None when it is not there yet. Raises Diverged, OperationConflict."""
        entry = self._find(key, digest)
        if entry is None or entry.end is None:
            return None
        body = self._log.body(entry.end)
        blobs = {name: self._log.blob(blob) for name, blob in body.blobs.items()}
        return Value(fields=body.fields, blobs={k: v for k, v in blobs.items() if v is not None})

    async def remember(
        self, key: str, digest: bytes, fields: Mapping[str, Any], blobs: Mapping[str, bytes]
    ) -> None:
        """Record a value durably; `recall` returns it from then on. Raises LogFull."""
        if self._find(key, digest) is not None:
            raise OperationConflict(f"the value {key} was recorded before")
        record = await self._append(
            Kind.VALUE, key=key, digest=digest, fields=dict(fields), blobs=dict(blobs)
        )
        entry = self._tape.begin(record, is_value=True)
        entry.end, entry.presented = record, True

    async def settle(self, key: str, outcome: Outcome, why: str) -> None:
        """Give an operation whose outcome is unknown the outcome that the caller decided on.

        The receipt says that it is the caller's word. Raises TrajectoryError for any other key.
        """
        entry = self._tape.by_key.get(key)
        if entry is None or entry.unknown is None:
            raise TrajectoryError(
                f"the outcome of {key} is not unknown: there is nothing to settle"
            )
        await self._write_receipt(entry, outcome, {"settled": why})

    async def snapshot(self, name: str | None = None) -> str:
        """Keep the state of the sandbox after the operations so far; return its name.

        Raises Unsupported when the executor cannot.
        """
        if not isinstance(self.executor, Restorable):
            raise Unsupported("this sandbox cannot keep snapshots")
        kept = await self.executor.snapshot()
        position = len(self._tape.entries)
        await self._append(
            Kind.SNAPSHOT, key=name or kept, fields={"position": position, "state": kept}
        )
        self._tape.snapshots.append((name or kept, position))
        return name or kept

    async def end(self, fields: Mapping[str, Any] | None = None) -> None:
        """Say that the trajectory is over. Does nothing the second time."""
        if not self._tape.ended:
            self._tape.ended = True
            await self._append(Kind.END, fields=dict(fields or {}))

    # The parts of one operation.

    def _find(self, key: str, digest: bytes) -> Entry | None:
        """The entry that is asked for, None when it is new. Raises Diverged, OperationConflict."""
        entry = self._tape.by_key.get(key)
        if entry is None:
            # Operations that ran at the same time may be asked for in another order; one that the
            # log does not know, while it knows others, means that the caller took another way.
            if waiting := self._tape.waiting:
                raise self._diverged(waiting[0], f"{key} is asked for")
            return None
        if entry.digest != digest:
            if not entry.presented:
                raise self._diverged(entry, f"another request is made under the key {key}")
            raise OperationConflict(f"the key {key} was used for another request: choose another")
        entry.presented = True
        return entry

    def _diverged(self, entry: Entry, what: str) -> Diverged:
        before = [name for name, at in self._tape.snapshots if at <= entry.position]
        snapshot = before[-1] if before else None
        way = f"from the snapshot {snapshot}" if snapshot else "into a fresh sandbox"
        return Diverged(
            f"{self.name} holds {entry.key} at position {entry.position}, but {what}: fork it "
            f"there {way} to take another way, or repeat what was asked before",
            position=entry.position,
            snapshot=snapshot,
        )

    async def _begin(self, operation: Operation, digest: bytes) -> Outcome:
        if (earlier := self._tape.by_key.get(operation.key)) is not None:
            self._log.release(earlier.intent)
        arguments = operation.request.to_json()
        blobs = {"arguments": canonical(arguments["arguments"])}
        if operation.request.data is not None:
            blobs["data"] = operation.request.data
        begun: list[Entry] = []

        async def commit() -> None:
            record = await self._append(
                Kind.INTENT,
                key=operation.key,
                digest=digest,
                fields={"verb": arguments["verb"], "effect": operation.effect},
                blobs=blobs,
                reserve=True,
            )
            entry = self._tape.begin(record)
            entry.presented = True
            begun.append(entry)

        ticket = self._tape.next_ticket(operation.key)
        return await self._dispatch(operation, digest, ticket, begun, commit)

    async def _dispatch(
        self,
        operation: Operation,
        digest: bytes,
        ticket: str,
        begun: list[Entry],
        commit: Commit = at_once,
    ) -> Outcome:
        def on_started() -> None:
            (entry,) = begun
            entry.started = True
            self._log.append(
                Kind.STARTED,
                self.name,
                key=entry.key,
                parent=entry.intent,
                epoch=self._life,
                durable=False,
            )

        try:
            outcome = await self.executor.dispatch(
                ticket, digest, operation.request, on_started, commit
            )
        except SandboxLost as error:
            if not begun:
                raise  # nothing was written down, so nothing began
            (entry,) = begun
            await self._decide(entry, operation.request)
            if entry.end is not None:
                return read_outcome(self._log, entry.end)
            if entry.unknown is None:
                raise  # it never began; the intent stays and the operation may be asked for again
            raise self._unknown(entry) from error
        await self._write_receipt(begun[0], outcome)
        return outcome

    async def _decide(self, entry: Entry, request: Request) -> None:
        """Find out what became of an operation that has an intent and no receipt."""
        epoch = self._tape.lives[entry.life]
        executor = self.executor if epoch == self.executor.epoch else self._earlier.get(epoch)
        if executor is None:
            answer = Lost(reason="the sandbox in which it was begun is gone")
        else:
            answer = await executor.query(entry.ticket, request)
        if executor is not None and isinstance(answer, Running):
            try:
                answer = Finished(outcome=await executor.wait(entry.ticket, request))
            except SandboxLost as error:
                answer = Lost(reason=str(error))
        if isinstance(answer, Finished):
            await self._write_receipt(entry, answer.outcome, {"recovered": True})
        elif isinstance(answer, Lost):
            fields = {"reason": answer.reason}
            await self._append(Kind.UNKNOWN, key=entry.key, parent=entry.intent, fields=fields)
            entry.unknown = answer.reason

    async def _resolve(
        self, operation: Operation, digest: bytes, entry: Entry, policy: OnUnknown
    ) -> Outcome:
        if operation.effect != "once":
            return await self._begin(operation, digest)
        if policy == "rollback":
            await self._roll_back(entry)
        elif callable(policy):
            outcome = await policy(operation)
            if outcome is None:
                return await self._begin(operation, digest)
            await self._write_receipt(entry, outcome, {"settled": "by a probe"})
            return outcome
        raise self._unknown(entry)

    async def _roll_back(self, entry: Entry) -> None:
        executor = self.executor
        if not isinstance(executor, Restorable) or not self._tape.snapshots:
            raise self._unknown(entry, "and there is no snapshot to go back to")
        name, position = self._tape.snapshots[-1]
        state = name
        for record in self._log.records(self.name):
            if record.kind is Kind.SNAPSHOT and record.key == name:
                state = self._log.body(record).fields["state"]
        await executor.restore(state)
        for stale in self._tape.entries[position:]:
            self._log.release(stale.intent)
        fields = {"back_to": position, "generation": executor.generation}
        await self._append(Kind.RESUME, key=name, fields=fields)
        self._tape.set_back = self._life, executor.generation
        self._tape.cut(position)
        raise RolledBack(
            f"{self.name} was set back to the snapshot {name}, because the outcome of {entry.key} "
            f"is unknown: ask again for everything from position {position} on",
            position=position,
        )

    def _unknown(self, entry: Entry, more: str = "") -> OutcomeUnknown:
        return OutcomeUnknown(
            f"whether {entry.key} took effect is unknown ({entry.unknown}) {more}".rstrip()
            + ": look at the sandbox and settle it, or give up this trajectory",
            key=entry.key,
            reason=entry.unknown or "",
        )

    async def _write_receipt(
        self, entry: Entry, outcome: Outcome, more: Mapping[str, Any] | None = None
    ) -> None:
        fill = partial(
            self._append,
            Kind.RECEIPT,
            key=entry.key,
            digest=entry.digest,
            parent=entry.intent,
            blobs=outcome.blobs,
        )
        try:
            entry.end = await fill(fields={**encode_outcome(outcome), **(more or {})})
        except LogFull:
            # The room that was kept for it is enough for what came of it, not for every name.
            entry.end = await fill(fields={**encode_outcome(outcome.least()), **(more or {})})
        entry.unknown, entry.generation = None, outcome.generation
        await self.executor.acknowledge(entry.ticket)

    async def _note_attachment(self, *, replaced: bool) -> None:
        fields: dict[str, Any] = {"epoch": self.executor.epoch, "replaced": replaced}
        await self._append(Kind.ATTACH, fields=fields)
        self._tape.lives[self._life] = self.executor.epoch

    async def _append(self, kind: Kind, **values: Any) -> Record:
        write = partial(self._log.append, kind, self.name, epoch=self._life, **values)
        size = sum(map(len, values.get("blobs", {}).values()))
        if self._log.is_quick and size < _AT_ONCE:
            return write()
        # A sync may take milliseconds, which the event loop has better use for. It is not abandoned
        # when the caller is cancelled: what was half said could not be taken back.
        record: Record | None = None
        with anyio.CancelScope(shield=True):
            record = await anyio.to_thread.run_sync(write)
        assert record is not None
        return record
