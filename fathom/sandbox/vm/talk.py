"""One command of an agent, asked for by a thread that waits for its end.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fathom.errors import SandboxError, SandboxTimeout
from fathom.sandbox import box, frames, messages, state
from fathom.sandbox.frames import Flags, Frame, Tag
from fathom.sandbox.request import FIXED_ENVIRONMENT


def execute(
    folder: Path,
    secret: bytes,
    what: str,
    *,
    builtin: bool = False,
    timeout: float,
    cap: int = 0,
    output: Callable[[bytes], object] | None = None,
    argument: str = "-",
) -> dict[int, bytes]:
    """Run a shell line, or with `builtin` an operation of the agent; return the fields of its EXIT.

    `cap`: bytes of standard output that `output` is given, piece by piece; a guest that sends more
    ends the command. `argument`: of an operation of the agent.
    Raises SandboxError where it cannot be run, SandboxTimeout.
    """
    request: list[tuple[int, bytes | str | int]] = [
        (Tag.ARG, argument if builtin else what),
        (Tag.TIMEOUT_US, int(timeout * 1e6)),
        (Tag.CAP, cap),
        (Tag.FLAGS, int(Flags(0) if builtin else Flags.SHELL)),
        (Tag.CWD, "/"),
        *((Tag.ENV, f"{name}={value}") for name, value in FIXED_ENVIRONMENT.items()),
    ]
    if builtin:
        request.append((Tag.BUILTIN, what))
    splitter = frames.Splitter()
    got = 0
    with messages.connect(folder, state.SOCKET) as line:
        line.settimeout(timeout + 30)
        try:
            line.sendall(
                box.greeting(secret) + frames.pack(1, Frame.EXEC, frames.join_fields(request))
            )
            while data := line.recv(1 << 18):
                for frame in splitter.feed(data):
                    if frame.kind == Frame.STDOUT and output is not None:
                        got += len(frame.payload)
                        if got > cap:
                            raise SandboxError(f"the machine sent more than {cap} bytes")
                        output(frame.payload)
                    elif frame.kind == Frame.EXIT:
                        return frame.fields()
                    elif frame.kind == Frame.ERROR:
                        raise SandboxError(frames.text_of(frame.fields().get(Tag.MESSAGE)))
        except TimeoutError as error:
            raise SandboxTimeout(f"the machine did not answer within {timeout + 30:g} s") from error
        except OSError as error:
            raise SandboxError(f"the machine ended ({error.strerror})") from error
    raise SandboxError("the machine ended while a command ran")
