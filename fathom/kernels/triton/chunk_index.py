"""The lightning indexer for many tokens: scores of a block of queries at a time, then a selection.

Keys are decoded to BF16 once a chunk. A program of `chunk_index_scores` holds 128 of them and lets
some queries pass: one matrix product of 64 heads by 128 keys each. `chunk_topk_choose` finds the
k-th largest score of a query bit by bit and lists what lies above it, and of the scores equal to it
the first: exact, deterministic, in ascending order of position, without a sort. Blocks of queries
bound the memory of scores.

FLOP: 2 * 64 * 128 for each query and visible entry, 1.4e11 for 8,192 tokens from the beginning,
1.8e13 at a context of 1M. Bytes: scores written once and read 32 times, from the caches as long as
a query has no more than some ten thousand.

Paper: §2.3.1, eq. 13-17; §3.4 (FP4 indexer).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import index_keys
from fathom.kernels.triton.index import sortable

ENTRIES = 128  # keys of one program of chunk_index_scores
QUERIES = 32  # that pass a program of chunk_index_scores
SCORE_BYTES = 256 * 2**20  # of one block of queries' scores
SELECT_BLOCK = 8192  # scores that chunk_topk_choose looks at at once


@triton.jit
def chunk_index_keys(
    pool, page_stride, index_offset, table, out, count,
    DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Decoded keys: out [entries, DIM], zeros behind the last."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = entry < count
    page = tl.load(table + entry // PAGE, mask=live, other=0).to(tl.int64)
    keys = (pool + page * page_stride + index_offset)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    values = index_keys.load(keys, entry % PAGE, live, PAGE, DIM, FP8, dtype != tl.float32)
    at = out + entry.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(at, values.to(dtype))


@triton.jit(do_not_specialize=["position", "first", "tokens"])
def chunk_index_scores(
    query, weights, weights_stride, keys, scores, scores_stride, first, tokens, position, factor,
    HEADS: tl.constexpr, DIM: tl.constexpr, RATIO: tl.constexpr, ENTRIES: tl.constexpr,
    QUERIES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Scores of the tokens from `first` on (at `position`), row by row. Invisible: unwritten."""
    own = tl.program_id(1) * QUERIES
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    last = tl.minimum(own + QUERIES, tokens)
    if tl.program_id(0) * ENTRIES < (position + last) // RATIO:
        dim, head = tl.arange(0, DIM), tl.arange(0, HEADS)
        key = tl.load(keys + entry[None, :].to(tl.int64) * DIM + dim[:, None]).to(DOT)
        for i in range(own, last):
            place = tl.zeros([], tl.int64) + i
            row = first + place
            q = tl.load(query + (row * HEADS + head[:, None]) * DIM + dim[None, :])
            w = tl.load(weights + row * weights_stride + head)
            w = w.to(query.dtype.element_ty).to(tl.float32) * factor
            products = tl.dot(q.to(DOT), key, input_precision="ieee")
            positive = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL)
            value = tl.sum(positive * w[:, None], axis=0)
            visible = entry < (position + i + 1) // RATIO
            tl.store(scores + place * scores_stride + entry, value, mask=visible)


