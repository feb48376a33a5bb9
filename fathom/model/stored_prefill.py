"""Prefill on weights and caches in their stored formats: a chunk of one sequence at a time.

Leaves the cache exactly as `decode_layers` would have, which then goes on from it; a chunk may be
of any length and begin anywhere. The host decides nothing from what the device computes and never
waits for it.

Reading order: prefill_layers -> _attention; the experts and the mHC boundary are one operation
each.

    tokens: consecutive ones of one sequence; hidden, streams, heads as everywhere.

Paper: §2 (architecture), §3.4 (FP4 and FP8 inference), §3.5.1 (cache layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fathom.errors import ConfigError
from fathom.kernels import operation
from fathom.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fathom.model.rope import RotaryTable
from fathom.model.stored import SLAB_TOKENS, StoredCache, StoredLayer

_chunk_attention = operation("chunk_attention")
_chunk_entries = operation("chunk_entries")
_chunk_linear = operation("chunk_linear")
_chunk_mhc_boundary = operation("chunk_mhc_boundary")
_chunk_moe = operation("chunk_moe")
_chunk_picks = operation("chunk_picks")

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What the layers of one chunk share.

    sequence: its row in the cache; start: the first token's position; token_ids: [tokens] int64;
    rotations: [tokens, 2, rope_dim / 2] without and with YaRN, and [windows, 2, rope_dim / 2] of
    the first positions of the windows of 4 and of 128 tokens that the chunk touches.
    """

    sequence: int
    start: int
    token_ids: Tensor
    rotations: dict[str, Tensor]

    @classmethod
    def create(
        cls, config: ModelConfig, cache: StoredCache, sequence: int, start: int, token_ids: Tensor
    ) -> Chunk:
        """token_ids: [tokens] int64. Raises ConfigError for a chunk that the cache cannot hold."""
        sequences, slabs = cache.table.shape
        end, room = start + len(token_ids), slabs * SLAB_TOKENS
        if not 0 <= sequence < sequences:
            raise ConfigError(f"the cache has {sequences} sequences: there is no number {sequence}")
        if start < 0 or len(token_ids) == 0:
            raise ConfigError(
                f"a chunk has at least one token and a start of at least 0, not "
                f"{len(token_ids)} tokens from {start}"
            )
        if end > room:
            raise ConfigError(
                f"tokens {start} to {end} of a sequence do not fit its {slabs} slabs of "
                f"{SLAB_TOKENS}: give the cache {-(-end // SLAB_TOKENS)} slabs a sequence"
            )
        at = torch.arange(start, end, device=token_ids.device)
        plain, yarn = RotaryTable(config, False), RotaryTable(config, True)
        rotations = {"plain": _turns(plain, at), "yarn": _turns(yarn, at)}
        for ratio in (CSA_RATIO, HCA_RATIO):
            windows = torch.arange(start // ratio, (end - 1) // ratio + 1, device=token_ids.device)
            rotations[f"entry{ratio}"] = _turns(yarn, windows * ratio)
        return cls(sequence=sequence, start=start, token_ids=token_ids, rotations=rotations)


def _turns(table: RotaryTable, positions: Tensor) -> Tensor:
    return torch.stack(table.at(positions), dim=1).contiguous()


def prefill_layers(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    cache: StoredCache,
    chunk: Chunk,
    streams: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Feed a chunk of one sequence through the blocks; the cache must hold all tokens before it.

    streams: [tokens, streams, hidden]. Returns (streams before the last write, the last sublayer's
    output [tokens, hidden], its post [tokens, streams] and comb [tokens, streams, streams]), as
    `decode_layers` does.
    """
    constants = {
        "iterations": config.hc_sinkhorn_iters,
        "eps": config.hc_eps,
        "norm_eps": config.rms_norm_eps,
    }
    y = pairs = post = comb = None
    for index, layer in enumerate(layers):
        streams, x, post, comb = _boundary(
            layer, "attn_site", streams, y, pairs, post, comb, constants
        )
        y = pairs = None  # the experts' outputs are the largest tensors: free them early
        y = _attention(config, layer, cache, index, chunk, x)
        streams, x, post, comb = _boundary(
            layer, "ffn_site", streams, y, None, post, comb, constants
        )
        y = None
        pairs, y, _ = _chunk_moe(
            x,
            chunk.token_ids,
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
    return streams, _summed(pairs, y), post, comb


def _boundary(
    layer: StoredLayer,
    name: str,
    streams: Tensor,
    y: Tensor | None,
    pairs: Tensor | None,
    post: Tensor | None,
    comb: Tensor | None,
    constants: dict[str, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    site = getattr(layer, name)
    return _chunk_mhc_boundary(
        streams, site.fn, site.base, site.scale, site.norm,
        y=y, pairs=pairs, post=post, comb=comb, **constants,
    )  # fmt: skip


def _summed(pairs: Tensor, y: Tensor) -> Tensor:
    """pairs: [tokens, topk, hidden]; y: [tokens, hidden]. Their sum in float32, in y's dtype."""
    return pairs.sum(1, dtype=torch.float32).add_(y).to(y.dtype)


def _attention(
    config: ModelConfig, layer: StoredLayer, cache: StoredCache, index: int, chunk: Chunk, x: Tensor
) -> Tensor:
    """x: [tokens, hidden], normed -> the attention's output [tokens, hidden]."""
    c, own, ratio, mine = config, cache.layers[index], layer.ratio, chunk.sequence
    entry_offset, index_offset = cache.layout.offsets[index]
    rotation = chunk.rotations["yarn" if ratio else "plain"]
    paged = {}
    if ratio:
        page = SLAB_TOKENS // ratio
        paged = {"pool": cache.pool, "table": cache.table[mine], "page_entries": page}

    low, projected = _chunk_linear(x, *layer.low, plain=layer.plain)
    qr = low[:, : c.q_lora_rank]
    query, _ = _chunk_linear(qr, *layer.high, norm=layer.q_norm, norm_eps=c.rms_norm_eps)
    recent, index_query = _chunk_entries(
        low,
        layer.kv_norm,
        chunk.start,
        rotation,
        own.ring[mine],
        kind=ratio,
        window=c.sliding_window,
        norm_eps=c.rms_norm_eps,
        projected=projected,
        query=query,
        compressor=_state_of(layer.compressor, own.state, mine),
        index_compressor=_state_of(layer.index_compressor, own.index_state, mine),
        entry_rotation=chunk.rotations.get(f"entry{ratio}"),
        offsets=(entry_offset, index_offset),
        index_heads=c.index_n_heads if ratio == CSA_RATIO else 0,
        **paged,
    )
    picks = None
    if ratio == CSA_RATIO:
        picks = _chunk_picks(
            index_query, projected, chunk.start, cache.pool, cache.table[mine],
            index_offset=index_offset, page_entries=SLAB_TOKENS // ratio, ratio=ratio,
            k=c.index_topk,
        )  # fmt: skip
    del low, qr, projected, index_query  # the queries and entries of a long chunk are large
    out = _chunk_attention(
        query,
        chunk.start,
        rotation,
        recent,
        layer.sink,
        kind=ratio,
        head_dim=c.head_dim,
        window=c.sliding_window,
        norm_eps=c.rms_norm_eps,
        entry_offset=entry_offset,
        picks=picks,
        **paged,
    )
    # Stored in FP8 but never met by a rounded input: the official converter expands wo_a.
    low_rank, _ = _chunk_linear(out, *layer.wo_a, groups=c.o_groups, quantize_input=False)
    del out, query
    return _chunk_linear(low_rank, *layer.wo_b)[0]


def _state_of(
    compressor: tuple[Tensor, Tensor] | None, state: Tensor | None, sequence: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(ape, norm, the sequence's state), where there is a compressor."""
    if compressor is None or state is None:
        return None
    return (*compressor, state[sequence])
