"""What the commands share about the terminal: consoles, untrusted text and exit codes.

Paper: none (command line).
"""

from __future__ import annotations

import os
import unicodedata

from rich.console import Console

from fathom.errors import (
    FathomError,
    KernelError,
    MissingDependency,
    ModelUnreachable,
    SandboxError,
    Unsupported,
)

TASK_FAILED = 1
WRONG_USAGE = 2
MACHINE_LACKS = 3
# Of commands that pass on what a program inside ended with: those of `timeout` and `env`.
TOOK_TOO_LONG = 124
SANDBOX_FAILED = 125


def console(*, stderr: bool = False) -> Console:
    """A console that writes no escape codes at all when NO_COLOR is set or nobody watches."""
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=stderr, color_system=None if plain else "auto", highlight=False)


def visible(text: str) -> str:
    """`text` without anything that could steer a terminal: control characters become pictures.

    Models and the programs they run write what they like; an escape code among it could rewrite
    the screen or the clipboard of the person watching.
    """
    return "".join(map(_picture, text))


def _picture(character: str) -> str:
    # The zero-width joiner only builds emoji; the other format characters can reorder text.
    if character in "\n\t\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def shortened(text: str, lines: int = 12, columns: int = 400) -> list[str]:
    """The visible lines of `text`, at most `lines` of them, the middle left out and counted."""
    every = [
        line if len(line) <= columns else f"{line[:columns]} [... {len(line) - columns} more]"
        for line in visible(text).split("\n")
    ]
    if len(every) <= lines:
        return every
    tail = lines // 3
    head = lines - tail - 1
    return [*every[:head], f"[... {len(every) - head - tail} more lines]", *every[-tail:]]


def exit_code(error: FathomError) -> int:
    """The exit code of a command that ended with `error`."""
    if isinstance(error, Unsupported | ModelUnreachable | KernelError | MissingDependency):
        return MACHINE_LACKS
    if isinstance(error, SandboxError):
        return TASK_FAILED
    return WRONG_USAGE  # every other error names something that the user gave
