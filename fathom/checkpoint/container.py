"""Safetensors headers and indexes, parsed as hostile input. No tensor is read while doing so.

A file is eight bytes of header length, a JSON header, then the tensors' bytes without gap or
overlap. Nothing here trusts a number before it was compared with the size of the file on disk.
Pickled files are never opened.

Paper: none (file format).
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fathom.checkpoint.manifest import DTYPE_BYTES
from fathom.errors import CheckpointError

# The largest official index has 145,116 tensors: about 20 MB of header even in a single file.
MAX_HEADER_BYTES = 64 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
MAX_CONFIG_BYTES = 16 * 2**20
MAX_DIMENSIONS = 8
MAX_FILES = 10_000

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}\.safetensors")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a checkpoint: in which file, with which tensor if any, and what."""

    file: str
    tensor: str | None
    message: str

    def __str__(self) -> str:
        if self.tensor is None:
            return f"{self.file} {self.message}"
        return f"tensor {shown(self.tensor)} in {self.file} {self.message}"


class StoredTensor(NamedTuple):
    """Where a tensor lies: bytes `start` to `stop` of `file`, under the name `stored` there."""

    stored: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start


def shown(name: str) -> str:
    """A name from a file, quoted, in ASCII and of bounded length, fit for a message."""
    text = ascii(name)
    return text if len(text) <= 160 else f"{text[:150]}...'"


