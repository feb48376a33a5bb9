"""Carrying the bytes of a connection on to another one.

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

_IDLE = 600.0
# After one side has ended: whoever is gone altogether looks just like that.
_HALF_IDLE = 60.0
_CHUNK = 1 << 16


class Source(Protocol):
    """What bytes are read from: a connection, or a part of one."""

    async def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, b"" at the end."""
        ...


class Pump:
    """Carries bytes one way until their end, or until none came for a while."""

    def __init__(self) -> None:
        self._patience = _IDLE
        self._timeout: asyncio.Timeout | None = None

    async def run(self, reader: Source, writer: asyncio.StreamWriter) -> None:
        """Carry until the end. Raises OSError, TimeoutError."""
        while True:
            async with asyncio.timeout(self._patience) as self._timeout:
                data = await reader.read(_CHUNK)
            self._timeout = None
            if not data:
                break
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            if writer.can_write_eof():
                writer.write_eof()

    def hurry(self) -> None:
        """Wait less from now on."""
        self._patience = _HALF_IDLE
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time() + _HALF_IDLE)


async def join(
    reader: Source,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """Carry bytes both ways until both sides have ended."""
    out, back = Pump(), Pump()
    try:
        async with asyncio.TaskGroup() as group:
            one = group.create_task(out.run(reader, far_writer))
            other = group.create_task(back.run(far_reader, writer))
            one.add_done_callback(lambda _: back.hurry())
            other.add_done_callback(lambda _: out.hurry())
    except BaseExceptionGroup:
        pass
    finally:
        far_writer.close()
