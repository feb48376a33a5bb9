"""The write-ahead log: every sampled token is in a file before anybody sees it.

One file per request: a header that says what was asked, then 16 bytes a token. A process that is
killed at any moment leaves whole records and at most one torn one, which is dropped; the request
then continues with the next draw, and, since draws and logits depend on nothing else, identically.

Paper: §5.2 (token-granular write-ahead log for preemptible rollouts).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fathom.engine.request import Request
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.errors import CacheError

MAGIC = b"fathomW1"
RECORD = struct.Struct("<IfII")  # token, log-probability, number of the draw, checksum
_SIZE = struct.Struct("<I")
END = 0xFFFFFFFF  # in place of a token: the request has ended, and why
_REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """What a log says of its request. `finish_reason` None: it was still running."""

    path: Path
    id: str
    prompt: list[int]
    params: SamplingParams
    priority: int
    masked: bool
    output: list[Drawn]
    finish_reason: str | None


class WriteAheadLog:
    """The logs of one model's requests in a folder. Raises CacheError when it cannot be used."""

    def __init__(self, folder: Path | str, root: bytes) -> None:
        self.folder, self._root = Path(folder), root.hex()
        self._open: dict[str, tuple[int, int]] = {}  # file descriptor, checksum of the header
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"the log folder {self.folder} cannot be used: {error}") from error

    def begin(self, request: Request) -> None:
        """Write down a request; one that was recovered goes on in its file."""
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
        path = self._path(request.id)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if os.fstat(descriptor).st_size == 0:
                checksum = zlib.crc32(header)
                _write(descriptor, MAGIC + _SIZE.pack(len(header)) + header + _SIZE.pack(checksum))
            else:
                logged = _read(path)
                if logged is None or logged[0].prompt != request.prompt:
                    os.close(descriptor)
                    raise CacheError(f"{path} belongs to another request of this name")
                os.ftruncate(descriptor, logged[2])  # a torn record at the end
                checksum = logged[1]
        except OSError as error:
            raise CacheError(f"{path} cannot be written: {error}") from error
        self._open[request.id] = descriptor, checksum

    def append(self, request: Request, drawn: Sequence[Drawn], first: int) -> None:
        """Write down tokens, the `first`-th and following; they may be shown afterwards.

        Raises CacheError when they cannot be written.
        """
        descriptor, checksum = self._open[request.id]
        data = b"".join(
            _record(checksum, d.token, d.logprob, first + i) for i, d in enumerate(drawn)
        )
        try:
            _write(descriptor, data)
        except OSError as error:
            raise CacheError(f"the log of {request.id} cannot be written: {error}") from error

    def end(self, request: Request) -> None:
        """Write down that a request has ended, and close its file."""
        opened = self._open.pop(request.id, None)
        if opened is None:
            return
        descriptor, checksum = opened
        reason = _REASONS.index(request.finish_reason or "error")
        try:
            _write(descriptor, _record(checksum, END, float(reason), len(request.output)))
        except OSError:
            pass  # then it is simply taken up again
        finally:
            os.close(descriptor)

    def forget(self, request_id: str) -> None:
        """Delete the log of a request whose tokens nobody needs any more."""
        opened = self._open.pop(request_id, None)
        if opened is not None:
            os.close(opened[0])
        self._path(request_id).unlink(missing_ok=True)

    def close(self) -> None:
        """Close all files; their requests can be recovered."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self) -> tuple[list[Logged], list[str]]:
        """All requests of this model in the folder, and what is wrong with files that are not."""
        found, problems = [], []
        for path in sorted(self.folder.glob("*.wal")):
            logged = _read(path)
            if logged is None:
                problems.append(f"{path} is damaged or no log of fathom's: left as it is")
            elif logged[3] != self._root:
                problems.append(f"{path} was written with another model: left as it is")
            else:
                found.append(logged[0])
        return found, problems

    def _path(self, request_id: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_." else f"%{ord(c):x}" for c in request_id)
        return self.folder / f"{safe}.wal"


def _record(header: int, token: int, logprob: float, number: int) -> bytes:
    data = RECORD.pack(token, logprob, number, 0)
    return data[:12] + _SIZE.pack(zlib.crc32(data[:12], header))


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read(path: Path) -> tuple[Logged, int, int, str] | None:
    """The content, the header's checksum, the length up to which it is sound, the model's name."""
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
        params = SamplingParams(**values)
        prompt, request_id = list(header["prompt"]), str(header["id"])
        priority, masked, model = header["priority"], header["masked"], str(header["model"])
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
    at += size + _SIZE.size
    output: list[Drawn] = []
    reason = None
    while at + RECORD.size <= len(data):
        token, logprob, number, check = RECORD.unpack_from(data, at)
        if check != zlib.crc32(data[at : at + 12], checksum) or number != len(output):
            break
        at += RECORD.size
        if token == END:
            reason = _REASONS[int(logprob)]
            break
        output.append(Drawn(token=token, logprob=logprob))
    logged = Logged(
        path=path,
        id=request_id,
        prompt=prompt,
        params=params,
        priority=priority,
        masked=masked,
        output=output,
        finish_reason=reason,
    )
    return logged, checksum, at, model
