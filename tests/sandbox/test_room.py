"""Commands for which there is no process at first: each is served, refused in time, or given up."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.errors import SandboxError
from fathom.sandbox import Container, SyncClient, SyncSandbox, box, frames, messages, state
from fathom.sandbox.frames import Flags, Frame, Tag

COMMANDS = 40


@pytest.fixture
def small(client: SyncClient) -> SyncSandbox:
    """One that has room for one command, which may start nothing."""
    return client.create(Container(pids=1))


@pytest.fixture
def line(small: SyncSandbox, options: dict[str, Path]) -> Iterator[socket.socket]:
    folder = options["runtime_dir"] / small.id
    secret = bytes.fromhex(json.loads((folder / state.SESSION).read_text())["secret"])
    with messages.connect(folder, state.SOCKET) as made:
        made.settimeout(20)
        made.sendall(box.greeting(secret))
        yield made


def exec_frame(number: int, *argv: str, seconds: float = 20, flags: int = 0, op: str = "") -> bytes:
    fields: list[tuple[int, bytes | str | int]] = [(Tag.ARG, text) for text in argv]
    fields += [(Tag.TIMEOUT_US, int(seconds * 1e6)), (Tag.CAP, 1000), (Tag.FLAGS, flags)]
    fields += [(Tag.CWD, "/work"), (Tag.ENV, "PATH=/bin:/usr/bin")]
    if op:
        fields += [(Tag.OP, op), (Tag.DIGEST, "d")]
    return frames.pack(number, Frame.EXEC, frames.join_fields(fields))


def hear(line: socket.socket, *numbers: int) -> dict[int, list[frames.Received]]:
    """What a line says until each of these operations has ended."""
    found: dict[int, list[frames.Received]] = {number: [] for number in numbers}
    splitter = frames.Splitter()
    while not all(said and said[-1].kind == Frame.EXIT for said in found.values()):
        data = line.recv(1 << 16)
        assert data
        for frame in splitter.feed(data):
            if frame.number in found:
                found[frame.number].append(frame)
    return found


def test_each_of_many_has_its_turn(small: SyncSandbox):
    said: dict[int, str] = {}

    def ask(number: int) -> None:
        try:
            small.files.write(f"f{number}", str(number))
            text = small.exec("cat", stdin=f"{number}", timeout=30, op=f"op/{number}").stdout
            said[number] = text + small.files.read(f"f{number}").decode()
        except Exception as error:
            said[number] = repr(error)

    workers = [threading.Thread(target=ask, args=(n,)) for n in range(COMMANDS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert {n: text for n, text in said.items() if text != f"{n}{n}"} == {}
    assert len(said) == COMMANDS


def test_one_that_waits_in_vain_is_refused(small: SyncSandbox):
    with small.run(["sleep", "100"], timeout=100):
        began = time.monotonic()
        with pytest.raises(SandboxError, match="raise pids or memory"):
            small.exec("true", timeout=1, op="never/1")
        assert 0.9 < time.monotonic() - began < 10
        assert small.receipt("never/1").state == "never"
    assert small.exec("echo on", timeout=10, op="never/1").stdout == "on\n"


def test_what_is_said_to_one_that_waits_reaches_it(small: SyncSandbox, line: socket.socket):
    line.sendall(
        exec_frame(1, "sleep", "0.5")
        + exec_frame(2, "cat", flags=Flags.STDIN)
        + exec_frame(3, "sleep", "100")
        + frames.pack(2, Frame.STDIN, b"first ")
        + frames.pack(2, Frame.STDIN, b"second")
        + frames.pack(2, Frame.EOF)
        + exec_frame(2, "true")
        + frames.pack(3, Frame.CANCEL)
    )
    said = hear(line, 1, 2, 3)
    (refusal,) = [frame for frame in said[2] if frame.kind == Frame.ERROR]
    assert b"in use" in refusal.payload
    output = b"".join(frame.payload for frame in said[2] if frame.kind == Frame.STDOUT)
    assert output == b"first second"
    assert frames.number_of(said[3][-1].fields()[Tag.CANCELLED]) == 1
    assert small.exec("echo on", timeout=10).stdout == "on\n"


def test_one_whose_line_ends_before_its_turn_never_begins(small: SyncSandbox, line: socket.socket):
    """One that has a monitor already goes on under its key; the receipt tells which it was."""
    asked = [exec_frame(1, "sleep", "4", op="1")]
    asked += [exec_frame(number, "touch", f"f{number}", op=str(number)) for number in (2, 3, 4)]
    line.sendall(b"".join(asked))
    deadline = time.monotonic() + 10
    while small.receipt("1").state != "running":
        assert time.monotonic() < deadline
    line.close()
    made = small.exec("ls", timeout=30).stdout.split()
    states = {number: small.receipt(str(number)).state for number in (2, 3, 4)}
    assert made == [f"f{number}" for number, told in states.items() if told == "finished"]
    assert states[3] == states[4] == "never"


def test_one_that_is_cancelled_as_it_begins_does_not_go_on(
    sandbox: SyncSandbox, options: dict[str, Path]
):
    folder = options["runtime_dir"] / sandbox.id
    secret = bytes.fromhex(json.loads((folder / state.SESSION).read_text())["secret"])
    for _ in range(10):
        with messages.connect(folder, state.SOCKET) as line:
            line.settimeout(20)
            asked = exec_frame(1, "sleep", "4711") + frames.pack(1, Frame.CANCEL)
            line.sendall(box.greeting(secret) + asked)
            assert hear(line, 1)[1][-1].kind == Frame.EXIT
    left = sandbox.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' '", timeout=10).stdout
    assert "4711" not in left.replace("cat /proc", "")
