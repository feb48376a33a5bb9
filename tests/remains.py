"""What test runs that were killed or interrupted left: daemons, sandboxes, their folders.

Every folder of live sandboxes has the process id of its test run in its name.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

from fathom.sandbox import state

_NAME = re.compile(r"fathom-(?:[a-z]+-)?test-(\d+)")


def sweep(patience: float = 5.0) -> list[Path]:
    """Remove what is left of runs whose process is gone; return the folders that were."""
    swept: list[Path] = []
    for base in (Path("/run"), Path("/tmp")):
        for folder in base.glob("fathom-*test-*"):
            found = _NAME.fullmatch(folder.name)
            if found and not Path("/proc", found[1]).exists() and os.access(folder, os.W_OK):
                _remove(folder, patience)
                swept.append(folder)
    return swept


def _remove(folder: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while serving := _serving(folder):
        for pid in serving:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL if time.monotonic() > deadline else signal.SIGTERM)
        time.sleep(0.1)
    for sandbox in folder.glob("sb-*"):
        if state.lives(sandbox) and (pid := state.first_process(sandbox)) is not None:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        state.reap_one(sandbox)
    state.remove(folder)


def _serving(folder: Path) -> list[int]:
    """The daemons of a folder, and their nodes' clients: who names it among its arguments."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
