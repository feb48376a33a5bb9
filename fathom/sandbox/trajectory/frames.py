"""Messages over a Unix socket: a JSON head and bytes, each behind its length.

Between a client and a holder both ends are of one user (checked by the kernel's word for it); at
the door of a worker the other end is a stranger. Lengths are bounded.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from fathom.errors import SandboxLost

LARGEST = 1 << 30
SOCKET = "socket"
_SIZES = struct.Struct("<II")
_CREDENTIALS = struct.Struct("3i")

Frame = tuple[dict[str, Any], bytes]


class Line:
    """One connection, frame by frame."""

    def __init__(
        self, stream: ByteStream, largest: int = LARGEST, largest_head: int = LARGEST
    ) -> None:
        self._stream = stream
        self._largest, self._largest_head = largest, largest_head
        self._reader = BufferedByteReceiveStream(stream)

    async def send(self, head: Mapping[str, Any], data: bytes = b"") -> None:
        """Send one frame. Raises anyio.BrokenResourceError when the other end is gone."""
        text = json.dumps(head).encode()
        await self._stream.send(_SIZES.pack(len(text), len(data)) + text)
        if data:
            await self._stream.send(data)

    async def receive(self) -> Frame | None:
        """The next frame, None at the end or when it is not one."""
        try:
            sizes = _SIZES.unpack(await self._reader.receive_exactly(_SIZES.size))
            if sum(sizes) > self._largest or sizes[0] > self._largest_head:
                return None
            head = json.loads(await self._reader.receive_exactly(sizes[0]))
            return head, await self._reader.receive_exactly(sizes[1]) if sizes[1] else b""
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
            return None
        except (ValueError, RecursionError):
            return None


@asynccontextmanager
async def connect(folder: Path) -> AsyncGenerator[Line]:
    """A connection to the socket in `folder`. Raises SandboxLost when nobody answers there."""
    # A socket's path is short by law of the kernel, a user's folder is not.
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        stream = await anyio.connect_unix(f"/proc/self/fd/{fd}/{SOCKET}")
    except OSError as error:
        raise SandboxLost(f"whoever held the sandbox in {folder} is gone") from error
    finally:
        os.close(fd)
    async with stream:
        yield Line(stream)


def is_own_user(stream: SocketStream) -> bool:
    """Whether the other end of a Unix socket is a process of this user."""
    raw = stream.extra(SocketAttribute.raw_socket)
    data = raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(data)[1] == os.geteuid()
