"""What a caller asks to run, checked and put into the form that an agent takes.

Paper: none (input checks).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fathom.errors import SandboxError
from fathom.sandbox.types import WORKDIR

# The kernel takes no longer single argument (MAX_ARG_STRLEN), its final NUL included.
LONGEST_ARGUMENT = 128 * 1024 - 1
LONGEST_KEY = 256
LONGEST_TIMEOUT = 1e9  # seconds, 31 years; the agent counts microseconds in 64 bits
PATH = "/usr/local/bin:/usr/bin:/bin"
# What every command finds in its environment, whatever the caller's own holds.
FIXED_ENVIRONMENT = {
    "PATH": PATH,
    "HOME": "/work",
    "USER": "user",
    "LOGNAME": "user",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "TERM": "dumb",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One command: `argv` holds one line for the sandbox's shell, or a program with arguments.

    `cwd` is absolute. `builtin` names an operation of the agent itself instead of a program.
    """

    argv: tuple[str, ...]
    shell: bool
    timeout: float
    cwd: str
    env: dict[str, str]
    builtin: str = ""
    mode: int = 0

    def digest(self, stdin: bytes | None = None, *, merge: bool = False) -> str:
        """Return what tells this request from another one under the same operation key.

        Timeout and caps are no part of it: a result that came back says how much of it is there.
        """
        found = hashlib.sha256()
        parts = [self.builtin, str(self.shell), self.cwd, str(self.mode), *self.argv]
        parts += [f"{name}={value}" for name, value in sorted(self.env.items())]
        for part in parts:
            data = os.fsencode(part)
            found.update(len(data).to_bytes(8, "little") + data)
        found.update(b"merged" if merge else b"apart")
        found.update(b"-" if stdin is None else b"+" + stdin)
        return found.hexdigest()


def form_request(
    command: str | Sequence[str],
    *,
    timeout: float,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Request:
    """Check the arguments of a command. Raises SandboxError."""
    check_seconds(timeout)
    shell = isinstance(command, str)
    if not shell and (not isinstance(command, Sequence) or isinstance(command, bytes | bytearray)):
        raise SandboxError(
            f"the command is {command!r:.80}: give text for the shell, or a list of a program and "
            "its arguments"
        )
    argv = (command,) if isinstance(command, str) else tuple(command)
    if not shell and (not argv or not argv[0]):
        raise SandboxError(f"the command is {list(argv)!r:.80}, its program is empty: name one")
    variables = dict(env or {})
    for text in (*argv, cwd or "", *variables, *variables.values()):
        check_text(text)
    for name in variables:
        if not name or "=" in name:
            raise SandboxError(f"{name!r} cannot name a variable: it is empty or contains =")
    folder = os.path.join(WORKDIR, cwd or "")
    return Request(
        argv=argv,
        shell=shell,
        timeout=float(timeout),
        cwd=folder,
        env=variables,
    )


def file_request(builtin: str, *paths: str, timeout: float, mode: int = 0) -> Request:
    """Form an operation on files; paths start from /work. Raises SandboxError."""
    for path in paths:
        check_text(path)
        if not path:
            raise SandboxError("the path is empty: name a file")
    return Request(
        argv=tuple(os.path.join(WORKDIR, path) for path in paths),
        shell=False,
        timeout=timeout,
        cwd="/",
        env={},
        builtin=builtin,
        mode=mode,
    )


def check_key(op: str) -> None:
    """Refuse an operation key that no journal could hold. Raises SandboxError."""
    check_text(op)
    if not 0 < len(os.fsencode(op)) <= LONGEST_KEY:
        raise SandboxError(f"an operation key has 1 to {LONGEST_KEY} bytes: {op[:80]!r} does not")


def check_text(text: object) -> None:
    """Refuse what cannot be an argument of a program. Raises SandboxError."""
    if not isinstance(text, str):
        raise SandboxError(f"{text!r} is not text: commands, folders and variables are text")
    if "\0" in text:
        raise SandboxError("a command, folder or variable contains a NUL character: remove it")
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        raise SandboxError(f"{text[:80]!r} is not valid Unicode text: correct it") from None
    if size > LONGEST_ARGUMENT:
        raise SandboxError(
            f"an argument has {size} bytes, more than the {LONGEST_ARGUMENT} that a program can be "
            "given: write it to a file with files.write, or give it as stdin"
        )


def to_bytes(data: bytes | str | None) -> bytes | None:
    """Encode text as UTF-8 and leave bytes as they are. Raises SandboxError."""
    if not isinstance(data, str):
        return data
    try:
        return data.encode()
    except UnicodeEncodeError:
        raise SandboxError("the text is not valid Unicode: correct it, or give bytes") from None


def check_seconds(value: object) -> None:
    """Refuse what is no number of seconds above 0. Raises SandboxError."""
    if not (isinstance(value, int | float) and 0 < value <= LONGEST_TIMEOUT):
        raise SandboxError(
            f"timeout is {value!r:.80}: give a number of seconds above 0, up to {LONGEST_TIMEOUT:g}"
        )
