"""LZ4 in the "legacy" form that Linux kernels are compressed with, read only.

Python's standard library has no LZ4, and this runs once per kernel. The form is that of
the LZ4 block and frame format descriptions.

Paper: none (a file format).
"""

from __future__ import annotations

from fathom.errors import SandboxError

LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_BLOCK = 8 << 20


def decompress_legacy(data: bytes) -> bytes:
    """Return what a legacy frame holds; the rest is left. Raises SandboxError."""
    if not data.startswith(LEGACY_MAGIC):
        raise SandboxError("this is no LZ4 frame of the legacy form")
    found = bytearray()
    at = len(LEGACY_MAGIC)
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        # A kernel's image ends with the length of the program in place of a block's.
        if size == 0 or at + size > len(data):
            break
        found += decompress_block(data[at : at + size])
        at += size
    return bytes(found)


def decompress_block(data: bytes) -> bytearray:
    """Return what one block holds. Raises SandboxError for one that is damaged."""
    out = bytearray()
    at, end = 0, len(data)
    try:
        while at < end:
            token = data[at]
            at += 1
            length = token >> 4
            if length == 15:
                while True:
                    more = data[at]
                    at += 1
                    length += more
                    if more != 255:
                        break
            out += data[at : at + length]
            at += length
            if at >= end:
                break
            distance = data[at] | data[at + 1] << 8
            at += 2
            length = token & 15
            if length == 15:
                while True:
                    more = data[at]
                    at += 1
                    length += more
                    if more != 255:
                        break
            length += 4
            start = len(out) - distance
            if distance == 0 or start < 0 or len(out) + length > _BLOCK:
                raise SandboxError("an LZ4 block is damaged")
            if distance >= length:
                out += out[start : start + length]
            else:
                # The copy reaches into what it writes itself.
                piece = out[start:]
                out += (piece * (length // distance + 1))[:length]
    except IndexError as error:
        raise SandboxError("an LZ4 block is cut short") from error
    return out
