"""The host's end of an interpreter that was taken over: whatever comes is refused and let go."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from fathom.errors import SandboxLost
from fathom.sandbox import Client, fn_link, fn_worker
from fathom.sandbox.frames import Flags
from fathom.sandbox.line import Line, Refused
from fathom.sandbox.process import NUMBER, Order
from fathom.sandbox.request import form_request

Send = Callable[[bytes, list[int]], None]


@pytest.fixture
def ends() -> Iterator[tuple[Line, socket.socket]]:
    ours, theirs = socket.socketpair()
    line = Line(ours)
    before = len(os.listdir("/proc/self/fd"))
    yield line, theirs
    line.close()
    theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2


def pipe_end() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def internet() -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()


def packets() -> int:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    second.close()
    return first.detach()


def silent() -> int:
    first, second = socket.socketpair()
    second.close()
    return first.detach()


NEXT = fn_worker.NEXT


@pytest.mark.parametrize(
    ("data", "files"),
    [
        (NEXT, []),
        (b"x", [silent]),
        (NEXT * 2, [silent]),
        (NEXT, [pipe_end]),
        (NEXT, [internet]),
        (NEXT, [packets]),
        (NEXT, [silent, silent]),
        (NEXT, [silent] * 20),
        (NEXT, [lambda: os.open("/dev/null", os.O_RDONLY)]),
        (NEXT, [lambda: os.memfd_create("x")]),
        (NEXT, [silent]),  # of the right kind, but nobody is at its other end
    ],
)
def test_what_is_no_socket_of_a_call_is_refused(
    ends: tuple[Line, socket.socket], data: bytes, files: list[Callable[[], int]]
):
    line, theirs = ends
    opened = [make() for make in files]
    socket.send_fds(theirs, [data], opened)
    for fd in opened:
        os.close(fd)
    with pytest.raises(SandboxLost):
        anyio.run(fn_link.Direct(line).ready)


@pytest.mark.parametrize("size", [fn_worker.ANSWER_LIMIT + 1, (1 << 32) - 1])
def test_an_answer_that_is_announced_too_large(ends: tuple[Line, socket.socket], size: int):
    line, theirs = ends
    ours, call = socket.socketpair()
    with call:
        socket.send_fds(theirs, [NEXT], [ours.fileno()])
        ours.close()
        call.send(fn_worker.WARM + struct.pack("<I", size))

        async def run() -> None:
            link = fn_link.Direct(line)
            await link.ready()
            await link.ask(b"{}")

        with pytest.raises(SandboxLost, match="announced"):
            anyio.run(run)


def test_what_follows_an_answer_is_not_taken_for_the_next(ends: tuple[Line, socket.socket]):
    line, theirs = ends
    answers: list[bytes | None] = []

    async def run() -> None:
        link = fn_link.Direct(line)
        for number in range(3):
            ours, call = socket.socketpair()
            with call:
                socket.send_fds(theirs, [NEXT], [ours.fileno()])
                ours.close()
                await anyio.lowlevel.checkpoint()
                frame = struct.pack("<I", 1) + str(number).encode()
                call.send(fn_worker.WARM + frame + struct.pack("<I", 6) + b"forged")
                await link.ready()
                answers.append(await link.ask(b"{}"))

    anyio.run(run)
    assert answers == [b"0", b"1", b"2"]


@pytest.mark.parametrize("what", ["a key", "a terminal"])
def test_a_line_is_handed_over_whole_or_not_at_all(options: dict[str, Path], what: str):
    flags = Flags.LINE | (Flags.PTY if what == "a terminal" else Flags(0))
    order = Order(
        request=form_request(["cat"], timeout=10),
        cap=0,
        flags=flags,
        op="k" if what == "a key" else None,
    )

    async def run() -> bytes:
        async with Client(**options) as client, await client.create() as sandbox:
            line = await sandbox._line()  # pyright: ignore[reportPrivateUsage]
            await line.send(order.frame())
            with pytest.raises(Refused, match="cannot become"):
                await line.receive_started(NUMBER)
            line.close()
            # What is handed over carries plain bytes, and its end is the command's.
            plain = await sandbox.hand_line(["head", "-c", "5"], timeout=10)
            assert plain is not None
            await plain.send(b"hello, and more")
            found = b""
            while piece := await plain.receive_some(100):
                found += piece
            plain.close()
            return found

    assert anyio.run(run) == b"hello"
