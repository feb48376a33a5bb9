"""What a record says: JSON fields and named blobs, the large ones kept once in a content store.

    length u32 | JSON | inline blobs one after another

A blob of more than 4 KiB lies in a file that its digest names, written and synced before the record
that mentions it, so a durable record never points at nothing. When the disk has no room for it, the
record of an operation that did run still says so: the digest and size are kept and the blob is
marked as lost, because a receipt without its output is worth more than no receipt.

Paper: none (storage).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.sandbox.trajectory.errors import LogCorrupt, LogFull

INLINE_LIMIT = 4096
_LENGTH = struct.Struct("<I")
_BLOBS = "blobs"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def digest_of(data: bytes) -> str:
    """The name of `data`: BLAKE2b with 256 bits, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON in one form only: sorted keys, no spaces, ASCII. Raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A piece of data in a record. `data` is None where it could not be stored (see `lost`)."""

    digest: str
    size: int
    inline: bytes | None = None
    lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The decoded body of a record."""

    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    blobs: dict[str, Blob] = field(default_factory=dict[str, Blob])


class Blobs:
    """The content store of one log: files named by the digest of what they hold."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
        self._durable = durable

    def put(self, data: bytes) -> str:
        """Store `data` durably and return its digest. Raises LogFull, leaving nothing behind."""
        digest = digest_of(data)
        path = self._path(digest)
        if path.exists():
            return digest
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._sync_folder(self._folder)
            _write(temporary, data, self._durable)
            # Written to the end before it gets its name: what bears a digest is whole.
            os.rename(temporary, path)
            self._sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if error.errno in NO_ROOM:
                raise LogFull(
                    f"no room for {len(data)} bytes in {self._folder}: free some"
                ) from error
            raise
        return digest

    def get(self, digest: str) -> bytes:
        """The data with this digest. Raises LogCorrupt when it is missing or damaged."""
        try:
            data = self._path(digest).read_bytes()
        except OSError as error:
            raise LogCorrupt(
                f"the data {digest} of {self._folder} cannot be read: {error}"
            ) from error
        if digest_of(data) != digest:
            raise LogCorrupt(f"the file {self._path(digest)} does not hold what its name says")
        return data

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest[2:]

    def _sync_folder(self, folder: Path) -> None:
        if self._durable:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _write(path: Path, data: bytes, durable: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def encode(
    fields: Mapping[str, Any], blobs: Mapping[str, bytes], store: Blobs, *, may_lose: bool = False
) -> bytes:
    """Put a body into bytes, the large blobs into `store`.

    Raises LogFull when the store has no room, unless `may_lose`: then the blob is marked as lost.
    """
    described: dict[str, Any] = {}
    inline: list[bytes] = []
    # In the order in which the canonical JSON will list them.
    for name, data in sorted(blobs.items()):
        if len(data) <= INLINE_LIMIT:
            described[name] = {"size": len(data), "digest": digest_of(data), "inline": True}
            inline.append(data)
            continue
        described[name] = {"size": len(data), "digest": digest_of(data)}
        try:
            store.put(data)
        except (LogFull, OSError):
            if not may_lose:
                raise
            described[name]["lost"] = True
    document = canonical({**fields, _BLOBS: described} if described else dict(fields))
    return b"".join((_LENGTH.pack(len(document)), document, *inline))


def decode(body: bytes) -> Body:
    """Take a body apart. Raises LogCorrupt when it makes no sense."""
    if not body:
        return Body()
    try:
        (length,) = _LENGTH.unpack_from(body, 0)
        at = _LENGTH.size + length
        fields: dict[str, Any] = json.loads(body[_LENGTH.size : at])
        blobs: dict[str, Blob] = {}
        described: dict[str, Any] = fields.pop(_BLOBS, {})
        for name, known in described.items():
            data: bytes | None = None
            if known.get("inline"):
                data = body[at : at + known["size"]]
                at += known["size"]
            blobs[name] = Blob(
                digest=known["digest"],
                size=known["size"],
                inline=data,
                lost=bool(known.get("lost")),
            )
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise LogCorrupt(f"the body of a record makes no sense: {error}") from error
    if at != len(body):
        raise LogCorrupt(f"the body of a record has {len(body)} bytes where {at} are described")
    return Body(fields=fields, blobs=blobs)
