"""The runtime folder: one locked folder per live sandbox, and the removal of those left behind.

A node holds a lock on each sandbox's lock file for as long as it lives; the kernel releases it when
the node dies in any way. A folder whose lock can be taken therefore has no owner, without any
guess about process ids that might have been given out again.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import time
from pathlib import Path

from fathom.errors import SandboxError
from fathom.sandbox import cgroups

_LOCK = "lock"
_GROUPS = "groups.json"
_FIRST = "first"
# Where a node mounts an image and a user's folder, in a mount namespace of its own.
ROOTFS = "rootfs"
WORK = "work"
DOOR = "door"
DISK = "disk"
LAYERS = "layers"
# The agent's socket, its journal, and what a later owner must know to take the sandbox over.
SOCKET = "agent.sock"
JOURNAL = "journal"
SESSION = "session.json"
# The container runtime's own records.
RUNTIME = "runtime"
_STARTING = 300.0


def claim(folder: Path, patience: float = 0.0) -> int:
    """Take the lock of a sandbox's folder and return its descriptor. Raises SandboxError.

    `patience`: seconds to wait for a former owner that is about to end.
    """
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError as error:
            if time.monotonic() >= deadline:
                os.close(fd)
                raise SandboxError(f"{folder} belongs to another sandbox") from error
        time.sleep(0.005)


def note_groups(folder: Path, groups: list[Path]) -> None:
    """Write down the control groups of a sandbox before they are made."""
    (folder / _GROUPS).write_text(json.dumps([str(group) for group in groups]))


def note_first(folder: Path, pid: int) -> None:
    """Write down the first process of a sandbox, so that its end can be awaited."""
    (folder / _FIRST).write_text(f"{pid} {_start_time(pid)}")


def is_first(folder: Path, pid: int) -> bool:
    """Whether `pid` is still the process that was written down as a sandbox's first."""
    with contextlib.suppress(OSError, ValueError):
        noted, started = (folder / _FIRST).read_text().split()
        return int(noted) == pid and _start_time(pid) == started
    return False


def lives(folder: Path) -> bool:
    """Whether the first process of a sandbox still runs."""
    pid = first_process(folder)
    if pid is None or not is_first(folder, pid):
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _start_time(pid: int) -> str:
    # After the name, which may contain anything, the start time is the 20th field.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _end_first(folder: Path) -> None:
    """Kill the first process of a sandbox whose node is dead, and wait until it is gone."""
    with contextlib.suppress(OSError, ValueError):
        pid, started = (folder / _FIRST).read_text().split()
        pidfd = os.pidfd_open(int(pid))
        try:
            # The number may belong to another process by now.
            if _start_time(int(pid)) == started:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                poller = select.poll()
                poller.register(pidfd, select.POLLIN)
                poller.poll(5000)
        finally:
            os.close(pidfd)


def remove(folder: Path) -> bool:
    """Remove a sandbox's folder; True when it is gone. Never raises, never enters a mount.

    Inside a node `rootfs`, `disk` and `work` show an image and a user's files. They are removed by
    rmdir alone, which fails on whatever is not an empty folder: no recursion may ever start above.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            path = Path(entry.path)
            with contextlib.suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    path.unlink()
                elif entry.name == RUNTIME:
                    _remove_tree(path)
                elif entry.name == LAYERS:
                    # Mount points: folders alone, and rmdir takes nothing that holds anything.
                    for at, _, _ in os.walk(path, topdown=False):
                        os.rmdir(at)
                else:
                    path.rmdir()
        folder.rmdir()
    return not folder.exists()


def _remove_tree(folder: Path) -> None:
    """Remove a folder that nobody else may write to, without a look at each name first."""
    for at, _, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(at, name))
        os.rmdir(at)


def reap(runtime: Path) -> list[str]:
    """Remove what dead nodes left in `runtime`; return the names of those sandboxes."""
    removed: list[str] = []
    with contextlib.suppress(OSError):
        for folder in sorted(runtime.iterdir()):
            if folder.is_dir() and not folder.is_symlink() and reap_one(folder):
                removed.append(folder.name)
    return removed


def reap_one(folder: Path) -> bool:
    """Remove what a dead node left of one sandbox; True when it is gone. Never raises."""
    try:
        fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # A node that is just starting has not locked it yet; one that died there never will.
        with contextlib.suppress(OSError):
            if time.time() - folder.lstat().st_mtime > _STARTING:
                return remove(folder)
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _end_first(folder)
        with contextlib.suppress(OSError, ValueError):
            groups = json.loads((folder / _GROUPS).read_text())
            # Only ever groups under our own parent, whatever the file says.
            cgroups.destroy_folders(
                [p for p in map(Path, groups) if p.parent.name == cgroups.PARENT]
            )
        return remove(folder)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def first_process(folder: Path) -> int | None:
    """The first process of a live sandbox, None when nobody wrote it down."""
    try:
        return int((folder / _FIRST).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
