"""Compressed entries: slabs of 256 tokens that hold every layer's entries in their stored formats.

A slab is one contiguous record, the unit that is allocated, shared, copied to another tier, hashed
and written to disk. Inside, each layer has its part: main entries (data bytes, then scales), in CSA
layers then indexer keys (data, then scales). 584 and 68 or 132 bytes an entry for the released
models; a model that is not quantised stores plain numbers.

Paper: §3.5.1 (classical KV cache blocks, a multiple of lcm(m, m') tokens each).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from fathom.errors import CacheFull, ConfigError
from fathom.model.config import CSA_RATIO, ModelConfig
from fathom.quant import kv_pack

SLAB_TOKENS = 256  # two blocks of lcm(4, 128): 64 CSA entries and 2 HCA entries a layer

# What copying a record to the host raises without memory: torch has no class of its own for memory
# that it cannot pin.
NO_MEMORY = (MemoryError, RuntimeError)

KVFormat = Literal["fp8", "float32", "bfloat16"]
KeyFormat = Literal["fp4", "fp8", "float32", "bfloat16"]
_ITEM = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlaces:
    """Byte offsets of one layer's parts within a slab; -1 where it has none."""

    ratio: int
    entries: int
    kv_data: int = -1
    kv_scales: int = -1
    key_data: int = -1
    key_scales: int = -1


