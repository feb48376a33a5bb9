"""Which files an operation changed, seen from outside of the sandbox.

The folders that a tenant may write to are walked before and after each operation; what differs in
kind, size, inode or time of change is a change. Only names and numbers are read, through folders
that are opened without following links, so nothing that a tenant planted leads anywhere else. What
changes between two operations was done by something left in the background. Where operations run at
the same time, each sees the changes of all.

Paper: §5.2.5 (provenance: which command changed which file).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fathom.sandbox import state

if TYPE_CHECKING:
    from fathom.sandbox.sandbox import Sandbox

FOLDERS = ("/work", "/tmp")
# Beyond these a walk costs more than it tells; the receipt then says that nobody looked.
MOST_FILES = 20_000
MOST_LISTED = 1_000

Signature = tuple[int, int, int, int]
Seen = dict[str, Signature]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A file or folder of a sandbox that is new, changed or gone. `size` is what it has now."""

    path: str
    what: Literal["added", "changed", "removed"]
    size: int = 0

    def to_json(self) -> list[Any]:
        """As a receipt holds it."""
        return [self.path, self.what, self.size]


def changes_from_json(value: list[list[Any]]) -> tuple[Change, ...]:
    """What `Change.to_json` wrote, for each."""
    return tuple(Change(path=path, what=what, size=size) for path, what, size in value)


def look(root: Path) -> Seen | None:
    """What lies in the writable folders below `root`; None when that cannot be told."""
    seen: Seen = {}
    try:
        for folder in FOLDERS:
            for path, found in _walk(f"{root}{folder}", folder):
                seen[path] = found
                if len(seen) > MOST_FILES:
                    return None
    except (OSError, RecursionError):  # folders lie too deep in one another, say
        return None
    return seen


def _walk(where: str, shown: str) -> Iterator[tuple[str, Signature]]:
    if not os.path.isdir(where):
        return
    for base, folders, files, fd in os.fwalk(where, follow_symlinks=False):
        prefix = shown + base[len(where) :]
        for name in [*folders, *files]:
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue  # it went away meanwhile
            # A name may hold any bytes; a record holds text.
            path = f"{prefix}/{name}".encode(errors="surrogateescape").decode(errors="replace")
            if stat.S_ISDIR(found.st_mode):
                # A folder changes with every file in it, which is listed itself.
                yield path, (stat.S_IFDIR, 0, 0, 0)
            else:
                kind = stat.S_IFMT(found.st_mode)
                yield path, (kind, found.st_size, found.st_ino, found.st_ctime_ns)


def difference(before: Mapping[str, Signature], after: Mapping[str, Signature]) -> list[Change]:
    """What changed from one look to the next, by path; at most `MOST_LISTED`."""
    found: list[Change] = []
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        if new is None:
            found.append(Change(path=path, what="removed"))
        else:
            what = "added" if old is None else "changed"
            found.append(Change(path=path, what=what, size=new[1]))
        if len(found) == MOST_LISTED:
            break
    return found


class Watcher:
    """Keeps the last look at the sandbox whose file system begins at `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._last = look(root)

    def changes(self) -> list[Change] | None:
        """What changed since the last call; None when nobody can tell."""
        before, self._last = self._last, look(self._root)
        if before is None or self._last is None:
            return None
        return difference(before, self._last)


def watch(runtime: Path, sandbox: Sandbox) -> Watcher | None:
    """A watcher of a sandbox whose folder is in `runtime`; None where its files cannot be seen."""
    if sandbox.caps.accelerator:
        return None  # the emulator's files are not the guest's
    pid = state.first_process(runtime / sandbox.id)
    root = None if pid is None else Path(f"/proc/{pid}/root")
    try:
        return Watcher(root) if root is not None and (root / "work").is_dir() else None
    except OSError:
        return None
