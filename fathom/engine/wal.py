"""The write-ahead log: every sampled token is in a file before anybody sees it.

One file per request: a header that says what was asked, then 14 bytes a token. A process that is
killed at any moment leaves whole records and at most one torn one, which is dropped; the request
then continues with the next draw, and, since draws and logits depend on nothing else, identically.
While a process has a log open it holds a lock on it, which ends with the process.

A file's end is mapped into memory: what is stored there is the system's to keep, as after a call of
write, which would take three times as long. Its blocks are reserved before, so that a full disk is
an error and no signal. Zeros behind the last record are reserved room.

Paper: §5.2 (token-granular write-ahead log for preemptible rollouts).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from fathom.engine.request import Request
from fathom.engine.sampler import Drawn
from fathom.engine.wal_format import CHECKED, END, REASONS, RECORD, Logged, encode_header, read_log
from fathom.errors import CacheError

RESERVED = 1 << 14  # bytes at a time


class _File:
    """A log that is open, with room reserved up to `end` of `map`; the next record goes to `at`.

    `header` is the header's checksum.
    """

    __slots__ = ("at", "descriptor", "end", "header", "map")

    def __init__(self, descriptor: int, header: int, at: int) -> None:
        self.descriptor, self.header, self.at, self.end = descriptor, header, at, at
        self.map: mmap.mmap | None = None

    def put(self, token: int, logprob: float, number: int) -> None:
        """Write a record. Raises OSError when the disk is full."""
        if self.at + RECORD.size > self.end:
            self.reserve()
        number &= 0xFFFF
        check = zlib.crc32(CHECKED.pack(token, logprob, number), self.header)
        RECORD.pack_into(self.map, self.at, token, logprob, number, check)  # type: ignore[arg-type]
        self.at += RECORD.size

    def reserve(self) -> None:
        """Room for more records. Raises OSError when the disk is full."""
        os.posix_fallocate(self.descriptor, self.at, RESERVED)
        grown = mmap.mmap(self.descriptor, self.at + RESERVED)
        if self.map is not None:
            self.map.close()
        self.map, self.end = grown, self.at + RESERVED

    def close(self) -> None:
        """Give back what was reserved, and the lock."""
        if self.map is not None:
            self.map.close()
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, self.at)
        os.close(self.descriptor)


class WriteAheadLog:
    """The logs of one model's requests in a folder. Raises CacheError when it cannot be used."""

    def __init__(self, folder: Path | str, root: bytes) -> None:
        self.folder, self._root = Path(folder), root.hex()
        self._open: dict[str, _File] = {}
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise CacheError(
                f"the log folder {self.folder} cannot be used: {error.strerror or error}"
            ) from error

    def begin(self, request: Request) -> None:
        """Write down a new request. Raises CacheError when that cannot be done, and when there is
        a log of this name already: it holds tokens that somebody may want.
        """
        path = self._path(request.id)
        try:
            self._open[request.id] = request.log = self._create(path, request)
        except FileExistsError as error:
            raise CacheError(
                f"{path} belongs to another request of this name: recover or forget it first"
            ) from error
        except OSError as error:
            raise CacheError(f"{path} cannot be written: {error}") from error

    def take_up(self, logged: Logged) -> object:
        """Open the log of a request to go on behind its last sound record; its request's `log`.

        Raises CacheError when it is open in another process, was changed by one since it was read,
        or cannot be written.
        """
        try:
            descriptor = _lock(logged.path)
        except BlockingIOError as error:
            raise CacheError(f"{logged.path} is in use by another process") from error
        except OSError as error:
            raise CacheError(f"{logged.path} cannot be written: {error}") from error
        try:
            if read_log(logged.path) != logged:
                raise CacheError(f"{logged.path} was changed by another process: read it again")
            os.ftruncate(descriptor, logged.size)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise CacheError(f"{logged.path} cannot be written: {error}") from error
            raise
        file = self._open[logged.id] = _File(descriptor, logged.checksum, logged.size)
        return file

    def append(
        self,
        request: Request,
        drawn: Drawn,
        checked: Callable[..., bytes] = CHECKED.pack,
        put: Callable[..., None] = RECORD.pack_into,
        crc: Callable[[bytes, int], int] = zlib.crc32,
        size: int = RECORD.size,
    ) -> None:
        """Write down the next token; it may be shown afterwards.

        As `_File.put`, in one frame and with everything at hand: after a step of the model the
        processor's caches hold nothing of this, and every name that is looked up costs a tenth of
        a microsecond. Raises CacheError when it cannot be written.
        """
        file: _File = request.log  # type: ignore[assignment]
        at, token, logprob = file.at, drawn.token, drawn.logprob
        number = len(request.output) & 0xFFFF
        if at + size > file.end:
            try:
                file.reserve()
            except OSError as error:
                raise CacheError(f"the log of {request.id} cannot be written: {error}") from error
        put(file.map, at, token, logprob, number, crc(checked(token, logprob, number), file.header))
        file.at = at + size

    def end(self, request: Request) -> None:
        """Write down that a request has ended, and close its file."""
        file = self._open.pop(request.id, None)
        if file is not None:
            reason = REASONS.index(request.finish_reason or "error")
            with contextlib.suppress(OSError):  # then it is simply taken up again
                file.put(END, float(reason), len(request.output))
            file.close()

    def forget(self, request_id: str) -> None:
        """Delete the log of a request whose tokens nobody needs any more."""
        file = self._open.pop(request_id, None)
        if file is not None:
            file.close()
        with contextlib.suppress(OSError):
            self._path(request_id).unlink()

    def drop(self, logged: Logged, seconds: float) -> bool:
        """Delete a log that nothing was added to for so long; False while a process has it open."""
        with contextlib.suppress(OSError):
            if time.time() - logged.path.stat().st_mtime > seconds:
                descriptor = _lock(logged.path)
                logged.path.unlink()
                os.close(descriptor)
                return True
        return False

    def rename(self, root: bytes, requests: Iterable[Request]) -> None:
        """From now on the model has another name: the logs of requests go on under it.

        Raises CacheError when some cannot be written: these go on under the old name.
        """
        self._root, problems = root.hex(), []
        for request in requests:
            path, new = self._path(request.id), None
            temporary = path.with_suffix(".new")
            try:
                temporary.unlink(missing_ok=True)
                new = self._create(temporary, request)
                for number, drawn in enumerate(request.output):
                    new.put(drawn.token, drawn.logprob, number)
                temporary.replace(path)
            except OSError as error:
                problems.append(f"{path} cannot be written: {error}")
                if new is not None:
                    new.close()
                    with contextlib.suppress(OSError):
                        temporary.unlink()
                continue
            self._open[request.id].close()
            self._open[request.id] = request.log = new
        if problems:
            raise CacheError("; ".join(problems))

    def close(self) -> None:
        """Close all files; their requests can be recovered."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def read(self) -> tuple[list[Logged], list[str]]:
        """All requests of this model in the folder, and what is wrong with files that are not."""
        found, problems = [], []
        for path in sorted(self.folder.glob("*.wal")):
            logged = read_log(path)
            if logged is None:
                problems.append(f"{path} is damaged or no log of fathom's: left as it is")
            elif logged.model != self._root:
                problems.append(f"{path} was written with another model: left as it is")
            else:
                found.append(logged)
        return found, problems

    def _path(self, request_id: str) -> Path:
        return self.folder / f"{quote(request_id, safe='')}.wal"

    def _create(self, path: Path, request: Request) -> _File:
        """A new file with a request's header. Raises OSError; then there is none."""
        data, checksum = encode_header(request, self._root)
        descriptor = _lock(path, os.O_CREAT | os.O_EXCL)
        try:
            _write(descriptor, data)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return _File(descriptor, checksum, len(data))


def _lock(path: Path, flags: int = 0) -> int:
    """Open a log for this process alone. Raises BlockingIOError for one in use."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
