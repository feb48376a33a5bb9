"""Slabs, checkpoints and sessions in files: the records of memory, with a header and a checksum.

A file is written under another name and renamed, so it is there whole or not at all; whatever is
damaged all the same is found by its checksum, reported, removed and computed again. Every model
has a folder of its own below the cache's, named by model, formats and weights. When the size limit
is reached, the files used longest ago go first; pinned ones stay.

Paper: §3.5.2 (on-disk KV cache storage).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import struct
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

from fathom.errors import CacheError

_log = logging.getLogger(__name__)

MAGIC = b"fathomK1"
MARKER = "fathom-cache.json"
_MARKED = json.dumps({"format": MAGIC.decode(), "by": "fathom"}).encode() + b"\n"
_HEADER = struct.Struct("<8s8s16s16sQ")  # magic, kind, root, key, payload bytes
_SUM = 16


@dataclass(slots=True)
class _File:
    path: Path
    size: int
    pinned: bool
    parent: bytes | None  # of a state: the slab before it


class DiskCache:
    """Records of one model (`root`) below `folder`, at most `limit` bytes."""

    def __init__(self, folder: Path | str, root: bytes, limit: int) -> None:
        self.folder, self.root, self.limit = Path(folder), root, limit
        self.size, self.problems = 0, 0
        self._pinned = 0  # bytes
        self._own = self.folder / root.hex()
        self._files: OrderedDict[tuple[str, bytes], _File] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._states: Counter[bytes] = Counter()  # by parent
        try:
            self._open()
            self._index()
        except OSError as error:
            raise CacheError(
                f"the cache folder {self.folder} cannot be used: {error.strerror or error}"
            ) from error

    def _open(self) -> None:
        marker = self.folder / MARKER
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not marker.exists():
            if any(not path.name.startswith(".tmp-") for path in self.folder.iterdir()):
                raise CacheError(
                    f"{self.folder} holds other files and no {MARKER}: it is no cache of "
                    "fathom's; name an empty folder"
                )
            new = self.folder / f".tmp-{os.getpid()}"
            new.write_bytes(_MARKED)
            new.replace(marker)
        elif marker.read_bytes() != _MARKED:
            raise CacheError(
                f"{self.folder} was written by another version of fathom, or its {MARKER} is "
                "damaged: name another folder, or delete it"
            )
        self._own.mkdir(exist_ok=True)
        probe = self._own / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()

    def _index(self) -> None:
        found = []
        for entry in os.scandir(self._own):
            name = _parse(entry.name)
            with contextlib.suppress(OSError):
                if name is not None and stat.S_ISREG((about := entry.stat()).st_mode):
                    found.append((about.st_mtime_ns, about.st_size, name, Path(entry.path)))
                elif entry.name.startswith(".tmp-"):  # left behind by a process that died
                    Path(entry.path).unlink()
        for _, size, (kind, key, parent, pinned), path in sorted(found, key=lambda f: f[0]):
            if self.has(kind, key):  # pinned and not: a process died between
                path.unlink(missing_ok=True)
            else:
                self._add(kind, key, _File(path, size, pinned, parent))

    def has(self, kind: str, key: bytes) -> bool:
        """Whether there is a file of that name; only `read` says whether it is sound."""
        return (kind, key) in self._files

    def count(self, kind: str) -> int:
        """Files of one kind."""
        return self._counts[kind]

    def keys(self, kind: str) -> list[bytes]:
        """Names of one kind."""
        return [key for k, key in self._files if k == kind]

    def has_states_after(self, parent: bytes) -> bool:
        """Whether there is a checkpoint whose slabs end with `parent`."""
        return self._states[parent] > 0

    def read(self, kind: str, key: bytes) -> bytes | None:
        """The record of that name, or None: also when its file is damaged, which is reported."""
        file = self._files.get((kind, key))
        if file is None:
            return None
        try:
            data = file.path.read_bytes()
        except (OSError, MemoryError) as error:
            self._report(f"{file.path} cannot be read ({error!r}); its part is computed again")
            self._drop(kind, key)
            return None
        record = self._unpack(kind, key, data)
        if record is None:
            self._report(f"{file.path} is damaged: removed; its part is computed again")
            self.remove(kind, key)
            return None
        self._files.move_to_end((kind, key))
        with contextlib.suppress(OSError):
            os.utime(file.path)
        return record

    def write(self, kind: str, key: bytes, record: bytes, *, pin: bool = False) -> None:
        """Keep a record, in place of one of the same name.

        Raises CacheError when it cannot be written (the cache stays sound).
        """
        old = self._files.get((kind, key))
        pin = pin or (old is not None and old.pinned)
        parent = record[:16] if kind == "state" else None
        head = _HEADER.pack(MAGIC, kind.encode(), self.root, key, len(record))
        path = self._own / _format(kind, key, parent, pin)
        temporary = self._own / f".tmp-{os.getpid()}-{key.hex()}"
        size = len(head) + len(record) + _SUM
        self._make_room(size)
        try:
            with open(temporary, "wb", opener=_private) as file:
                file.write(head)
                file.write(record)
                file.write(_digest(head, record))
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self.problems += 1
            raise CacheError(f"{path} cannot be written: {error}") from error
        if self.has(kind, key):
            stale = self._files[kind, key].path
            self._drop(kind, key)
            if stale != path:
                stale.unlink(missing_ok=True)
        self._add(kind, key, _File(path, size, pin, parent))

    def write_if_possible(self, kind: str, key: bytes, record: bytes) -> None:
        """As `write` for what is not there yet; what cannot be written is reported and left out."""
        if self.has(kind, key):
            return
        try:
            self.write(kind, key, record)
        except CacheError as error:  # counted already
            _log.warning("event=cache_file_problem detail=%r", str(error))

    def remove(self, kind: str, key: bytes) -> None:
        """Delete a record, if it is there."""
        file = self._files.get((kind, key))
        if file is not None:
            with contextlib.suppress(OSError):
                file.path.unlink()
            self._drop(kind, key)

    def pin(self, kind: str, key: bytes, pinned: bool = True) -> None:
        """Protect a record, if it is there, from making room for others, or no longer.

        Raises CacheError when its file cannot be renamed.
        """
        file = self._files.get((kind, key))
        if file is None or file.pinned == pinned:
            return
        target = self._own / _format(kind, key, file.parent, pinned)
        try:
            file.path.replace(target)
        except FileNotFoundError:  # another process made room
            self._drop(kind, key)
            return
        except OSError as error:
            raise CacheError(f"{file.path} cannot be renamed: {error}") from error
        file.path, file.pinned = target, pinned
        self._pinned += file.size if pinned else -file.size

    def _unpack(self, kind: str, key: bytes, data: bytes) -> bytes | None:
        if len(data) < _HEADER.size + _SUM:
            return None
        head, record, digest = data[: _HEADER.size], data[_HEADER.size : -_SUM], data[-_SUM:]
        expected = (MAGIC, kind.encode().ljust(8, b"\0"), self.root, key, len(record))
        if _HEADER.unpack(head) != expected or _digest(head, record) != digest:
            return None
        return record

    def _make_room(self, size: int) -> None:
        if self.size + size <= self.limit:
            return
        if self._pinned + size > self.limit:
            raise CacheError(
                f"{self.folder} may hold {self.limit} bytes, and what is pinned leaves no room: "
                "forget sessions, or raise disk_bytes"
            )
        excess, oldest = self.size + size - self.limit, []
        for name, file in self._files.items():
            if excess <= 0:
                break
            if not file.pinned:
                oldest.append(name)
                excess -= file.size
        for kind, key in oldest:
            self.remove(kind, key)

    def _add(self, kind: str, key: bytes, file: _File) -> None:
        self._files[kind, key] = file
        self.size += file.size
        self._counts[kind] += 1
        self._pinned += file.size if file.pinned else 0
        if file.parent is not None:
            self._states[file.parent] += 1

    def _drop(self, kind: str, key: bytes) -> None:
        file = self._files.pop((kind, key))
        self.size -= file.size
        self._counts[kind] -= 1
        self._pinned -= file.size if file.pinned else 0
        if file.parent is not None:
            self._states[file.parent] -= 1
            if not self._states[file.parent]:
                del self._states[file.parent]

    def _report(self, what: str) -> None:
        self.problems += 1
        _log.warning("event=cache_file_problem detail=%r", what)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # it tells what was said


def _digest(head: bytes, record: bytes) -> bytes:
    digest = hashlib.blake2b(head, digest_size=_SUM)
    digest.update(record)
    return digest.digest()


def _format(kind: str, key: bytes, parent: bytes | None, pinned: bool) -> str:
    owner = f"-{parent.hex()}" if parent is not None else ""
    return f"{kind}-{key.hex()}{owner}" + (".pin" if pinned else "")


def _parse(name: str) -> tuple[str, bytes, bytes | None, bool] | None:
    """Kind, key, parent and whether it is pinned; None for a file that is not a record's."""
    stem = name.removesuffix(".pin")
    kind, *rest = stem.split("-")
    try:
        keys = [bytes.fromhex(part) for part in rest]
    except ValueError:
        return None
    if (kind, len(keys)) not in (("slab", 1), ("state", 2), ("session", 1)) or any(
        len(k) != 16 for k in keys
    ):
        return None
    return kind, keys[0], keys[1] if kind == "state" else None, stem != name
