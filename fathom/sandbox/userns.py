"""User namespaces made for their maps alone: a mount takes from them how owners are translated.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fathom.errors import Unsupported
from fathom.sandbox import syscalls


def make(uid_map: str, gid_map: str) -> int:
    """Return a descriptor of a new user namespace with these maps. Raises OSError, Unsupported.

    A map is a line as in /proc/PID/uid_map: first number inside, first number outside, how many.
    """
    ready_read, ready_write = os.pipe()
    hold_read, hold_write = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                syscalls.unshare(syscalls.CLONE_NEWUSER)
                os.write(ready_write, b"1")
                os.read(hold_read, 1)
        finally:
            os._exit(0)
    os.close(ready_write)
    try:
        if os.read(ready_read, 1) != b"1":
            raise Unsupported("no user namespace can be made: raise user.max_user_namespaces")
        Path(f"/proc/{child}/uid_map").write_text(uid_map)
        Path(f"/proc/{child}/gid_map").write_text(gid_map)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        # Told, not by the end of the pipe: the child of another thread may hold its ends as well.
        os.write(hold_write, b"1")
        for fd in (ready_read, hold_read, hold_write):
            os.close(fd)
        os.waitpid(child, 0)
