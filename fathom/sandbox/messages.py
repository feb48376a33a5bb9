"""Small messages with open files between the processes of a node.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any, cast

from fathom.errors import SandboxError

MESSAGE_LIMIT = 16 << 20
_INLINE = 60_000  # bytes; what is longer comes in a file
_MOST_FILES = 16
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class BadMessage(OSError):
    """What came is no message; nothing of it was kept."""


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send one message with file descriptors. Raises OSError; SandboxError for one too long."""
    data = json.dumps(message).encode()
    if len(data) > MESSAGE_LIMIT:
        raise SandboxError(
            f"a message has {len(data)} bytes, more than the {MESSAGE_LIMIT} that there may be: "
            "ask for less at once"
        )
    if len(data) <= _INLINE:
        _send(sock, data, fds)
        return
    held = _in_memory(data)
    try:
        _send(sock, b"{}", (held, *fds))
    finally:
        os.close(held)


def _send(sock: socket.socket, data: bytes, fds: tuple[int, ...]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary)


def _in_memory(data: bytes) -> int:
    fd = os.memfd_create("message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message; None at the end of the stream.

    Raises OSError, BadMessage.
    """
    found = array.array("i")
    data, ancillary, flags, _ = sock.recvmsg(
        _INLINE + 1, socket.CMSG_SPACE(_MOST_FILES * found.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
    fds = list(found)
    if not data:
        return None, fds
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise BadMessage("a message is longer than messages are")
        if data == b"{}" and fds:
            data = _read(fds[0])
            os.close(fds.pop(0))
        message = json.loads(data)
        if not isinstance(message, dict):
            raise BadMessage("a message is no object")
        return cast("dict[str, Any]", message), fds
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, ValueError | RecursionError):
            raise BadMessage(f"a message is not JSON: {error}") from error
        raise


def _read(fd: int) -> bytes:
    """Read a file that nobody can change any more, nor make anybody wait for."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # it is not in memory
        sealed = 0
    size = os.fstat(fd).st_size
    if sealed & _SEALS != _SEALS or size > MESSAGE_LIMIT:
        raise BadMessage("a message comes in a file that is none of ours")
    return os.pread(fd, size, 0)


def _through(folder: Path, name: str, action: Any) -> None:
    """Give a Unix socket a path that fits into its 108 bytes, however deep `folder` lies."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        action(f"/proc/self/fd/{fd}/{name}")
    finally:
        os.close(fd)


def listen(folder: Path, name: str, mode: int = 0o600) -> socket.socket:
    """Listen on a Unix socket in `folder`. Raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # Under its name only once it answers; whatever a killed process left there is replaced.
    fresh = f"{name}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            (folder / fresh).unlink()
        _through(folder, fresh, made.bind)
        (folder / fresh).chmod(mode)
        made.listen(256)
        (folder / fresh).rename(folder / name)
    except BaseException:
        made.close()
        raise
    return made


def connect(folder: Path, name: str, *, timeout: float = 30.0) -> socket.socket:
    """Connect to a Unix socket in `folder`. Raises OSError.

    `timeout` in seconds: where so many wait there already that no more are let in, BlockingIOError
    says so after that long, at once for 0. The socket that comes back blocks, without a timeout.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if timeout > 0:
            _limit_sends(made, timeout)
        else:
            made.setblocking(False)
        _through(folder, name, made.connect)
        made.setblocking(True)
        _limit_sends(made, 0)
    except BaseException:
        made.close()
        raise
    return made


def _limit_sends(sock: socket.socket, seconds: float) -> None:
    # For the kernel, waiting to be let in is a kind of sending.
    value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
