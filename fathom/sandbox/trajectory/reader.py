"""The reader of a log: every record checked, beside a writer or after its death.

Paper: §5.2.5 (the ordered trajectory log).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from fathom.sandbox.trajectory import body as bodies
from fathom.sandbox.trajectory import segment as segments
from fathom.sandbox.trajectory.body import Blob, Blobs, Body
from fathom.sandbox.trajectory.errors import LogCorrupt, TrajectoryError
from fathom.sandbox.trajectory.index import Head, Index, Place, Summary, Witness, witness
from fathom.sandbox.trajectory.record import NOTHING, Record, chain_hash, record_at
from fathom.sandbox.trajectory.segment import SEGMENT_HEADER, Found

LOCK, BLOBS = "lock", "blobs"
# Records that are kept decoded from the check of a log until they are first read.
MOST_FRESH = 4096
_ATTEMPTS = 4


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
        self._blobs = Blobs(self.folder / BLOBS)
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


def is_locked(folder: Path) -> bool:
    """Whether a living process writes the log in `folder`."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
