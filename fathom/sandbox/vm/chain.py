"""Saved machines on disk, each beside the one it grew from: what a folder holds, and its proof.

    facts.json      what it is, the SHA-256 of every other file, and its parent by path and digest
    memory, pages   the pages that differ from the parent's memory, and which ones they are
    disk-N.qcow2    disks that the parent has not, the lowest first; each lies on the one before
    state, video    of the devices, whole

A machine that began from a saved one keeps only what changed since, so a chain of snapshots takes
the room of its changes. The digest of a folder is that of its facts, which names all its files and
its parent's digest: one word proves the whole chain.

Paper: §5.2.5 (incremental snapshots of virtual machines).
"""

from __future__ import annotations

import array
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import SandboxError, SnapshotDamaged, SnapshotMissing

FACTS, MEMORY, PAGES, STATE, VIDEO = "facts.json", "memory", "pages", "state", "video"
# A longer one would make every start read as many files.
LONGEST = 64
PAGE = 4096
_PIECE = 4 << 20

Run = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The saved machine that another one grew from.

    `disks`: how many of the machine's disks it has, from the lowest on; `pages`: runs (first,
    count) of memory that changed between it and the file that the machine maps.
    """

    folder: Path
    digest: str
    disks: int = 0
    pages: tuple[Run, ...] = ()

    def is_there(self) -> bool:
        """Whether the folder still is what it was."""
        try:
            return digest_of(self.folder) == self.digest
        except SandboxError:
            return False

    def as_json(self) -> dict[str, Any]:
        """Return the values in the form that `origin_in` takes after JSON."""
        return {
            "folder": str(self.folder),
            "digest": self.digest,
            "disks": self.disks,
            "pages": self.pages,
        }


def origin_in(values: dict[str, Any] | None) -> Origin | None:
    """Read an origin from JSON. Raises ValueError, KeyError, TypeError."""
    if values is None:
        return None
    pages = tuple((int(first), int(count)) for first, count in values["pages"])
    folder, disks = Path(values["folder"]), int(values["disks"])
    return Origin(folder=folder, digest=str(values["digest"]), disks=disks, pages=pages)


def disk_name(number: int) -> str:
    """The file of a folder's own disk; its lowest has the number 0."""
    return f"disk-{number}.qcow2"


def digest_of(folder: Path) -> str:
    """Return the digest of a folder, which is that of its facts. Raises SnapshotMissing."""
    try:
        return hashlib.sha256((folder / FACTS).read_bytes()).hexdigest()
    except OSError as error:
        raise SnapshotMissing(
            f"the saved machine {folder.name} is not there ({error.strerror}): restore another one"
        ) from error


