"""Commands in a pool of interpreters: each is a call that runs a program and tells how it ended.

Paper: §5.2.5 (one surface for every type of sandbox).
"""

from __future__ import annotations

import base64
from typing import Any

from fathom.errors import SandboxError
from fathom.sandbox.request import PATH, Request
from fathom.sandbox.types import ExecResult

# Runs a command in the process of a call. Output beyond the cap is read and dropped. What it leaves
# in the background may hold its output open: what was written until its own end counts, no more.
CODE = """
import array, base64, fcntl, os, subprocess, termios, threading, time

def unread(pipe):
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]

def main(order):
    os.chdir(order["cwd"])
    given = order["stdin"]
    try:
        process = subprocess.Popen(order["argv"], env=order["env"],
            stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if order["merge"] else subprocess.PIPE)
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        code = 127 if isinstance(error, FileNotFoundError) else 126
        said = base64.b64encode(str(error).encode()).decode()
        return {"code": code, "out": "", "err": said, "truncated": False}
    cap, cut, threads = order["cap"], set(), []
    kept = {"out": bytearray(), "err": bytearray()}

    def drain(name, pipe):
        while piece := pipe.read1(65536):
            if len(kept[name]) + len(piece) > cap:
                cut.add(name)
            kept[name] += piece[:cap - len(kept[name])]

    for name, pipe in (("out", process.stdout), ("err", process.stderr)):
        if pipe is not None:
            thread = threading.Thread(target=drain, args=(name, pipe), daemon=True)
            thread.start()
            threads.append((thread, pipe))
    if given is not None:
        try:
            with process.stdin:
                process.stdin.write(base64.b64decode(given))
        except BrokenPipeError:
            pass
    code = process.wait()
    end = time.monotonic() + 1
    for thread, pipe in threads:
        while thread.is_alive() and time.monotonic() < end and unread(pipe):
            thread.join(0.01)
        thread.join(0.05)
    shown = {name: base64.b64encode(bytes(kept[name])).decode() for name in kept}
    return {"code": 128 - code if code < 0 else code, "truncated": bool(cut), **shown}
"""


def argument(request: Request, data: bytes | None, *, merge: bool, cap: int) -> dict[str, Any]:
    """Return what `CODE` is called with to run a command. `data`: its standard input."""
    return {
        "argv": ["/bin/sh", "-c", *request.argv] if request.shell else list(request.argv),
        "cwd": request.cwd,
        "env": {"PATH": PATH, **request.env},
        "stdin": None if data is None else base64.b64encode(data).decode(),
        "merge": merge,
        "cap": cap,
    }


def ended(value: Any, seconds: float) -> ExecResult:
    """Read what `CODE` returned. Raises SandboxError for what is not that."""
    try:
        texts = [base64.b64decode(value[name]).decode(errors="replace") for name in ("out", "err")]
        return ExecResult(
            exit_code=int(value["code"]),
            stdout=texts[0],
            stderr=texts[1],
            output="".join(texts),
            truncated=bool(value["truncated"]),
            duration=seconds,
        )
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise SandboxError("a function sandbox sent something that is no result") from error
