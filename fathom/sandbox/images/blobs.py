"""Data blobs: the contents of a layer's files in one run of blocks, named by a tree of digests.

A blob is cut into chunks of 256 KiB. Its list of digests has one SHA-256 for each; the blob's own
name is the SHA-256 of its size and that list. So any chunk that was fetched alone can be proven to
belong to the blob, and whoever has the list has the name.

Paper: none (the report reads its layers in chunks of this size).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from fathom.sandbox.images.errors import ImageDamaged

BLOCK = 4096
CHUNK = 256 << 10
# Files up to this size are kept once when several are equal.
_SHARED = 1 << 20
# Zeros in runs of this size are holes of the file that is written.
_RUN = 64 << 10
_ZEROS = bytes(CHUNK)
_ZERO_CHUNK = hashlib.sha256(_ZEROS).digest()
_HASH = 32


def digest_of(data: bytes) -> str:
    """Return the digest of `data` as text."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def name_of(size: int, digests: bytes) -> str:
    """Return the digest that names a blob of `size` bytes whose chunks have these digests."""
    head = f"fathom data blob 1\n{size}\n{CHUNK}\n".encode()
    return "sha256:" + hashlib.sha256(head + digests).hexdigest()


def write_sparsely(file: BinaryIO, data: bytes) -> None:
    """Write `data` to a new file, its long runs of zeros as holes; `end_sparsely` must follow."""
    for at in range(0, len(data), _RUN):
        part = data[at : at + _RUN]
        if part == _ZEROS[: len(part)]:
            file.seek(len(part), os.SEEK_CUR)
        else:
            file.write(part)


def end_sparsely(file: BinaryIO) -> None:
    """Give a file that was written so its length, which a hole at its end did not."""
    file.flush()
    file.truncate(file.tell())


class BlobWriter:
    """Appends files to a data blob, each at a whole block, and hashes what is written.

    Long runs of zeros, and holes that are given as such, take no room on the disk.
    `add` returns where a file begins. Equal small files get one place. `short` tells whether the
    last file brought fewer bytes than announced; `total` is the number of bytes so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digests = bytearray()
        self._chunk = hashlib.sha256()
        self._filled = 0
        self._known: dict[bytes, int] = {}
        self.total = 0
        self.short = False

    def add(self, pieces: Iterable[bytes | int], size: int) -> int:
        """Append the file `pieces` of `size` bytes, or find an equal one. Returns its offset.

        A number among the pieces is a hole of so many bytes.
        """
        self.short = False
        if size <= _SHARED:
            content = b"".join(bytes(p) if isinstance(p, int) else p for p in pieces)
            self.short = len(content) != size
            key = hashlib.sha256(content).digest()
            if key in self._known:
                return self._known[key]
            offset = self.total
            self._known[key] = offset
            self._write(content + bytes(-len(content) % BLOCK))
        else:
            offset = self.total
            got = 0
            for piece in pieces:
                if isinstance(piece, int):
                    got += piece
                    self._skip(piece)
                else:
                    got += len(piece)
                    self._write(piece)
            self.short = got != size
            self._write(bytes(-self.total % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        for at in range(0, len(data), _RUN):
            part = data[at : at + _RUN]
            if len(part) == _RUN and part == _ZEROS[:_RUN]:
                self._skip(_RUN)
            else:
                self._file.write(part)
                self.total += len(part)
                self._hash(part)

    def _skip(self, size: int) -> None:
        """Leave a hole of `size` bytes, which reads as zeros."""
        self.total += size
        self._file.flush()
        self._file.truncate(self.total)
        self._file.seek(self.total)
        while size:
            if not self._filled and size >= CHUNK:
                count = size // CHUNK
                self._digests += _ZERO_CHUNK * count
                size -= count * CHUNK
            else:
                part = min(size, CHUNK - self._filled)
                self._hash(_ZEROS[:part])
                size -= part

    def _hash(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            part = view[: CHUNK - self._filled]
            self._chunk.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == CHUNK:
                self._digests += self._chunk.digest()
                self._chunk, self._filled = hashlib.sha256(), 0

    def finish(self) -> tuple[str, bytes]:
        """Return the blob's name and its list of digests."""
        if self._filled:
            self._digests += self._chunk.digest()
            self._chunk, self._filled = hashlib.sha256(), 0
        digests = bytes(self._digests)
        return name_of(self.total, digests), digests


class ChunkList:
    """The digests of a blob's chunks, proven to belong to its name."""

    def __init__(self, name: str, size: int, digests: bytes) -> None:
        if name_of(size, digests) != name or len(digests) != _HASH * -(-size // CHUNK):
            raise ImageDamaged(f"the list of digests does not belong to the blob {name}")
        self.name = name
        self.size = size
        self._digests = digests

    def __len__(self) -> int:
        return len(self._digests) // _HASH

    def length(self, number: int) -> int:
        """Return how many bytes chunk `number` has."""
        return min(CHUNK, self.size - number * CHUNK)

    def matches(self, number: int, data: bytes) -> bool:
        """Tell whether `data` is chunk `number`."""
        expected = self._digests[number * _HASH : (number + 1) * _HASH]
        return len(data) == self.length(number) and hashlib.sha256(data).digest() == expected

    def damaged(self, path: Path) -> list[int]:
        """Return the chunks of the file at `path` that do not match. Raises OSError."""
        found: list[int] = []
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for number in range(len(self)):
                if not self.matches(number, file.read(self.length(number))):
                    found.append(number)
        if size != self.size and len(self) and len(self) - 1 not in found:
            found.append(len(self) - 1)
        return found
