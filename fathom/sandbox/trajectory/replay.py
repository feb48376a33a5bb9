"""Looking at a trajectory again, and doing it again.

`Event`s give back what was recorded, byte for byte, at any time and without a sandbox. `reexecute`
does the recorded operations in a fresh sandbox and reports where something came out differently;
it repeats what was asked for, not clocks, process numbers or chance.

Paper: §5.2.5 (replay of historical sessions, provenance of changes).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal

from fathom.errors import SandboxError
from fathom.sandbox.trajectory.changes import Change
from fathom.sandbox.trajectory.executor import Executor
from fathom.sandbox.trajectory.operation import Outcome, Request
from fathom.sandbox.trajectory.reader import Reader
from fathom.sandbox.trajectory.record import Kind, Record
from fathom.sandbox.trajectory.tape import read_outcome, read_request, read_tape


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One record, with what it says where that is a request, an outcome or a value."""

    record: Record
    fields: dict[str, Any]
    request: Request | None = None
    outcome: Outcome | None = None
    blobs: dict[str, bytes] | None = None

    def to_json(self) -> dict[str, Any]:
        """The event as JSON; bytes that are not text are given as hexadecimal."""
        record = self.record
        told: dict[str, Any] = {
            "sequence": record.sequence,
            "node_sequence": record.node_sequence,
            "kind": record.kind.name.lower(),
            "key": record.key,
            "life": record.epoch,
            "parent": record.parent,
            "wall_ns": record.wall_ns,
        }
        if self.request is not None:
            told["request"] = self.request.to_json()
            if self.request.data is not None:
                told["request"]["data"] = _text(self.request.data)
        if self.outcome is not None:
            told["outcome"] = outcome_to_json(self.outcome)
        if self.blobs:
            told["blobs"] = {name: _text(data) for name, data in self.blobs.items()}
        return told | ({"fields": self.fields} if self.outcome is None else {})


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome for people and programs; the log keeps it in another form."""
    return {
        "fields": outcome.fields,
        "error": outcome.error,
        "changes": _listed(outcome.changes),
        "background": _listed(outcome.background),
        "lost": sorted(outcome.lost),
        **{name: _text(data) for name, data in outcome.blobs.items()},
    }


def _listed(changes: tuple[Change, ...] | None) -> list[Any] | None:
    return None if changes is None else [change.to_json() for change in changes]


def _text(data: bytes) -> str | dict[str, str]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"hex": data.hex()}


def events(log: Reader, name: str, after: int = 0) -> Iterator[Event]:
    """The records of a trajectory after node sequence `after`. Raises LogCorrupt."""
    for record in log.records(name, after):
        body = log.body(record)
        match record.kind:
            case Kind.INTENT:
                request, fields = read_request(log, record)
                yield Event(record=record, fields=fields, request=request)
            case Kind.RECEIPT:
                yield Event(record=record, fields=body.fields, outcome=read_outcome(log, record))
            case _:
                blobs = {n: log.blob(blob) or b"" for n, blob in body.blobs.items()}
                yield Event(record=record, fields=body.fields, blobs=blobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """One change of one file: the operation that made it, or what ran in the background before.

    `certain`: no other operation ran at the same time, so it can have been no other.
    """

    change: Change
    key: str
    command: str
    background: bool = False
    certain: bool = True


def provenance(log: Reader, name: str) -> list[Origin]:
    """Every recorded change of a file in order. Raises LogCorrupt."""
    found: list[Origin] = []
    begun: dict[int, tuple[str, str]] = {}
    # Operations that ran at the same time as the one that an intent began.
    crowded: set[int] = set()
    for event in events(log, name):
        record = event.record
        if event.request is not None:
            if begun:
                crowded |= {record.node_sequence, *begun}
            begun[record.node_sequence] = (record.key, event.request.describe())
        elif event.outcome is not None and record.parent in begun:
            key, command = begun.pop(record.parent)
            certain = record.parent not in crowded
            for background, changes in (
                (True, event.outcome.background),
                (False, event.outcome.changes),
            ):
                found += [
                    Origin(
                        change=change,
                        key=key,
                        command=command,
                        background=background,
                        certain=certain,
                    )
                    for change in changes or ()
                ]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """One operation done again. `differences`: what came out otherwise, in words."""

    key: str
    command: str
    then: Outcome | None
    now: Outcome
    differences: tuple[str, ...]

    @property
    def verdict(self) -> Literal["same", "different", "not compared"]:
        """Whether it came out the same; not compared when the first outcome is unknown."""
        if self.then is None:
            return "not compared"
        return "different" if self.differences else "same"


async def reexecute(log: Reader, name: str, executor: Executor) -> AsyncIterator[Repeat]:
    """Do the operations of a trajectory again, one after another, and compare.

    Operations that ran at the same time are done in the order in which they began. What ran in the
    background changes files at its own time, so that such a change is no difference wherever it
    comes. Raises SandboxLost and LogCorrupt.
    """
    tape = read_tape(log, name)
    requests: dict[int, Request] = {}
    background: set[Change] = set()
    for event in events(log, name):
        if event.request is not None:
            requests[event.record.node_sequence] = event.request
        elif event.outcome is not None:
            background.update(event.outcome.background or ())
    for entry in tape.entries:
        request = requests.get(entry.intent)
        if request is None:
            continue
        digest = hashlib.blake2b(entry.digest, digest_size=32).digest()
        now = await executor.dispatch(f"again/{entry.key}", digest, request, lambda: None)
        then = None if entry.end is None else read_outcome(log, entry.end)
        background.update(now.background or ())
        yield Repeat(
            key=entry.key,
            command=request.describe(),
            then=then,
            now=now,
            differences=() if then is None else tuple(compare(then, now, background)),
        )


def compare(then: Outcome, now: Outcome, background: Set[Change] = frozenset()) -> Iterator[str]:
    """What differs between two outcomes, in words; the time that it took is no difference.

    `background`: changes that are not held against an operation, as something else made them.
    """
    if then.error != now.error:
        yield f"error: {_code(then)} then, {_code(now)} now"
    for name in sorted(then.fields.keys() | now.fields.keys()):
        old, new = then.fields.get(name), now.fields.get(name)
        if name != "duration" and old != new:
            yield f"{name}: {old!r} then, {new!r} now"
    for name in sorted(then.blobs.keys() | now.blobs.keys()):
        if name in then.lost:
            yield f"{name}: was not kept, so it cannot be compared"
        elif (old := then.blobs.get(name, b"")) != (new := now.blobs.get(name, b"")):
            yield f"{name}: {_first_difference(old, new)}"
    if then.changes is not None and now.changes is not None:
        before, after = set(then.changes), set(now.changes)
        for change in sorted((before ^ after) - background, key=lambda c: (c.path, c.what, c.size)):
            when = "then" if change in before else "now"
            yield f"file {change.path}: {change.what} ({change.size} bytes) only {when}"


def _code(outcome: Outcome) -> str:
    return "none" if outcome.error is None else outcome.error[0]


def _first_difference(old: bytes, new: bytes) -> str:
    lines = zip(_lines(old), _lines(new), strict=False)
    for number, (one, other) in enumerate(lines, start=1):
        if one != other:
            return f"line {number} was {one[:120]!r} and is {other[:120]!r}"
    return f"{len(old)} bytes then, {len(new)} now"


def _lines(data: bytes) -> list[str]:
    return data.decode(errors="replace").split("\n")


def check_whole(log: Reader, name: str) -> int:
    """Read every record and every blob of a trajectory; how many. Raises LogCorrupt.

    Opening the log has checked the records; this reads the large data beside it as well.
    """
    count = 0
    for _ in events(log, name):
        count += 1
    if count == 0:
        raise SandboxError(f"there is no trajectory {name} in {log.folder}")
    return count
