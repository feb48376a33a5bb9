"""The interpreter inside a function sandbox. Run as a program there; imports nothing of fathom.

It forks the process of the next call in advance, so that a call waits for nothing. After a call it
ends every process that is left, empties the folders that can be written to and forks the next one.
A state that it cannot clean ends it, and the sandbox with it.

Each call's process has one end of a pair of sockets that is new for it, and nothing else that leads
out. What is written there can be taken for the answer of this call alone:

    "direct"  the other end goes to the host, over the line that is standard input and output here
    "relay"   for hosts that no open file can be sent to: the other end stays here, the request is
              carried to it and one answer back, in frames that name the request by its nonce

    to the host, direct   one byte, and the socket of the next call
    from the host, direct one byte when it is done with a call
    from the host, relay  nonce (16 bytes), size (4), the request as JSON
    to the host, relay    nonce of the request, kind (1), size, the answer as JSON
    to a call             size, the request
    from a call           one byte when it is ready; size, the answer

Standard input and output are closed in a call's process before its code is known, and this process
cannot be looked into.

Paper: §5.2.5 (function calls in pre-created containers).
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import resource
import select
import signal
import struct
import sys
import time

FOLDERS = ("/work", "/tmp", "/dev/shm")
SHARED = ("/proc/sysvipc/shm", "/proc/sysvipc/sem", "/proc/sysvipc/msg")
READY, ANSWERED, ENDED = 0, 1, 2
NEXT, WARM, DONE = b"n", b"r", b"d"
NONCE = 16
REQUEST_LIMIT = ANSWER_LIMIT = 64 << 20
SIZE = struct.Struct("<I")
_FROM_HOST = struct.Struct(f"<{NONCE}sI")
_TO_HOST = struct.Struct(f"<{NONCE}sBI")
_HOST_IN, _HOST_OUT = 0, 1
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _BY_FILTER, _PR_SET_CHILD_SUBREAPER = 4, 22, 2, 36
_WALL = 0x40000000  # children that tell of their end by another signal, or by none, too
_LIMITS = 16  # kinds of resource limits that Linux has
_PEEK = _socket.MSG_PEEK | _socket.MSG_DONTWAIT
# What a call's process does before its call: it touches the memory that a call will touch.
_REHEARSAL = json.dumps(
    {"code": "def main(x):\n    return [x]", "argument": 1, "function": "main", "cap": 1 << 20}
).encode()
_LEARNED = 50  # times after which Python's interpreter changes its code no more
_DEEPEST = 500  # folders in one another that are removed; deeper ones cost the container


class _Unclean(Exception):
    """Something of a call is left that cannot be taken back."""


def _read(fd: int, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = os.read(fd, size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class _Call:
    """The process of one call. `host` and `own`: the two ends of its sockets, as numbers."""

    def __init__(self) -> None:
        host, own = _socket.socketpair()
        self.host, self.own = host.detach(), own.detach()
        self.process = os.fork()
        if self.process == 0:
            try:
                _serve_one(self.own)
            finally:
                os._exit(1)
        self.end = os.pidfd_open(self.process)

    def close(self) -> None:
        """Let go of what is still open of it."""
        for fd in (self.host, self.own, self.end):
            if fd >= 0:
                os.close(fd)
        self.host = self.own = self.end = -1


def _keep_only(line: int) -> tuple[int, int]:
    """Close all but a new file for output and `line`; return both, as their new numbers."""
    said = fcntl.fcntl(os.memfd_create("output", 0), fcntl.F_DUPFD, 16)
    line = fcntl.fcntl(line, fcntl.F_DUPFD, said + 1)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.closerange(3, said)
    os.closerange(said + 1, line)
    os.closerange(line + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return said, line


def _serve_one(line: int) -> None:
    """Wait for one call in a process of its own, carry it out, and end."""
    # All that does not depend on the call is done before it comes.
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    said, line = _keep_only(line)
    _answer(_REHEARSAL, said)
    _write(line, WARM)
    request = _read(line, SIZE.unpack(_read(line, SIZE.size))[0])
    gc.enable()
    data = _answer(request, said)
    _write(line, SIZE.pack(len(data)) + data)
    os._exit(0)


def _answer(asked: bytes, said: int) -> bytes:
    """Carry out a call and return what it answers, as JSON. `said`: the file that it prints to."""
    request = json.loads(asked)
    answer: dict[str, object] = {}
    try:
        names: dict[str, object] = {"__name__": "__call__"}
        exec(compile(request["code"], "<call>", "exec"), names)
        value = names[request["function"]](request["argument"])  # type: ignore[operator]
        answer["value"] = json.loads(json.dumps(value))
    except BaseException as error:
        answer["error"] = _told(error)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    size = os.fstat(said).st_size
    answer["output"] = os.pread(said, request["cap"], 0).decode(errors="replace")
    answer["truncated"] = size > request["cap"]
    return json.dumps(answer).encode()


def _rehearse() -> None:
    """Carry out a call here, so that nothing is done for the first time in a call's process.

    There each page costs a copy on its first change, also those that an interpreter changes while
    it learns what its code is used for.
    """
    said = os.memfd_create("output", 0)
    for _ in range(_LEARNED):
        _answer(_REHEARSAL, said)
    os.close(said)


def _told(error: BaseException) -> str:
    try:
        # Not before: each module that is there is copied with every fork.
        import traceback

        return "".join(traceback.format_exception(error, limit=-20))[-20000:]
    except BaseException:
        return f"{type(error).__name__}: the traceback cannot be shown"


def _monitor_is_ours() -> bool:
    """Whether our own parent, which watches over us, could be ended by us."""
    try:
        os.kill(os.getppid(), 0)
    except PermissionError:
        return False
    return True


def _end_all(ours: bool) -> None:
    """End what a call left running, and return once nothing of it is there any more.

    All of it descends from this process, which adopts what loses its parent. `ours`: see above.
    """
    if not ours:
        # The kernel sends to all at once, so that none forks its way out.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(-1, signal.SIGKILL)
    while ours and _kill_each():
        time.sleep(0.0002)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, _WALL)


def _kill_each() -> bool:
    """Kill one by one what runs besides this process and those above it; False for nothing."""
    spared = {1, os.getpid(), os.getppid()}
    found = False
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in spared:
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/stat") as file:
                alive = file.read().rpartition(")")[2].split()[0] not in "ZX"
            if alive:
                found = True
                os.kill(int(name), signal.SIGKILL)
    return found


class _Before:
    """How this process and its folders are before any call: so they must be again after each.

    What a call may change with the rights that it shares with us is put back (folders), or is
    closed to it by the filter and compared all the same (limits, processors, priority).
    """

    def __init__(self) -> None:
        self._own = self._look()
        self._folders = {folder: os.stat(folder) for folder in FOLDERS}
        self._names = {folder: _attributes(folder) for folder in FOLDERS}
        self._empty = [_contents(path) for path in SHARED]

    @staticmethod
    def _look() -> list[object]:
        limits = [resource.getrlimit(number) for number in range(_LIMITS)]
        return [
            limits,
            os.sched_getaffinity(0),
            os.sched_getscheduler(0),
            os.getpriority(os.PRIO_PROCESS, 0),
        ]

    def restore(self) -> None:
        """Empty the folders and put them back. Raises OSError, _Unclean."""
        if self._look() != self._own:
            raise _Unclean("a call changed the interpreter's limits")
        for folder, found in self._folders.items():
            if os.listdir(folder):
                _empty(folder, _DEEPEST)
            now = os.stat(folder)
            if now.st_mode != found.st_mode:
                os.chmod(folder, found.st_mode & 0o7777)
            if _attributes(folder) != self._names[folder]:
                raise _Unclean(f"a call left attributes at {folder}")
            times = found.st_atime_ns, found.st_mtime_ns
            if now.st_uid == os.getuid() and (now.st_atime_ns, now.st_mtime_ns) != times:
                os.utime(folder, ns=times)
        if [_contents(path) for path in SHARED] != self._empty:
            raise _Unclean("a call left shared memory")


def _empty(folder: str, deepest: int) -> None:
    """Remove what is in a folder. Nobody else is there to change it meanwhile.

    Raises OSError, _Unclean.
    """
    if not deepest:
        raise _Unclean("a call left folders that lie too deep in one another")
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            os.chmod(entry.path, 0o700)
            _empty(entry.path, deepest - 1)
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)


def _contents(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _attributes(folder: str) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(folder, name) for name in os.listxattr(folder)}
    except OSError:
        return {}


def _prepare(program: bytes) -> None:
    """Close this process to its calls, which have the same user, and take on their filter.

    Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    held = ctypes.create_string_buffer(described, len(described))
    for option, *values in (
        (_PR_SET_DUMPABLE, 0, 0),
        (_PR_SET_CHILD_SUBREAPER, 1, 0),
        (_PR_SET_SECCOMP, _BY_FILTER, ctypes.addressof(held)),
    ):
        if libc.prctl(option, *(ctypes.c_ulong(value) for value in (*values, 0, 0))):
            raise OSError(ctypes.get_errno(), f"prctl {option}")


