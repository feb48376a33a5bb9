"""The privileged process of the daemon: it binds the sockets, starts the API process, and keeps.

It reads no byte that a client sent. It ends when told to, its sandboxes stay; an API process that
ended in any way is followed by another one, which serves the clients that wait meanwhile.

Paper: §5.2.5 (one node: admission, launch, expiry).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fathom.errors import SandboxError
from fathom.sandbox import messages, paths
from fathom.sandbox.edge import SOCKET
from fathom.sandbox.edge.channel import Channel
from fathom.sandbox.edge.events import event
from fathom.sandbox.edge.keeper import Keeper
from fathom.sandbox.edge.tokens import Tokens
from fathom.sandbox.edge.work import Work

_TICK = 0.5
_FAILURES = 5  # API processes in a row that may end before they answer
_LOCK = "edge.lock"
_EMPTY = "empty"
# API processes are users that no file belongs to, each runtime folder's another one. They lie below
# those of sandboxes.
_FIRST_USER = 0x5FFF0000
_CODE = (
    f"import sys; sys.path.append({str(Path(__file__).parents[3])!r}); "
    "from fathom.sandbox.edge.api import main; main(sys.argv[1:])"
)
_log = logging.getLogger(__name__)
# Told where clients of other machines come in.
Ready = Callable[[tuple[str, int] | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where clients of other machines come in. `certificate`, `key`: files in PEM."""

    host: str
    port: int
    certificate: Path
    key: Path
    tokens: Path


