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
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fathom.engine.request import Request
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.errors import CacheError, FathomError

MAGIC = b"fathomW2"
# Token, log-probability, number of the draw (its last 16 bits: the rest is its place), checksum.
RECORD = struct.Struct("<IfHI")
_CHECKED = struct.Struct("<IfH")  # what the checksum covers
_SIZE = struct.Struct("<I")
RESERVED = 1 << 14  # bytes at a time
END = 0xFFFFFFFF  # in place of a token: the request has ended, and why
_REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """What a log says of its request. `finish_reason` None: it was still running.

    `checksum` is the header's, `size` the length up to which the file is sound.
    """

    path: Path
    id: str
    model: str
    prompt: list[int]
    params: SamplingParams
    priority: int
    masked: bool
    output: list[Drawn]
    finish_reason: str | None
    checksum: int
    size: int


class _File:
    """A log that is open, with room reserved up to `end`; the next record goes to `at`.

    `header` is the header's checksum.
    """

    def __init__(self, descriptor: int, header: int, at: int) -> None:
        self.descriptor, self.header, self.at, self.end = descriptor, header, at, at
        self._map: mmap.mmap | None = None

    def put(self, token: int, logprob: float, number: int) -> None:
        """Write a record. Raises OSError when the disk is full.

        Few calls, since after each step of the model none of their code is in the caches.
        """
        at, number = self.at, number & 0xFFFF
        if at + RECORD.size > self.end:
            self._reserve()
        check = zlib.crc32(_CHECKED.pack(token, logprob, number), self.header)
        RECORD.pack_into(self._map, at, token, logprob, number, check)  # type: ignore[arg-type]
        self.at = at + RECORD.size

    def _reserve(self) -> None:
        os.posix_fallocate(self.descriptor, self.at, RESERVED)
        if self._map is not None:
            self._map.close()
        self.end = self.at + RESERVED
        self._map = mmap.mmap(self.descriptor, self.end)

    def close(self) -> None:
        """Give back what was reserved, and the lock."""
        if self._map is not None:
            self._map.close()
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, self.at)
        os.close(self.descriptor)


class WriteAheadLog:
    """The logs of one model's requests in a folder. Raises CacheError when it cannot be used."""

    def __init__(self, folder: Path | str, root: bytes) -> None:
        self.folder, self._root = Path(folder), root.hex()
        self._open: dict[str, _File] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"the log folder {self.folder} cannot be used: {error}") from error

    def begin(self, request: Request) -> None:
        """Write down a new request. Raises CacheError when that cannot be done, and when there is
        a log of this name already: it holds tokens that somebody may want.
        """
        path = self._path(request.id)
        try:
            self._open[request.id] = self._create(path, request)
        except FileExistsError as error:
            raise CacheError(
                f"{path} belongs to another request of this name: recover or forget it first"
            ) from error
        except OSError as error:
            raise CacheError(f"{path} cannot be written: {error}") from error

    def take_up(self, request: Request, logged: Logged) -> None:
        """Go on in the log of a request that was recovered, behind its last sound record.

        Raises CacheError when it is open in another process, or cannot be written.
        """
        try:
            descriptor = _lock(logged.path)
        except BlockingIOError as error:
            raise CacheError(f"{logged.path} is in use by another process") from error
        except OSError as error:
            raise CacheError(f"{logged.path} cannot be written: {error}") from error
        os.ftruncate(descriptor, logged.size)
        self._open[request.id] = _File(descriptor, logged.checksum, logged.size)

    def append(self, request: Request, drawn: Drawn) -> None:
        """Write down the next token; it may be shown afterwards.

        Raises CacheError when it cannot be written.
        """
        try:
            self._open[request.id].put(drawn.token, drawn.logprob, len(request.output))
        except OSError as error:
            raise CacheError(f"the log of {request.id} cannot be written: {error}") from error

    def end(self, request: Request) -> None:
        """Write down that a request has ended, and close its file."""
        file = self._open.pop(request.id, None)
        if file is not None:
            reason = _REASONS.index(request.finish_reason or "error")
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

    def rename(self, root: bytes, requests: Iterable[Request]) -> None:
        """From now on the model has another name: the logs of requests go on under it.

        Raises CacheError when some cannot be written: these go on under the old name.
        """
        self._root, problems = root.hex(), []
        for request in requests:
            path = self._path(request.id)
            temporary = path.with_suffix(".new")
            try:
                temporary.unlink(missing_ok=True)
                new = self._create(temporary, request)
                for number, drawn in enumerate(request.output):
                    new.put(drawn.token, drawn.logprob, number)
                temporary.replace(path)
            except OSError as error:
                problems.append(f"{path} cannot be written: {error}")
                continue
            self._open[request.id].close()
            self._open[request.id] = new
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
            logged = _read(path)
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
        params = asdict(request.params) | {"seed": request.sampler.seed}
        params["logit_bias"] = list(request.params.logit_bias.items())
        header = json.dumps(
            {
                "model": self._root,
                "id": request.id,
                "prompt": request.prompt,
                "params": params,
                "priority": request.priority,
                "masked": request.mask is not None,
            }
        ).encode()
        checksum = zlib.crc32(header)
        data = MAGIC + _SIZE.pack(len(header)) + header + _SIZE.pack(checksum)
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


def _read(path: Path) -> Logged | None:
    """What a file says, or None if it is no log."""
    try:
        data = path.read_bytes()
        at = len(MAGIC) + _SIZE.size
        (size,) = _SIZE.unpack(data[len(MAGIC) : at])
        raw = data[at : at + size]
        (checksum,) = _SIZE.unpack(data[at + size : at + size + _SIZE.size])
        if data[: len(MAGIC)] != MAGIC or zlib.crc32(raw) != checksum:
            return None
        header: dict[str, Any] = json.loads(raw)
        values = dict(header["params"])
        values["logit_bias"] = {int(k): v for k, v in values["logit_bias"]}
        values["stop_token_ids"] = tuple(values["stop_token_ids"])
        about = {
            "params": SamplingParams(**values),
            "prompt": list(header["prompt"]),
            **{key: header[key] for key in ("id", "model", "priority", "masked")},
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error, FathomError):
        return None
    at += size + _SIZE.size
    output: list[Drawn] = []
    reason = None
    while at + RECORD.size <= len(data):
        token, logprob, number, check = RECORD.unpack_from(data, at)
        if check != zlib.crc32(data[at : at + _CHECKED.size], checksum):
            break
        if token != END and number != len(output) & 0xFFFF:
            break
        at += RECORD.size
        if token == END:
            reason = dict(enumerate(_REASONS)).get(int(logprob), "error")
            break
        output.append(Drawn(token=token, logprob=logprob))
    return Logged(
        path=path, output=output, finish_reason=reason, checksum=checksum, size=at, **about
    )
