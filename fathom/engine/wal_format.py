"""What a request's log looks like in its file, and what is read from one.

A header says what was asked; then come 14 bytes a token: its id, its log-probability, the number of
its draw and a checksum. A file that was cut off at any byte gives back its whole records.

Paper: §5.2 (token-granular write-ahead log for preemptible rollouts).
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fathom.chat.generation import TokenMask
from fathom.engine.request import Request, StopHook
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.errors import FathomError, GenerationError

MAGIC = b"fathomW3"
# Token, log-probability, number of the draw (its last 16 bits: the rest is its place), checksum.
RECORD = struct.Struct("<IfHI")
CHECKED = struct.Struct("<IfH")  # what the checksum covers
END = 0xFFFFFFFF  # in place of a token: the request has ended, and why
REASONS = ("stop", "length", "cancelled", "error")
_SIZE = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """What a log says of its request. `finish_reason` None: it was still running. `rules`: see
    `rules_of` its mask.

    `checksum` is the header's, `size` the length up to which the file is sound.
    """

    path: Path
    id: str
    model: str
    prompt: list[int]
    params: SamplingParams
    priority: int
    rules: str | None
    output: list[Drawn]
    finish_reason: str | None
    checksum: int
    size: int

    def revive(self, mask: TokenMask | None, stop: StopHook | None) -> tuple[Request, str | None]:
        """The request, with its tokens, which mask and stop hook are told; and why it ends here, if
        it does. A request that had a mask and gets none ends with an error.
        """
        request = Request(
            prompt=self.prompt,
            params=self.params,
            id=self.id,
            priority=self.priority,
            mask=mask,
            stop=stop,
        )
        reason = None
        try:
            for drawn in self.output:
                request.add(drawn)
                request.sampler.accept(drawn.token)
                if mask is not None:
                    mask.accept(drawn.token)
                reason = request.ending() or reason
            if self.finish_reason is None and self.rules is not None and mask is None:
                raise GenerationError(f"{request.id} cannot go on without its mask")
        except Exception as error:  # whatever a hook raises is its request's trouble
            request.error, reason = error, "error"
        return request, reason


def rules_of(mask: TokenMask | None) -> str | None:
    """What tells masks of the same rules: "" for one that does not say, None without a mask."""
    if mask is None:
        return None
    rules = getattr(mask, "rules", "")
    return hashlib.blake2b(rules.encode(), digest_size=16).hexdigest() if rules else ""


def encode_header(request: Request, model: str) -> tuple[bytes, int]:
    """The bytes that a log begins with, and their checksum, which every record's goes on from."""
    params = asdict(request.params) | {"seed": request.sampler.seed}
    params["logit_bias"] = list(request.params.logit_bias.items())
    header = json.dumps(
        {
            "model": model,
            "id": request.id,
            "prompt": request.prompt,
            "params": params,
            "priority": request.priority,
            "rules": rules_of(request.mask),
        }
    ).encode()
    checksum = zlib.crc32(header)
    return MAGIC + _SIZE.pack(len(header)) + header + _SIZE.pack(checksum), checksum


def read_log(path: Path) -> Logged | None:
    """What a file says, or None if it is no log, or its header is damaged."""
    try:
        data = path.read_bytes()
        at = len(MAGIC) + _SIZE.size
        (size,) = _SIZE.unpack(data[len(MAGIC) : at])
        raw, at = data[at : at + size], at + size
        (checksum,) = _SIZE.unpack(data[at : at + _SIZE.size])
        if data[: len(MAGIC)] != MAGIC or zlib.crc32(raw) != checksum:
            return None
        header: dict[str, Any] = json.loads(raw)
        values = dict(header["params"])
        values["logit_bias"] = {int(k): v for k, v in values["logit_bias"]}
        values["stop_token_ids"] = tuple(values["stop_token_ids"])
        about = {
            "params": SamplingParams(**values),
            "prompt": list(header["prompt"]),
            **{key: header[key] for key in ("id", "model", "priority", "rules")},
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error, FathomError):
        return None
    output, reason, size = _read_records(data, at + _SIZE.size, checksum)
    return Logged(
        path=path, output=output, finish_reason=reason, checksum=checksum, size=size, **about
    )


def _read_records(data: bytes, at: int, checksum: int) -> tuple[list[Drawn], str | None, int]:
    """Tokens, the reason of the end if there is one, and where the sound part ends."""
    output: list[Drawn] = []
    while at + RECORD.size <= len(data):
        token, logprob, number, check = RECORD.unpack_from(data, at)
        if check != zlib.crc32(data[at : at + CHECKED.size], checksum):
            break
        if token == END:
            reason = dict(enumerate(REASONS)).get(int(logprob), "error")
            return output, reason, at + RECORD.size
        if number != len(output) & 0xFFFF:
            break
        at += RECORD.size
        output.append(Drawn(token=token, logprob=logprob))
    return output, None, at
