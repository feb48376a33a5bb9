"""Attention of a chunk: every token to its window, its picked or all visible entries, and the sink.

Queries are normalised and rotated in place, stored entries decoded to BF16 once a chunk. A program
of `chunk_attention_attend` owns one token: its heads are the rows of the matrix products, 64 keys a
step are gathered, each serves as key and as value, and the softmax runs online. The window's rows
are consecutive and shared by neighbouring tokens, so that they come from the cache. The outputs are
turned back and take the queries' memory.

FLOP: 4 * 512 * 64 for each query and key: 5.6e11 for 8,192 tokens that pick 512 entries, 1.4e11 for
their windows. Bytes: queries read and written twice, 2.1 GB; 1 KB for each query and key, from the
L2 cache where the entries fit it.

Paper: §2.3.1 (core attention), §2.3.2, §2.3.3 (attention sink, inverse rotation).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton.attention import rounded, turned_heads
from fathom.kernels.triton.chunk_entries import read_entries

STEP = 64  # keys of one step of the online softmax
HEADS = 64  # of one program, at most: more do not fit the shared memory
TURNED_HEADS = 8  # of one program of chunk_attention_queries
WARPS = 8
STAGES = {0: 2, 4: 3, 128: 2}  # by kind: picks are loaded a step before the keys they name


@triton.jit
def chunk_attention_queries(
    query, query_stride, rotation, eps,
    COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Normalise each head and rotate it, in place."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, WIDE)[None, :]
    own = query + token * query_stride + head[:, None] * COLS + col
    both = turned_heads(own, rotation + token * ROPE, eps, COLS, ROPE, WIDE, HEADS)
    tl.store(own, both, mask=col < COLS)


@triton.jit(do_not_specialize=["start", "tokens"])
def chunk_attention_attend(
    query, query_stride, rotation, rows, picks, sink, start, tokens, scale,
    KIND: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr,
    WINDOW: tl.constexpr, PICKS: tl.constexpr, STEP: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A token's whole attention for HEADS heads; its output takes the place of its queries."""
    # Late tokens see most: they start first, so that short ones fill the end.
    token = (tokens - 1 - tl.program_id(0) // GROUPS).to(tl.int64)
    dtype: tl.constexpr = query.dtype.element_ty
    position = start + token
    head = tl.program_id(0) % GROUPS * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, WIDE)
    used = (col < COLS)[None, :]
    own = query + token * query_stride + head[:, None] * COLS + col[None, :]
    q = tl.load(own, mask=used, other=0.0)
    count = tl.full([], 0, tl.int32)
    if KIND > 0:
        count = ((position + 1) // KIND).to(tl.int32)
        if PICKS > 0:
            count = tl.minimum(count, PICKS)
    high = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out = tl.zeros([HEADS, WIDE], tl.float32)
    for first in range(0, WINDOW + count, STEP):
        index = first + tl.arange(0, STEP)
        row = token + 1 + index  # row WINDOW + i is token i's
        live = (index < WINDOW) & (row >= WINDOW - start)
        if KIND > 0:
            entry = index - WINDOW
            far = (entry >= 0) & (entry < count)
            if PICKS > 0:
                entry = tl.load(picks + token * PICKS + entry, mask=far, other=0)
            row = tl.where(far, WINDOW + tokens + entry, row)
            live = live | far
        at = rows + row[:, None] * COLS + col[None, :]
        kv = tl.load(at, mask=live[:, None] & used, other=0.0)
        logits = tl.dot(q, tl.trans(kv), input_precision="ieee") * scale
        logits = tl.where(live[None, :], logits, -float("inf"))
        higher = tl.maximum(high, tl.max(logits, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp(high - base)
        p = tl.exp(logits - base[:, None])
        total = total * fade + tl.sum(p, axis=1)
        out = tl.dot(p.to(dtype), kv, out * fade[:, None], input_precision="ieee")
        high = higher
    total += tl.exp(tl.load(sink + head) - high)
    out = rounded(out / total[:, None], dtype)
    even, odd = tl.split(tl.reshape(out, [HEADS, WIDE // 2, 2]))
    pair = tl.arange(0, WIDE // 2)
    turned = (pair >= (COLS - ROPE) // 2) & (pair < COLS // 2)
    cos = tl.load(rotation + token * ROPE + pair - (COLS - ROPE) // 2, mask=turned, other=1.0)
    sin = tl.load(rotation + token * ROPE + pair - (COLS - 2 * ROPE) // 2, mask=turned, other=0.0)
    back_even, back_odd = even * cos + odd * sin, odd * cos - even * sin
    tl.store(own, tl.reshape(tl.join(back_even, back_odd), [HEADS, WIDE]).to(dtype), mask=used)


@register("chunk_attention", "triton")
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
    """As the reference. query: [tokens, rows], overwritten; rotation: [tokens, 2, rope_dim / 2];
    recent: [window + tokens, head_dim]; sink: [heads]; pool: [pages, bytes] uint8; table: [pages]
    int32; picks: [tokens, topk] int32, those of a token before its -1. Returns [tokens, heads *
    head_dim], a part of the query's memory.
    """
    tokens, heads, rope = query.shape[0], sink.shape[0], 2 * rotation.shape[-1]
    each, wide = min(TURNED_HEADS, heads), triton.next_power_of_2(head_dim)
    chunk_attention_queries[(tokens, heads // each)](
        query, query.stride(0), rotation, norm_eps, COLS=head_dim, ROPE=rope, WIDE=wide,
        HEADS=each, num_warps=4,
    )  # fmt: skip
    rows = recent
    if kind:
        assert pool is not None
        assert table is not None
        near, count = window + tokens, (start + tokens) // kind
        rows = torch.empty(near + count, head_dim, dtype=query.dtype, device=query.device)
        rows[:near] = recent
        read_entries(
            pool, table, count, rows[near:], entry_offset=entry_offset, page_entries=page_entries,
            rope_dim=rope,
        )  # fmt: skip
    own_heads = min(heads, HEADS)
    groups = heads // own_heads
    chunk_attention_attend[(tokens * groups,)](
        query, query.stride(0), rotation, rows, picks if picks is not None else rows, sink, start,
        tokens, head_dim**-0.5,
        KIND=kind, COLS=head_dim, ROPE=rope, WIDE=wide, WINDOW=window,
        PICKS=picks.shape[1] if picks is not None else 0, STEP=STEP,
        HEADS=own_heads, GROUPS=groups,
        num_warps=WARPS, num_stages=STAGES[kind],
    )  # fmt: skip
    return query[:, : heads * head_dim]
