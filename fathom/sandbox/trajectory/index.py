"""Where each record lies: a SQLite file that may be deleted at any time.

It is filled from the log alone. It saves a scan of the segments that were scanned before and have
not been touched since, and it remembers up to which record the log was on disk: a log that is
shorter has lost something, which its own segments could not tell. Whoever doubts it deletes it.

Paper: none (storage).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fathom.sandbox.trajectory.errors import LogCorrupt
from fathom.sandbox.trajectory.record import Kind, chain_hash
from fathom.sandbox.trajectory.segment import Found, Segment

NAME = "index.sqlite"
_VERSION = 2
_SCHEMA = """
CREATE TABLE segments (first INTEGER PRIMARY KEY, mtime INTEGER, inode INTEGER, size INTEGER);
CREATE TABLE records (
    node INTEGER PRIMARY KEY, sandbox TEXT, sequence INTEGER, kind INTEGER, key TEXT, wall INTEGER,
    segment INTEGER, offset INTEGER, size INTEGER, hash BLOB, epoch INTEGER
);
CREATE INDEX by_sandbox ON records (sandbox, sequence);
"""
# `boot`: in which life of the machine that holds, empty for all.
_LOG = "CREATE TABLE log (identity BLOB, durable INTEGER, boot TEXT)"
# A file that cannot be read or written now may be whole: it is left as it is.
_NOT_NOW = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
}
_ROW = "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_BATCH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a record lies and what it is."""

    node_sequence: int
    kind: Kind
    key: str
    segment: int
    offset: int
    size: int
    wall_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last record of a sandbox: what its next one continues."""

    sequence: int
    hash: bytes
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a log holds of one sandbox."""

    sandbox: str
    records: int
    operations: int
    first_wall_ns: int
    last_wall_ns: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Witness:
    """That the log with this identity was on disk up to the record `durable`."""

    identity: bytes = b""
    durable: int = 0


