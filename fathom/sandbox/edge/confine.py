"""Giving up every right of this process but the use of what it has open.

Paper: none (sandbox security; the report only names its platform).
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from fathom.sandbox import seccomp, syscalls

_DEATH = 9
_LAST_CAPABILITY = 63


def confine(user: int | None, root: Path | None, parent: int) -> None:
    """Become `user` in the empty folder `root`, under a filter, without a file system.

    Without root's rights `user` and `root` are None, and the process stays its user's. It ends with
    the process `parent`. Called before any thread is started and after all that is needed of files
    is loaded. Raises OSError, SystemExit where the parent is gone.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if user is not None and root is not None:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))
            most = 1 << 20
        os.chroot(root)
        os.chdir("/")
        for capability in range(_LAST_CAPABILITY + 1):
            with contextlib.suppress(OSError):  # this kernel has fewer
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Changing the user has undone both of these.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, _DEATH)
    if os.getppid() != parent:
        raise SystemExit(0)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.close_file_systems()
    syscalls.install_filter(seccomp.compile_filter(server=True))
