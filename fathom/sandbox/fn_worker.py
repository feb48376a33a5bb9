"""The interpreter inside a function sandbox. Run as a program there; imports nothing of fathom.

It forks the process of the next call in advance, so that a call waits for nothing. After a call it
ends every process that is left, empties the folders that can be written to and forks the next one.
A state that it cannot clean ends it, and the sandbox with it.

Paper: §5.2.5 (function calls in pre-created containers).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import struct
import sys
import time
import traceback

FOLDERS = ("/work", "/tmp", "/dev/shm")
SHARED = ("/proc/sysvipc/shm", "/proc/sysvipc/sem", "/proc/sysvipc/msg")
_HEAD = struct.Struct("<I")
_PR_SET_DUMPABLE = 4


def _read(size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = os.read(0, size - len(parts))
        if not part:
            os._exit(0)
        parts += part
    return parts


def _send(fd: int, message: dict[str, object]) -> None:
    data = json.dumps(message).encode()
    view = memoryview(_HEAD.pack(len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def _warm_up() -> None:
    """Touch the memory that a call will touch: a fork copies it page by page, on first use."""
    names: dict[str, object] = {"__name__": "__call__"}
    exec(compile("def main(x):\n    return [x]", "<call>", "exec"), names)
    json.loads(json.dumps({"value": names["main"](1)}))  # type: ignore[operator]


def _serve_one(out: int) -> None:
    """Wait for one call in a process of its own, carry it out, and end."""
    # All that does not depend on the call is done before it comes.
    said = os.memfd_create("output", 0)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    _warm_up()
    _send(out, {"ready": True})
    request = json.loads(_read(_HEAD.unpack(_read(_HEAD.size))[0]))
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
    _send(out, answer)
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


def _clean() -> None:
    """Leave nothing of a call. Ends this process where that cannot be made sure."""
    _kill_others()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    for folder in FOLDERS:
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    os.chmod("/work", 0o755)
    for path in SHARED:
        with open(path) as file:
            if len(file.readlines()) > 1:
                os._exit(3)


def main() -> None:
    """Answer calls until the line ends."""
    import ctypes

    # The call has the same user: its memory and files must stay closed to it.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    out = os.dup(1)
    # What the interpreter's collector never looks at again is never copied again.
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        child = os.fork()
        if child == 0:
            _serve_one(out)
        os.waitpid(child, 0)
        try:
            _clean()
        except OSError:
            os._exit(3)


if __name__ == "__main__":
    main()