class _Refused(Exception):
    """Carries a Problem out of the parsing functions below."""

    def __init__(self, message: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.message, self.tensor = message, tensor


def read_header(path: Path) -> tuple[list[StoredTensor], list[Problem]]:
    """The tensors of one file, and what is wrong with it. An unusable header gives no tensors.

    A file that ends too early still lists its tensors, so that they are not called missing as well.
    """
    try:
        size, raw = _read_raw_header(path)
        tensors = _parse_entries(path.name, _parse_json(raw, "its header"), 8 + len(raw))
    except _Refused as e:
        return [], [Problem(path.name, e.tensor, e.message)]
    tensors.sort(key=lambda t: (t.start, t.stop))
    return tensors, _check_layout(path.name, tensors, 8 + len(raw), size)


def read_index(path: Path) -> tuple[dict[str, str], list[Problem]]:
    """The weight_map of an index, and what is wrong with it. Only plain file names are accepted."""
    try:
        raw = _parse_json(_bounded_bytes(path, MAX_INDEX_BYTES), "it")
        weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise _Refused("has no weight_map object that names the file of each tensor")
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
                raise _Refused(
                    f"is mapped to {shown(str(file))}: only a file name ending in .safetensors in "
                    "the same folder is accepted",
                    tensor,
                )
        if len(set(weight_map.values())) > MAX_FILES:
            raise _Refused(f"names more than {MAX_FILES:,} files")
    except _Refused as e:
        return {}, [Problem(path.name, e.tensor, e.message)]
    shared: dict[str, str] = {}  # one string object per file name, not one per tensor
    return {tensor: shared.setdefault(f, f) for tensor, f in weight_map.items()}, []


def read_bytes(folder: Path, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Any:
    """Bytes `start` to `stop` of a tensor, read into fresh memory: [cols] uint8.

    Reading, unlike mapping, costs exactly these bytes, and a file cut short meanwhile is an error
    instead of a crash. Raises CheckpointError.
    """
    stop = tensor.nbytes if stop is None else stop
    buffer = torch.empty(stop - start, dtype=torch.uint8)
    read_into(folder, tensor, start, buffer)
    return buffer


def read_into(folder: Path, tensor: StoredTensor, start: int, buffer: torch.Tensor) -> None:
    """Fill a buffer on the host with a tensor's bytes from `start` on: buffer [cols] uint8.

    Raises CheckpointError.
    """
    if not len(buffer):
        return
    view = buffer.numpy().data
    try:
        with open(folder / tensor.file, "rb", buffering=0) as f:
            f.seek(tensor.start + start)
            done = 0
            while done < len(view):
                count = f.readinto(view[done:])
                if not count:
                    break
                done += count
    except OSError as e:
        raise CheckpointError(
            f"{folder}: cannot read tensor {shown(tensor.stored)} in {tensor.file}: "
            f"{e.strerror or e}"
        ) from e
    if done < len(view):
        raise CheckpointError(
            f"{folder}: tensor {shown(tensor.stored)} in {tensor.file} ends early: the file became "
            "shorter while it was being read"
        )


def _read_raw_header(path: Path) -> tuple[int, bytes]:
    """(size of the file, its header). Raises _Refused."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("is not a regular file")
        with open(path, "rb") as f:
            prefix = f.read(8)
            if len(prefix) < 8:
                raise _Refused(
                    f"is truncated: {len(prefix)} bytes cannot hold a safetensors header"
                )
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise _Refused(
                    f"is no safetensors file: it announces a header of {length:,} bytes, more than "
                    f"the {MAX_HEADER_BYTES:,} that are accepted"
                )
            if length > status.st_size - 8:
                raise _Refused(
                    f"is truncated: its header should have {length:,} bytes, "
                    f"{status.st_size - 8:,} are left in the file"
                )
            raw = f.read(length)
    except FileNotFoundError:
        raise _Refused("is missing") from None
    except OSError as e:
        raise _Refused(f"cannot be read: {e.strerror or e}") from None
    if len(raw) != length:
        raise _Refused("is truncated: it ended inside its header")
    return status.st_size, raw


def _bounded_bytes(path: Path, limit: int) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("is not a regular file")
        if status.st_size > limit:
            raise _Refused(f"is larger than the {limit:,} bytes that are accepted")
        with open(path, "rb") as f:
            return f.read(status.st_size)
    except OSError as e:
        raise _Refused(f"cannot be read: {e.strerror or e}") from None


def _parse_json(raw: bytes, what: str) -> Any:
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError:
        raise _Refused(f"cannot be parsed: {what} is nested too deeply") from None
    except ValueError as e:
        raise _Refused(f"cannot be parsed: {what} is not valid JSON ({e})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused("appears twice", twice)
    return table


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON value")


def _parse_entries(file: str, header: Any, data_start: int) -> list[StoredTensor]:
    if not isinstance(header, dict):
        raise _Refused(f"has a header that is not an object but {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Refused("has a __metadata__ entry that does not map text to text")
    shared: dict[Any, Any] = {}  # shapes and type names repeat thousands of times
    return [_parse_entry(file, name, e, data_start, shared) for name, e in header.items()]


def _parse_entry(
    file: str, name: str, entry: Any, data_start: int, shared: dict[Any, Any]
) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise _Refused("must be described by dtype, shape and data_offsets alone", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _Refused(f"has the unknown dtype {shown(str(dtype))}", name)
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _Refused(f"has an unusable shape: {shown(str(shape))}", name)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Refused(f"has unusable data_offsets: {shown(str(offsets))}", name)
    needed = DTYPE_BYTES[dtype]
    for size in shape:
        needed *= size
    if needed != offsets[1] - offsets[0]:
        raise _Refused(
            f"claims {offsets[1] - offsets[0]:,} bytes, but {dtype} {shape} has {needed:,}", name
        )
    start, stop = (data_start + o for o in offsets)
    dims = tuple(shape)
    return StoredTensor(
        name, file, shared.setdefault(dtype, dtype), shared.setdefault(dims, dims), start, stop
    )


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_layout(
    file: str, tensors: list[StoredTensor], data_start: int, size: int
) -> list[Problem]:
    """The tensors, sorted by place, must fill the rest of the file exactly."""
    end = data_start
    before: StoredTensor | None = None
    for tensor in tensors:
        if tensor.start < end and before is not None:
            message = f"overlaps tensor {shown(before.stored)}"
            return [Problem(file, tensor.stored, message)]
        if tensor.start > end:
            return [
                Problem(file, tensor.stored, f"lies behind {tensor.start - end:,} unclaimed bytes")
            ]
        end, before = tensor.stop, tensor
    if end > size:
        first = next(t for t in tensors if t.stop > size)
        return [
            Problem(
                file,
                first.stored,
                f"ends outside the file, which is truncated: {size:,} bytes of {end:,}. "
                "Download or copy it again",
            )
        ]
    if end < size:
        return [Problem(file, None, f"has {size - end:,} bytes that belong to no tensor")]
    return []
