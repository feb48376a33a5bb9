"""The interpreter inside a function sandbox. Run as a program there; imports nothing of fathom.

It forks the process of the next call in advance, so that a call waits for nothing. After a call it
ends every process that is left, empties the folders that can be written to and forks the next one.
A state that it cannot clean ends it, and the sandbox with it.

The host is heard and answered by this process alone: a call has two pipes of its own, and nothing
that it writes reaches the host but one answer, in a frame made here. Standard input and output are
closed in a call's process before its code is known, and this process cannot be looked into.

    from the host   nonce (16 bytes), size (4), the request as JSON
    to the host     nonce of the request, kind (1), size, the answer as JSON
    to the call     size, the request
    from the call   one byte when it is ready; size, the answer

Paper: §5.2.5 (function calls in pre-created containers).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import time
import traceback

FOLDERS = ("/work", "/tmp", "/dev/shm")
SHARED = ("/proc/sysvipc/shm", "/proc/sysvipc/sem", "/proc/sysvipc/msg")
READY, ANSWERED, ENDED = 0, 1, 2
NONCE = 16
REQUEST_LIMIT = ANSWER_LIMIT = 64 << 20
_FROM_HOST = struct.Struct(f"<{NONCE}sI")
_TO_HOST = struct.Struct(f"<{NONCE}sBI")
_SIZE = struct.Struct("<I")
_HOST_IN, _HOST_OUT = 0, 1
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _BY_FILTER = 4, 22, 2
_LIMITS = 16  # kinds of resource limits that Linux has


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


class _Carrier:
    """Carries what a call is told and what it answers, and keeps nothing of either.

    The process of the next call is a copy of this one: bytes left in memory would be shown to it.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(1 << 16)
        self._zeros = bytes(len(self._buffer))

    def carry(self, source: int, target: int, head: bytes, size: int) -> None:
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


class _Call:
    """The process of one call, and this end of its pipes."""

    def __init__(self) -> None:
        inbox, self.tell = os.pipe()
        self.hear, outbox = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            try:
                _serve_one(inbox, outbox)
            finally:
                os._exit(1)
        os.close(inbox)
        os.close(outbox)
        if _read(self.hear, 1) != b"r":
            raise _Unclean("the process of the next call did not start")
        self._end = os.pidfd_open(self.process)

    def answers(self) -> bool:
        """Wait for an answer to begin; False when none can come any more."""
        poller = select.poll()
        poller.register(self.hear, select.POLLIN)
        poller.register(self._end, select.POLLIN)
        return bool(dict(poller.poll()).get(self.hear, 0) & select.POLLIN)

    def close(self) -> None:
        """Take note of the end. Raises _Unclean when there was more than one answer."""
        os.close(self.tell)
        os.close(self._end)
        # Whoever could write here was ended: what comes now was written before.
        os.set_blocking(self.hear, False)
        try:
            if os.read(self.hear, 1):
                raise _Unclean("a call wrote more than one answer")
        except BlockingIOError as error:
            raise _Unclean("the answers of a call are still open somewhere") from error
        finally:
            os.close(self.hear)


def _warm_up() -> None:
    """Touch the memory that a call will touch: a fork copies it page by page, on first use."""
    names: dict[str, object] = {"__name__": "__call__"}
    exec(compile("def main(x):\n    return [x]", "<call>", "exec"), names)
    json.loads(json.dumps({"value": names["main"](1)}))  # type: ignore[operator]


def _keep_only(outbox: int) -> tuple[int, int]:
    """Close all but a new file for output and `outbox`; return both, as their new numbers."""
    said = fcntl.fcntl(os.memfd_create("output", 0), fcntl.F_DUPFD, 16)
    outbox = fcntl.fcntl(outbox, fcntl.F_DUPFD, said + 1)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.closerange(3, said)
    os.closerange(said + 1, outbox)
    os.closerange(outbox + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return said, outbox


def _serve_one(inbox: int, outbox: int) -> None:
    """Wait for one call in a process of its own, carry it out, and end."""
    # All that does not depend on the call is done before it comes.
    os.dup2(inbox, 0)
    said, outbox = _keep_only(outbox)
    null = os.open("/dev/null", os.O_RDONLY)
    _warm_up()
    _write(outbox, b"r")
    request = json.loads(_read(0, _SIZE.unpack(_read(0, _SIZE.size))[0]))
    os.dup2(null, 0)
    gc.enable()
    answer: dict[str, object] = {}
    try:
        names: dict[str, object] = {"__name__": "__call__"}
        exec(compile(request["code"], "<call>", "exec"), names)
        value = names[request["function"]](request["argument"])  # type: ignore[operator]
        answer["value"] = json.loads(json.dumps(value))
    except BaseException as error:
        answer["error"] = "".join(traceback.format_exception(error, limit=-20))[-20000:]
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    size = os.fstat(said).st_size
    answer["output"] = os.pread(said, request["cap"], 0).decode(errors="replace")
    answer["truncated"] = size > request["cap"]
    data = json.dumps(answer).encode()
    _write(outbox, _SIZE.pack(len(data)) + data)
    os._exit(0)


def _monitor_is_ours() -> bool:
    """Whether our own parent, which watches over us, could be ended by us."""
    try:
        os.kill(os.getppid(), 0)
    except PermissionError:
        return False
    return True


def _kill_others() -> None:
    """End what a call left running, and return once none of it runs any more."""
    ours = _monitor_is_ours()
    spared = {1, os.getpid(), os.getppid()}
    while True:
        if not ours:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        found = False
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) in spared:
                continue
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/stat") as file:
                    alive = file.read().rpartition(")")[2].split()[0] not in "ZX"
                if alive:
                    found = True
                    if ours:
                        os.kill(int(name), signal.SIGKILL)
        if not found:
            return
        time.sleep(0.0002)


