"""Small messages with open files between the processes of a node.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

MESSAGE_LIMIT = 1 << 17
_MOST_FILES = 16


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send one message with file descriptors. Raises OSError."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], ancillary)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message; None at the end of the stream. Raises OSError."""
    fds = array.array("i")
    data, ancillary, _, _ = sock.recvmsg(
        MESSAGE_LIMIT, socket.CMSG_SPACE(_MOST_FILES * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return (json.loads(data) if data else None), list(fds)


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


def connect(folder: Path, name: str, *, blocking: bool = True) -> socket.socket:
    """Connect to a Unix socket in `folder`. Raises OSError.

    Not `blocking`, BlockingIOError says that too many wait there already.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        made.setblocking(blocking)
        _through(folder, name, made.connect)
    except BaseException:
        made.close()
        raise
    return made
