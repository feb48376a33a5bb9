"""Sandboxes by bubblewrap, for users other than root: same methods, fewer promises.

The tenant is the same user as the caller for the kernel, kept apart by namespaces, the empty
capability sets and the system call filter. There is no control group, so memory is bounded for each
process only, and nothing can be paused.

Paper: none (a thin form of the report's container substrate).
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from fathom.errors import SandboxError
from fathom.sandbox.request import PATH
from fathom.sandbox.substrates.launch import (
    AGENT,
    INIT,
    MASKED_PATHS,
    TENANT,
    Ends,
    Launch,
    Started,
)

_START_TIMEOUT = 30.0
# The agent and two monitors count like the tenant's own.
_RESERVED = 4


def command_line(launch: Launch, info_fd: int, filter_fd: int) -> list[str]:
    """Return bubblewrap's command line."""
    size = str(launch.disk)
    argv = [
        launch.program,
        "--unshare-user",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup",
        "--uid",
        str(TENANT),
        "--gid",
        str(TENANT),
        "--hostname",
        launch.hostname,
        "--as-pid-1",
        "--new-session",
        *(() if launch.outlive else ("--die-with-parent",)),
        "--cap-drop",
        "ALL",
        "--clearenv",
        "--setenv",
        "PATH",
        PATH,
        "--info-fd",
        str(info_fd),
        "--seccomp",
        str(filter_fd),
        "--ro-bind",
        launch.rootfs,
        "/",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--ro-bind",
        launch.agent,
        AGENT,
    ]
    for path in MASKED_PATHS:
        if os.path.isdir(path):
            argv += ["--perms", "0555", "--tmpfs", path, "--remount-ro", path]
        elif os.path.exists(path):
            argv += ["--ro-bind", "/dev/null", path]
    argv += ["--perms", "1777", "--size", str(launch.disk // 4), "--tmpfs", "/dev/shm"]
    argv += ["--remount-ro", "/dev"]
    argv += ["--perms", "1777", "--size", size, "--tmpfs", "/tmp"]
    if launch.workdir is None:
        argv += ["--perms", "0755", "--size", size, "--tmpfs", "/work"]
    else:
        argv += ["--bind", launch.workdir, "/work"]
    return [*argv, "--chdir", "/", "--", *INIT]


def start(launch: Launch, ends: Ends, program: bytes) -> Started:
    """Start the agent under the filter `program`. Raises SandboxError or OSError."""
    filter_fd = os.memfd_create("filter", 0)
    os.write(filter_fd, program)
    os.lseek(filter_fd, 0, os.SEEK_SET)
    info_read, info_write = os.pipe()
    log = launch.folder / "runtime.log"
    try:
        with log.open("wb") as errors:
            process = _in_lasting_thread(
                lambda: subprocess.Popen(
                    command_line(launch, info_write, filter_fd),
                    stdin=ends.listener,
                    stdout=ends.journal,
                    stderr=errors,
                    pass_fds=(info_write, filter_fd),
                    env={},
                    cwd="/",
                )
            )
        os.close(info_write)
        info_write = -1
        pid = _read_pid(info_read)
        if pid is None:
            process.kill()
            process.wait()
            raise SandboxError(failure(launch))
    finally:
        for fd in (filter_fd, info_read, info_write):
            if fd >= 0:
                os.close(fd)
    return Started(
        pid=pid,
        address_space=launch.memory,
        processes=launch.pids + _RESERVED,
        filtered=True,
        process=process,
    )


_jobs: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
_starting = threading.Lock()
_thread: threading.Thread | None = None


def _in_lasting_thread(work: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Run `work` in a thread that ends only with this process.

    bubblewrap ends with its parent, and for the kernel the parent is the thread that started it.
    """
    global _thread
    with _starting:
        if _thread is None:
            _thread = threading.Thread(target=_work, name="fathom-bubblewrap", daemon=True)
            _thread.start()
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
    _jobs.put((work, answer))
    made = answer.get()
    if isinstance(made, BaseException):
        raise made
    return made


def _work() -> None:
    while True:
        work, answer = _jobs.get()
        try:
            answer.put(work())
        except BaseException as error:
            answer.put(error)


def failure(launch: Launch) -> str:
    """Say why a sandbox did not start, in bubblewrap's own words."""
    said = (launch.folder / "runtime.log").read_text(errors="replace").strip()[-1500:]
    return (
        f"bubblewrap could not start the sandbox: {said or 'it gave no reason'}; "
        "run `fathom doctor` to see what this machine can do"
    )


def _read_pid(fd: int) -> int | None:
    data = b""
    while b"}" not in data:
        if not select.select([fd], [], [], _START_TIMEOUT)[0]:
            return None
        part = os.read(fd, 4096)
        if not part:
            return None
        data += part
    return int(json.loads(data)["child-pid"])
