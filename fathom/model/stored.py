"""Decoding on weights and caches in their stored formats: the model that fits the machine.

`Transformer` holds weights dequantised and computes everything differentiably. Here a block keeps
the bytes of the checkpoint (FP4 experts, FP8 matrices), reads and writes the cache's 584-byte
entries, and feeds one token to each of up to 64 sequences a step, as about 16 fused operations that
a GPU replays without the host. Matrices of the same input lie stacked, so that each is one launch.

Reading order: decode_layers -> _attention, stored_moe; mhc_boundary in between.

    tokens: sequences of the step; hidden, streams, heads as everywhere.

Paper: §2 (architecture), §3.4 (FP4 and FP8 inference), §3.5.1 (cache layout).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fathom.errors import ConfigError
from fathom.kernels import operation
from fathom.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fathom.model.rope import RotaryTable
from fathom.quant import kv_pack

_chunk_linear = operation("chunk_linear")
_chunk_moe = operation("chunk_moe")
_entry_attention = operation("entry_attention")
_index_scores_paged = operation("index_scores_paged")
_mhc_boundary = operation("mhc_boundary")
_store_entries = operation("store_entries")
_stored_linear = operation("stored_linear")
_stored_moe = operation("stored_moe")
_topk_positions = operation("topk_positions")

SLAB_TOKENS = 256  # tokens whose compressed entries, of every layer, lie in one slab
MOST_TOKENS = 64  # sequences in one decode step

Tensor = torch.Tensor


@dataclass(slots=True, kw_only=True)
class MixSite:
    """One mHC site and the norm behind it.

    fn: [cols, streams * hidden], base: [cols], scale: [3] float32; norm: [hidden].
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor


@dataclass(slots=True, kw_only=True)
class StoredLayer:
    """One block as stored; codes and scales are uint8, as in the files.

    low: wq_a over wkv; high: wq_b, over the indexer's wq_b; plain: the compressor's wkv, wgate,
    then the indexer compressor's wkv, wgate, then weights_proj, BF16; compressor,
    index_compressor: (ape, norm); routed: w1, scale, w3, scale, w2, scale; shared: w1 over w3,
    scale, w2, scale.
    """

    ratio: int
    attn_site: MixSite
    ffn_site: MixSite
    low: tuple[Tensor, Tensor]
    q_norm: Tensor
    kv_norm: Tensor
    high: tuple[Tensor, Tensor]
    sink: Tensor
    wo_a: tuple[Tensor, Tensor]
    wo_b: tuple[Tensor, Tensor]
    gate: Tensor
    routed: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]
    bias: Tensor | None = None
    table: Tensor | None = None
    plain: Tensor | None = None
    compressor: tuple[Tensor, Tensor] | None = None
    index_compressor: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], ratio: int) -> StoredLayer:
        """From a block's tensors by their official names, without the `layers.N.` before them.

        tensors: each in the same shape and dtype as in the files; routed experts may also be
        stacked, [experts, rows, cols], as `ffn.experts.w1.weight`.
        """
        get = tensors.__getitem__

        def quantised(*names: str) -> tuple[Tensor, Tensor]:
            return (
                torch.cat([_bytes(get(f"{name}.weight")) for name in names]).contiguous(),
                torch.cat([_bytes(get(f"{name}.scale")) for name in names]).contiguous(),
            )

        def site(name: str) -> MixSite:
            return MixSite(
                fn=get(f"hc_{name}_fn"),
                base=get(f"hc_{name}_base"),
                scale=get(f"hc_{name}_scale"),
                norm=get(f"{name}_norm.weight"),
            )

        plain, compressor, index_compressor = [], None, None
        if ratio:
            plain = [get(f"attn.compressor.{part}.weight") for part in ("wkv", "wgate")]
            compressor = (get("attn.compressor.ape"), get("attn.compressor.norm.weight"))
        if ratio == CSA_RATIO:
            own = "attn.indexer.compressor"
            plain += [get(f"{own}.{part}.weight") for part in ("wkv", "wgate")]
            plain.append(get("attn.indexer.weights_proj.weight"))
            index_compressor = (get(f"{own}.ape"), get(f"{own}.norm.weight"))
        return cls(
            ratio=ratio,
            attn_site=site("attn"),
            ffn_site=site("ffn"),
            low=quantised("attn.wq_a", "attn.wkv"),
            q_norm=get("attn.q_norm.weight"),
            kv_norm=get("attn.kv_norm.weight"),
            high=quantised("attn.wq_b", *(["attn.indexer.wq_b"] if ratio == CSA_RATIO else [])),
            sink=get("attn.attn_sink"),
            wo_a=quantised("attn.wo_a"),
            wo_b=quantised("attn.wo_b"),
            gate=get("ffn.gate.weight"),
            routed=tuple(
                _experts(tensors, f"{w}.{part}")
                for w in ("w1", "w3", "w2")
                for part in ("weight", "scale")
            ),
            shared=(
                *quantised("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
                *quantised("ffn.shared_experts.w2"),
            ),
            bias=tensors.get("ffn.gate.bias"),
            table=tensors.get("ffn.gate.tid2eid"),
            plain=torch.cat(plain).contiguous() if plain else None,
            compressor=compressor,
            index_compressor=index_compressor,
        )

    def num_bytes(self) -> int:
        """Bytes of all weights."""
        total = 0
        for tensor in self._tensors():
            total += tensor.numel() * tensor.element_size()
        return total

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, MixSite):
                value = (value.fn, value.base, value.scale, value.norm)
            values = value if isinstance(value, tuple) else (value,)
            found += [v for v in values if isinstance(v, Tensor)]
        return found


