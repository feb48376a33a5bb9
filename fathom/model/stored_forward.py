"""Inference on weights and caches in their stored formats, layer after layer.

The work is a decode step or a chunk of a prompt (fathom/model/stored_work.py): both go through the
same layers, and what differs is which operation does each part. The host decides nothing from what
the device computes and never waits for it.

Reading order: run_layers -> _attention; the experts and the mHC boundary are one operation each.

    tokens: rows of the step or tokens of the chunk; hidden, streams, heads as everywhere.

Paper: §2 (architecture), §3.4 (FP4 and FP8 inference), §3.5.1 (cache layout).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fathom.kernels import operation
from fathom.model.config import ModelConfig
from fathom.model.stored import MixSite, StoredLayer
from fathom.model.stored_cache import LayerState, StoredCache

_mhc_write = operation("mhc_write")

Tensor = torch.Tensor


class Work(Protocol):
    """A step or a chunk: which operation does each part of a layer, on which tokens."""

    @property
    def token_ids(self) -> Tensor:
        """[tokens] int64 or int32."""
        ...

    @property
    def boundary(self) -> Callable[..., Any]:
        """`mhc_boundary`, or another operation of its signature."""
        ...

    @property
    def linear(self) -> Callable[..., Any]:
        """`stored_linear`, or another operation of its signature."""
        ...

    @property
    def moe(self) -> Callable[..., Any]:
        """`stored_moe`, or another operation of its signature."""
        ...

    def attend(
        self, config: ModelConfig, layer: StoredLayer, where: Place, low: Tensor,
        projected: Tensor | None, query: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Store what the tokens add, choose entries and attend.

        low: [tokens, rows]; projected: [tokens, cols] float32; query: [tokens, rows]. Returns
        ([tokens, heads * head_dim], picks [tokens, topk] int32 or None).
        """
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's memory lies: its state, and its entries and index keys within slabs."""

    state: LayerState
    offsets: tuple[int, int]
    pool: Tensor
    table: Tensor
    key_format: str


@dataclass(slots=True, kw_only=True)
class Pending:
    """Streams whose last write has not been done, and what it needs; see `mhc_write`.

    streams: [tokens, streams, hidden]; pairs: [tokens, topk, hidden]; y: [tokens, hidden]; post,
    comb: of the last read.
    """

    streams: Tensor
    pairs: Tensor
    y: Tensor
    post: Tensor
    comb: Tensor

    def write(self, places: Tensor, out: Tensor) -> None:
        """Finish: each token's streams to places [tokens] int32 of out [rows, streams, hidden]."""
        _mhc_write(self.streams, self.y, self.pairs, self.post, self.comb, places, out)

    def streams_now(self) -> Tensor:
        """The finished streams [tokens, streams, hidden]."""
        out = torch.empty_like(self.streams)
        places = torch.arange(len(out), dtype=torch.int32, device=out.device)
        self.write(places, out)
        return out


@dataclass(slots=True)
class Choices:
    """What a trainer replays: of each layer the experts chosen, and the entries picked or None."""

    experts: list[Tensor] = field(default_factory=list)
    picks: list[Tensor | None] = field(default_factory=list)


def run_layers(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    cache: StoredCache,
    work: Work,
    streams: Tensor,
    choices: Choices | None = None,
) -> Pending:
    """Feed the tokens of a step or chunk through the blocks; the cache must hold all before them.

    streams: [tokens, streams, hidden].
    """
    c = config
    constants = {"iterations": c.hc_sinkhorn_iters, "eps": c.hc_eps, "norm_eps": c.rms_norm_eps}

    def boundary(site: MixSite, *before: Any, **output: Any) -> tuple[Tensor, ...]:
        weights = (site.fn, site.base, site.scale, site.norm)
        return work.boundary(*before, *weights, **output, **constants)

    y = pairs = post = comb = None
    for index, layer in enumerate(layers):
        streams, x, post, comb = boundary(
            layer.attn_site, streams, y=y, pairs=pairs, post=post, comb=comb
        )
        y = pairs = None  # the experts' outputs are the largest tensors: free them early
        where = Place(
            cache.layers[index], cache.offsets[index], cache.pool, cache.table, cache.key_format
        )
        y, picks = _attention(c, layer, where, work, x)
        streams, x, post, comb = boundary(layer.ffn_site, streams, y=y, post=post, comb=comb)
        y = None
        pairs, y, experts = work.moe(
            x,
            work.token_ids,
            layer.gate,
            layer.routed,
            layer.shared,
            topk=c.num_experts_per_tok,
            scaling_factor=c.routed_scaling_factor,
            limit=c.swiglu_limit,
            bias=layer.bias,
            table=layer.table,
        )
        if choices is not None:
            choices.experts.append(experts)
            choices.picks.append(picks)
    assert y is not None
    assert pairs is not None
    assert post is not None
    assert comb is not None
    return Pending(streams=streams, pairs=pairs, y=y, post=post, comb=comb)


def _attention(
    config: ModelConfig, layer: StoredLayer, where: Place, work: Work, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """x: [tokens, hidden], normed -> (the attention's output [tokens, hidden], picks or None)."""
    c = config
    low, projected = work.linear(x, *layer.low, plain=layer.plain)
    qr = low[:, : c.q_lora_rank]
    query, _ = work.linear(qr, *layer.high, norm=layer.q_norm, norm_eps=c.rms_norm_eps)
    out, picks = work.attend(c, layer, where, low, projected, query)
    del low, qr, projected, query
    # Stored in FP8 but never met by a rounded input: the official converter expands wo_a.
    low_rank, _ = work.linear(out, *layer.wo_a, groups=c.o_groups, quantize_input=False)
    del out
    return work.linear(low_rank, *layer.wo_b)[0], picks
