"""Which substrate serves this user, and where its program is.

Paper: none (machine facts).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from typing import Literal

from fathom.errors import Unsupported

Name = Literal["crun", "runc", "bubblewrap"]
Wanted = Literal["auto", "crun", "runc", "bubblewrap"]

SUBSTRATES: tuple[Name, ...] = ("crun", "runc", "bubblewrap")
# Sandboxes that are virtual machines: see `fathom.sandbox.vm`.
MACHINES = ("microvm", "fullvm")
_PROGRAMS = {"crun": "crun", "runc": "runc", "bubblewrap": "bwrap"}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def program_of(name: Name) -> str | None:
    """Return the path of a substrate's program, or None where it is not installed.

    Only the system's folders are searched: a program that builds sandboxes shall not come from a
    folder that somebody put into PATH.
    """
    return shutil.which(_PROGRAMS[name], path=_PATH)


def suited() -> tuple[Name, ...]:
    """Return the substrates that suit this user: root has crun and runc, others bubblewrap."""
    return ("crun", "runc") if os.geteuid() == 0 else ("bubblewrap",)


def install_command(name: Name) -> str:
    """Return the command that installs a substrate on Debian and Ubuntu."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get install -y {name}"


def choose(wanted: Wanted) -> list[tuple[Name, str]]:
    """Return the substrates to try in order, with their programs. Raises Unsupported."""
    fitting = suited()
    if wanted != "auto" and wanted not in fitting:
        who = "root" if os.geteuid() == 0 else "a user other than root"
        raise Unsupported(f"{wanted} is not for {who}: use {' or '.join(fitting)}")
    names: tuple[Name, ...] = fitting if wanted == "auto" else (wanted,)
    found: list[tuple[Name, str]] = []
    for name in names:
        if program := program_of(name):
            found.append((name, program))
    if not found:
        raise Unsupported(
            f"{' or '.join(names)} is needed to run a sandbox and is not installed: "
            f"`{install_command(names[0])}`"
        )
    return found


def process_limit_is_per_namespace() -> bool:
    """Tell whether the kernel counts processes per user namespace (Linux 5.14 and newer)."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return found is not None and (int(found[1]), int(found[2])) >= (5, 14)
