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
_HASH = 32


def digest_of(data: bytes) -> str:
    """Return the digest of `data` as text."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def name_of(size: int, digests: bytes) -> str:
    """Return the digest that names a blob of `size` bytes whose chunks have these digests."""
    head = f"fathom data blob 1\n{size}\n{CHUNK}\n".encode()
    return "sha256:" + hashlib.sha256(head + digests).hexdigest()


class BlobWriter:
    """Appends files to a data blob, each at a whole block, and hashes what is written.

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

    def add(self, pieces: Iterable[bytes], size: int) -> int:
        """Append the file `pieces` of `size` bytes, or find an equal one. Returns its offset."""
        self.short = False
        if size <= _SHARED:
            content = b"".join(pieces)
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
                got += len(piece)
                self._write(piece)
            self.short = got != size
            self._write(bytes(-self.total % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.total += len(data)
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
