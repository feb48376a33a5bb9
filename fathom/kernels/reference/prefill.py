"""Operations of a chunk: many tokens of one sequence, on weights and caches as they are stored.

Three of them compute what the decode step's operation computes for as many tokens: `chunk_linear`,
`chunk_moe` and `chunk_mhc_boundary` have its signature and its reference. The others know that the
tokens follow one another, and are here defined as that many decode steps.

    tokens: consecutive ones of one sequence, the first at position `start`; a table here is
    [pages] int32, the sequence's own.

Paper: §2.1 (experts), §2.2 (mHC), §2.3 (attention), §3.5.1 (cache layout).
"""

from __future__ import annotations

import torch

from fathom.kernels.reference.attention import sparse_attention
from fathom.kernels.reference.mhc import mhc_boundary
from fathom.kernels.reference.norm import head_rmsnorm
from fathom.kernels.reference.rope import rope
from fathom.kernels.reference.stored import (
    index_scores_paged,
    read_rows,
    store_entries,
    stored_linear,
    stored_moe,
    topk_positions,
)
from fathom.kernels.registry import register
from fathom.quant import kv_pack

Compressor = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

register("chunk_linear", "reference")(stored_linear)
register("chunk_moe", "reference")(stored_moe)
register("chunk_mhc_boundary", "reference")(mhc_boundary)


