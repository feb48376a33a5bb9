"""Machines that were saved: their memory, their devices, their disks; in memory or in a folder.

Paper: §5.2.5 (memory snapshots of virtual machines).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fathom.errors import SandboxError, SnapshotDamaged
from fathom.sandbox.vm import chain, memory
from fathom.sandbox.vm.chain import MEMORY, PAGES, STATE, VIDEO, File, Origin, Writer, disk_name

STATE_LIMIT = 64 << 20
# Of the folder and of what the emulator is told: a machine saved by another version is no template.
FORMAT = 3
_MOST_HELD = 4


@dataclass(slots=True, kw_only=True)
class Saved:
    """A machine of one moment. `memory`, `disks`: descriptors; the disks lie on one another, the
    lowest first, and never change.

    `state`: of its devices. `secret`: what its agent wants to hear. `video`: the screen's memory.
    `online`: whether the guest's network device was on. `origin`: what of it lies in a folder.
    """

    memory: int
    size: int
    state: bytes
    secret: bytes
    disks: tuple[int, ...] = ()
    video: bytes = b""
    online: bool = False
    origin: Origin | None = None

    def close(self) -> None:
        """Close the files. Machines that began from it keep theirs."""
        for fd in (self.memory, *self.disks):
            if fd >= 0:
                os.close(fd)
        self.memory, self.disks = -1, ()

    def lease(self) -> Saved:
        """Return the same with files of its own, the caller's to close."""
        return replace(self, memory=os.dup(self.memory), disks=tuple(map(os.dup, self.disks)))

    def write(self, folder: Path, facts: dict[str, Any]) -> int:
        """Keep it in `folder`, which exists and is the owner's alone; return the bytes taken.

        Only what its origin has not is written, all of it where that is gone. Raises OSError.
        """
        origin = self.origin if self.origin is not None and self.origin.is_there() else None
        writer = Writer(folder)
        if origin is None:
            pages, below = memory.data_pages(self.memory, self.size), 0
        else:
            pages, below = list(origin.pages), origin.disks
        writer.write(PAGES, iter([chain.pages_out(pages)]))
        writer.write(MEMORY, memory.pieces(self.memory, pages))
        writer.write(STATE, iter([self.state]))
        writer.write(VIDEO, iter([self.video]))
        own = self.disks[below:]
        for number, disk in enumerate(own):
            writer.write(disk_name(number), _whole(disk))
        parent = None
        if origin is not None:
            path = os.path.relpath(origin.folder, folder.parent)
            parent = {"path": path, "digest": origin.digest}
        return writer.finish(
            {
                **facts,
                "secret": self.secret.hex(),
                "memory": self.size,
                "online": self.online,
                "disks": len(own),
                "parent": parent,
            }
        )


def _whole(fd: int) -> Iterator[bytes]:
    at = 0
    while piece := os.pread(fd, 4 << 20, at):
        yield piece
        at += len(piece)


def read(folder: Path) -> Saved:
    """Take a saved machine, and all that it grew from, into memory.

    Raises SnapshotMissing, SnapshotDamaged, OSError.
    """
    links = chain.lineage(folder)
    opened: list[int] = []
    try:
        facts = links[-1][1]
        size, secret = int(facts["memory"]), bytes.fromhex(facts["secret"])
        opened.append(memory.create(size))
        disks: list[int] = []
        for at, known in links:
            if int(known["memory"]) != size:
                raise SnapshotDamaged(f"{at.name} is of another size than what grew from it")
            _take_memory(at, known, opened[0], size)
            for number in range(int(known["disks"])):
                with File(at, known, disk_name(number)) as file:
                    opened.append(os.dup(file.fd))
                    disks.append(opened[-1])
                    for _ in file.pieces():
                        pass
        memory.seal(opened[0])
        with File(folder, facts, STATE) as file:
            state = b"".join(file.pieces())
        with File(folder, facts, VIDEO) as file:
            video = b"".join(file.pieces())
        return Saved(
            memory=opened[0],
            size=size,
            state=state,
            secret=secret,
            disks=tuple(disks),
            video=video,
            online=bool(facts["online"]),
            origin=Origin(folder=folder, digest=chain.digest_of(folder), disks=len(disks)),
        )
    except BaseException as error:
        for fd in opened:
            os.close(fd)
        if isinstance(error, ValueError | KeyError | TypeError):
            raise SnapshotDamaged(f"the facts of {folder.name} are damaged: {error}") from (error)
        raise


def _take_memory(folder: Path, facts: dict[str, Any], target: int, size: int) -> None:
    with File(folder, facts, PAGES) as file:
        runs = chain.pages_in(b"".join(file.pieces()), size)
    with File(folder, facts, MEMORY) as file:
        for first, count in runs:
            at, left = first * chain.PAGE, count * chain.PAGE
            while left:
                piece = file.take(min(4 << 20, left))
                os.pwrite(target, piece, at)
                at, left = at + len(piece), left - len(piece)


@dataclass(slots=True)
class Shelf:
    """Saved machines that a node holds: those that many begin from, and those of a fork."""

    _held: dict[str, Saved] = field(default_factory=dict[str, Saved])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def template(self, folder: Path) -> Saved:
        """Return a lease of a saved machine that is held from now on for the next ones."""
        with self._lock:
            found = self._held.pop(str(folder), None) or read(folder)
            self._held[str(folder)] = found
            templates = [name for name in self._held if name.startswith("/")]
            for name in templates[:-_MOST_HELD]:
                self._held.pop(name).close()
            return found.lease()

    def put(self, name: str, saved: Saved) -> None:
        """Hold one under a name without a slash, until it is dropped."""
        with self._lock:
            self._held[name] = saved

    def get(self, name: str) -> Saved:
        """Return a lease of the one of that name. Raises SandboxError."""
        with self._lock:
            if name not in self._held:
                raise SandboxError("the moment to copy from is gone: fork again")
            return self._held[name].lease()

    def drop(self, name: str) -> None:
        """Let go of one. Does nothing where there is none."""
        with self._lock:
            if saved := self._held.pop(name, None):
                saved.close()