def _experts(tensors: Mapping[str, Tensor], part: str) -> Tensor:
    """One kind of the routed experts' tensors, stacked: [experts, rows, cols] uint8."""
    stacked = tensors.get(f"ffn.experts.{part}")
    if stacked is not None:
        return _bytes(stacked)
    count = sum(name.endswith(f".{part}") for name in tensors if name.startswith("ffn.experts."))
    return torch.stack([_bytes(tensors[f"ffn.experts.{e}.{part}"]) for e in range(count)])


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """Where each layer's entries lie in a slab: all layers' compressed entries of 256 tokens.

    offsets: for each layer (entries, index keys), in bytes; sequences differ only in their slabs.
    """

    offsets: tuple[tuple[int, int], ...]
    num_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, ratios: Sequence[int]) -> SlabLayout:
        """The layout for layers of these compress ratios."""
        entry = kv_pack.kv_entry_bytes(config.head_dim, config.qk_rope_head_dim)
        key = kv_pack.indexer_entry_bytes("fp4", config.index_head_dim)
        offsets, at = [], 0
        for ratio in ratios:
            count = SLAB_TOKENS // ratio if ratio else 0
            index = at + count * entry
            offsets.append((at, index))
            at = index + (count * key if ratio == CSA_RATIO else 0)
        return cls(tuple(offsets), at)


@dataclass(slots=True)
class LayerState:
    """A layer's fixed-size memory of every sequence: its window's ring and compressor states."""

    ring: Tensor
    state: Tensor | None = None
    index_state: Tensor | None = None


@dataclass(slots=True)
class StoredCache:
    """The memory of `tokens` sequences: a state slot each, and slabs found through `table`.

    pool: [slabs, bytes] uint8; table: [tokens, slabs] int32.
    """

    layout: SlabLayout
    layers: list[LayerState]
    pool: Tensor
    table: Tensor

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        ratios: Sequence[int],
        tokens: int,
        slabs: int,
        device: torch.device | str,
    ) -> StoredCache:
        """Room for `slabs` slabs of every sequence, in order; nothing in it."""
        layout = SlabLayout.of(config, ratios)
        entry = kv_pack.kv_entry_bytes(config.head_dim, config.qk_rope_head_dim)
        make = {"dtype": torch.float32, "device": device}
        layers = []
        for ratio in ratios:
            ring = torch.zeros(
                tokens, config.sliding_window * entry, dtype=torch.uint8, device=device
            )
            own = LayerState(ring)
            if ratio == CSA_RATIO:
                own.state = torch.zeros(tokens, 8, 2, 2 * config.head_dim, **make)
                own.index_state = torch.zeros(tokens, 8, 2, 2 * config.index_head_dim, **make)
            elif ratio == HCA_RATIO:
                own.state = torch.zeros(tokens, 3, config.head_dim, **make)
            layers.append(own)
        pool = torch.zeros(tokens * slabs, layout.num_bytes, dtype=torch.uint8, device=device)
        table = torch.arange(tokens * slabs, dtype=torch.int32, device=device)
        return cls(layout, layers, pool, table.view(tokens, slabs))


