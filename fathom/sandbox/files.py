"""Files of a sandbox, read and written inside it by the tenant itself.

A path is resolved where the tenant resolves it, with the tenant's rights, by a process of the
sandbox. Whatever symbolic links, pipes or devices were planted can therefore reach only what the
tenant reaches anyway, and there is no moment between a check and a use on the host.

Paper: §5.2.5 (file transfer of the common surface).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Literal

from fathom.errors import SandboxError
from fathom.sandbox.process import Ended, file_problem
from fathom.sandbox.request import Request, file_request, to_bytes

# Runs an operation of the agent with this input, keeping so many bytes of its output.
Runner = Callable[[Request, bytes | None, int, str | None], Awaitable[tuple[Ended, bytes]]]

DEFAULT_LIMIT = 64 << 20
DEFAULT_TIMEOUT = 60.0
_ENTRY_FIELDS = 6
_KINDS: dict[str, Literal["file", "folder", "link", "other"]] = {
    "f": "file",
    "d": "folder",
    "l": "link",
    "o": "other",
}


class SandboxFileMissing(SandboxError, FileNotFoundError):
    """The file does not exist in the sandbox."""

    code = "sandbox_file_missing"

    def __str__(self) -> str:
        return str(self.args[0])


class SandboxFileIsFolder(SandboxError, IsADirectoryError):
    """The path names a folder of the sandbox where a file is needed."""

    code = "sandbox_file_is_folder"

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One entry: `name` as it was asked for or as its folder lists it, `modified` in seconds."""

    name: str
    kind: Literal["file", "folder", "link", "other"]
    mode: int
    size: int
    modified: float
    links: int


class Files:
    """The files of one sandbox. Paths are absolute or start from /work.

    `timeout`: seconds for the whole operation. Every method raises SandboxFileMissing (also a
    FileNotFoundError), SandboxFileIsFolder (also an IsADirectoryError), SandboxError for what the
    tenant may not do, and SandboxLost. `op` names an operation that happens at most once.
    """

    def __init__(self, run: Runner) -> None:
        self._run = run

    async def read(
        self,
        path: str,
        *,
        offset: int = 0,
        limit: int = DEFAULT_LIMIT,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> bytes:
        """Return the content of a plain file from `offset` on.

        A file with more than `limit` bytes left is an error: read it in pieces with `read_piece`.
        """
        data = await self._read(path, offset, limit + 1, timeout)
        if len(data) > limit:
            raise SandboxError(f"{path} has more than {limit} bytes: raise limit= to read it")
        return data

    async def read_piece(
        self, path: str, *, offset: int, size: int, timeout: float = DEFAULT_TIMEOUT
    ) -> bytes:
        """Return at most `size` bytes from `offset` on; fewer only at the end of the file."""
        return await self._read(path, offset, size, timeout)

    async def _read(self, path: str, offset: int, size: int, timeout: float) -> bytes:
        if offset < 0 or size < 0:
            raise SandboxError(f"offset {offset} and size {size} must not be negative")
        request = file_request("read", path, timeout=timeout)
        request = replace(request, argv=(*request.argv, str(offset)))
        ended, data = await self._run(request, None, size, None)
        _check(ended, path, "read", whole=len(data) < size)
        return data

    async def write(
        self,
        path: str,
        data: bytes | str,
        *,
        mode: int | None = None,
        op: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        """Write a file, making it and its folders where they are missing.

        A write that fails leaves no new file, but may leave an old one cut short. `mode`:
        permissions, 0644 for a new file when not given.
        """
        request = file_request("write", path, timeout=timeout, mode=mode or 0)
        ended, _ = await self._run(request, to_bytes(data), 4096, op)
        _check(ended, path, "written")

    async def stat(self, path: str, *, timeout: float = DEFAULT_TIMEOUT) -> FileInfo:
        """Describe one entry; a link is described itself."""
        ended, data = await self._run(
            file_request("stat", path, timeout=timeout), None, 1 << 16, None
        )
        _check(ended, path, "read")
        found = _entries(data)
        if len(found) != 1:
            raise _senseless(path)
        return replace(found[0], name=path)

    async def list(self, path: str = ".", *, timeout: float = DEFAULT_TIMEOUT) -> list[FileInfo]:
        """Describe the entries of a folder, by name."""
        ended, data = await self._run(
            file_request("list", path, timeout=timeout), None, DEFAULT_LIMIT, None
        )
        _check(ended, path, "listed")
        if ended.stdout_total > len(data):
            raise SandboxError(
                f"the names in {path} have more than {DEFAULT_LIMIT} bytes: list it by a command"
            )
        return sorted(_entries(data), key=lambda info: info.name)

    async def mkdir(
        self, path: str, *, op: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Make a folder and those above it; one that is there is fine."""
        ended, _ = await self._run(file_request("mkdir", path, timeout=timeout), None, 4096, op)
        _check(ended, path, "made")

    async def remove(
        self, path: str, *, op: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Remove a file, a link itself, or a folder with all that is in it."""
        ended, _ = await self._run(file_request("remove", path, timeout=timeout), None, 4096, op)
        _check(ended, path, "removed")

    async def rename(
        self, path: str, target: str, *, op: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Give an entry another name, in the place of what has it now."""
        request = file_request("rename", path, target, timeout=timeout)
        ended, _ = await self._run(request, None, 4096, op)
        _check(ended, path, "renamed")


def _entries(data: bytes) -> list[FileInfo]:
    parts = data.decode(errors="surrogateescape").split("\0")[:-1]
    found: list[FileInfo] = []
    for at in range(0, len(parts) - len(parts) % _ENTRY_FIELDS, _ENTRY_FIELDS):
        kind, mode, size, modified, links, name = parts[at : at + _ENTRY_FIELDS]
        try:
            info = FileInfo(
                name=name,
                kind=_KINDS[kind],
                mode=int(mode, 8),
                size=int(size),
                modified=int(modified) / 1e9,
                links=int(links),
            )
        except (LookupError, ValueError, OverflowError) as error:
            raise _senseless(name) from error
        found.append(info)
    return found


def _senseless(path: str) -> SandboxError:
    """What a guest may say whose agent was taken over."""
    return SandboxError(f"what the sandbox says of {path[:80]!r} makes no sense")


def _check(ended: Ended, path: str, verb: str, *, whole: bool = True) -> None:
    if not whole or (ended.exit_code == 0 and not ended.problem):
        return
    number = file_problem(ended.problem)
    if number in (errno.ENOENT, errno.ENOTDIR):
        raise SandboxFileMissing(f"{path} does not exist in the sandbox")
    if number == errno.EISDIR:
        raise SandboxFileIsFolder(f"{path} is a folder in the sandbox")
    if number == errno.ENOTSUP:
        reason = "it is not a plain file"
    elif number == errno.EACCES:
        reason = "permission denied"
    elif number is not None:
        reason = os.strerror(number)
    elif ended.timed_out:
        reason = "it took too long"
    else:
        reason = ended.problem or f"exit code {ended.exit_code}"
    raise SandboxError(f"{path} cannot be {verb} in the sandbox: {reason}")
