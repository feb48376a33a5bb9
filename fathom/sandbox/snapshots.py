"""The snapshots on this machine: what there is, whether it is whole, and what can go.

A snapshot of a virtual machine holds what changed since the one that the machine began from, so one
that others grew from stays for as long as they do, even where nobody wants it by itself any more.

Paper: §5.2.5 (incremental snapshots).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import SnapshotMissing
from fathom.sandbox import paths

FACTS, DROPPED = "facts.json", "dropped"
_LOCK = "snapshots.lock"
_ABANDONED = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One snapshot. `size`: bytes of its own; `parent`: what it grew from, a template or another.

    `dropped`: nobody wants it by itself, and it is here because others grew from it.
    """

    id: str
    substrate: str
    size: int
    made: float
    parent: str | None = None
    dropped: bool = False


class Snapshots:
    """The snapshots below a cache folder, the user's own where none is given."""

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache or paths.cache_folder()
        self.folder = self.cache / "snapshots"
        self.templates = self.cache / "vm" / "templates"

    def list(self) -> list[Kept]:
        """Every snapshot, the oldest first."""
        found = [self._look(path) for path in _whole(self.folder)]
        return sorted(found, key=lambda one: one.made)

    def _look(self, path: Path) -> Kept:
        facts = _facts(path)
        parent = facts.get("parent")
        return Kept(
            id=path.name,
            substrate=str(facts.get("substrate", "damaged")),
            size=sum(one.lstat().st_blocks * 512 for one in path.rglob("*")),
            made=path.stat().st_mtime,
            parent=Path(parent["path"]).name if parent else None,
            dropped=(path / DROPPED).exists(),
        )

    def path(self, id_: str) -> Path:
        """The folder of a snapshot. Raises SnapshotMissing."""
        path = self.folder / id_
        if "/" in id_ or not (path / FACTS).is_file() or (path / DROPPED).exists():
            raise SnapshotMissing(f"there is no snapshot {id_[:80]!r} in {self.folder}")
        return path

    def check(self, id_: str) -> int:
        """Read every byte of a snapshot and of what it grew from; return how many.

        Raises SnapshotMissing, SnapshotDamaged.
        """
        from fathom.sandbox.vm import chain

        path = self.path(id_)
        if "files" not in _facts(path):
            # Of a container: plain files, which nothing was noted of.
            return sum(one.lstat().st_size for one in path.rglob("*") if one.is_file())
        return chain.check(path)

    def drop(self, id_: str) -> list[str]:
        """Give a snapshot up, and remove it and what was kept for it where nothing grew from it.

        Returns the names of what was removed. Raises SnapshotMissing.
        """
        (self.path(id_) / DROPPED).touch()
        return self.collect()

    def collect(self) -> list[str]:
        """Remove what nobody wants and nothing grew from; return the names of it."""
        removed: list[str] = []
        with self.lock(exclusive=True):
            while rubbish := self._rubbish():
                for path in rubbish:
                    # Not half a snapshot at any moment: without its facts it is none.
                    (path / FACTS).unlink(missing_ok=True)
                    shutil.rmtree(path, ignore_errors=True)
                removed += [path.name for path in rubbish]
            _remove_abandoned(self.folder)
        return removed

    def _rubbish(self) -> list[Path]:
        needed = self.needed()
        return [
            path
            for path in _whole(self.folder)
            if (path / DROPPED).exists() and path.resolve() not in needed
        ]

    def needed(self) -> set[Path]:
        """The folders that a snapshot or a template grew from. Call it with the lock held."""
        found: set[Path] = set()
        for path in (*_whole(self.folder), *_whole(self.templates)):
            if parent := _facts(path).get("parent"):
                found.add((path.parent / parent["path"]).resolve())
        return found

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool) -> Generator[None]:
        """Hold the lock: shared while something is saved, exclusive while something is removed."""
        self.cache.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.cache / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)


def _whole(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if not path.name.startswith("."))
    return [path for path in found if (path / FACTS).is_file()]


def _facts(path: Path) -> dict[str, Any]:
    """The facts of a snapshot; none where they cannot be read, which `check` says."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        found: Any = json.loads((path / FACTS).read_text())
        parent = found.get("parent")
        if parent is None or isinstance(parent["path"], str):
            return found
    return {}


def _remove_abandoned(folder: Path) -> None:
    """Remove what a killed process left half-made."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
