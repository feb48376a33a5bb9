"""One command inside a sandbox: a monitor that enters it, and a process that gives up everything.

The monitor is forked from the keeper before the command is known. It enters the sandbox's control
groups and namespaces (all but the process one, so the tenant never sees it) and waits. When the
command comes it forks once more: that child is inside the process namespace, becomes the tenant,
drops every privilege, installs the system call filter and only then executes.

Nothing may be imported after the sandbox was entered: paths would resolve in the tenant's files.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from fathom.sandbox import cgroups, syscalls

PATH = "/usr/local/bin:/usr/bin:/bin"
TENANT = 1000
FIXED_ENVIRONMENT = {
    "PATH": PATH,
    "HOME": "/work",
    "USER": "user",
    "LOGNAME": "user",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "TERM": "dumb",
}
_OPEN_FILES = 1024
_FDS_PER_COMMAND = 5  # request, stdin, stdout, stderr, status


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What a monitor needs to enter: all of it opened on the host beforehand."""

    init_pidfd: int
    filter: bytes
    entry_fds: tuple[int, ...] = ()
    group_fd: int = -1
    leave_fd: int = -1
    oom_fd: int = -1
    address_space: int | None = None
    processes: int | None = None


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send one small message with file descriptors. Raises OSError."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], ancillary)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message; None at the end of the stream. Raises OSError."""
    fds = array.array("i")
    data, ancillary, _, _ = sock.recvmsg(
        1 << 16, socket.CMSG_SPACE(16 * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return (json.loads(data) if data else None), list(fds)


def read_payload(fd: int) -> dict[str, Any]:
    """Read the JSON object in the memory file behind `fd`."""
    parts: list[bytes] = []
    offset = 0
    while part := os.pread(fd, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return json.loads(b"".join(parts))


def run_monitor(sock: socket.socket, ticket: Ticket) -> None:
    """Enter the sandbox, wait for one command on `sock`, see it through, and never return."""
    code = 1
    try:
        _enter(ticket)
        message, fds = receive(sock)
        if message is not None and len(fds) == _FDS_PER_COMMAND:
            _serve(read_payload(fds[0]), fds[1:], ticket)
        code = 0
    except BaseException:
        # The client sees the status pipe close without an answer and reports a lost sandbox.
        code = 1
    finally:
        os._exit(code)


def _enter(ticket: Ticket) -> None:
    for fd in ticket.entry_fds:
        os.write(fd, b"0")
    syscalls.setns(ticket.init_pidfd, syscalls.ALL_NAMESPACES)
    # Entering changed the credentials, which clears the request to die with the keeper: repeat it.
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    os.chdir("/")
    sys.path.clear()
    sys.meta_path.clear()


def _serve(request: dict[str, Any], fds: list[int], ticket: Ticket) -> None:
    *streams, status = fds
    ooms = _ooms(ticket)
    error_read, error_write = os.pipe()
    started = time.monotonic()
    answer: dict[str, Any] = {"problem": "", "exit_code": 126, "timed_out": False}
    try:
        child = os.fork()
    except OSError as error:
        answer["problem"] = f"no process can be started ({error.strerror}): raise pids or memory"
    else:
        if child == 0:
            os.close(error_read)
            _become_tenant(request, streams, error_write, ticket)
        for fd in (*streams, error_write):
            os.close(fd)
        answer["problem"] = os.read(error_read, 4096).decode(errors="replace")
        why = _wait(child, status, started + request["timeout"])
        if why is not None:
            _kill_everything(child, ticket)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer["exit_code"] = code if code >= 0 else 128 - code
        answer["timed_out"] = why == "timeout"
    answer["oom_killed"] = _ooms(ticket) > ooms
    answer["duration"] = time.monotonic() - started
    with contextlib.suppress(BrokenPipeError):
        os.write(status, json.dumps(answer).encode())


def _wait(child: int, status: int, deadline: float) -> str | None:
    """Wait for the child; say "timeout" or "gone" (the client left) when that comes first."""
    pidfd = os.pidfd_open(child)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(status, 0)  # errors only: the reader went away
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            events = dict(poller.poll(min(left, 3600.0) * 1000))
            if pidfd in events:
                return None
            if status in events:
                return "gone"
    finally:
        os.close(pidfd)


def _ooms(ticket: Ticket) -> int:
    if ticket.oom_fd < 0:
        return 0
    return cgroups.oom_count(os.pread(ticket.oom_fd, 4096, 0).decode())


def _kill_everything(child: int, ticket: Ticket) -> None:
    """End the command: its whole control group, or where there is none the whole sandbox."""
    if ticket.group_fd >= 0:
        os.write(ticket.leave_fd, b"0")
        # v2 ends a whole group at once. Under v1 nothing can start any more, which makes sure that
        # the loop cannot be outrun.
        for name, text in (("cgroup.kill", b"1"), ("pids.max", b"0")):
            with contextlib.suppress(OSError):
                _write(ticket.group_fd, name, text)
        deadline = time.monotonic() + 5
        while left := [pid for pid in _members(ticket) if not _is_zombie(child, pid)]:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)
        return
    killer = os.fork()
    if killer == 0:
        deadline = time.monotonic() + 5
        with contextlib.suppress(OSError):
            while True:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
                # A signal that was sent is not yet a process that has ended.
                if not _others_alive() or time.monotonic() > deadline:
                    break
                time.sleep(0.001)
        os._exit(0)
    os.waitpid(killer, 0)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _others_alive() -> bool:
    """Tell whether the sandbox holds a process besides its first one and our own."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (1, os.getpid()):
            continue
        try:
            fd = os.open(f"/proc/{name}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            text = os.read(fd, 4096)
        except OSError:  # it ended between the two calls
            continue
        finally:
            os.close(fd)
        # The state follows the name, which may itself hold spaces and brackets.
        if text.rpartition(b")")[2].split()[0] not in (b"Z", b"X"):
            return True
    return False


def _members(ticket: Ticket) -> list[int]:
    # Opened anew each time: v1 answers every read of one open file from the same old list.
    fd = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=ticket.group_fd)
    try:
        return [int(pid) for pid in os.read(fd, 1 << 20).split()]
    finally:
        os.close(fd)


def _write(folder: int, name: str, text: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


def _is_zombie(child: int, pid: int) -> bool:
    """Tell whether `pid` is our own ended child, which stays listed until it is waited for."""
    if pid != child:
        return False
    found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is not None


def _become_tenant(request: dict[str, Any], streams: list[int], error: int, ticket: Ticket) -> None:
    """Turn into the tenant and execute; on failure say why on `error`. Never returns."""
    step = "prepare"
    try:
        os.setsid()
        for number, fd in enumerate(streams):
            # Streams came in above 2, so no copy overwrites one that is still needed.
            os.dup2(fd, number)
        syscalls.default_signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.umask(0o022)
        _set_limits(ticket)
        # When memory is short a command shall go, not the sandbox's first process or our own.
        with contextlib.suppress(OSError):
            fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, b"500")
            os.close(fd)
        with contextlib.suppress(PermissionError):
            # Refused in a namespace made without privileges, where nothing was added either.
            os.setgroups([])
        os.setresgid(TENANT, TENANT, TENANT)
        os.setresuid(TENANT, TENANT, TENANT)
        syscalls.drop_capabilities()
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        fcntl.fcntl(error, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        _close_others(error)
        # From here on nothing is possible that is not possible to the tenant.
        step = f"enter the folder {request['cwd']}"
        os.chdir(request["cwd"])
        step = "install the system call filter"
        syscalls.install_filter(ticket.filter)
        step = "start the command"
        argv = request["argv"]
        os.execve(argv[0], argv, {**FIXED_ENVIRONMENT, **request["env"]})
    except BaseException as failure:
        reason = failure.strerror if isinstance(failure, OSError) else str(failure)
        os.write(error, f"{step}: {reason or type(failure).__name__}".encode())
    finally:
        os._exit(126)


def _set_limits(ticket: Ticket) -> None:
    limits = {
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_AS: ticket.address_space,
        resource.RLIMIT_NPROC: ticket.processes,
        # One byte, not none: with none the kernel still hands the core to a helper of the host.
        resource.RLIMIT_CORE: 1,
    }
    for kind, limit in limits.items():
        if limit is not None:
            resource.setrlimit(kind, (limit, limit))


def _close_others(keep: int) -> None:
    os.closerange(3, keep)
    os.closerange(keep + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1] + 4096)
