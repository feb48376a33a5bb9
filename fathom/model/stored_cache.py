"""The memory of stored-format inference: a slot per sequence, and slabs found through its table.

The engine makes such views of its own memory; `StoredCache.empty` allocates a plain one.

Paper: §3.5.1 (cache layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fathom.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fathom.quant import kv_pack
from fathom.quant.kv_pack import IndexerFormat

SLAB_TOKENS = 256  # tokens whose compressed entries, of every layer, lie in one slab
TAIL = 8  # tokens whose projections a CSA compressor looks at

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """Where each layer's entries lie in a slab: all layers' compressed entries of 256 tokens.

    offsets: for each layer (entries, index keys), in bytes; sequences differ only in their slabs.
    """

    offsets: tuple[tuple[int, int], ...]
    num_bytes: int

    @classmethod
    def of(
        cls, config: ModelConfig, ratios: Sequence[int], key_format: IndexerFormat = "fp4"
    ) -> SlabLayout:
        """The layout for layers of these compress ratios."""
        entry = kv_pack.kv_entry_bytes(config.head_dim, config.qk_rope_head_dim)
        key = kv_pack.indexer_entry_bytes(key_format, config.index_head_dim)
        offsets, at = [], 0
        for ratio in ratios:
            count = SLAB_TOKENS // ratio if ratio else 0
            index = at + count * entry
            offsets.append((at, index))
            at = index + (count * key if ratio == CSA_RATIO else 0)
        return cls(tuple(offsets), at)


@dataclass(slots=True)
class LayerState:
    """A layer's fixed-size memory of every sequence: its window's ring and compressor states.

    ring: [slots, bytes] uint8, all data bytes, then all scale bytes of as many entries as it has
    room for; state, index_state: float32, of CSA the last tokens' kv and gate [slots, 2, tail, 2 *
    cols], of HCA the running softmax after each of the last tokens [slots, tail, 3, cols].
    """

    ring: Tensor
    state: Tensor | None = None
    index_state: Tensor | None = None


@dataclass(slots=True)
class StoredCache:
    """Where every layer's state and entries lie.

    offsets: for each layer (entries, index keys), in bytes within a slab; pool: [slabs, bytes]
    uint8; table: [slots, slabs] int32; key_format: of index keys.
    """

    offsets: tuple[tuple[int, int], ...]
    layers: list[LayerState]
    pool: Tensor
    table: Tensor
    key_format: IndexerFormat = "fp4"

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        ratios: Sequence[int],
        slots: int,
        slabs: int,
        device: torch.device | str,
        key_format: IndexerFormat = "fp4",
    ) -> StoredCache:
        """Room for `slabs` slabs of every sequence, in order; nothing in it."""
        layout = SlabLayout.of(config, ratios, key_format)
        entry = kv_pack.kv_entry_bytes(config.head_dim, config.qk_rope_head_dim)
        make = {"dtype": torch.float32, "device": device}
        layers = []
        for ratio in ratios:
            ring = torch.zeros(
                slots, config.sliding_window * entry, dtype=torch.uint8, device=device
            )
            own = LayerState(ring)
            if ratio == CSA_RATIO:
                own.state = torch.zeros(slots, 2, TAIL, 2 * config.head_dim, **make)
                own.index_state = torch.zeros(slots, 2, TAIL, 2 * config.index_head_dim, **make)
            elif ratio == HCA_RATIO:
                own.state = torch.zeros(slots, 1, 3, config.head_dim, **make)
            layers.append(own)
        pool = torch.zeros(slots * slabs, layout.num_bytes, dtype=torch.uint8, device=device)
        table = torch.arange(slots * slabs, dtype=torch.int32, device=device)
        return cls(layout.offsets, layers, pool, table.view(slots, slabs), key_format)
