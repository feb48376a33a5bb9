"""A machine's memory: kept as a sealed file in memory, mapped copy-on-write, saved page by page.

Every machine maps one such file privately, so that what it writes is its own and the file never
changes; copies of one moment share it. The seal holds against the emulator too: one that was taken
over cannot write into the memory of others. What a machine wrote since is found in the page table
(Linux admin-guide/mm/pagemap, memfd_create(2) and fcntl(2) for the seals).

Paper: §5.2.5 (memory snapshots of virtual machines).
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fathom.errors import SandboxError

NAME = "fathom-memory"
_PAGE = 4096
_PIECE = 4 << 20
_PRESENT, _SWAPPED, _OF_A_FILE = 1 << 63, 1 << 62, 1 << 61
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # no more seals, no shrinking, no growing, no writing


def create(size: int) -> int:
    """Return a descriptor of an empty file in memory of `size` bytes. Raises OSError."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def seal(fd: int) -> None:
    """Let nobody change the file any more. Raises OSError."""
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    # The machine's own user must be able to open it; writing is what the seal refuses.
    os.fchmod(fd, 0o666)


def hold_bytes(data: bytes) -> int:
    """Return a descriptor of a file in memory with `data`, read from its beginning."""
    fd = create(0)
    with open(os.dup(fd), "wb") as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def copy_sparse(source: int, target: int, size: int) -> None:
    """Copy what is not a hole. `target` must be empty. Raises OSError."""
    for start, end in _data(source, size):
        at = start
        while at < end:
            done = 0
            with contextlib.suppress(OSError):
                done = os.copy_file_range(source, target, end - at, at, at)
            if done == 0:
                piece = os.pread(source, min(_PIECE, end - at), at)
                if not piece:
                    raise SandboxError("a memory file ended too early")
                done = os.pwrite(target, piece, at)
            at += done
    os.ftruncate(target, size)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        yield start, end
        at = end


def data_pages(fd: int, size: int) -> list[tuple[int, int]]:
    """Return runs (first page, count) of the pages of a file that were ever written."""
    return [(start // _PAGE, (end - start + _PAGE - 1) // _PAGE) for start, end in _data(fd, size)]


def pieces(fd: int, runs: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Give the contents of runs of pages, one after the other. Raises OSError, SandboxError."""
    for first, count in runs:
        at, end = first * _PAGE, (first + count) * _PAGE
        while at < end:
            piece = os.pread(fd, min(_PIECE, end - at), at)
            if not piece:
                raise SandboxError("a memory file ended too early")
            yield piece
            at += len(piece)


def save(pid: int, base: int, target: int, size: int) -> list[tuple[int, int]]:
    """Write the memory of a stopped machine to `target`, which is empty.

    `base`: the file that it maps. Returns runs (first page, count) of what is its own, in the order
    of their place in the file. Raises OSError, SandboxError.
    """
    copy_sparse(base, target, size)
    own: list[tuple[int, int]] = []
    with (
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as table,
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
    ):
        for start, length, offset in _mappings(pid):
            for first, count in _own_pages(table, start, length):
                own.append((offset // _PAGE + first, count))
                at, left = first * _PAGE, count * _PAGE
                while left:
                    memory.seek(start + at)
                    piece = memory.read(min(left, _PIECE))
                    if not piece:
                        raise SandboxError("the machine's memory cannot be read")
                    os.pwrite(target, piece, offset + at)
                    at += len(piece)
                    left -= len(piece)
    return sorted(own)


def _mappings(pid: int) -> list[tuple[int, int, int]]:
    """Return (address, length, offset in the file) of every piece of the machine's memory."""
    found: list[tuple[int, int, int]] = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        match = re.match(rf"(\w+)-(\w+) \S+ (\w+) \S+ \d+ +/memfd:{NAME} \(deleted\)$", line)
        if match:
            start, end, offset = (int(value, 16) for value in match.groups())
            found.append((start, end - start, offset))
    if not found:
        raise SandboxError("the machine's memory is not where it should be")
    return found


def _own_pages(table: object, start: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield runs (first page, count) of pages that are the machine's own, not the file's."""
    table.seek(start // _PAGE * 8)  # type: ignore[attr-defined]
    entries = array.array("Q")
    entries.frombytes(table.read(length // _PAGE * 8))  # type: ignore[attr-defined]
    first = -1
    for number, entry in enumerate(entries):
        own = (entry & _PRESENT and not entry & _OF_A_FILE) or entry & _SWAPPED
        if own and first < 0:
            first = number
        elif not own and first >= 0:
            yield first, number - first
            first = -1
    if first >= 0:
        yield first, len(entries) - first