@triton.jit(do_not_specialize=["position"])
def chunk_topk_choose(
    scores, scores_stride, picks, position,
    RATIO: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best K visible entries of a token, in ascending order; -1 where there are fewer."""
    token = tl.program_id(0)
    visible = (position + token + 1) // RATIO
    own = picks + token.to(tl.int64) * K
    row = scores + token.to(tl.int64) * scores_stride
    i = tl.arange(0, BLOCK)
    if visible <= K:
        slot = tl.arange(0, K)
        tl.store(own + slot, tl.where(slot < visible, slot, -1))
    else:
        # The largest number that at least K keys reach; the first bit is the sign's.
        low = tl.full([], -0x80000000, tl.int64)
        for bit in range(32):
            middle = low + (tl.full([], 1, tl.int64) << (31 - bit))
            bound = middle.to(tl.int32)
            reached = tl.zeros([BLOCK], tl.int32)
            for first in range(0, visible, BLOCK):
                live = first + i < visible
                key = sortable(tl.load(row + first + i, mask=live, other=0.0))
                reached += (live & (key >= bound)).to(tl.int32)
            low = tl.where(tl.sum(reached, axis=0) >= K, middle, low)
        kth = low.to(tl.int32)
        above = tl.zeros([BLOCK], tl.int32)
        for first in range(0, visible, BLOCK):
            live = first + i < visible
            key = sortable(tl.load(row + first + i, mask=live, other=0.0))
            above += (live & (key > kth)).to(tl.int32)
        room = K - tl.sum(above, axis=0)  # for scores equal to the k-th: the first of them
        done = tl.full([], 0, tl.int32)
        ties = tl.full([], 0, tl.int32)
        for first in range(0, visible, BLOCK):
            live = first + i < visible
            key = sortable(tl.load(row + first + i, mask=live, other=0.0))
            tied = (live & (key == kth)).to(tl.int32)
            order = ties + tl.cumsum(tied, axis=0)
            chosen = (live & (key > kth)) | ((tied > 0) & (order <= room))
            count = chosen.to(tl.int32)
            tl.store(own + done + tl.cumsum(count, axis=0) - 1, first + i, mask=chosen)
            done += tl.sum(count, axis=0)
            ties += tl.sum(tied, axis=0)


def select(scores: torch.Tensor, position: int, picks: torch.Tensor, ratio: int) -> None:
    """Write the best visible entries of each row. scores: [tokens, entries] float32, the first row
    a token at `position`; picks: [tokens, topk] int32, topk a power of two, contiguous.
    """
    tokens, most = scores.shape
    block = min(SELECT_BLOCK, max(128, triton.next_power_of_2(most)))
    chunk_topk_choose[(tokens,)](
        scores, scores.stride(0), picks, position, RATIO=ratio, K=picks.shape[1], BLOCK=block,
        num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip


@register("chunk_picks", "triton")
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
    """As the reference. query: [tokens, index_heads, index_dim]; weights: [tokens, cols] float32,
    the index_heads last; pool: [pages, bytes] uint8; table: [pages] int32. Returns [tokens, topk]
    int32.
    """
    tokens, heads, dim = query.shape
    picks = torch.empty(tokens, k, dtype=torch.int32, device=query.device)
    count = (start + tokens) // ratio
    room = triton.cdiv(max(count, 1), ENTRIES) * ENTRIES
    few = min(tokens, max(0, ratio * (k + 1) - 1 - start))  # tokens that see at most k entries
    keys = torch.empty(room, dim, dtype=query.dtype, device=query.device)
    block = max(1, min(tokens, SCORE_BYTES // (4 * room)))
    scores = torch.empty(block, room, dtype=torch.float32, device=query.device)
    if few < tokens:
        chunk_index_keys[(room // ENTRIES,)](
            pool, pool.stride(0), index_offset, table, keys, count, DIM=dim, PAGE=page_entries,
            BLOCK=ENTRIES, FP8=key_format == "fp8", num_warps=4,
        )  # fmt: skip
    if few:
        chunk_topk_choose[(few,)](scores, 0, picks, start, RATIO=ratio, K=k, BLOCK=128, num_warps=4)
    for first in range(few, tokens, block):
        number = min(block, tokens - first)
        entries = (start + first + number) // ratio
        chunk_index_scores[(triton.cdiv(entries, ENTRIES), triton.cdiv(number, QUERIES))](
            query, weights[:, weights.shape[1] - heads :], weights.stride(0), keys, scores,
            scores.stride(0), first, number, start + first, dim**-0.5 * heads**-0.5,
            HEADS=heads, DIM=dim, RATIO=ratio, ENTRIES=ENTRIES, QUERIES=QUERIES,
            DOT=tl.float32 if query.dtype == torch.float32 else tl.bfloat16,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        select(scores[:number, :entries], start + first, picks[first : first + number], ratio)
    return picks
