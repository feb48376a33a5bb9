"""The body of one request, and not a byte more: what follows would be a second, unjudged request.

The sender's framing is read strictly and written anew, so that the next reader finds the same end
(RFC 9112, section 7.1).

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import asyncio
import re

from fathom.sandbox.proxy_head import Framing

# An extension of a chunk means nothing to anybody here and is left out.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
_MOST_TRAILERS = 100


class Body:
    """Reads as a stream does that ends with its client; what comes after the body is dropped."""

    def __init__(self, reader: asyncio.StreamReader, framing: Framing) -> None:
        self._reader = reader
        self._chunked = framing.chunked
        # Of the whole body, or of the chunk that is being read.
        self._left = framing.length or 0

    async def read(self, size: int) -> bytes:
        """Return up to `size` bytes of the body, framed; b"" once the client has ended.

        Raises ValueError or IncompleteReadError for chunks that are none.
        """
        if self._chunked and not self._left:
            return await self._next_chunk(size)
        if self._left:
            return await self._piece(size)
        # Its client may still go away, which is worth knowing.
        while await self._reader.read(size):
            pass
        return b""

    async def _piece(self, size: int) -> bytes:
        data = await self._reader.read(min(size, self._left))
        self._left -= len(data)
        if not data or not self._chunked:
            return data
        if not self._left and await self._reader.readexactly(2) != b"\r\n":
            raise ValueError("a chunk is longer than it says")
        return b"%x\r\n%b\r\n" % (len(data), data)

    async def _next_chunk(self, size: int) -> bytes:
        found = _SIZE.fullmatch(await self._reader.readuntil(b"\r\n"))
        if found is None:
            raise ValueError("a chunk has no size")
        self._left = int(found[1], 16)
        if self._left:
            return await self._piece(size)
        for _ in range(_MOST_TRAILERS):
            if await self._reader.readuntil(b"\r\n") == b"\r\n":
                self._chunked = False
                return b"0\r\n\r\n"
        raise ValueError("the chunks do not end")
