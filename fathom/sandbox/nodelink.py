"""The owner's end of a node: starting it, asking it, reaching its sandboxes, awaiting its end.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import (
    DaemonLost,
    KeyConflict,
    MachineFull,
    PolicyDenied,
    SandboxError,
    SandboxLost,
    SandboxTimeout,
    SnapshotDamaged,
    SnapshotMissing,
    Unsupported,
)
from fathom.sandbox import box, cgroups, line, messages, paths, state
from fathom.sandbox.images.errors import ImageDamaged, ImageError, ImageMissing, StoreFull

_log = logging.getLogger(__name__)
# A full machine that boots under emulation takes the longest.
_CALL_TIMEOUT = 400.0
_STOP_TIMEOUT = 30.0
# From the end of a node's sockets to that of its process.
_LAST_MOMENTS = 5.0
# Appended, not put first: nothing beside the package may take the place of a standard module.
_CODE = (
    f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); "
    "from fathom.sandbox.node import main; main(sys.argv[1:])"
)
_ERRORS: dict[str, type[SandboxError]] = {
    kind.code: kind
    for kind in (
        DaemonLost,
        ImageDamaged,
        ImageError,
        ImageMissing,
        KeyConflict,
        MachineFull,
        PolicyDenied,
        SandboxLost,
        SandboxTimeout,
        SnapshotDamaged,
        SnapshotMissing,
        StoreFull,
        Unsupported,
    )
}


def raise_error(answer: dict[str, Any]) -> None:
    """Raise the error that an answer carries, if it carries one."""
    if "error" in answer:
        raise _ERRORS.get(answer["error"], SandboxError)(answer["message"])


@dataclass(slots=True)
class _Reach:
    """How to get to one agent."""

    folder: Path
    secret: bytes
    oom_file: str

    @property
    def greeting(self) -> bytes:
        """The frame that begins every line."""
        return box.greeting(self.secret)


class NodeLink:
    """A node of this process's own, started at the first call."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        # Whether what dead nodes left is removed before the first sandbox, rather than adopted.
        self.reaps = True
        # How many nodes there were; each one that died was followed by another.
        self.starts = 0
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reach: dict[str, _Reach] = {}
        # What a new node could not take over, though it lives, and why; it is tried again.
        self._left: dict[str, str] = {}

    @property
    def is_ours(self) -> bool:
        """Whether this process started the node, rather than being a fork of the one that did."""
        return os.getpid() == self._owner

    def create(self, folder: Path, launch: dict[str, Any], **source: str) -> None:
        """Start a sandbox in `folder` and return once its agent answered. Raises SandboxError."""
        answer = self.request("create", folder=str(folder), launch=launch, **source)
        secret = bytes.fromhex(answer["secret"])
        self._reach[folder.name] = _Reach(folder, secret, answer["oom_file"])

    def adopt(self, folder: Path) -> None:
        """Take over a sandbox that outlived its node. Raises SandboxError."""
        answer = self.request("adopt", folder=str(folder))
        secret = bytes.fromhex(answer["secret"])
        self._reach[folder.name] = _Reach(folder, secret, answer["oom_file"])

    def has(self, name: str) -> bool:
        """Whether a sandbox of this name was made or adopted here, and not destroyed."""
        return name in self._reach

    def secret_of(self, name: str) -> bytes:
        """Return the secret of a sandbox's session. Raises SandboxLost."""
        reach = self._reach.get(name)
        if reach is None:
            raise SandboxLost(f"sandbox {name} was stopped: create another one")
        return reach.secret

    def destroy(self, name: str) -> None:
        """End a sandbox and wait until nothing of it is left. Never raises for one that ended."""
        reach = self._reach.pop(name, None)
        with self._lock:
            pass  # a node that is just beginning may be taking it over: it has it, or will not
        with contextlib.suppress(SandboxError):
            if self._alive():
                self.request("destroy", id=name)
        if reach is not None and reach.folder.exists():
            # The node was killed before it could finish; its lock is free now.
            state.reap_one(reach.folder)

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def request(self, op: str, **values: Any) -> dict[str, Any]:
        """Have one operation done by the node, in this thread. Raises SandboxError."""
        sock = self._node()
        process = self._process
        try:
            answer = _exchange(sock, op, values)
        except TimeoutError as error:
            raise SandboxTimeout(f"the node did not {op} within {_CALL_TIMEOUT:g} s") from error
        except OSError as error:
            if self._alive() and not isinstance(error, ConnectionError):
                # This process has no descriptor left, say: no reason to end any sandbox.
                raise SandboxError(f"the node cannot be asked to {op}: {error}") from error
            answer = None
        if answer is None:
            # It lets go of its sandboxes' locks in its last moments only.
            if process is not None and not _has_ended(process, _LAST_MOMENTS):
                # It lives, and so do its sandboxes.
                raise MachineFull(
                    f"the node did not take the request to {op}: it may have as many files open as "
                    "it can; end some sandboxes, try again"
                )
            raise DaemonLost(f"the node of this process ended while it was to {op}{self._said()}")
        raise_error(answer)
        return answer

    def revive(self) -> None:
        """Start another node where one died, which takes over the sandboxes. Raises SandboxError.

        Only for sandboxes that outlive their node.
        """
        if self._process is not None and not self._alive():
            self._node()
        for name in list(self._left):
            reach = self._reach.get(name)
            if reach is None:
                self._left.pop(name, None)
                continue
            try:
                self.request("adopt", folder=str(reach.folder))
                self._left.pop(name, None)
                if name not in self._reach:
                    self.request("destroy", id=name)  # it was stopped meanwhile
            except SandboxError as error:
                self._leave(name, reach.folder, str(error))

    def _said(self) -> str:
        process = self._process
        if process is None or process.stderr is None or process.poll() is None:
            return ""
        with contextlib.suppress(OSError, ValueError):
            os.set_blocking(process.stderr.fileno(), False)
            return f": {(process.stderr.read() or b'').decode(errors='replace').strip()[-1500:]}"
        return ""

    def _node(self) -> socket.socket:
        with self._lock:
            if self._sock is not None and self._alive():
                return self._sock
            self._forget_node()
            paths.make_runtime_folder(self.runtime)
            if self.reaps:
                state.reap(self.runtime)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = _spawn(theirs)
            self._sock = ours
            self.starts += 1
            if not self.reaps:
                self._take_over(ours)
            return ours

    def _take_over(self, sock: socket.socket) -> None:
        """Have a new node adopt the sandboxes of the one that died."""
        for name, reach in list(self._reach.items()):
            try:
                answer = _exchange(sock, "adopt", {"folder": str(reach.folder)})
            except OSError:
                answer = None
            if answer is None:
                return  # this node died as well: the next one is asked again
            if "error" in answer:
                self._leave(name, reach.folder, str(answer.get("message", "")))

    def _leave(self, name: str, folder: Path, why: str) -> None:
        """Let a sandbox that could not be taken over be, and remove what is left of a dead one."""
        if state.lives(folder):
            if self._left.get(name) != why:
                _log.error("event=left_by_node id=%s error=%r", name, why)
            self._left[name] = why
        else:
            self._left.pop(name, None)
            self._reach.pop(name, None)
            state.reap_one(folder)

    def _forget_node(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            _await_end(self._process)
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None

    def door(self, name: str) -> tuple[Path, bytes]:
        """Return a sandbox's folder, and the frame that begins a line.

        Raises SandboxLost; DaemonLost for one that no new node could take over.
        """
        reach = self._reach.get(name)
        if reach is None:
            raise SandboxLost(f"sandbox {name} was stopped: create another one")
        if (why := self._left.get(name)) is not None:
            raise DaemonLost(
                f"sandbox {name} runs on, but a new node could not take it over ({why}): it is "
                "tried again all the time"
            )
        return reach.folder, reach.greeting

    async def open(self, name: str) -> line.Line:
        """Open a line to an agent. Raises SandboxLost."""
        folder, greeting = self.door(name)
        try:
            opened = await line.dial(folder, state.SOCKET)
        except SandboxLost as error:
            raise SandboxLost(f"sandbox {name} ended on its own: {error}") from error
        try:
            await opened.send(greeting)
        except BaseException:
            opened.close()
            raise
        return opened

    def oom_count(self, name: str) -> int:
        """Return how many processes of the sandbox were killed for memory so far."""
        reach = self._reach.get(name)
        if reach is None or not reach.oom_file:
            return 0
        try:
            fd = os.open(reach.oom_file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            return cgroups.oom_count(os.read(fd, 4096).decode())
        finally:
            os.close(fd)

    def close(self) -> None:
        """End the node and with it every sandbox, and wait until nothing of them is left.

        Sandboxes that are to outlive their node are left to the next one.
        """
        if not self.is_ours:
            return
        with self._lock:
            self._forget_node()
        for name in list(self._reach):
            reach = self._reach.pop(name)
            if self.reaps and reach.folder.exists():
                state.reap_one(reach.folder)


def _exchange(sock: socket.socket, op: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """Ask a node for one thing; None where it ended meanwhile. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            messages.send(sock, {"op": op, **values}, (theirs.fileno(),))
        ours.settimeout(_CALL_TIMEOUT)
        return messages.receive(ours)[0]


def _await_end(process: subprocess.Popen[bytes]) -> None:
    """Wait until a node has ended, and kill it when that takes too long."""
    if not _has_ended(process, _STOP_TIMEOUT):
        process.kill()
        process.wait()


def _has_ended(process: subprocess.Popen[bytes], patience: float) -> bool:
    """Wait for the end of a node for so many seconds; whether it has come."""
    # Popen.wait with a timeout sleeps up to 50 ms at a time; a pidfd answers at once.
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(process.pid)
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            if not poller.poll(patience * 1000):
                return False
        finally:
            os.close(pidfd)
    process.wait()
    return True


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    # Isolated and without site packages it starts in a third of the time, and nothing of the
    # caller's environment reaches a sandbox. A session of its own keeps Ctrl-C in a terminal away
    # from it: the client decides.
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE, str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"the node did not start: {error}") from error