def facts_of(folder: Path) -> dict[str, Any]:
    """Read the facts of a folder. Raises SnapshotMissing, SnapshotDamaged."""
    try:
        facts = json.loads((folder / FACTS).read_text())
        _check_shape(facts)
        return facts
    except OSError as error:
        raise SnapshotMissing(
            f"the saved machine {folder.name} is not there ({error.strerror}): restore another one"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotDamaged(f"the facts of {folder.name} are damaged: {error}") from error


def _check_shape(facts: Any) -> None:
    parent = facts["parent"]
    if parent is not None and not all(isinstance(parent[name], str) for name in ("path", "digest")):
        raise ValueError("they name no parent")
    for name, (size, digest) in facts["files"].items():
        if "/" in name or size < 0 or len(digest) != 64:
            raise ValueError("they name no files")


def lineage(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return a saved machine and all that it grew from, the oldest first.

    Raises SnapshotMissing, SnapshotDamaged.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    at = folder
    while True:
        facts = facts_of(at)
        found.insert(0, (at, facts))
        parent = facts["parent"]
        if parent is None:
            return found
        if len(found) == LONGEST:
            raise SnapshotDamaged(f"{folder.name} has more than {LONGEST} ancestors")
        below = Path(os.path.normpath(at.parent / parent["path"]))
        try:
            digest = digest_of(below)
        except SnapshotMissing as error:
            raise SnapshotMissing(
                f"{at.name} grew from {below.name}, which is not there any more: it cannot be used"
            ) from error
        if digest != parent["digest"]:
            raise SnapshotDamaged(f"{at.name} grew from another {below.name} than is there now")
        at = below


def check(folder: Path) -> int:
    """Read every byte of a saved machine and of all that it grew from; return how many.

    Raises SnapshotMissing, SnapshotDamaged.
    """
    total = 0
    for at, facts in lineage(folder):
        for name in facts["files"]:
            with File(at, facts, name) as file:
                total += sum(len(piece) for piece in file.pieces())
    return total


class File:
    """A file of a saved machine, read from its beginning to its end and proven there."""

    def __init__(self, folder: Path, facts: dict[str, Any], name: str) -> None:
        self._what = f"{folder.name}/{name}"
        try:
            self._size, self._digest = facts["files"][name]
            self.fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (OSError, KeyError) as error:
            raise SnapshotMissing(f"{self._what} is not there: restore another one") from error
        self._hash = hashlib.sha256()
        self._left = self._size
        if os.fstat(self.fd).st_size != self._size:
            os.close(self.fd)
            raise SnapshotDamaged(f"{self._what} has another size than was written")

    def __enter__(self) -> File:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        os.close(self.fd)
        if kind is None and (self._left or self._hash.hexdigest() != self._digest):
            raise SnapshotDamaged(f"{self._what} is not what was written")

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes. Raises SnapshotDamaged."""
        data = os.read(self.fd, size)
        while data and len(data) < size:
            more = os.read(self.fd, size - len(data))
            if not more:
                break
            data += more
        if len(data) < size:
            raise SnapshotDamaged(f"{self._what} ended too early")
        self._hash.update(data)
        self._left -= size
        return data

    def pieces(self) -> Iterator[bytes]:
        """Give all that is left."""
        while self._left:
            yield self.take(min(_PIECE, self._left))


class Writer:
    """Writes the files of a folder and notes their digests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[str, tuple[int, str]] = {}

    def write(self, name: str, pieces: Iterator[bytes]) -> None:
        """Write one file. Raises OSError."""
        digest, size = hashlib.sha256(), 0
        fd = os.open(
            self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        with open(fd, "wb", buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]
                digest.update(piece)
                size += len(piece)
        self.files[name] = size, digest.hexdigest()

    def finish(self, facts: dict[str, Any]) -> int:
        """Write the facts, which name all other files; return the bytes taken. Raises OSError."""
        path = self._folder / FACTS
        path.touch(mode=0o600)
        path.write_text(json.dumps({**facts, "files": self.files}))
        return sum(one.stat().st_blocks * 512 for one in self._folder.iterdir())


def pages_out(runs: Sequence[Run]) -> bytes:
    """Return runs of pages as bytes."""
    return array.array("Q", [number for run in runs for number in run]).tobytes()


def pages_in(data: bytes, size: int) -> list[Run]:
    """Read runs of pages of a memory of `size` bytes. Raises SnapshotDamaged."""
    numbers = array.array("Q")
    try:
        numbers.frombytes(data)
        runs = list(zip(numbers[::2], numbers[1::2], strict=True))
    except ValueError as error:
        raise SnapshotDamaged(f"the pages of a saved machine are damaged: {error}") from error
    last = 0
    for first, count in runs:
        if first < last or count == 0 or (first + count) * PAGE > size:
            raise SnapshotDamaged("the pages of a saved machine are out of order")
        last = first + count
    return runs


def merged(one: Sequence[Run], other: Sequence[Run]) -> tuple[Run, ...]:
    """Return the pages that are in either, as runs in order that do not touch."""
    found: list[Run] = []
    for first, count in sorted([*one, *other]):
        if found and first <= found[-1][0] + found[-1][1]:
            begin = found[-1][0]
            found[-1] = begin, max(found[-1][1], first + count - begin)
        else:
            found.append((first, count))
    return tuple(found)
