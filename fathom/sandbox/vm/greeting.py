"""The beginning of a host's line over the port of a virtual machine.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import secrets
import socket
import time

from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox import frames
from fathom.sandbox.frames import Frame, Received, Tag

_CHUNK = 1 << 18
# What a former host had not read is less by far; a guest could go on for ever.
_MOST_SKIPPED = 32 << 20


def greet(port: socket.socket, secret: bytes, timeout: float) -> tuple[Received, frames.Splitter]:
    """Say HELLO, past whatever a former host left on the port.

    Returns the answer, and what splits the rest. Raises SandboxError where the agent refuses or
    sends too much else, SandboxLost.
    """
    number = secrets.randbits(31) | 1 << 30
    hello = frames.join_fields([(Tag.VERSION, frames.PROTOCOL), (Tag.SECRET, secret)])
    port.settimeout(timeout)
    try:
        port.sendall(frames.pack(number, Frame.HELLO, hello))
        answer, splitter = _find(port, number, time.monotonic() + timeout)
    except TimeoutError as error:
        raise SandboxError(f"the agent did not answer within {timeout:g} s") from error
    except OSError as error:
        raise SandboxLost(f"the virtual machine ended ({error.strerror})") from error
    if answer.kind == Frame.ERROR:
        said = frames.text_of(answer.fields().get(Tag.MESSAGE))
        raise SandboxError(f"the machine's agent refused: {said}")
    return answer, splitter


def _find(port: socket.socket, number: int, deadline: float) -> tuple[Received, frames.Splitter]:
    """Read up to the answer to `number`. Raises SandboxError, OSError, TimeoutError."""
    # The header of the one answer that is awaited, without its length.
    marks = [frames.pack(number, kind)[4:] for kind in (Frame.OK, Frame.ERROR)]
    held = b""
    skipped = 0
    while True:
        places = [at - 4 for mark in marks if (at := held.find(mark)) >= 4]
        if places:
            splitter = frames.Splitter()
            if found := splitter.feed(held[min(places) :]):
                return found[0], splitter  # others were for a former host
        elif len(held) > frames.HEADER_SIZE:
            # Only its end may be the beginning of that header.
            skipped += len(held) - frames.HEADER_SIZE
            held = held[-frames.HEADER_SIZE :]
        if skipped > _MOST_SKIPPED:
            raise SandboxError("the agent's port carries everything but an answer")
        if time.monotonic() > deadline:
            raise TimeoutError
        data = port.recv(_CHUNK)
        if not data:
            raise SandboxLost("the virtual machine ended before its agent answered")
        held += data
