"""One record of the log: a fixed header, two short names, a body, all under one checksum.

    magic 4s | version u16 | kind u16 | size u32 | crc32 u32          of everything but the crc
    node sequence u64 | durable u64 | sequence u64 | parent u64
    wall time u64 ns | monotonic time u64 ns | epoch u32 | name sizes u16 u16
    request digest 32s | hash of the previous record 32s
    sandbox name | operation key | body | zeros up to a multiple of 8

Numbers are little-endian. `sequence` counts the records of one sandbox from 1, `node sequence`
those of the whole log. `parent` is the node sequence of the record that this one answers, or 0.
The checksum starts from the log's own random identity, which no tenant can read: output of a
program that happens to look like a record is never taken for one.
`durable` is the node sequence up to which the log was known to be on disk when this record was
written: a damaged record at or below it had been durable, one above it is a torn write. The hash
chains the records of one sandbox; it is not keyed, so it finds accidents and careless edits rather
than an owner of the folder who rewrites everything.

Paper: §5.2.5 (the ordered log per sandbox).
"""

from __future__ import annotations

import enum
import hashlib
import mmap
import struct
import zlib
from dataclasses import dataclass

from fathom.sandbox.trajectory.errors import LogCorrupt, LogTooNew, TrajectoryError

MAGIC = b"FTR\x01"
VERSION = 1
DIGEST_SIZE = 32
NOTHING = bytes(DIGEST_SIZE)
LONGEST_NAME = 255
LARGEST_RECORD = 1 << 20

_HEADER = struct.Struct("<4sHHII QQQQ QQ IHH 32s32s")
_START = struct.Struct("<4sHHI")
HEADER_SIZE = _HEADER.size
_CRC_AT = 12


class Kind(enum.IntEnum):
    """What a record states. Numbers are part of the format and never change."""

    CREATE = 1
    INTENT = 2
    STARTED = 3
    OUTPUT = 4
    RECEIPT = 5
    UNKNOWN = 6
    PHASE = 7
    SNAPSHOT = 8
    FORK = 9
    PAUSE = 10
    RESUME = 11
    END = 12
    VALUE = 13
    ATTACH = 14


_KINDS = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record as it is written and read; see the module for the fields."""

    kind: Kind
    sandbox: str
    node_sequence: int
    durable: int
    sequence: int
    epoch: int = 0
    key: str = ""
    digest: bytes = NOTHING
    parent: int = 0
    previous: bytes = NOTHING
    wall_ns: int = 0
    monotonic_ns: int = 0
    body: bytes = b""

    def encode(self, salt: int) -> bytes:
        """The bytes of this record in the log with this `salt`.

        Raises TrajectoryError for names or a body that are too long.
        """
        name, key = self.sandbox.encode(), self.key.encode()
        if not name or len(name) > LONGEST_NAME or len(key) > LONGEST_NAME:
            raise TrajectoryError(
                f"the name {self.sandbox[:60]!r} or key {self.key[:60]!r} is empty or longer than "
                f"{LONGEST_NAME} bytes: choose a shorter one"
            )
        size = padded(HEADER_SIZE + len(name) + len(key) + len(self.body))
        if size > LARGEST_RECORD:
            raise TrajectoryError(
                f"a record of {size} bytes is too large (at most {LARGEST_RECORD}): large data "
                "belongs into blobs"
            )
        data = bytearray(size)
        _HEADER.pack_into(
            data,
            0,
            MAGIC,
            VERSION,
            self.kind,
            HEADER_SIZE + len(name) + len(key) + len(self.body),
            0,
            self.node_sequence,
            self.durable,
            self.sequence,
            self.parent,
            self.wall_ns,
            self.monotonic_ns,
            self.epoch,
            len(name),
            len(key),
            self.digest,
            self.previous,
        )
        data[HEADER_SIZE : HEADER_SIZE + len(name) + len(key) + len(self.body)] = (
            name + key + self.body
        )
        struct.pack_into("<I", data, _CRC_AT, _checksum(data, salt))
        return bytes(data)


def padded(size: int) -> int:
    """`size` rounded up to where the next record may begin."""
    return (size + 7) & ~7


def salt_of(identity: bytes) -> int:
    """Where the checksums of the log with this identity start."""
    return zlib.crc32(identity)


def _checksum(data: bytes | bytearray, salt: int) -> int:
    return zlib.crc32(data[_CRC_AT + 4 :], zlib.crc32(data[:_CRC_AT], salt))


def chain_hash(data: bytes) -> bytes:
    """The hash that the next record of the same sandbox carries: of all bytes of this one."""
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()


def record_at(data: bytes | mmap.mmap, at: int, salt: int) -> tuple[Record, bytes] | None:
    """The record at `at` and its bytes, or None when there is no whole record.

    Raises LogTooNew for a whole record of a later version.
    """
    if at + HEADER_SIZE > len(data):
        return None
    magic, version, kind, size = _START.unpack_from(data, at)
    if magic != MAGIC or not HEADER_SIZE <= size <= LARGEST_RECORD:
        return None
    end = at + padded(size)
    if end > len(data):
        return None
    whole = bytes(data[at:end])
    if struct.unpack_from("<I", whole, _CRC_AT)[0] != _checksum(whole, salt):
        return None
    if version > VERSION:
        raise LogTooNew(
            f"a record has version {version}, this program reads up to {VERSION}: use the program "
            "that wrote the log"
        )
    return _decode(whole, kind, size), whole


def _decode(whole: bytes, kind: int, size: int) -> Record:
    fields = _HEADER.unpack_from(whole, 0)
    (node, durable, sequence, parent, wall, monotonic, epoch, names, keys, digest, previous) = (
        fields[5:]
    )
    body_at = HEADER_SIZE + names + keys
    try:
        known = _KINDS.get(kind) or Kind(kind)
        name = whole[HEADER_SIZE : HEADER_SIZE + names].decode()
        key = whole[HEADER_SIZE + names : body_at].decode()
    except ValueError as error:
        raise LogCorrupt(
            f"record {node} has a valid checksum and makes no sense: {error}"
        ) from error
    if body_at > size:
        raise LogCorrupt(f"record {node} has a valid checksum and names longer than itself")
    return Record(
        kind=known,
        sandbox=name,
        node_sequence=node,
        durable=durable,
        sequence=sequence,
        epoch=epoch,
        key=key,
        digest=digest,
        parent=parent,
        previous=previous,
        wall_ns=wall,
        monotonic_ns=monotonic,
        body=whole[body_at:size],
    )
