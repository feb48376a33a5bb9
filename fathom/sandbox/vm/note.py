"""What is written down of a machine in its folder, so that another node can take it over.

Its files have no path: they are found again among those that the emulator has open, by what they
are. The emulator makes copies of what it is given and uses the numbers for other files.

Paper: none (a thin form of the report's edge).
"""

from __future__ import annotations

import contextlib
import json
import os
import stat

from fathom.errors import SandboxError
from fathom.sandbox import state
from fathom.sandbox.vm.chain import Origin
from fathom.sandbox.vm.launch import MachineLaunch


def write(
    launch: MachineLaunch,
    secret: bytes,
    pid: int,
    *,
    memory: int,
    disk: int,
    below: tuple[int, ...],
    origin: Origin | None,
) -> None:
    """Write the note of a machine that runs. `disk`: below 0 where it has none. Raises OSError."""
    note = {
        "secret": secret.hex(),
        "pid": pid,
        "launch": launch.as_json(),
        "memory": identity(memory),
        "disk": identity(disk) if disk >= 0 else None,
        "below": [identity(fd) for fd in below],
        "origin": None if origin is None else origin.as_json(),
    }
    session = launch.folder / state.SESSION
    session.touch(mode=0o600)
    session.write_text(json.dumps(note))


def identity(fd: int) -> list[int]:
    """Return what names an open file wherever it is open: its device and inode."""
    found = os.fstat(fd)
    return [found.st_dev, found.st_ino]


def open_kept(pid: int, wanted: list[int]) -> int:
    """Open a file for reading that the emulator has open. Raises SandboxError, OSError."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with contextlib.suppress(OSError):
            found = os.stat(path)
            if stat.S_ISREG(found.st_mode) and [found.st_dev, found.st_ino] == wanted:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if identity(fd) == wanted:
                    return fd
                os.close(fd)
    raise SandboxError("the emulator has closed a file of its machine")
