"""Slabs and checkpoints in files: the same records as in memory, each with a header and a checksum.

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
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from fathom.errors import CacheError

_log = logging.getLogger(__name__)

MAGIC = b"fathomK1"
MARKER = "fathom-cache.json"
_HEADER = struct.Struct("<8s8s16s16sQ")  # magic, kind, root, key, payload bytes
_SUM = 16


@dataclass(slots=True)
class _File:
    path: Path
    size: int
    pinned: bool


class DiskCache:
    """Records of one model (`root`) below `folder`, at most `limit` bytes."""

    def __init__(self, folder: Path | str, root: bytes, limit: int) -> None:
        self.folder, self.root, self.limit = Path(folder), root, limit
        self.size, self.problems, self.writable = 0, 0, True
        self._files: OrderedDict[tuple[str, bytes], _File] = OrderedDict()
        self._children: dict[bytes, set[bytes]] = {}
        self._open()

    def _open(self) -> None:
        marker = self.folder / MARKER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                if any(self.folder.iterdir()):
                    raise CacheError(
                        f"{self.folder} holds other files and no {MARKER}: it is no cache of "
                        "fathom's; name an empty folder"
                    )
                marker.write_text(json.dumps({"format": MAGIC.decode(), "by": "fathom"}) + "\n")
            elif json.loads(marker.read_text()).get("format") != MAGIC.decode():
                raise CacheError(
                    f"{self.folder} was written by another version of fathom: name another folder, "
                    "or delete it"
                )
            self._own.mkdir(exist_ok=True)
            probe = self._own / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except (OSError, ValueError, AttributeError) as error:
            raise CacheError(f"the cache folder {self.folder} cannot be used: {error}") from error
        found = []
        for path in self._own.iterdir():
            name = _parse(path.name)
            if name is None:
                if path.name.startswith(".tmp-"):  # left behind by a process that died
                    with contextlib.suppress(OSError):
                        path.unlink()
                continue
            with contextlib.suppress(OSError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, name, path))
        for _, size, (kind, key, parent, pinned), path in sorted(found, key=lambda f: f[0]):
            self._add(kind, key, parent, _File(path, size, pinned))

    @property
    def _own(self) -> Path:
        return self.folder / self.root.hex()

    def has(self, kind: str, key: bytes) -> bool:
        """Whether there is a file of that name; only `read` says whether it is sound."""
        return (kind, key) in self._files

    def count(self, kind: str) -> int:
        """Files of one kind."""
        return sum(1 for k, _ in self._files if k == kind)

    def children(self, parent: bytes) -> set[bytes]:
        """Names of the checkpoints whose slabs end with `parent`."""
        return self._children.get(parent, set())

    def read(self, kind: str, key: bytes) -> bytes | None:
        """The record of that name, or None: also when its file is damaged, which is reported."""
        file = self._files.get((kind, key))
        if file is None:
            return None
        try:
            data = file.path.read_bytes()
        except OSError as error:
            self._report(f"{file.path} cannot be read ({error}); its part is computed again")
            self._drop(kind, key)
            return None
        record = self._unpack(kind, key, data)
        if record is None:
            self._report(f"{file.path} is damaged: removed; its part is computed again")
            self._remove(kind, key)
            return None
        self._files.move_to_end((kind, key))
        with contextlib.suppress(OSError):
            os.utime(file.path)
        return record

    def write(self, kind: str, key: bytes, record: bytes, *, pin: bool = False) -> None:
        """Keep a record. Raises CacheError when it cannot be written (the cache stays sound)."""
        if self.has(kind, key):
            if pin:
                self.pin(kind, key)
            return
        parent = record[:16] if kind == "state" else None
        head = _HEADER.pack(MAGIC, kind.encode(), self.root, key, len(record))
        path = self._own / _format(kind, key, parent, pin)
        temporary = self._own / f".tmp-{os.getpid()}-{key.hex()}"
        size = len(head) + len(record) + _SUM
        self._make_room(size)
        try:
            with temporary.open("wb") as file:
                file.write(head)
                file.write(record)
                file.write(_digest(head, record))
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise CacheError(f"{path} cannot be written: {error}") from error
        self._add(kind, key, parent, _File(path, size, pin))

    def write_if_possible(self, kind: str, key: bytes, record: bytes) -> None:
        """As `write`; what cannot be written is reported and left out."""
        try:
            self.write(kind, key, record)
        except CacheError as error:
            self._report(str(error))

    def remove(self, kind: str, key: bytes) -> None:
        """Delete a record, if it is there."""
        if self.has(kind, key):
            self._remove(kind, key)

    def pin(self, kind: str, key: bytes, pinned: bool = True) -> None:
        """Protect a record from making room for others, or no longer."""
        file = self._files.get((kind, key))
        if file is None or file.pinned == pinned:
            return
        stem = file.path.name.removesuffix(".pin")
        target = file.path.with_name(stem + ".pin" if pinned else stem)
        try:
            file.path.replace(target)
        except OSError as error:
            raise CacheError(f"{file.path} cannot be renamed: {error}") from error
        file.path, file.pinned = target, pinned

    def _unpack(self, kind: str, key: bytes, data: bytes) -> bytes | None:
        if len(data) < _HEADER.size + _SUM:
            return None
        head, record, digest = data[: _HEADER.size], data[_HEADER.size : -_SUM], data[-_SUM:]
        expected = (MAGIC, kind.encode().ljust(8, b"\0"), self.root, key, len(record))
        if _HEADER.unpack(head) != expected or _digest(head, record) != digest:
            return None
        return record

    def _make_room(self, size: int) -> None:
        for kind, key in list(self._files):
            if self.size + size <= self.limit:
                return
            if not self._files[kind, key].pinned:
                self._remove(kind, key)
        if self.size + size > self.limit:
            raise CacheError(
                f"{self.folder} may hold {self.limit} bytes, and what is pinned leaves no room"
            )

    def _add(self, kind: str, key: bytes, parent: bytes | None, file: _File) -> None:
        self._files[kind, key] = file
        self.size += file.size
        if parent is not None:
            self._children.setdefault(parent, set()).add(key)

    def _remove(self, kind: str, key: bytes) -> None:
        with contextlib.suppress(OSError):
            self._files[kind, key].path.unlink()
        self._drop(kind, key)

    def _drop(self, kind: str, key: bytes) -> None:
        self.size -= self._files.pop((kind, key)).size
        for children in self._children.values():
            children.discard(key)

    def _report(self, what: str) -> None:
        self.problems += 1
        _log.warning("event=cache_file_problem detail=%r", what)


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
    if (kind, len(keys)) not in (("slab", 1), ("state", 2), ("tokens", 1)) or any(
        len(k) != 16 for k in keys
    ):
        return None
    return kind, keys[0], keys[1] if kind == "state" else None, stem != name
