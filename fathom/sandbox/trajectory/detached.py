"""Processes that outlive whoever started them, one for each folder, which can be seen to live.

The process inherits a lock on a file of its folder: it is held from its first moment to its last,
however it ends, so nobody has to trust a number that was written down.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fathom.errors import SandboxError

_ALIVE = "alive"
_PACKAGE = str(Path(__file__).parents[3])
_CODE = "import sys; sys.path += {paths!r}; from {module} import main; main()"
_PATIENCE = 15.0

# Processes that were started from here: whoever waits for one of them to end must reap it as well.
_children: list[subprocess.Popen[bytes]] = []


def start(module: str, folder: Path, order: dict[str, Any]) -> dict[str, Any] | None:
    """Run `main` of a module in a process of its own; return the one line of JSON that it says.

    It gets `order` on its standard input. None where a process has the folder already; where it
    ends without a word, what it wrote as an error is returned as one.
    """
    alive = os.open(folder / _ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _spawn(module, alive, order)
    except BlockingIOError:
        return None
    finally:
        os.close(alive)


def _spawn(module: str, alive: int, order: dict[str, Any]) -> dict[str, Any]:
    # Exactly the libraries of this process; the package first, the standard library before it.
    paths = [_PACKAGE, *(path for path in sys.path if os.path.isabs(path))]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CODE.format(paths=paths, module=module)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        cwd="/",
        pass_fds=(alive,),
        # Neither Ctrl-C in a terminal nor the terminal's end reaches it.
        start_new_session=True,
    )
    os.ftruncate(alive, 0)
    os.pwrite(alive, f"{process.pid}\n".encode(), 0)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin, process.stdout, process.stderr:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
        line = process.stdout.readline()
        if line and "error" not in (answer := json.loads(line)):
            _children.append(process)
            return answer
        said = process.stderr.read().decode(errors="replace").strip()[-1500:]
        process.wait()
    return json.loads(line) if line else {"error": SandboxError.code, "message": said}


def report(message: dict[str, Any]) -> None:
    """Tell the process that started this one, which waits for one line."""
    # It may have died meanwhile; its successor will find what this process offers.
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")
    # From here on nobody listens, and a word to nobody must not end this process.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


def lives(folder: Path) -> bool:
    """Whether a process has the folder."""
    try:
        fd = os.open(folder / _ALIVE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    _reap()
    return False


def _reap() -> None:
    """Take note of children that have ended."""
    for process in [p for p in _children if p.poll() is not None]:
        _children.remove(process)


def stop(folder: Path) -> None:
    """Ask the process that has the folder to end, and wait until it has. Does nothing else."""
    if not lives(folder):
        return
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder / _ALIVE).read_text())
        pidfd = os.pidfd_open(pid)
        try:
            # The number is this process's while it has the lock.
            if lives(folder):
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)
        await_end(pid)


def await_end(pid: int) -> None:
    """Wait until a process that was started from here, or by another, has ended."""
    for process in [p for p in _children if p.pid == pid]:
        process.wait()
        _children.remove(process)
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            select.select([pidfd], [], [], _PATIENCE)
        finally:
            os.close(pidfd)
