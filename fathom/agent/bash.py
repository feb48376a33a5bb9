"""The `bash` tool: run one command in the sandbox's shell and put its output into words.

The result text is a format that models are trained on. Changing it changes what they read, so it
lives in `format_output` alone, a pure function that training and evaluation use as well.

Paper: §5.3.1 (code agents work with a bash tool and a file-edit tool).
"""

from __future__ import annotations

from typing import Any

from fathom.agent.types import Sandbox, ToolResult
from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox.trajectory.errors import TrajectoryError

OUTPUT_LIMIT = 8_000

# How much of a command's output is kept for counting and for its last lines. What a command writes
# beyond that is lost, and the count of the characters cut is then too low.
BYTES_KEPT = 16 << 20


async def run_bash(arguments: dict[str, Any], sandbox: Sandbox, *, timeout: float) -> ToolResult:
    """Run `arguments["command"]`, waiting at most `timeout` seconds.

    A command that fails, is stopped or cannot be run as it was written is a result. Raises
    SandboxLost when the sandbox ended and TrajectoryError when its log cannot go on.
    """
    command: str = arguments["command"]
    if mistake := _unusable(command):
        return ToolResult(text=f"Error: {mistake}", executed=False, failed=True)
    try:
        done = await sandbox.exec(command, timeout=timeout, merge=True, cap=BYTES_KEPT)
    except (SandboxLost, TrajectoryError):
        raise
    except SandboxError as error:
        return ToolResult(text=f"Error: {error}", executed=False, failed=True)
    return ToolResult(
        text=format_output(done.output, done.exit_code, timeout if done.timed_out else None),
        failed=done.timed_out or done.exit_code != 0,
        exit_code=done.exit_code,
        timed_out=done.timed_out,
    )


def format_output(output: str, exit_code: int, timed_out_after: float | None = None) -> str:
    """The text the model reads for a finished command.

    `output` is standard output and standard error merged in order of arrival. `timed_out_after` is
    the limit in seconds when the command was stopped for reaching it, else None.
    """
    parts = [text] if (text := cut(output.removesuffix("\n"))) else []
    if timed_out_after is not None:
        parts.append(f"[timed out after {timed_out_after:g} s]")
    elif exit_code != 0:
        parts.append(f"[exit code {exit_code}]")
    return "\n".join(parts) or "[no output]"


def cut(text: str, limit: int = OUTPUT_LIMIT) -> str:
    """Shorten `text` to `limit` characters by taking out its middle, which a line then counts."""
    if len(text) <= limit:
        return text
    half = limit // 2
    removed = len(text) - 2 * half
    return f"{text[:half]}\n[... {removed} characters cut ...]\n{text[-half:]}"


def _unusable(command: str) -> str | None:
    # An argument vector is NUL-terminated UTF-8: neither of these can reach a shell.
    if "\0" in command:
        return "the command contains a NUL character"
    try:
        command.encode("utf-8")
    except UnicodeEncodeError:
        return "the command is not valid Unicode text"
    return None
