"""The graphical console: its picture as PNG, and its memory, which a saved state leaves out.

Paper: §5.2.5 (full VM substrate).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

from fathom.errors import SandboxError

_LIMIT = 8192
VIDEO_SIZE = 8 << 20


def parse_ppm(data: bytes) -> tuple[int, int, bytes]:
    """Take a picture of the P6 form apart: width, height, dots. Raises SandboxError."""
    head = re.match(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s", data)
    if head is None:
        raise SandboxError("the emulator gave no picture")
    width, height = int(head[1]), int(head[2])
    dots = data[head.end() :]
    if not (0 < width <= _LIMIT and 0 < height <= _LIMIT) or len(dots) != 3 * width * height:
        raise SandboxError(f"the emulator gave a damaged picture of {width} x {height} dots")
    return width, height, dots


def png(width: int, height: int, dots: bytes) -> bytes:
    """Return a picture of 8-bit red, green and blue as PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    row = 3 * width
    # Each row begins with the number of its filter: none.
    rows = b"".join(b"\0" + dots[at : at + row] for at in range(0, row * height, row))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 6)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _place(ask: Callable[..., Any]) -> int:
    """Return where in the emulator the screen's memory lies. Raises SandboxError."""
    for bus in ask("query-pci"):
        for device in bus["devices"]:
            if device.get("qdev_id") == "video":
                region = next(r for r in device["regions"] if r["bar"] == 0)
                said = ask(
                    "human-monitor-command", **{"command-line": f"gpa2hva {region['address']:#x}"}
                )
                if found := re.search(r"is (0x[0-9a-f]+)", said):
                    return int(found[1], 16)
    raise SandboxError("the machine has no screen")


def take_video(pid: int, ask: Callable[..., Any]) -> bytes:
    """Return the screen's memory, without the zeros at its end. Raises SandboxError, OSError."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        file.seek(_place(ask))
        return (file.read(VIDEO_SIZE) or b"").rstrip(b"\0") or b"\0"


def put_video(pid: int, ask: Callable[..., Any], data: bytes) -> None:
    """Put back what `take_video` returned. Raises SandboxError, OSError."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as file:
        file.seek(_place(ask))
        file.write(data[:VIDEO_SIZE])
