"""What a log says about the operations of one sandbox, in the order in which they were asked for.

Paper: §5.2.5 (fast-forward over the recorded commands).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fathom.sandbox.trajectory.errors import LogCorrupt
from fathom.sandbox.trajectory.operation import Outcome, Request, decode_outcome
from fathom.sandbox.trajectory.reader import Reader
from fathom.sandbox.trajectory.record import Kind, Record


@dataclass(slots=True, kw_only=True)
class Entry:
    """One operation or value. Operations: `intent`, then perhaps `started`, `end` or `unknown`.

    `life` counts the attachments up to the one in which it was begun. `end` is the record of the
    receipt or of the value. `presented`: its caller asked for it in this life of the session.
    """

    key: str
    digest: bytes
    intent: int
    position: int
    life: int
    attempts: int = 1
    started: bool = False
    end: Record | None = None
    unknown: str | None = None
    presented: bool = False
    is_value: bool = False
    generation: int | None = None

    @property
    def ticket(self) -> str:
        """The key under which the executor knows this attempt: it runs none of them twice."""
        return _ticket(self.key, self.attempts)


def _ticket(key: str, attempt: int) -> str:
    return key if attempt == 1 else f"{key}#{attempt}"


@dataclass(slots=True)
class Tape:
    """The entries of one sandbox, with what the other records say about it.

    `lives` gives the epoch of each attachment, `set_back` the life and generation of the last
    rollback, `asked` how many entries from the first on were presented. `gone`: intents of what
    was taken back by one; those that ran at that time may still have come to an end.
    """

    entries: list[Entry] = field(default_factory=list[Entry])
    by_key: dict[str, Entry] = field(default_factory=dict[str, Entry])
    lives: dict[int, str] = field(default_factory=dict[int, str])
    attempts: dict[str, int] = field(default_factory=dict[str, int])
    set_back: tuple[int, int | None] = (0, None)
    ended: bool = False
    asked: int = 0
    gone: set[int] = field(default_factory=set[int])
    snapshots: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    def begin(self, record: Record, *, is_value: bool = False) -> Entry:
        """Add an operation, or another attempt at one that is known."""
        entry = self.by_key.get(record.key)
        # Counted beyond a rollback too: the executor may remember what happened before it.
        attempts = self.attempts[record.key] = self.attempts.get(record.key, 0) + 1
        if entry is not None:
            entry.attempts = attempts
            entry.intent, entry.life = record.node_sequence, record.epoch
            entry.started, entry.unknown = False, None
            return entry
        entry = Entry(
            key=record.key,
            digest=record.digest,
            intent=record.node_sequence,
            position=len(self.entries),
            life=record.epoch,
            attempts=attempts,
            is_value=is_value,
        )
        self.entries.append(entry)
        self.by_key[record.key] = entry
        return entry

    def next_ticket(self, key: str) -> str:
        """The ticket of the attempt that would be begun next."""
        return _ticket(key, self.attempts.get(key, 0) + 1)

    def present(self, presented: bool) -> None:
        """Take every entry for asked for in this life, or none."""
        for entry in self.entries:
            entry.presented = presented
        self.asked = len(self.entries) if presented else 0

    def cut(self, position: int) -> None:
        """Forget the entries from `position` on: the sandbox was set back before them."""
        for entry in self.entries[position:]:
            del self.by_key[entry.key]
            self.gone.add(entry.intent)
        del self.entries[position:]
        self.asked = min(self.asked, position)
        self.snapshots = [(name, at) for name, at in self.snapshots if at <= position]

    @property
    def waiting(self) -> list[Entry]:
        """What the log holds and nobody has asked for in this life."""
        while self.asked < len(self.entries) and self.entries[self.asked].presented:
            self.asked += 1
        return [entry for entry in self.entries[self.asked :] if not entry.presented]

    @property
    def undecided(self) -> list[Entry]:
        """Operations that were begun and have no receipt."""
        return [entry for entry in self.entries if entry.end is None]

    def generation(self, epoch: str) -> int | None:
        """The state of the sandbox `epoch` after its last receipt; None when nobody counted."""
        counts = [(entry.life, entry.generation) for entry in self.entries]
        counts.append(self.set_back)
        found = [n for life, n in counts if n is not None and self.lives.get(life) == epoch]
        return max(found, default=None)


def read_tape(log: Reader, sandbox: str) -> Tape:
    """The tape of a sandbox. Raises LogCorrupt for records that contradict each other."""
    tape = Tape()
    for record in _with_parents(log, sandbox):
        _apply(log, tape, record)
    return tape


def _with_parents(log: Reader, sandbox: str) -> Iterator[Record]:
    """The records of a sandbox, after those of the one it was forked from up to that point."""
    for record in log.records(sandbox):
        if record.kind is Kind.FORK:
            fields = log.body(record).fields
            for earlier in _with_parents(log, fields["from"]):
                if earlier.node_sequence <= fields["through"]:
                    yield earlier
        yield record


def _apply(log: Reader, tape: Tape, record: Record) -> None:
    match record.kind:
        case Kind.ATTACH:
            tape.lives[record.epoch] = str(log.body(record).fields["epoch"])
        case Kind.INTENT:
            tape.begin(record)
        case Kind.VALUE:
            tape.begin(record, is_value=True).end = record
        case Kind.STARTED | Kind.RECEIPT | Kind.UNKNOWN if record.parent in tape.gone:
            pass
        case Kind.STARTED:
            _entry(tape, record).started = True
        case Kind.RECEIPT:
            entry = _entry(tape, record)
            entry.end, entry.unknown = record, None
            entry.generation = log.body(record).fields["generation"]
        case Kind.UNKNOWN:
            _entry(tape, record).unknown = str(log.body(record).fields["reason"])
        case Kind.SNAPSHOT:
            tape.snapshots.append((record.key, int(log.body(record).fields["position"])))
        case Kind.RESUME:
            fields = log.body(record).fields
            tape.set_back = record.epoch, fields["generation"]
            tape.cut(int(fields["back_to"]))
        case Kind.END:
            tape.ended = True
        case _:
            pass  # kinds that say nothing about operations


def _entry(tape: Tape, record: Record) -> Entry:
    entry = tape.by_key.get(record.key)
    if entry is None or entry.intent != record.parent:
        raise LogCorrupt(f"record {record.node_sequence} answers an operation that was not begun")
    return entry


def read_outcome(log: Reader, record: Record) -> Outcome:
    """The outcome that a receipt holds. Raises LogCorrupt."""
    body = log.body(record)
    blobs = {name: log.blob(blob) for name, blob in body.blobs.items()}
    return decode_outcome(body.fields, blobs)


def read_request(log: Reader, record: Record) -> tuple[Request, dict[str, Any]]:
    """The request of an intent, and its other fields. Raises LogCorrupt."""
    body = log.body(record)
    data = log.blob(body.blobs["data"]) if "data" in body.blobs else None
    arguments = log.blob(body.blobs["arguments"])
    value = {"verb": body.fields["verb"], "arguments": json.loads(arguments or b"{}")}
    return Request.from_json(value, data), body.fields
