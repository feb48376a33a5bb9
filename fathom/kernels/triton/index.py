"""The lightning indexer over paged FP4 or FP8 keys, and the choice of the best entries without
full sorts.

Two launches. `index_scores` also keeps the largest score of every small group of entries.
`topk_choose`, one program for a token, looks at those maxima alone for a number that at least k of
them reach, and few more: so many scores do, and the best k are among the scores that do. Only the
groups that reach it are read. What passes, about k entries, is sorted as 64-bit numbers, score
first and then the lower position: exact, also for ties, whatever order they were gathered in. Where
very many pass (of equal scores, say), the bound is first raised bit by bit.

Bytes for one token at 1M tokens: 262,144 keys of 68 bytes as FP4, 17.8 MB, of 132 as FP8, 34.6 MB;
scores 1 MB written, maxima of 16 scores 64 KB written and read.

Paper: §2.3.1, eq. 13-17; §3.4 (FP4 indexer).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import index_keys

BLOCK = 64  # entries that index_scores takes at once
PROGRAMS = 512  # of one token's scores, at most: four for each of about 130 multiprocessors
SCORE_WARPS, STAGES = 4, 1
ROUNDED = 1024  # of which the room for scores is a multiple
COARSE = 2048  # numbers among which topk_choose looks for its bound
MOST_GROUPS = 16384  # maxima that it holds
TILE = 1024  # groups of scores, or parts of them, that it looks at together
SORTED = 1024  # candidates that it sorts
CHOICE_WARPS = 16


@triton.jit
def sortable(score):
    """float32 as an int32 of the same order, NaN above all; adding zero makes the two zeros equal,
    and of any NaN the device's, which is positive.
    """
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _larger(a, b):
    """The larger of two numbers, NaN where one is: `sortable` puts it above all."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _page(block, visible, pages, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of a block; pages: the sequence's row of the table."""
    return tl.load(pages + block * BLOCK // PAGE, mask=block * BLOCK < visible, other=0)


@triton.jit
def _fetched(
    block, page, visible, pool, page_stride, index_offset, PAGE: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    keys = pool + page.to(tl.int64) * page_stride + index_offset
    first = block * BLOCK
    return index_keys.fetched(keys, first % PAGE, visible - first, BLOCK, PAGE, DIM, FP8)


@triton.jit
def _store_by_warps(at, value):
    """Store numbers [n]. Each of four warps has a quarter of them, as of the rows of a matrix
    product: in lines as long as a warp they stay there, without an exchange among warps.
    """
    EACH: tl.constexpr = value.shape[0] // 4
    if EACH > 0:
        value = tl.broadcast_to(tl.reshape(value, [4, 1, EACH]), [4, 32 // EACH, EACH])
        warp, lane = tl.arange(0, 4)[:, None], tl.arange(0, 32)[None, :]
        tl.store(at + warp * EACH + lane, tl.reshape(value, [4, 32]), mask=lane < EACH)
    else:
        tl.store(at + tl.arange(0, value.shape[0]), value)


@triton.jit
def index_scores(
    query, weights, weights_stride, weights_first, rows, tokens, pool, page_stride, index_offset,
    table, pages, scores, maxima, most, factor,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, RATIO: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, BF16: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A program takes every so many blocks; a block's keys are on their way while the block before
    it is multiplied.
    """
    token = tl.program_id(1).to(tl.int64)
    visible = (tl.load(rows + token) + 1) // RATIO
    slot = tl.load(rows + tokens + token).to(tl.int64)
    own_pages = table + slot * pages
    step = tl.num_programs(0)
    first = tl.program_id(0)
    page = _page(first, visible, own_pages, PAGE, BLOCK)
    next_page = _page(first + step, visible, own_pages, PAGE, BLOCK)
    codes, scale = _fetched(
        first, page, visible, pool, page_stride, index_offset, PAGE, DIM, BLOCK, FP8
    )
    head, col = tl.arange(0, HEADS), tl.arange(0, 128)
    own_at = query + (token * HEADS + head[:, None]) * DIM + col[None, :]
    own = tl.load(own_at, mask=(col < DIM)[None, :], other=0.0)  # a narrower key: with zeros
    own = index_keys.turned_query(own, FP8)
    w = tl.load(weights + token * weights_stride + weights_first + head)
    w = w.to(query.dtype.element_ty).to(tl.float32) * (0.5 * factor)
    if BF16 and not FP8:
        w *= 4611686018427387904.0  # 2**62, by which unpacked codes are too small
    inside, group = tl.arange(0, BLOCK), tl.arange(0, BLOCK // GROUP)
    value_at = scores + token * most
    group_at = maxima + token * (most // GROUP)
    for block in range(first, tl.cdiv(visible, BLOCK), step):
        next_codes, next_scale = _fetched(
            block + step, next_page, visible, pool, page_stride, index_offset, PAGE, DIM, BLOCK, FP8
        )
        next_page = _page(block + 2 * step, visible, own_pages, PAGE, BLOCK)
        key = index_keys.operand(codes, scale, FP8, BF16)
        products = tl.dot(key, own, input_precision="ieee")
        # Twice what is positive: additions have twice the throughput of a maximum.
        value = tl.sum((products + tl.abs(products)) * w[None, :], axis=1)
        if FP8:  # a scale is positive, so it may wait until here
            value *= scale
        value = tl.where(block * BLOCK + inside < visible, value, -float("inf"))
        _store_by_warps(value_at + block * BLOCK, value)
        largest = tl.reduce(tl.reshape(value, [BLOCK // GROUP, GROUP]), 1, _larger)
        _store_by_warps(group_at + block * (BLOCK // GROUP), largest)
        codes, scale = next_codes, next_scale
    unseen = first + tl.cdiv(tl.maximum(tl.cdiv(visible, BLOCK) - first, 0), step) * step
    for block in range(unseen, most // BLOCK, step):
        tl.store(value_at + block * BLOCK + inside, tl.full([BLOCK], -float("inf"), tl.float32))
        nothing = tl.full([BLOCK // GROUP], -float("inf"), tl.float32)
        tl.store(group_at + block * (BLOCK // GROUP) + group, nothing)


@triton.jit
def _bound(key, k):
    """A number that at least k of `key` [n] int32 reach, and few more; the smallest where there are
    fewer than k.
    """
    nothing = -2139095041  # sortable(-inf)
    high = tl.max(key, axis=0)
    low = tl.min(tl.where(key > nothing, key, high), axis=0)
    amount = tl.sum((key >= low).to(tl.int32), axis=0)
    low = tl.where(amount >= k, low, nothing)
    while (low < high) & (amount > k + k // 8):
        apart = (high - low).to(tl.uint32, bitcast=True)
        middle = low + (apart - apart // 2).to(tl.int32, bitcast=True)
        count = tl.sum((key >= middle).to(tl.int32), axis=0)
        enough = count >= k
        amount = tl.where(enough, count, amount)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _packed(score, entry):
    """Score and position as one number: of equal scores the lower position is the larger number."""
    return (sortable(score).to(tl.int64) << 32) | (0x7FFFFFFF - entry).to(tl.int64)


@triton.jit
def _marked(passed):
    """[rows, at most 16 cols] bool -> the columns of each row that passed as bits, and how many."""
    col = tl.arange(0, passed.shape[1])[None, :]
    both = tl.sum(passed.to(tl.int32) * (65536 + (1 << col)), axis=1)
    return both & 0xFFFF, both >> 16


@triton.jit
def _lowest(bits):
    """The number of the lowest bit that is set: the exponent of its value."""
    return ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _candidates(
    scores, maxima, groups, near, visible, group_count, k,
    GROUP: tl.constexpr, COARSE: tl.constexpr, FOLDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gather what may be among the best k at `near`, in no order; how many.

    groups: room for the numbers of the groups in which they are.
    """
    # A row has one of every COARSE groups: all rows have some, also when few are visible.
    i = tl.arange(0, COARSE)
    group = tl.arange(0, FOLDS)[None, :] * COARSE + i[:, None]
    key = sortable(tl.load(maxima + group, mask=group < group_count, other=-float("inf")))
    low = _bound(tl.max(key, axis=1), k)
    bits, count = _marked((key >= low) & (group * GROUP < visible))
    place = tl.cumsum(count, axis=0) - count
    for _ in range(tl.max(count, axis=0)):
        tl.store(groups + place, _lowest(bits) * COARSE + i, mask=bits != 0)
        bits, place = bits & (bits - 1), place + 1
    tl.debug_barrier()

    PART: tl.constexpr = min(GROUP, 16)
    PARTS: tl.constexpr = GROUP // PART
    parts = tl.sum(count, axis=0) * PARTS
    found = tl.full([], 0, tl.int32)
    for first in range(0, parts, TILE):
        part = first + tl.arange(0, TILE)
        own = tl.load(groups + part // PARTS, mask=part < parts, other=0)
        begin = own * GROUP + part % PARTS * PART
        entry = begin[:, None] + tl.arange(0, PART)[None, :]
        seen = (part < parts)[:, None] & (entry < visible)
        score = tl.load(scores + entry, mask=seen, other=-float("inf"))
        chosen, amount = _marked(seen & (sortable(score) >= low))
        at = found + tl.cumsum(amount, axis=0) - amount
        for _ in range(tl.max(amount, axis=0)):
            best = begin + _lowest(chosen)
            again = tl.load(scores + best, mask=chosen != 0, other=0.0)
            tl.store(near + at, _packed(again, best), mask=chosen != 0)
            chosen, at = chosen & (chosen - 1), at + 1
        found += tl.sum(amount, axis=0)
    tl.debug_barrier()
    return found


@triton.jit
def _store_best(best, picks, K: tl.constexpr):
    """Sort packed candidates and store the positions of the best K; -1 where there are fewer."""
    smallest = -0x7FFFFFFFFFFFFFFF - 1
    best = tl.sort(best, descending=True)
    position = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
    i = tl.arange(0, best.shape[0])
    tl.store(picks + i, tl.where(best == smallest, -1, position), mask=i < K)


@triton.jit
def _reduced(own, count, k, SORTED: tl.constexpr):
    """Leave those of `count` packed candidates that are among the best k; how many there are."""
    # The k-th largest number, bit by bit from the top; all numbers differ.
    i = tl.arange(0, SORTED)
    low = tl.full([], -0x7FFFFFFFFFFFFFFF - 1, tl.int64)
    for step in range(64):
        middle = low + (tl.full([], 1, tl.int64) << (63 - step))
        above = tl.zeros([SORTED], tl.int32)
        for first in range(0, count, SORTED):
            value = tl.load(own + first + i, mask=first + i < count, other=0)
            above += ((value >= middle) & (first + i < count)).to(tl.int32)
        low = tl.where(tl.sum(above, axis=0) >= k, middle, low)
    kept = tl.full([], 0, tl.int32)
    for first in range(0, count, SORTED):
        value = tl.load(own + first + i, mask=first + i < count, other=0)
        chosen = (value >= low) & (first + i < count)
        tl.debug_barrier()  # all of this piece is read before its front part is overwritten
        place = kept + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(own + place, value, mask=chosen)
        kept += tl.sum(chosen.to(tl.int32), axis=0)
    tl.debug_barrier()
    return kept


@triton.jit
def topk_choose(
    scores, maxima, groups, candidates, picks, rows, most, group_count, k,
    RATIO: tl.constexpr, GROUP: tl.constexpr, COARSE: tl.constexpr, FOLDS: tl.constexpr,
    TILE: tl.constexpr, SORTED: tl.constexpr, K: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The best K visible entries of a token, best first; -1 where there are fewer."""
    token = tl.program_id(0).to(tl.int64)
    visible = (tl.load(rows + token) + 1) // RATIO
    i = tl.arange(0, SORTED)
    smallest = -0x7FFFFFFFFFFFFFFF - 1
    if ALL:  # few enough entries to be sorted without a choice
        score = tl.load(scores + token * most + i, mask=i < visible, other=0.0)
        best = tl.where(i < visible, _packed(score, i), smallest)
    else:
        near = candidates + token * most
        count = _candidates(
            scores + token * most, maxima + token * group_count, groups + token * group_count,
            near, visible, group_count, k, GROUP, COARSE, FOLDS, TILE,
        )  # fmt: skip
        if count > SORTED:
            count = _reduced(near, count, k, SORTED)
        best = tl.load(near + i, mask=i < count, other=smallest)
    _store_best(best, picks + token * K, K)


def group_size(most: int) -> int:
    """Entries of one maximum, so few that a step's choice among them is narrow.

    A graph serves steps that see from a quarter of `most` entries on: those then have 1,024 groups.
    """
    enough = min(16, triton.cdiv(most, 2 * COARSE))
    return triton.next_power_of_2(max(enough, triton.cdiv(most, MOST_GROUPS)))


@register("index_scores_paged", "triton")
def index_scores_paged(
    query: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    pool: torch.Tensor,
    table: torch.Tensor,
    *,
    index_offset: int,
    page_entries: int,
    ratio: int,
    most_entries: int,
    key_format: str = "fp4",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference. query: [tokens, index_heads, index_dim]; weights: [tokens, cols] float32,
    the index_heads last; rows: [4, tokens] int32; pool: [pages, bytes] uint8; table: [slots,
    pages] int32. Returns (scores [tokens, entries] float32, the maxima of groups of them).
    """
    tokens, heads, dim = query.shape
    assert dim <= 128 and dim % 32 == 0  # noqa: PT018
    most = triton.cdiv(most_entries, ROUNDED) * ROUNDED
    group = group_size(most)
    scores = torch.empty(tokens, most, dtype=torch.float32, device=query.device)
    maxima = torch.empty(tokens, most // group, dtype=torch.float32, device=query.device)
    assert page_entries % BLOCK == 0
    programs = min(most // BLOCK, PROGRAMS)
    index_scores[(programs, tokens)](
        query=query, weights=weights, weights_stride=weights.stride(0),
        weights_first=weights.shape[1] - heads, rows=rows, tokens=tokens, pool=pool,
        page_stride=pool.stride(0), index_offset=index_offset, table=table,
        pages=table.stride(0), scores=scores, maxima=maxima, most=most,
        factor=dim**-0.5 * heads**-0.5,
        HEADS=heads, DIM=dim, PAGE=page_entries, RATIO=ratio, BLOCK=BLOCK, GROUP=group,
        BF16=query.dtype != torch.float32, FP8=key_format == "fp8", num_warps=SCORE_WARPS,
        num_stages=STAGES,
    )  # fmt: skip
    return scores, maxima


@register("topk_positions", "triton")
def topk_positions(
    scores: torch.Tensor, maxima: torch.Tensor, rows: torch.Tensor, *, k: int, ratio: int
) -> torch.Tensor:
    """As the reference. scores: [tokens, entries] float32; maxima: [tokens, groups]; rows:
    [4, tokens] int32. Returns [tokens, topk] int32.
    """
    tokens, most = scores.shape
    groups = maxima.shape[1]
    group, room = most // groups, triton.next_power_of_2(groups)
    assert k <= SORTED and groups <= MOST_GROUPS and groups * group == most  # noqa: PT018
    picks = torch.empty(tokens, k, dtype=torch.int32, device=scores.device)
    passed = torch.empty(tokens, groups, dtype=torch.int32, device=scores.device)
    candidates = torch.empty(tokens, most, dtype=torch.int64, device=scores.device)
    topk_choose[(tokens,)](
        scores, maxima, passed, candidates, picks, rows, most, groups, k, RATIO=ratio, GROUP=group,
        COARSE=min(COARSE, room), FOLDS=max(1, room // COARSE), TILE=TILE,
        SORTED=SORTED, K=k, ALL=most <= SORTED, num_warps=CHOICE_WARPS,
    )  # fmt: skip
    return picks