@register("chunk_entries", "reference")
def chunk_entries(
    low: torch.Tensor,
    kv_norm: torch.Tensor,
    start: int,
    rotation: torch.Tensor,
    ring: torch.Tensor,
    *,
    kind: int,
    window: int,
    norm_eps: float,
    projected: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    compressor: Compressor | None = None,
    index_compressor: Compressor | None = None,
    entry_rotation: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    pool: torch.Tensor | None = None,
    offsets: tuple[int, int] = (0, 0),
    page_entries: int = 1,
    index_heads: int = 0,
    key_format: str = "fp4",
    known: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Write what the chunk adds to the sequence's caches, in place, as one step a token would.

    low: [tokens, rows], whose last head_dim columns are wkv's output; kv_norm: [head_dim];
    rotation: [tokens, 2, rope_dim / 2]; ring: [bytes] uint8; projected: [tokens, cols] float32;
    query: [tokens, rows];
    compressor, index_compressor: (ape, norm, state), the state without its leading dimension;
    entry_rotation: [entries, 2, rope_dim / 2] of the first positions of the windows from start //
    kind on; table: [pages] int32; pool: [pages, bytes] uint8; known: entries of positions before it
    stay as they are; the rest as in `store_entries`.
    Returns (raw entries as stored: [window + tokens, head_dim], the window before the chunk first,
    zeros where nothing was, in low's dtype; rounded index queries [tokens, index_heads, index_dim]
    or None).
    """
    head_dim, rope_dim = kv_norm.shape[0], 2 * rotation.shape[-1]
    recent = low.new_zeros(window + low.shape[0], head_dim)
    room = kv_pack.ring_entries(ring, head_dim, rope_dim)
    stored = read_rows(ring, room, head_dim, rope_dim, low.dtype)
    for place in range(max(0, window - start), window):
        recent[place] = stored[(start - window + place) % room]
    index_queries = []
    for i in range(low.shape[0]):
        kwargs: dict[str, object] = {}
        if kind:
            assert projected is not None
            assert compressor is not None
            assert entry_rotation is not None
            assert table is not None
            of = (start + i) // kind - start // kind
            kwargs = {
                "projected": projected[i : i + 1],
                "query": query[i : i + 1] if query is not None else None,
                "compressor": _one(compressor),
                "index_compressor": _one(index_compressor) if index_compressor else None,
                "entry_rotation": entry_rotation[of : of + 1],
                "table": table[None],
                "pool": pool,
                "offsets": offsets,
                "page_entries": page_entries,
                "index_heads": index_heads,
                "key_format": key_format,
            }
        rows = torch.tensor([[start + i], [0], [0], [known]], dtype=torch.int32)
        index_queries.append(
            store_entries(
                low[i : i + 1], kv_norm, rows.to(low.device), rotation[i : i + 1], ring[None],
                kind=kind, norm_eps=norm_eps, **kwargs,
            )
        )  # fmt: skip
        stored = read_rows(ring, room, head_dim, rope_dim, low.dtype)
        recent[window + i] = stored[(start + i) % room]
    return recent, torch.cat(index_queries) if kind == 4 else None


def _one(compressor: Compressor) -> Compressor:
    ape, norm, state = compressor
    return ape, norm, state[None]


@register("chunk_picks", "reference")
def chunk_picks(
    query: torch.Tensor,
    weights: torch.Tensor,
    start: int,
    pool: torch.Tensor,
    table: torch.Tensor,
    *,
    index_offset: int,
    page_entries: int,
    ratio: int,
    k: int,
    key_format: str = "fp4",
) -> torch.Tensor:
    """The k visible entries of the best index scores for every token, ties to the lower position.

    query: [tokens, index_heads, index_dim], rotated and rounded; weights: [tokens, cols] float32,
    weights_proj's output in its last index_heads columns; pool: [pages, bytes] uint8; table:
    [pages] int32; key_format: "fp4" or "fp8". Returns [tokens, topk] int32: ascending positions,
    then -1 where there are fewer.
    """
    tokens = query.shape[0]
    rows = torch.zeros(4, tokens, dtype=torch.int32, device=query.device)
    rows[0] = torch.arange(start, start + tokens)
    most = max(1, (start + tokens) // ratio)
    scores, maxima = index_scores_paged(
        query, weights, rows, pool, table[None], index_offset=index_offset,
        page_entries=page_entries, ratio=ratio, most_entries=most, key_format=key_format,
    )  # fmt: skip
    picks = topk_positions(scores, maxima, rows, k=k, ratio=ratio)
    none = torch.iinfo(torch.int32).max
    ascending = picks.masked_fill(picks < 0, none).sort(dim=1).values
    return ascending.masked_fill(ascending == none, -1)


@register("chunk_attention", "reference")
def chunk_attention(
    query: torch.Tensor,
    start: int,
    rotation: torch.Tensor,
    recent: torch.Tensor,
    sink: torch.Tensor,
    *,
    kind: int,
    head_dim: int,
    window: int,
    norm_eps: float,
    pool: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    entry_offset: int = 0,
    page_entries: int = 1,
    picks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend each token to its window and to its picked (or all visible) entries; turned back.

    query: [tokens, rows], wq_b's output, heads * head_dim of it first, neither normed nor rotated;
    its memory may be used for the result. rotation: [tokens, 2, rope_dim / 2]; recent: [window +
    tokens, head_dim], what `chunk_entries` returned; sink: [heads]; pool: [pages, bytes] uint8;
    table: [pages] int32; picks: [tokens, topk] int32, -1 = none. Returns [tokens, heads *
    head_dim].
    """
    tokens, heads = query.shape[0], sink.shape[0]
    rope_dim = 2 * rotation.shape[-1]
    q = head_rmsnorm(query[:, : heads * head_dim].unflatten(-1, (heads, head_dim)), norm_eps)
    q = rope(q[None], rotation[:, 0], rotation[:, 1])
    place = torch.arange(tokens, device=q.device)[:, None]
    near = place + 1 + torch.arange(window, device=q.device)
    lists = near.masked_fill(near + start < window, -1)
    rows = recent
    if kind:
        assert pool is not None
        assert table is not None
        count = (start + tokens) // kind
        pages = table[: -(-count // page_entries)].long()
        blocks = [
            read_rows(pool[p, entry_offset:], page_entries, head_dim, rope_dim, q.dtype)
            for p in pages
        ]
        rows = torch.cat((recent, *blocks))
        if picks is None:
            every = torch.arange(count, device=q.device)
            picks = torch.where(every < (place + start + 1) // kind, every, -1)
        lists = torch.cat((lists, torch.where(picks >= 0, picks + recent.shape[0], -1)), dim=1)
    out = sparse_attention(q, rows[None], lists[None], sink, head_dim**-0.5)
    return rope(out, rotation[:, 0], rotation[:, 1], inverse=True)[0].flatten(1)