class Parent:
    """The daemon in the folder of `keeper`'s host."""

    def __init__(self, keeper: Keeper, listen: Listen | None = None) -> None:
        self._keeper = keeper
        self._runtime = keeper.host.runtime
        self._listen = listen
        self._tokens = Tokens(listen.tokens) if listen is not None else None
        self._work = Work()
        self._channel: Channel | None = None
        self._stopping = threading.Event()
        self._ready = _nothing
        self.api_starts = 0
        keeper.gone = self._tell_gone
        keeper.more = lambda: {"fathom_api_starts_total": self.api_starts}

    def run(self, ready: Ready | None = None) -> None:
        """Adopt what is there, then serve until SIGINT or SIGTERM. Sandboxes stay.

        `ready` is called once clients are answered, with the address of `listen`. Only in a
        process's main thread. Raises SandboxError.
        """
        lock = self._claim()
        opened: list[socket.socket] = []
        try:
            wake = _on_signals()
            self._keeper.adopt()
            opened.append(messages.listen(self._runtime, SOCKET))
            if self._listen is not None:
                opened.append(_bind(self._listen.host, self._listen.port))
            threading.Thread(target=self._tend, daemon=True).start()
            self._ready = lambda: self._say_ready(opened, ready)
            self._supervise(opened, wake)
        finally:
            self._stopping.set()
            for sock in opened:
                sock.close()
            with contextlib.suppress(OSError):
                (self._runtime / SOCKET).unlink()
                (self._runtime / _EMPTY).rmdir()
            self._work.shutdown()
            self._keeper.host.link.close()
            os.close(lock)

    def _say_ready(self, listening: list[socket.socket], ready: Ready | None) -> None:
        address = listening[1].getsockname()[:2] if len(listening) > 1 else None
        where = {} if address is None else {"address": f"{address[0]}:{address[1]}"}
        count = len(self._keeper.entries)
        path = self._runtime / SOCKET
        event(_log, logging.INFO, "ready", socket=path, sandboxes=count, **where)
        if ready is not None:
            ready(address)

    def _claim(self) -> int:
        """Make sure that no other daemon works in this folder. Raises SandboxError."""
        paths.make_runtime_folder(self._runtime)
        lock = os.open(self._runtime / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise SandboxError(
                f"a daemon answers in {self._runtime} already: stop it first"
            ) from error
        return lock

    # The API process ---------------------------------------------------------------------------

    def _supervise(self, listening: list[socket.socket], wake: int) -> None:
        """Keep an API process running until a signal comes."""
        failures = 0
        while True:
            began = time.monotonic()
            process, channel = self._start(listening)
            self._channel = channel
            reader = threading.Thread(target=channel.serve, daemon=True)
            reader.start()
            told = self._watch(process, channel, wake)
            channel.close()
            if told:
                process.terminate()
            else:
                process.kill()
            process.wait()
            reader.join()
            self._channel = None
            channel.release()
            if told:
                return
            lasted = time.monotonic() - began
            failures = 0 if channel.ready.is_set() else failures + 1
            if failures > _FAILURES:
                raise SandboxError("the API process does not start: see its errors above")
            event(_log, logging.WARNING, "api_ended", code=process.returncode, seconds=int(lasted))
            # One that was killed is replaced at once; one that cannot even start is not in a loop.
            if failures and select.select([wake], [], [], 0.1 * 2**failures)[0]:
                return

    def _watch(self, process: subprocess.Popen[bytes], channel: Channel, wake: int) -> bool:
        """Wait for the end of the API process or for a signal; whether it was the latter."""
        while not channel.ready.is_set():
            if (told := _await_end(process, wake, 0.01)) is not None:
                return told
        self._ready()
        self._ready = _nothing
        return bool(_await_end(process, wake))

    def _start(self, listening: list[socket.socket]) -> tuple[subprocess.Popen[bytes], Channel]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = os.geteuid() == 0
        empty = self._runtime / _EMPTY
        if root:
            empty.mkdir(mode=0o555, exist_ok=True)
        given = {
            "parent": os.getpid(),
            "channel": theirs.fileno(),
            "unix": listening[0].fileno(),
            "tcp": listening[1].fileno() if len(listening) > 1 else None,
            "certificate": str(self._listen.certificate) if self._listen is not None else "",
            "key": str(self._listen.key) if self._listen is not None else "",
            "user": user_of(self._runtime) if root else None,
            "root": str(empty) if root else None,
        }
        files = (theirs.fileno(), *(sock.fileno() for sock in listening))
        with theirs:
            try:
                # The thread that starts it must live on: for the kernel that is its parent.
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _CODE, json.dumps(given)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=files,
                    env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise SandboxError(f"the API process did not start: {error}") from error
        self.api_starts += 1
        return process, Channel(ours, self._keeper, self._tokens, self._work)

    def _tell_gone(self, name: str) -> None:
        channel = self._channel
        if channel is not None:
            channel.tell_gone(name)

    def _tend(self) -> None:
        while not self._stopping.wait(_TICK):
            try:
                self._keeper.tend()
            except Exception:  # tried again in a moment
                _log.exception("event=tend_failed")


def user_of(runtime: Path) -> int:
    """Return the number of the user that root's API process in this folder becomes."""
    found = hashlib.blake2b(os.fsencode(runtime.absolute()), digest_size=2).digest()
    return _FIRST_USER + int.from_bytes(found, "big")


def _on_signals() -> int:
    """Return a file that can be read from once SIGINT or SIGTERM came."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)
    return read


def _ignore(*_: object) -> None:
    """Do nothing: whoever waits reads of it from the file."""


def _nothing() -> None:
    """Do nothing."""


def _await_end(process: subprocess.Popen[bytes], wake: int, timeout: float = -1) -> bool | None:
    """Wait for the end of a process or for a signal; whether it was the latter, None for neither.

    `timeout`: in seconds, below 0 for none.
    """
    pidfd = os.pidfd_open(process.pid)
    try:
        poller = select.poll()
        for fd in (pidfd, wake):
            poller.register(fd, select.POLLIN)
        found = poller.poll(timeout * 1000 if timeout >= 0 else None)
        return any(fd == wake for fd, _ in found) if found else None
    finally:
        os.close(pidfd)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise SandboxError(f"{host}:{port} cannot be listened on: {error}") from error