class _Before:
    """How this process and its folders are before any call: so they must be again after each.

    What a call may change with the rights that it shares with us is put back (folders), or is
    closed to it by the filter and compared all the same (limits, processors, priority).
    """

    def __init__(self) -> None:
        self._own = self._look()
        self._folders = {folder: os.stat(folder) for folder in FOLDERS}
        self._names = {folder: _attributes(folder) for folder in FOLDERS}

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
            for entry in list(os.scandir(folder)):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
            now = os.stat(folder)
            if now.st_mode != found.st_mode:
                os.chmod(folder, found.st_mode & 0o7777)
            if _attributes(folder) != self._names[folder]:
                raise _Unclean(f"a call left attributes at {folder}")
            if now.st_uid == os.getuid():
                os.utime(folder, ns=(found.st_atime_ns, found.st_mtime_ns))
        for path in SHARED:
            with open(path) as file:
                if len(file.readlines()) > 1:
                    raise _Unclean("a call left shared memory")


def _attributes(folder: str) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(folder, name) for name in os.listxattr(folder)}
    except OSError:
        return {}


def _shut_in(program: bytes) -> None:
    """Close this process to its calls, which have the same user, and take on their filter.

    Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    held = ctypes.create_string_buffer(described, len(described))
    for option, *values in (
        (_PR_SET_DUMPABLE, 0, 0),
        (_PR_SET_SECCOMP, _BY_FILTER, ctypes.addressof(held)),
    ):
        if libc.prctl(option, *(ctypes.c_ulong(value) for value in (*values, 0, 0))):
            raise OSError(ctypes.get_errno(), f"prctl {option}")


def _rehearse(carrier: _Carrier) -> None:
    """Do once what the next call will need: after a fork each page costs a copy on first touch."""
    a, b = os.pipe(), os.pipe()
    os.write(a[1], _FROM_HOST.pack(bytes(NONCE), 2) + b"{}")
    nonce, size = _FROM_HOST.unpack(_read(a[0], _FROM_HOST.size))
    carrier.carry(a[0], b[1], _SIZE.pack(size), size)
    poller = select.poll()
    poller.register(a[0], select.POLLIN)
    poller.register(b[0], select.POLLIN)
    if bool(dict(poller.poll()).get(b[0], 0) & select.POLLIN):
        (size,) = _SIZE.unpack(_read(b[0], _SIZE.size))
        carrier.carry(b[0], a[1], _TO_HOST.pack(nonce, ANSWERED, size), size)
    for fd in (*a, *b):
        os.close(fd)


def _serve(carrier: _Carrier, before: _Before, nonce: bytes) -> bytes:
    """Have one call done, and everything of it removed; return the nonce it had."""
    call = _Call()
    _rehearse(carrier)
    # Nobody but this process can write there: that it is in step is told by the last nonce.
    _write(_HOST_OUT, _TO_HOST.pack(nonce, READY, 0))
    nonce, size = _FROM_HOST.unpack(_read(_HOST_IN, _FROM_HOST.size))
    carrier.carry(_HOST_IN, call.tell, _SIZE.pack(size), size)
    if call.answers():
        (size,) = _SIZE.unpack(_read(call.hear, _SIZE.size))
        if size > ANSWER_LIMIT:
            raise _Unclean(f"a call announced an answer of {size} bytes")
        head = _TO_HOST.pack(nonce, ANSWERED, size)
        carrier.carry(call.hear, _HOST_OUT, head, size)
    else:
        _write(_HOST_OUT, _TO_HOST.pack(nonce, ENDED, 0))
    _kill_others()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    call.close()
    before.restore()
    return nonce


def main() -> None:
    """Answer calls until the line ends. The one argument is the filter of calls, in hexadecimal."""
    _shut_in(bytes.fromhex(sys.argv[1]))
    carrier, before, nonce = _Carrier(), _Before(), bytes(NONCE)
    # What the interpreter's collector never looks at again is never copied again.
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        try:
            nonce = _serve(carrier, before, nonce)
        except (EOFError, OSError, RecursionError, _Unclean):
            os._exit(3)


if __name__ == "__main__":
    main()
