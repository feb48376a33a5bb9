"""The simple contiguous cache: what each layer must remember to process the next tokens.

One batch of sequences of equal length. A layer keeps its last `sliding_window - 1` raw key-value
entries, all its compressed entries and indexer keys, and the tokens of windows not yet complete.

Paper: §3.5.1 (KV cache layout: classical blocks and per-request state).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fathom.model.config import CSA_RATIO, ModelConfig


class EntryBuffer:
    """Rows appended along dimension 1 of [batch, entries, cols]; the storage doubles as needed."""

    def __init__(self, batch: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        self._storage = torch.empty(batch, 0, cols, dtype=dtype, device=device)
        self._count = 0

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [batch, entries, cols]. Returns all rows so far, a view of the storage."""
        first = self._count
        storage = self.reserve(first + rows.shape[1])
        storage[:, first : self._count] = rows
        return storage[:, : self._count]

    def reserve(self, count: int) -> torch.Tensor:
        """Make it hold `count` rows, new ones to be written by the caller.

        Returns the storage [batch, rows, cols], which may have more rows than that.
        """
        if count > self._storage.shape[1]:
            batch, _, cols = self._storage.shape
            grown = self._storage.new_empty(batch, max(64, 2 * count), cols)
            grown[:, : self._count] = self._storage[:, : self._count]
            self._storage = grown
        self._count = count
        return self._storage

    def clone(self) -> EntryBuffer:
        """An independent copy."""
        copy = EntryBuffer.__new__(EntryBuffer)
        copy._storage, copy._count = self._storage.clone(), self._count
        return copy


@dataclass(slots=True)
class CompressorState:
    """The tokens of a window not yet complete, and what the next window needs of the last one.

    kv, gate: [batch, window, cols] float32, of which the first `tokens processed % window` rows are
    filled (the gate with its position bias); previous_kv, previous_gate: [batch, window, head_dim],
    the first halves of the last complete window (CSA only; gate -inf before the first).
    """

    kv: torch.Tensor
    gate: torch.Tensor
    previous_kv: torch.Tensor | None = None
    previous_gate: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, batch: int, ratio: int, cols: int, device: torch.device | str = "cpu"
    ) -> CompressorState:
        """The state before the first token; only windows of 4 overlap."""
        width = 2 * cols if ratio == CSA_RATIO else cols
        kv = torch.zeros(batch, ratio, width, device=device)
        if ratio != CSA_RATIO:
            return cls(kv, torch.zeros_like(kv))
        previous = torch.zeros(batch, ratio, cols, device=device)
        return cls(kv, torch.zeros_like(kv), previous, torch.full_like(previous, -torch.inf))

    def clone(self) -> CompressorState:
        """An independent copy."""
        return CompressorState(
            self.kv.clone(),
            self.gate.clone(),
            None if self.previous_kv is None else self.previous_kv.clone(),
            None if self.previous_gate is None else self.previous_gate.clone(),
        )


@dataclass(slots=True)
class LayerCache:
    """One layer's memory. window: [batch, sliding_window - 1, head_dim], zeros before the start;
    key_format: what index queries and keys of a quantised model are rounded to, "fp4" or "fp8".
    """

    window: torch.Tensor
    entries: EntryBuffer | None = None
    compressor: CompressorState | None = None
    index_keys: EntryBuffer | None = None
    index_compressor: CompressorState | None = None
    key_format: str = "fp4"

    def clone(self) -> LayerCache:
        """An independent copy."""
        return LayerCache(
            self.window.clone(),
            self.entries and self.entries.clone(),
            self.compressor and self.compressor.clone(),
            self.index_keys and self.index_keys.clone(),
            self.index_compressor and self.index_compressor.clone(),
            self.key_format,
        )


@dataclass(slots=True)
class Cache:
    """The memory of all main layers after `length` tokens; `Cache.empty` starts one."""

    layers: list[LayerCache]
    length: int = 0
    mtp: list[LayerCache] = field(default_factory=list)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Cache:
        """A cache before the first token. dtype is the model's arithmetic."""
        device = torch.device(device)
        return cls(
            layers=[
                _empty_layer(config, ratio, batch, dtype, device)
                for ratio in config.compress_ratios
            ],
            mtp=[
                _empty_layer(config, 0, batch, dtype, device) for _ in range(config.num_mtp_layers)
            ],
        )

    def clone(self) -> Cache:
        """An independent copy, to continue from the same point more than once."""
        return Cache([c.clone() for c in self.layers], self.length, [c.clone() for c in self.mtp])


def _empty_layer(
    config: ModelConfig, ratio: int, batch: int, dtype: torch.dtype, device: torch.device
) -> LayerCache:
    window = torch.zeros(
        batch, config.sliding_window - 1, config.head_dim, dtype=dtype, device=device
    )
    layer = LayerCache(window)
    if ratio:
        layer.entries = EntryBuffer(batch, config.head_dim, dtype, device)
        layer.compressor = CompressorState.empty(batch, ratio, config.head_dim, device)
    if ratio == CSA_RATIO:
        layer.index_keys = EntryBuffer(batch, config.index_head_dim, dtype, device)
        layer.index_compressor = CompressorState.empty(batch, ratio, config.index_head_dim, device)
    return layer
