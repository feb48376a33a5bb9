"""One client's session, sealed off: a network of loopback alone, and nothing of the caller's.

`run` starts this module in new namespaces of users, network and processes. Inside, it brings
loopback up, starts the server and the client, and says what the client did. Everything dies with
it, also what a client leaves running.

Paper: none (a test).
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fathom.errors import FathomError, Unsupported
from fathom.eval.clients.plans import BASE, CLIENTS, PORT, STEPS, Client, Step

RECORD = "record.jsonl"
_SEALED = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child",
           "--mount-proc")  # fmt: skip
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STEP_SECONDS, _SERVER_SECONDS = 90.0, 60.0
_SPEAKING_SECONDS = 2.0  # how long a reply runs before it is cancelled
_NOTES = "the colour is blue\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a client did in a step; times are seconds since the epoch.

    interrupted: when it was told to stop, None if it was not.
    """

    name: str
    began: float
    ended: float
    exit_code: int | None
    output: str
    interrupted: float | None = None


def check_sealable() -> None:
    """Raises Unsupported where no namespaces can be had."""
    if shutil.which("unshare") is None:
        raise Unsupported("there is no unshare: apt-get install util-linux")
    tried = subprocess.run([*_SEALED, "true"], capture_output=True, text=True)
    if tried.returncode:
        raise Unsupported(
            f"cannot make namespaces ({tried.stderr.strip()}): run as root, or allow them:\n"
            "  sysctl -w user.max_user_namespaces=10000\n"
            "  sysctl -w kernel.apparmor_restrict_unprivileged_userns=0  (where it exists)"
        )


