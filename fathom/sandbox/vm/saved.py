"""Machines that were saved: their memory, their devices, their disk; in memory or in a folder.

Paper: §5.2.5 (memory snapshots of virtual machines).
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fathom.errors import SandboxError
from fathom.sandbox.vm import memory

MEMORY, STATE, DISK, FACTS = "memory", "state", "disk.qcow2", "facts.json"
STATE_LIMIT = 64 << 20
# Of the folder and of what the emulator is told: a machine saved by another version is no template.
FORMAT = 2
_MOST_HELD = 4


@dataclass(slots=True, kw_only=True)
class Saved:
    """A machine of one moment. `memory`, `disk`: descriptors, `disk` -1 where there is none.

    `state`: of its devices. `secret`: what its agent wants to hear. `video`: the screen's memory.
    `online`: whether the guest's network device was on.
    """

    memory: int
    size: int
    state: bytes
    secret: bytes
    disk: int = -1
    video: bytes = b""
    online: bool = False

    def close(self) -> None:
        """Close the files. Machines that began from it keep theirs."""
        for fd in (self.memory, self.disk):
            if fd >= 0:
                os.close(fd)
        self.memory = self.disk = -1

    def lease(self) -> Saved:
        """Return the same with files of its own, the caller's to close."""
        disk = os.dup(self.disk) if self.disk >= 0 else -1
        return replace(self, memory=os.dup(self.memory), disk=disk)

    def write(self, folder: Path, facts: dict[str, Any]) -> int:
        """Keep it in `folder`, which exists and is the owner's alone; return the bytes taken."""
        fd = os.open(folder / MEMORY, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            memory.copy_sparse(self.memory, fd, self.size)
        finally:
            os.close(fd)
        (folder / STATE).write_bytes(self.state)
        if self.disk >= 0:
            fd = os.open(folder / DISK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                memory.copy_sparse(self.disk, fd, os.fstat(self.disk).st_size)
            finally:
                os.close(fd)
        if self.video:
            (folder / "video").write_bytes(self.video)
        facts = {**facts, "secret": self.secret.hex(), "memory": self.size}
        facts["online"] = self.online
        (folder / FACTS).touch(mode=0o600)
        (folder / FACTS).write_text(json.dumps(facts))
        return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def read(folder: Path) -> Saved:
    """Take a saved machine from its folder into memory. Raises SandboxError, OSError."""
    try:
        facts = json.loads((folder / FACTS).read_text())
        size, secret = int(facts["memory"]), bytes.fromhex(facts["secret"])
        online = bool(facts["online"])
        source = os.open(folder / MEMORY, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SandboxError(f"the saved machine {folder.name} is damaged: {error}") from error
    held, disk = -1, -1
    try:
        if os.fstat(source).st_size != size:
            raise SandboxError(f"the saved machine {folder.name} is damaged: its memory is cut")
        held = memory.create(size)
        memory.copy_sparse(source, held, size)
        memory.seal(held)
        if (folder / DISK).exists():
            disk = os.open(folder / DISK, os.O_RDONLY | os.O_CLOEXEC)
        video = (folder / "video").read_bytes() if (folder / "video").exists() else b""
        return Saved(
            memory=held,
            size=size,
            state=(folder / STATE).read_bytes(),
            secret=secret,
            disk=disk,
            video=video,
            online=online,
        )
    except BaseException:
        for fd in (held, disk):
            if fd >= 0:
                os.close(fd)
        raise
    finally:
        os.close(source)


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
