"""Archives as they arrive: decompressed in bounded memory, counted, and their digest known.

What an archive says of itself decides how much it takes from this machine, and it comes from
anybody: bytes, memory and the room on the disk are bounded while it is read.

Paper: §5.2.5 (container images become layers).
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import threading
import zlib
from typing import BinaryIO, cast

import zstandard

from fathom.sandbox.images.errors import ImageDamaged, ImageTooLarge, StoreFull

_PIECE = 1 << 20
# A file may ask for a dictionary of gigabytes; so large ones are enough for every common setting.
_ZSTD_WINDOW = 1 << 27
_XZ_MEMORY = 144 << 20


class Allowance:
    """How many bytes several archives may have together. Any thread may use it.

    `room`: how many the disk has to spare; fewer than `limit` may then be the bound.
    """

    def __init__(self, limit: int, room: int | None = None) -> None:
        self.limit = limit
        self._room = room
        self._left = limit
        self._spare = limit if room is None else room
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Take `size` bytes of it. Raises ImageTooLarge when they are not left, or StoreFull."""
        with self._lock:
            self._left -= size
            self._spare -= size
            if size >= 0 and self._left >= 0 and self._spare < 0:
                raise StoreFull(
                    f"the archive unpacks to more than the {self._room} bytes that the disk of "
                    "the store can spare: free some space, or use another folder"
                )
            if size < 0 or self._left < 0:
                raise ImageTooLarge(
                    f"the archive unpacks to more than {self.limit} bytes: it may be a bomb; raise "
                    "the limit if you trust it"
                )


class Reader(io.RawIOBase):
    """A stream of at most `limit` bytes, whose SHA-256 is known at its end."""

    def __init__(self, source: BinaryIO, limit: int | Allowance) -> None:
        self._source = source
        self._limit = Allowance(limit) if isinstance(limit, int) else limit
        self._hash = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes. Raises ImageTooLarge, ImageDamaged."""
        try:
            data = self._source.read(_PIECE if size < 0 else min(size, _PIECE))
        except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
            raise ImageDamaged(f"the archive cannot be decompressed: {error}") from error
        self.count += len(data)
        self._limit.take(len(data))
        self._hash.update(data)
        return data

    def drain(self) -> str:
        """Read the rest and return the digest of everything."""
        while self.read(_PIECE):
            pass
        return "sha256:" + self._hash.hexdigest()


class _Xz:
    """What an xz file holds, stream after stream, in bounded memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._stream: lzma.LZMADecompressor | None = None
        self._packed = b""

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes. Raises LZMAError, EOFError."""
        while self._stream is not None or self._begin():
            stream = cast("lzma.LZMADecompressor", self._stream)
            if stream.needs_input and not self._packed:
                self._packed = self._file.read(_PIECE)
                if not self._packed:
                    raise EOFError("it ends in the middle")
            data = stream.decompress(self._packed, size)
            self._packed = stream.unused_data
            if stream.eof:
                self._stream = None
            if data:
                return data
        return b""

    def _begin(self) -> bool:
        """Begin another stream, if there is one: zeros may lie before and after it."""
        while not (found := self._packed.lstrip(b"\0")):
            self._packed = self._file.read(_PIECE)
            if not self._packed:
                return False
        self._packed = found
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        return True


def decompress(file: BinaryIO) -> BinaryIO:
    """Return a stream of what `file` holds, compressed by gzip, zstd, xz, bzip2 or not at all."""
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast("BinaryIO", gzip.GzipFile(fileobj=file, mode="rb"))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        tool = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        return cast("BinaryIO", tool.stream_reader(file, read_across_frames=True))
    if head.startswith(b"\xfd7zXZ\0"):
        return cast("BinaryIO", _Xz(file))
    if head.startswith(b"BZh"):
        return cast("BinaryIO", bz2.BZ2File(file, "rb"))
    return file
