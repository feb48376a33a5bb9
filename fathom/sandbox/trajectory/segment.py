"""One file of the log: preallocated, written from front to back, read with suspicion.

    magic 8s | version u32 | crc32 u32 of these | identity 16s | first node sequence u64 |
    size u64 | created ns u64 | crc32 u32 of all before | zeros up to 64 bytes | records | zeros

The first 16 bytes mean the same in every version, so an old program knows a new log.

A segment gets its name only when it is whole, and the next one is made only after everything in
this one is on disk. So in every segment but the last, what follows the records is zeros. In the
last one a crash may have left a torn write; `scan` tells it from damage by asking whether any
later record was written in the knowledge that the broken one had been durable.

Paper: none (storage).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fathom.sandbox.trajectory.body import NO_ROOM
from fathom.sandbox.trajectory.errors import LogCorrupt, LogFull, LogTooNew
from fathom.sandbox.trajectory.record import MAGIC, Record, record_at, salt_of

SEGMENT_MAGIC = b"FATHOMTL"
VERSION = 1
SEGMENT_HEADER = 64
SMALLEST_SEGMENT = 1 << 16
SUFFIX = ".log"
_ZEROS = 1 << 20
_PROMISE = struct.Struct("<8sI")
_REST = struct.Struct("<16sQQQ")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment's file and what its header says."""

    path: Path
    identity: bytes
    first: int
    size: int

    @property
    def salt(self) -> int:
        """Where its checksums start."""
        return salt_of(self.identity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A record in a segment: its bytes begin at `offset`."""

    record: Record
    data: bytes
    offset: int


def create(
    folder: Path, identity: bytes, first: int, size: int, *, durable: bool = True
) -> Segment:
    """Make a segment for the records from `first` on. Raises LogFull, leaving nothing behind."""
    path = folder / f"{first:016x}{SUFFIX}"
    temporary = path.with_suffix(".new")
    promise = _PROMISE.pack(SEGMENT_MAGIC, VERSION)
    header = promise + _CRC.pack(zlib.crc32(promise))
    header += _REST.pack(identity, first, size, time.time_ns())
    header += _CRC.pack(zlib.crc32(header))
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, header, 0)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        if durable:
            sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in (*NO_ROOM, errno.EFBIG):
            raise LogFull(
                f"no room for a segment of {size} bytes in {folder}: free some"
            ) from error
        raise
    return Segment(path=path, identity=identity, first=first, size=size)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_segments(folder: Path) -> list[Segment]:
    """The segments of a log in their order. Raises LogCorrupt and LogTooNew."""
    segments = [_read_header(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    for segment in segments:
        if segment.path.name != f"{segment.first:016x}{SUFFIX}":
            raise LogCorrupt(f"{segment.path} begins with record {segment.first}: it was renamed")
        if segment.identity != segments[0].identity:
            raise LogCorrupt(f"{segment.path} belongs to another log")
    if segments and segments[0].first != 1:
        raise LogCorrupt(f"the log in {folder} begins with record {segments[0].first}, not with 1")
    return segments


def _read_header(path: Path) -> Segment:
    with path.open("rb") as file:
        header = file.read(SEGMENT_HEADER)
    promise = header[: _PROMISE.size]
    end = _PROMISE.size + _CRC.size + _REST.size
    if len(header) < SEGMENT_HEADER or promise[:8] != SEGMENT_MAGIC:
        raise LogCorrupt(f"{path} is not a segment of a log")
    if _CRC.unpack_from(header, _PROMISE.size)[0] != zlib.crc32(promise):
        raise LogCorrupt(f"the header of {path} is damaged")
    version = _PROMISE.unpack(promise)[1]
    if version > VERSION:
        raise LogTooNew(
            f"{path} has format {version}, this program reads up to {VERSION}: use the program "
            "that wrote it"
        )
    whole = _CRC.unpack_from(header, end)[0] == zlib.crc32(header[:end])
    if not whole or any(header[end + _CRC.size :]):
        raise LogCorrupt(f"the header of {path} is damaged")
    identity, first, size, _ = _REST.unpack_from(header, _PROMISE.size + _CRC.size)
    return Segment(path=path, identity=identity, first=first, size=size)


def scan(segment: Segment, *, last: bool) -> Iterator[Found]:
    """The records of a segment in order, until its end or, in the `last` one, a torn write.

    Raises LogCorrupt where a durable record is damaged, missing or out of order, and LogTooNew.
    """
    salt = segment.salt
    with segment.path.open("rb") as file:
        if os.fstat(file.fileno()).st_size <= SEGMENT_HEADER:
            raise LogCorrupt(f"{segment.path} is empty")
        # Asked before anything is read: what is read ahead would count as written.
        written = list(_written(file.fileno()))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            expected, at = segment.first, SEGMENT_HEADER
            while found := record_at(data, at, salt):
                record, whole = found
                if record.node_sequence != expected:
                    raise LogCorrupt(
                        f"{segment.path} has record {record.node_sequence} where {expected} belongs"
                    )
                yield Found(record=record, data=whole, offset=at)
                expected, at = expected + 1, at + len(whole)
            rest = [(max(begin, at), end) for begin, end in written if end > at]
            if last:
                _check_tail(segment, data, rest, at, expected)
            elif not _is_zero(data, rest):
                raise LogCorrupt(f"record {expected} in {segment.path} at byte {at} is damaged")


def _check_tail(
    segment: Segment, data: mmap.mmap, rest: list[tuple[int, int]], at: int, expected: int
) -> None:
    """Decide whether what follows the last whole record is a torn write. Raises LogCorrupt."""
    durable = 0
    for begin, end in rest:
        position = begin - 1
        while durable < expected and (position := data.find(MAGIC, position + 1, end)) >= 0:
            # Only what lies where a record may lie, with this log's checksum, is a witness.
            if position % 8 == 0 and (found := record_at(data, position, segment.salt)):
                durable = max(durable, found[0].durable)
    if durable >= expected:
        raise LogCorrupt(
            f"record {expected} in {segment.path} at byte {at} is damaged although it had been "
            "durable: restore the log from a copy, or set it aside and begin another one"
        )


def _is_zero(data: mmap.mmap, rest: list[tuple[int, int]], chunk: int = 1 << 20) -> bool:
    return not any(
        any(data[position : min(end, position + chunk)])
        for begin, end in rest
        for position in range(begin, end, chunk)
    )


def _written(file: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that were ever written; the others are zeros and need no look."""
    at = 0
    while True:
        try:
            begin = os.lseek(file, at, os.SEEK_DATA)
        except OSError:
            return  # nothing but preallocated room
        at = os.lseek(file, begin, os.SEEK_HOLE)
        yield begin, at


def cut(segment: Segment, at: int, *, durable: bool = True) -> None:
    """Remove everything from byte `at` on and give the segment its full size again.

    What is there is overwritten: room that was given back might be somebody else's by the time it
    is asked for again, and a log on a full disk must still take the receipts it kept room for.
    """
    fd = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for begin, end in list(_written(fd)):
            for position in range(max(begin, at), end, _ZEROS):
                os.pwrite(fd, bytes(min(_ZEROS, end - position)), position)
        try:
            os.posix_fallocate(fd, 0, segment.size)
        except OSError as error:
            # Somebody else took its room from it; a write that finds none says so.
            if error.errno not in NO_ROOM:
                raise
        os.ftruncate(fd, segment.size)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
