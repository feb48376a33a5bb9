"""Messages between the processes of a node: long ones, bad ones, and what they must not cost."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fathom.errors import SandboxError
from fathom.sandbox import Container, Net, SyncClient, messages
from fathom.sandbox.messages import MESSAGE_LIMIT, BadMessage

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield one, other


@pytest.mark.parametrize("size", [0, 59_000, 60_000, 61_000, 140_000, 3_000_000])
def test_a_message_of_any_size_arrives_with_its_files(pair: Pair, size: int):
    one, other = pair
    read, write = os.pipe()
    messages.send(one, {"text": "x" * size}, (read, write))
    message, fds = messages.receive(other)
    assert message == {"text": "x" * size}
    assert len(fds) == 2
    os.write(fds[1], b"through")
    assert os.read(read, 10) == b"through"
    for fd in (read, write, *fds):
        os.close(fd)


def test_a_message_without_fields_is_one(pair: Pair):
    messages.send(pair[0], {}, ())
    assert messages.receive(pair[1]) == ({}, [])


def test_one_too_long_is_refused_before_it_is_sent(pair: Pair):
    with pytest.raises(SandboxError, match="ask for less"):
        messages.send(pair[0], {"text": "x" * MESSAGE_LIMIT})
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        messages.receive(pair[1])


def forged(sealed: bool) -> int:
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b'{"a": 1}')
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


@pytest.mark.parametrize(
    "data", [b"{", b"[]", b"1", b"\xff", b"[" * 50_000, b'{"x": "%s"}' % (b"y" * 100_000)]
)
def test_what_is_no_message_is_told_and_its_files_are_closed(pair: Pair, data: bytes):
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryFile() as file:
        rights = array.array("i", [file.fileno()])
        pair[0].sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    with pytest.raises(BadMessage):
        messages.receive(pair[1])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["pipe", "file", "unsealed", "half sealed"])
def test_a_long_message_is_read_from_nothing_that_could_change_or_block(pair: Pair, kind: str):
    read, write = os.pipe()
    with tempfile.TemporaryFile() as file:
        fd = {"pipe": read, "file": file.fileno()}.get(kind)
        fd = forged(kind == "half sealed") if fd is None else os.dup(fd)
        rights = array.array("i", [fd])
        pair[0].sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    for one in (read, write, fd):
        os.close(one)
    with pytest.raises(BadMessage):
        messages.receive(pair[1])


def test_no_message_ends_a_node(client: SyncClient):
    sandbox = client.create(Container())
    link = client._client._host.link  # pyright: ignore
    for data in (b"[]", b"{", b"{}", b'{"op": "create"}', b'{"op": ["x"]}', b"x" * 150_000):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            rights = array.array("i", [theirs.fileno(), theirs.fileno()])
            link._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            link._sock.sendmsg([data])
            link._sock.sendmsg([b'{"op": 1}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    with pytest.raises(SandboxError, match="ask for less"):
        link.request("stats", id="x" * MESSAGE_LIMIT)
    assert sandbox.exec("echo alive", timeout=10).stdout == "alive\n"
    assert link.starts == 1


@pytest.mark.usefixtures("need_root")
def test_a_policy_of_any_length(client: SyncClient):
    sandbox, other = client.create(Container()), client.create(Container())
    if "address" not in sandbox.caps.networks:
        pytest.skip("needs nftables")
    addresses = tuple((f"10.{n >> 8}.{n & 255}.1", 443) for n in range(9000))
    assert sandbox.phase("long", net=replace(Net.deny(), addresses=addresses)) == 1
    assert other.exec("echo alive", timeout=10).stdout == "alive\n"


def test_a_node_that_cannot_be_asked_now_is_left_alone(
    client: SyncClient, monkeypatch: pytest.MonkeyPatch
):
    """A client that runs out of descriptors must not end its sandboxes for it."""
    sandbox = client.create(Container())

    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("fathom.sandbox.nodelink.socket.socketpair", refuse)
        with pytest.raises(SandboxError, match="Too many open files"):
            sandbox.stats()
    assert sandbox.exec("echo alive", timeout=10).stdout == "alive\n"