def witness(folder: Path) -> Witness:
    """What an index in `folder` says of its log; nothing where there is none that can be read."""
    try:
        db = sqlite3.connect(f"file:{quote(str(folder / NAME))}?mode=ro", uri=True)
        try:
            identity, durable, boot = db.execute("SELECT * FROM log").fetchone()
        finally:
            db.close()
        return Witness(bytes(identity), int(durable) if boot in ("", _boot()) else 0)
    except (sqlite3.Error, TypeError, ValueError):
        return Witness()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Index:
    """The index of one log, in its folder or, for a reader, in memory.

    `durable`: up to which record the log is on disk, as its writer knows; it is written out with
    the rows. Where the log leaves that to the kernel, it is no longer true once the machine stops.
    """

    def __init__(self, folder: Path | None, identity: bytes, *, durable: bool = True) -> None:
        self.durable = 0
        self._noted = 0
        self._boot = "" if durable else _boot()
        # What need not survive a power cut need not wait for the disk either.
        self._synchronous = "NORMAL" if durable else "OFF"
        self._path = None if folder is None else folder / NAME
        self._identity = identity
        self._waiting: list[tuple[object, ...]] = []
        self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            return self._connect(":memory:")
        try:
            db = self._connect(str(self._path))
            if self._is_ours(db):
                return db
            db.close()
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF in _NOT_NOW:
                return self._connect(":memory:")
            # damaged: what it said is in the log
        return self._start_again()

    def _start_again(self) -> sqlite3.Connection:
        assert self._path is not None
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        try:
            return self._connect(str(self._path))
        except sqlite3.Error:
            return self._connect(":memory:")  # a full or read-only disk: this run does without

    def _connect(self, where: str) -> sqlite3.Connection:
        db = sqlite3.connect(where, check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA synchronous={self._synchronous}")
            if not db.execute("PRAGMA user_version").fetchone()[0]:
                db.execute("BEGIN")
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version={_VERSION}")
                db.execute(_LOG)
                db.execute("INSERT INTO log VALUES (?, 0, '')", (self._identity,))
                db.execute("COMMIT")
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _is_ours(self, db: sqlite3.Connection) -> bool:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        return (
            version == _VERSION
            and db.execute("SELECT identity FROM log").fetchone() == (self._identity,)
            and db.execute("PRAGMA quick_check").fetchone() == ("ok",)
        )

    def known_segments(self, segments: Sequence[Segment]) -> int:
        """How many `segments`, from the first on, need no scan: indexed, finished and untouched.

        What the index says about the others is forgotten; the last one is always among them.
        Raises LogCorrupt when a finished segment is gone.
        """
        there = {segment.first for segment in segments}
        try:
            for (first,) in self._db.execute("SELECT first FROM segments").fetchall():
                if first not in there:
                    raise LogCorrupt(f"the segment that begins with record {first} is missing")
            known = 0
            for segment in segments[:-1]:
                row = self._db.execute(
                    "SELECT mtime, inode, size FROM segments WHERE first=?", (segment.first,)
                ).fetchone()
                if row != _signature(segment):
                    break
                known += 1
            boundary = segments[known].first if segments else 1
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM records WHERE node>=?", (boundary,))
            self._db.execute("DELETE FROM segments WHERE first>=?", (boundary,))
            self._db.execute("COMMIT")
            return known
        except sqlite3.Error:
            # A full disk, most likely: then all of the log is read, and this run does without.
            self._db.close()
            self._db = self._connect(":memory:")
            return 0

    def add(self, segment: Segment, found: Found) -> None:
        """Note a record; it is written out with others later."""
        record = found.record
        self._waiting.append(
            (
                record.node_sequence,
                record.sandbox,
                record.sequence,
                int(record.kind),
                record.key,
                record.wall_ns,
                segment.first,
                found.offset,
                len(found.data),
                chain_hash(found.data),
                record.epoch,
            )
        )
        if len(self._waiting) >= _BATCH:
            self.flush()

    def seal(self, segment: Segment) -> None:
        """Note that a segment is finished and how its file looks."""
        self.flush()
        with contextlib.suppress(sqlite3.Error):
            self._db.execute(
                "INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?)",
                (segment.first, *_signature(segment)),
            )

    def flush(self) -> None:
        """Write out what waits. A disk without room only makes the next start scan more."""
        if not self._waiting and self.durable == self._noted:
            return
        rows, self._waiting = self._waiting, []
        try:
            self._write(rows)
        except sqlite3.Error:
            # The file cannot be written any more; the log goes on, with an index in memory.
            old = self._db
            self._db = self._connect(":memory:")
            with contextlib.suppress(sqlite3.Error):
                old.rollback()
                self._write([tuple(row) for row in old.execute("SELECT * FROM records")])
            old.close()
            self._write(rows)

    def _write(self, rows: list[tuple[object, ...]]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany(_ROW, rows)
        if self.durable != self._noted:
            values = self.durable, self._boot
            self._db.execute("UPDATE log SET durable=?, boot=?", values)
        self._db.execute("COMMIT")
        self._noted = self.durable

    def head(self, sandbox: str) -> Head | None:
        """The last record of a sandbox."""
        self.flush()
        row = self._db.execute(
            "SELECT sequence, hash, epoch FROM records WHERE sandbox=? "
            "ORDER BY sequence DESC LIMIT 1",
            (sandbox,),
        ).fetchone()
        return None if row is None else Head(sequence=row[0], hash=row[1], epoch=row[2])

    def places(self, sandbox: str, after: int = 0) -> list[Place]:
        """The records of a sandbox after node sequence `after`, in order."""
        self.flush()
        rows = self._db.execute(
            "SELECT node, kind, key, segment, offset, size, wall FROM records "
            "WHERE sandbox=? AND node>? ORDER BY sequence",
            (sandbox, after),
        )
        return [
            Place(
                node_sequence=node,
                kind=Kind(kind),
                key=key,
                segment=segment,
                offset=offset,
                size=size,
                wall_ns=wall,
            )
            for node, kind, key, segment, offset, size, wall in rows
        ]

    def summaries(self) -> list[Summary]:
        """What there is of each sandbox, the latest last."""
        self.flush()
        rows = self._db.execute(
            "SELECT sandbox, count(*), sum(kind=?), min(wall), max(wall), "
            "max(node * (kind=?)) = max(node) FROM records GROUP BY sandbox ORDER BY max(node)",
            (int(Kind.RECEIPT), int(Kind.END)),
        )
        return [
            Summary(
                sandbox=sandbox,
                records=records,
                operations=operations,
                first_wall_ns=first,
                last_wall_ns=last,
                ended=bool(ended),
            )
            for sandbox, records, operations, first, last, ended in rows
        ]

    def close(self) -> None:
        """Write out what waits and close the file."""
        with contextlib.suppress(sqlite3.Error):
            self.flush()
        self._db.close()


def _signature(segment: Segment) -> tuple[int, int, int]:
    found = segment.path.stat()
    return found.st_mtime_ns, found.st_ino, found.st_size