class _Direct:
    """Sends the host the socket of each call, and has no part in the call itself."""

    def __init__(self) -> None:
        self._line = _socket.socket(fileno=_HOST_OUT)
        self._owed = False

    def serve(self, call: _Call) -> None:
        """Return once a call is over. Raises EOFError when the host has gone, OSError."""
        # Nobody but the call has its end: the host sees when it is closed.
        os.close(call.own)
        call.own = -1
        if self._owed:
            self._hear()  # of the call before
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("@i", call.host))]
        self._line.sendmsg([NEXT], rights)
        os.close(call.host)
        call.host = -1
        poller = select.poll()
        poller.register(call.end, select.POLLIN)
        poller.register(_HOST_IN, select.POLLIN)
        self._owed = _HOST_IN not in dict(poller.poll())
        if not self._owed:
            self._hear()

    @staticmethod
    def _hear() -> None:
        """Hear that the host is done with a call. Raises EOFError."""
        if os.read(_HOST_IN, 1) != DONE:
            raise EOFError


class _Relay:
    """Carries what a call is told and what it answers, and keeps nothing of either.

    The process of the next call is a copy of this one: bytes left in memory would be shown to it.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(1 << 16)
        self._zeros = bytes(len(self._buffer))
        self._nonce = bytes(NONCE)

    def serve(self, call: _Call) -> None:
        """Return once a call has answered or ended. Raises EOFError, OSError, _Unclean."""
        os.close(call.own)
        call.own = -1
        if _read(call.host, 1) != WARM:
            raise _Unclean("the process of the next call did not start")
        # Nobody but this process can write there: that it is in step is told by the last nonce.
        _write(_HOST_OUT, _TO_HOST.pack(self._nonce, READY, 0))
        self._nonce, size = _FROM_HOST.unpack(_read(_HOST_IN, _FROM_HOST.size))
        self._carry(_HOST_IN, call.host, SIZE.pack(size), size)
        if not self._answers(call):
            _write(_HOST_OUT, _TO_HOST.pack(self._nonce, ENDED, 0))
            return
        (size,) = SIZE.unpack(_read(call.host, SIZE.size))
        if size > ANSWER_LIMIT:
            raise _Unclean(f"a call announced an answer of {size} bytes")
        self._carry(call.host, _HOST_OUT, _TO_HOST.pack(self._nonce, ANSWERED, size), size)

    @staticmethod
    def _answers(call: _Call) -> bool:
        """Wait for an answer to begin; False when none can come any more."""
        poller = select.poll()
        poller.register(call.host, select.POLLIN)
        poller.register(call.end, select.POLLIN)
        poller.poll()
        sock = _socket.socket(fileno=call.host)
        try:
            return bool(sock.recv(1, _PEEK))
        except (BlockingIOError, ConnectionResetError):
            return False
        finally:
            sock.detach()

    def _carry(self, source: int, target: int, head: bytes, size: int) -> None:
        """Write `head` and then `size` bytes of `source` to `target`. Raises EOFError, OSError.

        As few writes as can be: each one wakes the reader.
        """
        view = memoryview(self._buffer)
        used = len(head)
        view[:used] = head
        end = used
        try:
            while size or end:
                if size:
                    got = os.readv(source, [view[end : end + size]])
                    if not got:
                        raise EOFError
                    size -= got
                    end += got
                used = max(used, end)
                if size and end < len(view):
                    continue
                _write(target, view[:end])
                end = 0
        finally:
            view[:used] = self._zeros[:used]


def main() -> None:
    """Answer calls until the line ends. Arguments: "direct" or "relay", and the filter of calls."""
    ours = _monitor_is_ours()
    _prepare(bytes.fromhex(sys.argv[2]))
    way, before = _Direct() if sys.argv[1] == "direct" else _Relay(), _Before()
    _rehearse()
    # What the interpreter's collector never looks at again is never copied again.
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        try:
            call = _Call()
            way.serve(call)
            _end_all(ours)
            call.close()
            before.restore()
        except (EOFError, OSError, RecursionError, _Unclean):
            os._exit(3)


if __name__ == "__main__":
    main()