@dataclass(frozen=True)
class SlabLayout:
    """Where everything lies in a slab. Formats: "fp8" main entries and "fp4" or "fp8" keys of a
    quantised model; the arithmetic's dtype by name for both otherwise.
    """

    config: ModelConfig
    kv_format: KVFormat
    key_format: KeyFormat

    @classmethod
    def of(
        cls, config: ModelConfig, quantized: bool, dtype: torch.dtype, key_format: str = "fp4"
    ) -> SlabLayout:
        """The layout for a model. Raises ConfigError for an unknown format of indexer keys."""
        if key_format not in ("fp4", "fp8"):
            raise ConfigError(f"indexer keys are stored as fp4 or fp8, not {key_format!r}")
        if quantized:
            return cls(config, "fp8", key_format)  # type: ignore[arg-type]
        name = "float32" if dtype == torch.float32 else "bfloat16"
        return cls(config, name, name)

    @cached_property
    def kv_sizes(self) -> tuple[int, int]:
        """Bytes of one main entry: (data, scales)."""
        c = self.config
        if self.kv_format != "fp8":
            return c.head_dim * _ITEM[self.kv_format], 0
        total = kv_pack.kv_entry_bytes(c.head_dim, c.qk_rope_head_dim)
        data = c.head_dim + c.qk_rope_head_dim
        return data, total - data

    @cached_property
    def key_sizes(self) -> tuple[int, int]:
        """Bytes of one indexer key: (data, scales)."""
        dim = self.config.index_head_dim
        if self.key_format == "fp4":
            return dim // 2, kv_pack.indexer_entry_bytes("fp4", dim) - dim // 2
        if self.key_format == "fp8":
            return dim, 4
        return dim * _ITEM[self.key_format], 0

    @cached_property
    def layers(self) -> tuple[LayerPlaces, ...]:
        """The parts of every main layer, in order."""
        return self._plan[0]

    @cached_property
    def slab_bytes(self) -> int:
        """Bytes of a slab; 985,664 for V4-Flash with FP8 keys."""
        return self._plan[1]

    @cached_property
    def _plan(self) -> tuple[tuple[LayerPlaces, ...], int]:
        places, end = [], 0
        for ratio in self.config.compress_ratios:
            if not ratio:
                places.append(LayerPlaces(ratio=0, entries=0))
                continue
            entries = SLAB_TOKENS // ratio
            starts = [end, end + entries * self.kv_sizes[0]]
            end = starts[1] + entries * self.kv_sizes[1]
            keys = [-1, -1]
            if ratio == CSA_RATIO:
                keys = [end, end + entries * self.key_sizes[0]]
                end = keys[1] + entries * self.key_sizes[1]
            places.append(
                LayerPlaces(
                    ratio=ratio,
                    entries=entries,
                    kv_data=starts[0],
                    kv_scales=starts[1],
                    key_data=keys[0],
                    key_scales=keys[1],
                )
            )
        return tuple(places), -(-end // 8) * 8

    def used_ranges(self, tokens: int) -> list[tuple[int, int]]:
        """The byte ranges of a slab that its first `tokens` tokens have filled."""
        if tokens >= SLAB_TOKENS:
            return [(0, self.slab_bytes)]
        ranges = []
        for p in self.layers:
            if not p.ratio:
                continue
            count = tokens // p.ratio
            parts = [(p.kv_data, self.kv_sizes[0]), (p.kv_scales, self.kv_sizes[1])]
            if p.key_data >= 0:
                parts += [(p.key_data, self.key_sizes[0]), (p.key_scales, self.key_sizes[1])]
            ranges += [(start, start + count * size) for start, size in parts if count * size]
        return ranges


def slabs_for(tokens: int) -> int:
    """How many slabs hold this many tokens."""
    return -(-tokens // SLAB_TOKENS)


def read_ranges(row: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> bytes:
    """The bytes of some ranges of row [bytes] uint8, one after the other."""
    whole = _on_host(row).numpy()
    return b"".join(whole[a:b].tobytes() for a, b in ranges)


def write_ranges(row: torch.Tensor, ranges: Sequence[tuple[int, int]], record: bytes) -> None:
    """Undo `read_ranges` on row [bytes] uint8. Raises ValueError for a record of another length."""
    wanted = sum(b - a for a, b in ranges)
    if len(record) != wanted:
        raise ValueError(f"a record of {len(record)} bytes where {wanted} belong")
    source, at = np.frombuffer(record, np.uint8), 0
    staged = _on_host(row)
    whole = staged.numpy()  # torch would wake its threads for every copy
    for a, b in ranges:
        whole[a:b] = source[at : at + b - a]
        at += b - a
    if row.device.type != "cpu":
        row.copy_(staged, non_blocking=True)


def _on_host(row: torch.Tensor) -> torch.Tensor:
    """row [bytes] uint8 itself on the CPU; of a GPU a copy in pinned memory, in one transfer."""
    if row.device.type == "cpu":
        return row
    staged = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
    staged.copy_(row, non_blocking=True)
    torch.cuda.current_stream(row.device).synchronize()
    return staged


def _allocate(rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """Memory [rows, cols] uint8; on the CPU in huge pages where there are any.

    A scan of a million tokens touches a place in every slab: with small pages, finding where each
    lies takes as long as reading it.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, cols, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, rows * cols)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(rows, cols)


class SlabPool:
    """All slabs of a device: one allocation at a fixed address, handed out and counted.

    data: [slabs, slab_bytes] uint8. Memory that was never written to costs nothing on the CPU.
    A slab that several sequences share has as many references; only full slabs are shared.
    `releases` counts how often one was given back: until then there is no more room than before.
    """

    def __init__(self, layout: SlabLayout, count: int, device: torch.device | str = "cpu") -> None:
        self.layout, self.count = layout, count
        self.data = _allocate(count, layout.slab_bytes, torch.device(device))
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count
        self.releases = 0

    @property
    def free(self) -> int:
        """Slabs that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free slab, with one reference. Raises CacheFull when there is none."""
        if not self._free:
            raise CacheFull(
                f"all {self.count} slabs ({self.count * SLAB_TOKENS} tokens) are in use"
            )
        slab = self._free.pop()
        self._references[slab] = 1
        return slab

    def share(self, slab: int) -> None:
        """Add a reference to a slab that somebody holds."""
        assert self._references[slab] > 0
        self._references[slab] += 1

    def release(self, slab: int) -> None:
        """Drop a reference; the last one frees the slab."""
        self._references[slab] -= 1
        self.releases += 1
        assert self._references[slab] >= 0
        if self._references[slab] == 0:
            self._free.append(slab)

    def references(self, slab: int) -> int:
        """How many hold this slab."""
        return self._references[slab]

    def read(self, slab: int, tokens: int = SLAB_TOKENS) -> bytes:
        """The record of a slab, or of the part that its first `tokens` tokens have filled."""
        return read_ranges(self.data[slab], self.layout.used_ranges(tokens))

    def write(self, slab: int, record: bytes, tokens: int = SLAB_TOKENS) -> None:
        """Undo `read`. Raises ValueError when the record has another length."""
        write_ranges(self.data[slab], self.layout.used_ranges(tokens), record)
