"""The log of a node: one total order of records, of which each sandbox has its own chain.

`Log` writes, alone; `Reader` reads the same files at any time, beside a writer or after its death.

    with Log(folder) as log:
        intent = log.append(Kind.INTENT, "sb-1", key="s4", fields={...})   # on disk when it returns

A record is written into the file at once and then made durable together with all others that are
waiting: whoever comes first syncs for everybody, so nobody waits on purpose and many writers share
one sync. `durability` "power" syncs to the disk and survives the end of the machine; "process"
leaves that to the kernel and survives the end of any process, which is all that matters to
sandboxes that die with the machine.

Paper: §5.2.5 (the ordered trajectory log).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from fathom.sandbox.trajectory import body as bodies
from fathom.sandbox.trajectory import segment as segments
from fathom.sandbox.trajectory.body import Blob, Blobs, Body
from fathom.sandbox.trajectory.errors import LogCorrupt, LogFull, LogLocked, TrajectoryError
from fathom.sandbox.trajectory.index import Head, Index, Place, Summary, Witness, witness
from fathom.sandbox.trajectory.record import (
    NOTHING,
    Kind,
    Record,
    chain_hash,
    record_at,
)
from fathom.sandbox.trajectory.segment import SEGMENT_HEADER, SMALLEST_SEGMENT, Found, Segment

Durability = Literal["power", "process"]
SEGMENT_SIZE = 64 << 20
# Room that is kept for the receipt of every operation that was begun.
RECEIPT_ROOM = 16 << 10
# Records that are kept decoded from the check of a log until they are first read.
MOST_FRESH = 4096
_LOCK = "lock"
_ATTEMPTS = 4
# `is_locked` holds the lock for a moment; a writer that starts just then must not give up.
_LOCK_PATIENCE = 0.2
_BLOBS = "blobs"
# A sync that takes so many seconds costs less than handing it to a thread; the mean is taken over
# about so many of them.
_QUICK = 0.0003
_SYNCS = 8


class Reader:
    """The records of a log, checked from the first to the last when it is opened.

    Raises LogCorrupt, LogTooNew, and TrajectoryError where there is no log.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        # Asked first: whatever it knows of is in the segments that are there now.
        known = witness(self.folder)
        self._segments = segments.open_segments(self.folder) if self.folder.is_dir() else []
        if not self._segments:
            self._check_end(known)
            raise TrajectoryError(f"there is no log in {self.folder}")
        self._blobs = Blobs(self.folder / _BLOBS)
        self._files: dict[int, int] = {}
        self._salt = self._segments[0].salt
        for attempt in range(_ATTEMPTS):
            self._index = Index(None, self._segments[0].identity)
            try:
                self._next, self._offset = self._scan(0)
                self._check_end(known)
                return
            except LogCorrupt:
                self._index.close()
                # A living writer may have been seen in the middle of a record.
                if attempt + 1 == _ATTEMPTS or not is_locked(self.folder):
                    raise
                time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _scan(self, known: int) -> tuple[int, int]:
        """Read the segments after the `known` ones; say which record comes next, and where."""
        heads: dict[str, Head | None] = {}
        self._fresh: dict[int, Record] = {}
        following, offset = self._segments[known].first, SEGMENT_HEADER
        for segment in self._segments[known:]:
            if segment.first != following:
                raise LogCorrupt(
                    f"{segment.path} begins with record {segment.first} where {following} belongs: "
                    "a segment is missing"
                )
            offset = SEGMENT_HEADER
            last = segment is self._segments[-1]
            for found in segments.scan(segment, last=last):
                self._check_chain(found, heads)
                self._index.add(segment, found)
                if len(self._fresh) < MOST_FRESH:
                    self._fresh[following] = found.record
                following, offset = following + 1, found.offset + len(found.data)
            if not last:
                self._index.seal(segment)
        return following, offset

    def _check_end(self, known: Witness) -> None:
        """Refuse a log without its last records, or without any, where the index knew of more."""
        ours = not self._segments or self._segments[0].identity == known.identity
        last = self.last if self._segments else 0
        if ours and last < known.durable:
            raise LogCorrupt(
                f"records {last + 1} to {known.durable} of {self.folder} were on disk and are "
                "gone: restore its last segments from a copy; or, where this is a copy that was "
                "made while the log was written, delete its index.sqlite to go on without them"
            )

    def _check_chain(self, found: Found, heads: dict[str, Head | None]) -> None:
        record = found.record
        if record.sandbox not in heads:
            heads[record.sandbox] = self._index.head(record.sandbox)
        head = heads[record.sandbox] or Head(sequence=0, hash=NOTHING, epoch=0)
        if record.previous != head.hash or record.sequence != head.sequence + 1:
            raise LogCorrupt(
                f"record {record.node_sequence} does not continue the chain of {record.sandbox}"
            )
        heads[record.sandbox] = Head(
            sequence=record.sequence, hash=chain_hash(found.data), epoch=record.epoch
        )

    @property
    def last(self) -> int:
        """The node sequence of the last record, 0 when there is none."""
        return self._next - 1

    def sandboxes(self) -> list[Summary]:
        """What the log holds of each sandbox, the latest last."""
        return self._index.summaries()

    def head(self, sandbox: str) -> Head | None:
        """The last record of a sandbox, None when there is none."""
        return self._index.head(sandbox)

    def places(self, sandbox: str, after: int = 0) -> list[Place]:
        """Where the records of a sandbox after node sequence `after` lie, in order."""
        return self._index.places(sandbox, after)

    def records(self, sandbox: str, after: int = 0) -> Iterator[Record]:
        """The records of a sandbox in order. Raises LogCorrupt."""
        # What was just decoded to be checked need not be decoded a second time.
        fresh = self._fresh
        for place in self.places(sandbox, after):
            yield fresh.pop(place.node_sequence, None) or self.read(place)

    def read(self, place: Place) -> Record:
        """The record at a place, checked again. Raises LogCorrupt."""
        fd = self._files.get(place.segment)
        if fd is None:
            path = next(s.path for s in self._segments if s.first == place.segment)
            fd = self._files[place.segment] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = record_at(os.pread(fd, place.size, place.offset), 0, self._salt)
        if found is None or found[0].node_sequence != place.node_sequence:
            raise LogCorrupt(f"record {place.node_sequence} of {self.folder} is damaged")
        return found[0]

    def body(self, record: Record) -> Body:
        """What a record says. Raises LogCorrupt."""
        return bodies.decode(record.body)

    def blob(self, blob: Blob) -> bytes | None:
        """The data of a blob, None when it was lost for want of room. Raises LogCorrupt."""
        if blob.lost:
            return None
        return self._blobs.get(blob.digest) if blob.inline is None else blob.inline

    def close(self) -> None:
        """Close the files. Does nothing the second time."""
        for fd in self._files.values():
            os.close(fd)
        self._files = {}
        self._index.close()


