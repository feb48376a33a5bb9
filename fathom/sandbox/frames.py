"""The one protocol of sandboxes: frames with an operation's number, and fields inside of them.

A frame is a header of 12 bytes (length, number, type, version, magic) and a payload. Most payloads
are fields: a tag byte, a 32-bit length, the bytes; numbers are 64-bit and little-endian. The same
frames run over a Unix socket, a virtio-serial port and vsock; docs/sandbox.md has the tables.

Paper: §5.2.5 (one surface for every type of sandbox).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from fathom.errors import SandboxError

PROTOCOL = 1
MAGIC = 0xF47A
FRAME_LIMIT = 1 << 20
# Bytes of standard input that may be on the way before the agent grants more.
WINDOW = 256 << 10
PIECE = 64 << 10
_HEADER = struct.Struct("<IIBBH")
HEADER_SIZE = _HEADER.size
_FIELD = struct.Struct("<BI")
_NUMBER = struct.Struct("<Q")


class Frame(IntEnum):
    """What a frame is: below 64 it goes to the agent, from 64 on it comes from there."""

    HELLO = 1
    CONFIGURE = 2
    EXEC = 3
    STDIN = 4
    EOF = 5
    SIGNAL = 6
    RESIZE = 7
    CANCEL = 8
    QUERY = 9
    ACK = 10
    PING = 11
    SHIFT = 12
    REKEY = 13
    HOLD = 14
    LEAVE = 15
    NETWORK = 16
    OK = 64
    ERROR = 65
    STARTED = 66
    STDOUT = 67
    STDERR = 68
    EXIT = 69
    CREDIT = 70


class Tag(IntEnum):
    """What a field is."""

    VERSION = 1
    SECRET = 2
    EPOCH = 3
    PID = 4
    CODE = 5
    MESSAGE = 6
    ERRNO = 7
    UID = 16
    GID = 17
    FILTER = 18
    WRITABLE = 19
    ADDRESS_SPACE = 20
    PROCESSES = 21
    FILES = 22
    CPUS = 23
    OOM_SCORE = 24
    GUEST = 25
    LANDLOCK = 26
    MORTAL = 27
    JOURNAL = 28
    ARG = 32
    ENV = 33
    CWD = 34
    TIMEOUT_US = 35
    CAP = 36
    FLAGS = 37
    ROWS = 38
    COLS = 39
    OP = 40
    DIGEST = 41
    BUILTIN = 42
    GRACE_US = 43
    SIGNAL = 44
    MICROS = 45
    WRITE_MODE = 46
    EXIT = 64
    TIMED_OUT = 65
    PROBLEM = 66
    DURATION_US = 67
    STDOUT_TOTAL = 68
    STDERR_TOTAL = 69
    USER_US = 70
    SYSTEM_US = 71
    MAX_RSS_KB = 72
    KILLED_ALL = 73
    OOM_KILLED = 74
    REPLAYED = 75
    STATE = 76
    CANCELLED = 77
    STDOUT_KEPT = 78
    STDERR_KEPT = 79
    LOST = 80
    ENTROPY = 96
    HOSTNAME = 97
    CLOCK_US = 98


class Flags(IntFlag):
    """How a command runs: one stream, a terminal, input to come, a shell line, no owner, the line.

    LINE: after STARTED the socket itself is the command's standard input and output.
    """

    MERGE = 1
    PTY = 2
    STDIN = 4
    SHELL = 8
    DETACH = 16
    LINE = 32


@dataclass(frozen=True, slots=True)
class Received:
    """One frame as it came: `kind` (a Frame, or a number that this version does not know)."""

    number: int
    kind: int
    payload: bytes

    def fields(self) -> dict[int, bytes]:
        """Return tag -> bytes, the last of each tag. Raises SandboxError."""
        return dict(split_fields(self.payload))


def join_fields(fields: Sequence[tuple[int, bytes | str | int]]) -> bytes:
    """Put fields into one payload; text is encoded as UTF-8 (surrogates as the bytes they hide)."""
    parts: list[bytes] = []
    for tag, value in fields:
        if isinstance(value, int):
            data = _NUMBER.pack(value & 0xFFFFFFFFFFFFFFFF)
        elif isinstance(value, str):
            data = value.encode(errors="surrogateescape")
        else:
            data = value
        parts.append(_FIELD.pack(tag, len(data)))
        parts.append(data)
    return b"".join(parts)


def split_fields(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """Take a payload apart. Raises SandboxError where it is cut short."""
    at = 0
    while at < len(payload):
        if len(payload) - at < _FIELD.size:
            raise SandboxError("a frame's fields are cut short")
        tag, size = _FIELD.unpack_from(payload, at)
        at += _FIELD.size
        if len(payload) - at < size:
            raise SandboxError("a frame's fields are cut short")
        yield tag, payload[at : at + size]
        at += size


def number_of(data: bytes | None, default: int = 0) -> int:
    """Read a number; `default` where the field is missing or too short."""
    return default if data is None or len(data) < _NUMBER.size else _NUMBER.unpack_from(data)[0]


def text_of(data: bytes | None) -> str:
    """Read text; empty where the field is missing, bytes that are not UTF-8 replaced."""
    return (data or b"").decode(errors="replace")


def pack(number: int, kind: int, payload: bytes = b"") -> bytes:
    """Form one frame. Raises SandboxError above the limit."""
    if len(payload) > FRAME_LIMIT:
        raise SandboxError(f"a frame of {len(payload)} bytes is above the limit of {FRAME_LIMIT}")
    return _HEADER.pack(len(payload), number, kind, PROTOCOL, MAGIC) + payload


class Splitter:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def missing(self) -> int:
        """How many bytes of the next header, or of the frame that it begins, have not come."""
        held = self._held
        if len(held) < HEADER_SIZE:
            return HEADER_SIZE - len(held)
        return HEADER_SIZE + _HEADER.unpack_from(held)[0] - len(held)

    def feed(self, data: bytes) -> list[Received]:
        """Add bytes and return the frames that are whole now.

        Raises SandboxError where the stream carries something else.
        """
        held = self._held
        held += data
        found: list[Received] = []
        at = 0
        while len(held) - at >= _HEADER.size:
            size, number, kind, version, magic = _HEADER.unpack_from(held, at)
            if magic != MAGIC or version != PROTOCOL or size > FRAME_LIMIT:
                raise SandboxError("the agent's line carries something that is not its protocol")
            if len(held) - at < _HEADER.size + size:
                break
            at += _HEADER.size
            found.append(Received(number, kind, bytes(held[at : at + size])))
            at += size
        del held[:at]
        return found