def run(client: Client, folder: Path, scratch: Path) -> list[StepResult]:
    """Drive `client` of `folder` through the session; the record lies in `scratch` afterwards.

    Raises FathomError when the session could not be run at all.
    """
    command = [*_SEALED, sys.executable, "-m", __spec__.name if __spec__ else __name__,
               client.name, str(folder), str(scratch)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    result = scratch / "steps.json"
    if done.returncode or not result.exists():
        raise FathomError(
            f"the session of {client.name} did not run: {done.stderr.strip()[-2000:]}"
        )
    return [StepResult(**step) for step in json.loads(result.read_text())]


class Run:
    """A session inside the namespaces."""

    def __init__(self, client: Client, folder: Path, scratch: Path) -> None:
        self._client, self._folder = client, folder
        self._home, self._work = scratch / "home", scratch / "work"
        self._work.mkdir()
        (self._work / "notes.txt").write_text(_NOTES)
        for name, text in client.files.items():
            path = self._home / name
            path.parent.mkdir(parents=True)
            path.write_text(text)
        self._home.mkdir(exist_ok=True)

    def steps(self) -> list[StepResult]:
        """All steps; a conversation that is typed is one program."""
        results: list[StepResult] = []
        typing: Typing | None = None
        for step in STEPS:
            if not self._client.typed:
                results.append(self._step(step))
                continue
            if not step.again:
                if typing is not None:
                    typing.close()
                typing = Typing(self._start_typed(step))
                results.append(typing.step(step))
            elif typing is not None:
                results.append(typing.step(step, f"{step.prompt}\r"))
        if typing is not None:
            typing.close()
        return results

    def _arguments(self, step: Step) -> list[str]:
        words = self._client.again if step.again else self._client.first
        words = tuple(step.prompt if word == "PROMPT" else word for word in words)
        return [str(self._folder / self._client.program), *words]

    def _variables(self) -> dict[str, str]:
        own = f"{self._folder}/node_modules/.bin:{Path(shutil.which('node') or '/usr/bin').parent}"
        plain = {"PATH": f"{own}:{_SYSTEM_PATH}", "HOME": str(self._home), "TERM": "xterm"}
        return plain | {"LANG": "C.UTF-8"} | self._client.variables

    def _step(self, step: Step) -> StepResult:
        began = time.time()
        out = self._work.parent / f"{step.name}.out"
        with out.open("wb") as file:
            process = subprocess.Popen(
                self._arguments(step),
                cwd=self._work,
                env=self._variables(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        interrupted = None
        if step.cancel and wait_until(speaking, 30):
            time.sleep(_SPEAKING_SECONDS)
            interrupted = time.time()
            os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C reaches all of it
        code = _end(process, 15 if step.cancel else _STEP_SECONDS)
        return StepResult(
            name=step.name,
            began=began,
            ended=time.time(),
            exit_code=code,
            output=out.read_text(errors="replace"),
            interrupted=interrupted,
        )

    def _start_typed(self, step: Step) -> tuple[subprocess.Popen[bytes], int]:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, 0x5414, struct.pack("HHHH", 50, 200, 0, 0))  # TIOCSWINSZ
        process = subprocess.Popen(
            self._arguments(step),
            cwd=self._work,
            env=self._variables(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=_own_terminal,  # there is one thread, and no other way
        )
        os.close(theirs)
        return process, ours


class Typing:
    """A client on a terminal, for a whole conversation."""

    def __init__(self, started: tuple[subprocess.Popen[bytes], int]) -> None:
        self._process, self._terminal = started

    def step(self, step: Step, line: str = "") -> StepResult:
        """Type `line` and wait until the client shows what it must, or is interrupted."""
        began, interrupted = time.time(), None
        os.write(self._terminal, line.encode())
        if step.cancel:
            output = self._read(speaking, 30)
            output += self._read(lambda: False, _SPEAKING_SECONDS)
            interrupted = time.time()
            os.write(self._terminal, b"\x03")
            output += self._read(lambda: not speaking(), 15)
            output += self._read(lambda: False, 1.5)
        else:
            output = ""
            deadline = time.time() + _STEP_SECONDS
            while step.expect not in output and time.time() < deadline:
                output += self._read(lambda: False, 0.5)
            output += self._read(lambda: False, 1.5)  # until it takes the next line
        return StepResult(
            name=step.name,
            began=began,
            ended=time.time(),
            exit_code=None,
            output=output,
            interrupted=interrupted,
        )

    def close(self) -> None:
        """End the client."""
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def _read(self, enough: Callable[[], bool], seconds: float) -> str:
        data, deadline = b"", time.time() + seconds
        while time.time() < deadline and not enough():
            if select.select([self._terminal], [], [], 0.1)[0]:
                try:
                    data += os.read(self._terminal, 1 << 16)
                except OSError:  # the client has gone
                    break
        return data.decode("utf-8", "replace")


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, 0x540E, 0)  # TIOCSCTTY: Ctrl-C must reach it


def _end(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; None for one that had to be killed."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it came to hold within that time."""
    deadline = time.time() + seconds
    while not holds():
        if time.time() > deadline:
            return False
        time.sleep(0.1)
    return True


def speaking() -> bool:
    """Whether the model is writing a reply, by the server's own counter."""
    for line in _get("/metrics").splitlines():
        if line.startswith("fathom_running"):
            return float(line.split()[-1]) > 0
    return False


def _get(path: str) -> str:
    try:
        with urllib.request.urlopen(BASE + path, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1


def device_flags(device: str, *, raise_to_up: bool = False) -> int:
    """The flags of a network device, after setting UP if so asked."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        asked = struct.pack("16sH14x", device.encode(), 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(handle, _GET_FLAGS, asked))[1]
        if raise_to_up:
            flags |= _UP
            fcntl.ioctl(handle, _SET_FLAGS, struct.pack("16sH14x", device.encode(), flags))
    return flags


def main(name: str, folder: Path, scratch: Path) -> None:
    """Run the session of the client `name` in this, already sealed, process."""
    for _, device in socket.if_nameindex():
        if device != "lo" and device_flags(device) & _UP:
            raise FathomError(f"the network is not sealed: {device} is up")
    device_flags("lo", raise_to_up=True)
    client = next(c for c in CLIENTS if c.name == name)
    record = scratch / RECORD
    command = [sys.executable, "-m", "fathom", "serve", "--model", "scripted",
               "--port", str(PORT), "--record", str(record)]  # fmt: skip
    with (scratch / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            if not wait_until(lambda: bool(_get("/health")), _SERVER_SECONDS):
                raise FathomError(
                    "the server did not start: " + (scratch / "server.log").read_text()
                )
            results = Run(client, folder, scratch).steps()
            wait_until(lambda: not speaking(), 5)
        finally:
            server.terminate()
            server.wait()
    steps: list[dict[str, Any]] = [asdict(result) for result in results]
    (scratch / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
