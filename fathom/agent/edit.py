"""The `edit` tool: replace the only occurrence of a text in a file, or create a file.

Paper: §5.3.1 (code agents work with a bash tool and a file-edit tool).
"""

from __future__ import annotations

from typing import Any

from fathom.agent.types import WORK_FOLDER, Sandbox, ToolResult
from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox.trajectory.errors import TrajectoryError


async def run_edit(arguments: dict[str, Any], sandbox: Sandbox, *, timeout: float) -> ToolResult:
    """Replace `old` by `new` in the file `path`, or write `new` to it when `old` is empty.

    Everything that goes wrong with the file is a result whose text begins with `Error: `. Raises
    SandboxLost when the sandbox ended and TrajectoryError when its log cannot go on. `timeout` is
    unused: file access has its own limits.
    """
    shown: str = arguments["path"]
    try:
        text = await _edit(sandbox, shown, _utf8(arguments["old"]), _utf8(arguments["new"]))
    except (SandboxLost, TrajectoryError):
        raise
    except (OSError, SandboxError, ValueError) as error:
        return _refused(_reason(error, shown))
    return ToolResult(text=text) if not text.startswith("Error: ") else _refused(text[7:])


async def _edit(sandbox: Sandbox, shown: str, old: bytes, new: bytes) -> str:
    # Bytes throughout, so that a file in an unknown encoding survives an edit of its ASCII part.
    if not shown or "\0" in shown:
        raise ValueError("the path is empty or contains a NUL character")
    _utf8(shown)
    path = str(WORK_FOLDER / shown)
    if not old:
        await sandbox.files.write(path, new)
        return f"Created {shown}"
    data = await sandbox.files.read(path)
    found = count_occurrences(data, old)
    if found == 0:
        return f"Error: the text to replace was not found in {shown}"
    if found > 1:
        return f"Error: the text to replace occurs {found} times in {shown}"
    await sandbox.files.write(path, data.replace(old, new, 1))
    return f"Replaced 1 occurrence in {shown}"


def count_occurrences(data: bytes, wanted: bytes) -> int:
    """Count the places where `wanted` begins, overlapping ones too: each is a possible meaning."""
    count, at = 0, data.find(wanted)
    while at >= 0:
        count, at = count + 1, data.find(wanted, at + 1)
    return count


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the arguments are not valid Unicode text") from None


def _reason(error: Exception, shown: str) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{shown} does not exist"
    if isinstance(error, IsADirectoryError):
        return f"{shown} is a folder"
    if isinstance(error, OSError) and error.strerror:
        return f"{shown}: {error.strerror}"
    return str(error)


def _refused(reason: str) -> ToolResult:
    return ToolResult(text=f"Error: {reason}", failed=True)