class Log(Reader):
    """A log that is written: its one writer holds a lock until it closes or dies.

    A torn write at the end is cut off. Raises LogLocked while another process writes, LogCorrupt,
    LogTooNew, and LogFull when a new log has no room.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        segment_size: int = SEGMENT_SIZE,
        durability: Durability = "power",
    ) -> None:
        if segment_size < SMALLEST_SEGMENT:
            raise TrajectoryError(f"segment_size is {segment_size}: at least {SMALLEST_SEGMENT}")
        self.folder = Path(folder)
        self.durability: Durability = durability
        self._segment_size = segment_size
        self._state = threading.Condition()
        self._syncing = False
        self._sync_time: float | None = None
        self._broken: str | None = None
        self._reserved: dict[int, int] = {}
        self._files = {}
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _take_lock(self.folder)
        self._fd = -1
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        _remove_unfinished(self.folder)
        witnessed = witness(self.folder)
        self._segments = segments.open_segments(self.folder)
        if not self._segments:
            self._check_end(witnessed)
            identity = secrets.token_bytes(16)
            self._segments = [self._new_segment(identity, 1)]
        self._blobs = Blobs(self.folder / _BLOBS, durable=self.durability == "power")
        self._index = Index(
            self.folder, self._segments[0].identity, durable=self.durability == "power"
        )
        self._heads: dict[str, Head] = {}
        self._salt = self._segments[0].salt
        known = self._index.known_segments(self._segments)
        self._next, self._offset = self._scan(known)
        self._check_end(witnessed)
        active = self._segments[-1]
        segments.cut(active, self._offset, durable=self.durability == "power")
        self._durable = self._index.durable = self._next - 1
        self._fd = os.open(active.path, os.O_RDWR | os.O_CLOEXEC)

    def head(self, sandbox: str) -> Head | None:
        """The last record of a sandbox, None when there is none."""
        return self._heads.get(sandbox) or self._index.head(sandbox)

    def append(
        self,
        kind: Kind,
        sandbox: str,
        *,
        key: str = "",
        digest: bytes = NOTHING,
        parent: int = 0,
        epoch: int = 0,
        fields: Mapping[str, Any] | None = None,
        blobs: Mapping[str, bytes] | None = None,
        durable: bool = True,
        reserve: bool = False,
    ) -> Record:
        """Write one record and, unless `durable` is false, return once it is on disk.

        `reserve` keeps room for the receipt that will name this record as its `parent`; that one is
        written even on a full disk, at the price of its large blobs. Raises LogFull, then nothing
        was written, and TrajectoryError for values that fit no record.
        """
        body = bodies.encode(
            fields or {},
            blobs or {},
            self._blobs,
            may_lose=kind is Kind.RECEIPT and parent in self._reserved,
        )
        with self._state:
            self._check_open()
            head = self.head(sandbox) or Head(sequence=0, hash=NOTHING, epoch=0)
            record = Record(
                kind=kind,
                sandbox=sandbox,
                node_sequence=self._next,
                durable=self._durable,
                sequence=head.sequence + 1,
                epoch=epoch or head.epoch,
                key=key,
                digest=digest,
                parent=parent,
                previous=head.hash,
                wall_ns=time.time_ns(),
                monotonic_ns=time.monotonic_ns(),
                body=body,
            )
            self._write(record, reserve)
        if durable:
            self.sync(record.node_sequence)
        return record

    def _write(self, record: Record, reserve: bool) -> None:
        data = record.encode(self._salt)
        answered = record.parent if record.kind is Kind.RECEIPT else 0
        released = self._reserved.get(answered, 0)
        kept = sum(self._reserved.values()) - released + (RECEIPT_ROOM if reserve else 0)
        if self._offset + len(data) + kept > self._segments[-1].size:
            if SEGMENT_HEADER + len(data) + kept > self._segment_size:
                raise LogFull(
                    f"{len(self._reserved)} operations without a receipt leave no room for another "
                    "record: let some of them end"
                )
            self._rotate()
        try:
            written = os.pwrite(self._fd, data, self._offset)
        except OSError as error:
            self._undo()
            raise _as_full(error, self.folder) from error
        if written != len(data):
            self._undo()
            raise LogFull(f"no room for a record in {self.folder}: free some")
        self._reserved.pop(answered, None)
        if reserve:
            self._reserved[record.node_sequence] = RECEIPT_ROOM
        self._heads[record.sandbox] = Head(
            sequence=record.sequence, hash=chain_hash(data), epoch=record.epoch
        )
        self._index.add(self._segments[-1], Found(record=record, data=data, offset=self._offset))
        self._next += 1
        self._offset += len(data)

    def _undo(self) -> None:
        try:
            segments.cut(self._segments[-1], self._offset)
        except OSError as error:
            self._broken = f"a failed write could not be taken back: {error}"

    def _rotate(self) -> None:
        while self._syncing:
            self._state.wait()
        self._flush_disk(self._fd)
        fresh = self._new_segment(self._segments[0].identity, self._next)
        fd = os.open(fresh.path, os.O_RDWR | os.O_CLOEXEC)
        os.close(self._fd)
        self._fd, self._offset = fd, SEGMENT_HEADER
        self._durable = self._index.durable = self._next - 1
        self._index.seal(self._segments[-1])
        self._segments.append(fresh)
        self._state.notify_all()

    def _new_segment(self, identity: bytes, first: int) -> Segment:
        durable = self.durability == "power"
        return segments.create(self.folder, identity, first, self._segment_size, durable=durable)

    def sync(self, through: int | None = None) -> None:
        """Return once every record up to `through` (all of them by default) is on disk."""
        with self._state:
            target = self._next - 1 if through is None else through
            while self._durable < target:
                self._check_open()
                if self._syncing:
                    self._state.wait()
                    continue
                self._syncing, written, fd = True, self._next - 1, self._fd
                self._state.release()
                failure: OSError | None = None
                try:
                    self._flush_disk(fd)
                except OSError as error:
                    failure = error
                finally:
                    self._state.acquire()
                    self._syncing = False
                    self._state.notify_all()
                if failure is not None:
                    # What the kernel could not write it may have dropped: a second sync that
                    # succeeds would prove nothing.
                    self._broken = f"the disk failed: {failure}"
                    self._check_open()
                self._durable = self._index.durable = max(self._durable, written)

    def _flush_disk(self, fd: int) -> None:
        if self.durability == "power":
            began = time.perf_counter()
            os.fdatasync(fd)
            spent = time.perf_counter() - began
            known = self._sync_time
            self._sync_time = spent if known is None else known + (spent - known) / _SYNCS

    @property
    def is_quick(self) -> bool:
        """Whether a durable record has lately been a matter of less than a change of threads."""
        if self.durability == "process":
            return True
        return self._sync_time is not None and self._sync_time < _QUICK and not self._syncing

    def _check_open(self) -> None:
        if self._broken is not None:
            raise TrajectoryError(f"the log in {self.folder} cannot go on: {self._broken}")
        if self._fd < 0:
            raise TrajectoryError(f"the log in {self.folder} was closed")

    def release(self, intent: int) -> None:
        """Give back the room that was kept for the receipt of an intent."""
        with self._state:
            self._reserved.pop(intent, None)

    def keep(self, intent: int) -> None:
        """Keep room for the receipt of an intent of an earlier life of this log."""
        with self._state:
            self._reserved.setdefault(intent, RECEIPT_ROOM)

    def close(self) -> None:
        """Sync, close and unlock. Does nothing the second time."""
        try:
            if self._fd >= 0:
                if self._broken is None:
                    with contextlib.suppress(TrajectoryError):
                        self.sync()
                os.close(self._fd)
                self._fd = -1
            if hasattr(self, "_index"):
                super().close()
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1


def _take_lock(folder: Path) -> int:
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            os.close(fd)
            raise LogLocked(
                f"another process writes the log in {folder}: end it, or only read"
            ) from error
        return fd


def is_locked(folder: Path) -> bool:
    """Whether a living process writes the log in `folder`."""
    try:
        fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _remove_unfinished(folder: Path) -> None:
    # The lock is held: what has no name yet belongs to a writer that died.
    for pattern in ("*.new", f"{_BLOBS}/*/*.new"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _as_full(error: OSError, folder: Path) -> Exception:
    if error.errno in bodies.NO_ROOM:
        return LogFull(f"no room for a record in {folder}: free some")
    return TrajectoryError(f"the log in {folder} cannot be written: {error}")