@dataclass(slots=True, kw_only=True)
class Step:
    """What the layers of one decode step share; fixed addresses, so that a graph can replay it.

    positions: [tokens] int32; token_ids: [tokens] int64; rotations: [tokens, 2, rope_dim / 2] of
    this position without and with YaRN, and of the first positions of its windows of 4 and 128;
    most_positions: a bound on every position + 1, which sizes the grids.
    """

    positions: Tensor
    token_ids: Tensor
    most_positions: int
    rotations: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def create(
        cls, config: ModelConfig, positions: Tensor, token_ids: Tensor, most_positions: int
    ) -> Step:
        """positions: [tokens] int32; token_ids: [tokens] int64. Raises ConfigError beyond 64."""
        if len(positions) > MOST_TOKENS:
            raise ConfigError(
                f"a decode step takes at most {MOST_TOKENS} sequences, not {len(positions)}: "
                "split the batch"
            )
        step = cls(positions=positions, token_ids=token_ids, most_positions=most_positions)
        step.rotate(config)
        return step

    def rotate(self, config: ModelConfig) -> None:
        """Bring the rotations up to date with the positions, in place where they exist."""
        plain, yarn = RotaryTable(config, False), RotaryTable(config, True)
        at = self.positions.long()
        for name, rotary, position in (
            ("plain", plain, at),
            ("yarn", yarn, at),
            (f"entry{CSA_RATIO}", yarn, at // CSA_RATIO * CSA_RATIO),
            (f"entry{HCA_RATIO}", yarn, at // HCA_RATIO * HCA_RATIO),
        ):
            value = torch.stack(rotary.at(position), dim=1)
            if name in self.rotations:
                self.rotations[name].copy_(value)
            else:
                self.rotations[name] = value.contiguous()


def decode_layers(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    cache: StoredCache,
    step: Step,
    streams: Tensor,
    *,
    batch_invariant: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Feed one token of every sequence through the blocks.

    streams: [tokens, streams, hidden]; batch_invariant: a token's result is the same bits whatever
    the batch; without it, linears and experts go through the matrix units, which is quicker from
    about eight sequences on. Returns (streams before the last write, the last sublayer's
    output [tokens, hidden], its post [tokens, streams] and comb [tokens, streams, streams]): the
    head's read finishes the write.
    """
    constants = {
        "iterations": config.hc_sinkhorn_iters,
        "eps": config.hc_eps,
        "norm_eps": config.rms_norm_eps,
    }
    y = pairs = post = comb = None
    for index, layer in enumerate(layers):
        for site in (layer.attn_site, layer.ffn_site):
            streams, x, post, comb = _mhc_boundary(
                streams, site.fn, site.base, site.scale, site.norm,
                y=y, pairs=pairs, post=post, comb=comb, **constants,
            )  # fmt: skip
            if site is layer.attn_site:
                y = _attention(config, layer, cache, index, step, x, batch_invariant)
                pairs = None
            else:
                moe = _stored_moe if batch_invariant else _chunk_moe
                pairs, y, _ = moe(
                    x,
                    step.token_ids,
                    layer.gate,
                    layer.routed,
                    layer.shared,
                    topk=config.num_experts_per_tok,
                    scaling_factor=config.routed_scaling_factor,
                    limit=config.swiglu_limit,
                    bias=layer.bias,
                    table=layer.table,
                )
    assert y is not None
    assert pairs is not None
    assert post is not None
    assert comb is not None
    y = (pairs.float().sum(1) + y.float()).to(y.dtype)
    return streams, y, post, comb


def _attention(
    config: ModelConfig,
    layer: StoredLayer,
    cache: StoredCache,
    index: int,
    step: Step,
    x: Tensor,
    batch_invariant: bool,
) -> Tensor:
    """x: [tokens, hidden], normed -> the attention's output [tokens, hidden]."""
    linear = _stored_linear if batch_invariant else _chunk_linear
    c, own, ratio = config, cache.layers[index], layer.ratio
    entry_offset, index_offset = cache.layout.offsets[index]
    page = SLAB_TOKENS // ratio if ratio else 1
    most = step.most_positions // ratio if ratio else 0
    rotation = step.rotations["yarn" if ratio else "plain"]
    paged = {"pool": cache.pool, "table": cache.table, "page_entries": page} if ratio else {}

    low, projected = linear(x, *layer.low, plain=layer.plain)
    qr = low[:, : c.q_lora_rank]
    query, _ = linear(qr, *layer.high, norm=layer.q_norm, norm_eps=c.rms_norm_eps)
    index_query = _store_entries(
        low,
        layer.kv_norm,
        step.positions,
        rotation,
        own.ring,
        kind=ratio,
        window=c.sliding_window,
        norm_eps=c.rms_norm_eps,
        projected=projected,
        query=query,
        compressor=(*layer.compressor, own.state) if layer.compressor else None,
        index_compressor=(
            (*layer.index_compressor, own.index_state) if layer.index_compressor else None
        ),
        entry_rotation=step.rotations.get(f"entry{ratio}"),
        offsets=(entry_offset, index_offset),
        index_heads=c.index_n_heads if ratio == CSA_RATIO else 0,
        **paged,
    )
    picks = None
    if ratio == CSA_RATIO:
        scores, maxima = _index_scores_paged(
            index_query, projected, step.positions, cache.pool, cache.table,
            index_offset=index_offset, page_entries=page, ratio=ratio, most_entries=most,
        )  # fmt: skip
        picks = _topk_positions(scores, maxima, step.positions, k=c.index_topk, ratio=ratio)
    out = _entry_attention(
        query,
        step.positions,
        rotation,
        own.ring,
        layer.sink,
        kind=ratio,
        head_dim=c.head_dim,
        window=c.sliding_window,
        norm_eps=c.rms_norm_eps,
        entry_offset=entry_offset,
        picks=picks,
        most_entries=most,
        **paged,
    )
    # Stored in FP8 but never met by a rounded input: the official converter expands wo_a.
    low_rank, _ = linear(out, *layer.wo_a, groups=c.o_groups, quantize_input=False)
    return linear(low_rank, *layer.wo_b)[0]
