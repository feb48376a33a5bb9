"""Routed experts in their stored FP4 form for a few tokens, beside the shared expert in FP8.

`_route` chooses the experts and sorts the (token, choice) pairs by expert into runs. A program of
`_up` or `_down` then owns some whole rows of one run's expert and multiplies them with the run's
tokens, a few at a time (packed.py), so that every chosen expert's weights come from memory once.
The grids are as large as the most runs there can be; programs without a run end at once.

Bytes for one token of V4-Flash: 6 experts x 3 matrices x 4096 x 2048 / 2, 80 MB with the scales.

Paper: §2.1 (DeepSeekMoE: sqrt-softplus affinity, hash routing); §3.4 (FP4 experts).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import packed as p
from fathom.kernels.triton.linear import PLAIN_VALUES

WARPS = 4
# Of the words that a program could hold: fewer leave room for more programs at once.
UP_SHARE = 8
DOWN_SHARE = 4


@triton.jit
def _route(
    logits, bias, table, tokens_ids, indices, weights, pairs, run_expert, run_start, runs,
    tokens, experts, topk, factor,
    HASHED: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token, expert = tl.arange(0, TOKENS), tl.arange(0, EXPERTS)
    live = token < tokens
    cell = (live[:, None]) & (expert < experts)[None, :]
    x = tl.load(logits + token[:, None] * experts + expert[None, :], mask=cell, other=0.0)
    e = tl.exp(tl.minimum(x, 20.0))
    small = e * (1.0 - e * (0.5 - e / 3.0))  # log(1 + e) where adding 1 would round e away
    softplus = tl.where(x > 20.0, x, tl.where(e < 1e-2, small, tl.log(1.0 + e)))
    score = tl.sqrt(softplus)
    if HASHED:
        steered = score
    else:
        steered = score + tl.load(bias + expert, mask=expert < experts, other=0.0)[None, :]
    steered = tl.where(cell, steered, -float("inf"))
    total = tl.zeros([TOKENS], tl.float32)
    for choice in range(topk):
        if HASHED:
            ids = tl.load(tokens_ids + token, mask=live, other=0)
            best = tl.load(table + ids * topk + choice, mask=live, other=0).to(tl.int32)
        else:
            best = tl.argmax(steered, axis=1).to(tl.int32)
        chosen = expert[None, :] == best[:, None]
        own = tl.sum(tl.where(chosen, score, 0.0), axis=1)
        steered = tl.where(chosen, -float("inf"), steered)
        total += tl.where(live, own, 1.0)  # rows without a token must not divide by zero
        tl.store(indices + token * topk + choice, best, mask=live)
        tl.store(weights + token * topk + choice, own, mask=live)
    tl.debug_barrier()
    for choice in range(topk):
        own = tl.load(weights + token * topk + choice, mask=live, other=0.0)
        tl.debug_barrier()
        tl.store(weights + token * topk + choice, own / total * factor, mask=live)
    # Pairs in the order of their experts; runs of equal experts.
    pair = tl.arange(0, PAIRS)
    count = tokens * topk
    of = tl.load(indices + pair, mask=pair < count, other=0)
    key = tl.where(pair < count, of * PAIRS + pair, 0x7FFFFFFF)
    key = tl.sort(key)
    tl.store(pairs + pair, key % PAIRS, mask=pair < count)
    own = key // PAIRS
    tl.store(run_start + pair, own)  # scratch: to see the neighbour's expert
    tl.debug_barrier()
    before = tl.load(run_start + pair - 1, mask=pair > 0, other=-1)
    begins = (own != before) & (pair < count)
    tl.debug_barrier()
    place = tl.cumsum(begins.to(tl.int32), axis=0) - 1
    number = tl.sum(begins.to(tl.int32), axis=0)
    tl.store(run_expert + place, own, mask=begins)
    tl.store(run_start + place, pair, mask=begins)
    tl.store(run_start + number, count)
    tl.store(runs, number)


@triton.jit
def _fp4_tile(
    codes, scale, row, first, COLS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Columns from `first` of FP4 rows: words [ROWS, BLOCK / 32, 4], scales [ROWS, BLOCK / 32]."""
    words = p.load_words(codes, row, COLS // 8, first // 8, BLOCK // 32)
    group = first // 32 + tl.arange(0, BLOCK // 32)
    return words, tl.load(scale + row[:, None] * (COLS // 32) + group[None, :])


@triton.jit
def _up(
    x, unit, w1, s1, w3, s3, pairs, run_expert, run_start, runs, weights, act, inner, topk, limit,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    run, block = tl.program_id(1), tl.program_id(0)
    if run < tl.load(runs):
        expert = tl.load(run_expert + run).to(tl.int64)
        row = block * ROWS + tl.arange(0, ROWS)
        codes1, codes3 = w1 + expert * inner * (HIDDEN // 2), w3 + expert * inner * (HIDDEN // 2)
        scale1, scale3 = s1 + expert * inner * (HIDDEN // 32), s3 + expert * inner * (HIDDEN // 32)
        end = tl.load(run_start + run + 1)
        for begin in range(tl.load(run_start + run), end, TOKENS):
            gate = tl.zeros([TOKENS, ROWS], tl.float32)
            up = tl.zeros([TOKENS, ROWS], tl.float32)
            for first in tl.static_range(0, HIDDEN, BLOCK):
                words1, own1 = _fp4_tile(codes1, scale1, row, first, HIDDEN, BLOCK)
                words3, own3 = _fp4_tile(codes3, scale3, row, first, HIDDEN, BLOCK)
                for t in tl.static_range(TOKENS):
                    pair = tl.load(pairs + tl.minimum(begin + t, end - 1))
                    own = x + pair // topk * HIDDEN
                    own_unit = unit + pair // topk * (HIDDEN // 128)
                    sums = p.fp4_row_sums(
                        words1, own1, own, own_unit, HIDDEN, first, BLOCK // 32, PACKED
                    )
                    gate = p.added(gate, sums, t)
                    sums = p.fp4_row_sums(
                        words3, own3, own, own_unit, HIDDEN, first, BLOCK // 32, PACKED
                    )
                    up = p.added(up, sums, t)
            place = begin + tl.arange(0, TOKENS)
            live = place < end
            pair = tl.load(pairs + place, mask=live, other=0)
            weight = tl.load(weights + pair, mask=live, other=0.0)
            value = swiglu(gate, up, limit, act.dtype.element_ty) * weight[:, None]
            at = act + pair[:, None] * inner + row[None, :]
            tl.store(at, value.to(act.dtype.element_ty), mask=live[:, None])


@triton.jit
def swiglu(gate, up, limit, dtype: tl.constexpr):
    """silu(min(gate, limit)) * clamp(up), from matrix outputs that are rounded to `dtype` first."""
    gate = tl.minimum(gate.to(dtype).to(tl.float32), limit)
    up = tl.minimum(tl.maximum(up.to(dtype).to(tl.float32), -limit), limit)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _down(
    act, unit, w2, s2, pairs, run_expert, run_start, runs, out, shared_act, shared_unit,
    shared_codes, shared_scale, shared_out, tokens, hidden, most_runs,
    INNER: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    run, block = tl.program_id(1), tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    if run >= most_runs:
        token = (run - most_runs) * TOKENS
        mine = token + tl.arange(0, TOKENS)
        shared = tl.zeros([TOKENS, ROWS], tl.float32)
        own_scale = shared_scale + block * ROWS // 128 * (INNER // 128)
        for first in tl.static_range(0, INNER, BLOCK):
            words = p.load_words(shared_codes, row, INNER // 4, first // 4, BLOCK // 16)
            for t in tl.static_range(TOKENS):
                here = tl.minimum(token + t, tokens - 1)
                sums = p.fp8_row_sums(
                    words, own_scale, shared_act + here * INNER,
                    shared_unit + here * (INNER // 128), INNER, first, BLOCK // 16, PACKED,
                )  # fmt: skip
                shared = p.added(shared, sums, t)
        at = shared_out + mine[:, None] * hidden + row[None, :]
        tl.store(at, shared.to(shared_out.dtype.element_ty), mask=(mine < tokens)[:, None])
    elif run < tl.load(runs):
        expert = tl.load(run_expert + run).to(tl.int64)
        codes = w2 + expert * hidden * (INNER // 2)
        scale = s2 + expert * hidden * (INNER // 32)
        end = tl.load(run_start + run + 1)
        for begin in range(tl.load(run_start + run), end, TOKENS):
            total = tl.zeros([TOKENS, ROWS], tl.float32)
            for col in tl.static_range(0, INNER, BLOCK):
                routed_words, own = _fp4_tile(codes, scale, row, col, INNER, BLOCK)
                for t in tl.static_range(TOKENS):
                    pair = tl.load(pairs + tl.minimum(begin + t, end - 1))
                    routed_sums = p.fp4_row_sums(
                        routed_words, own, act + pair * INNER, unit + pair * (INNER // 128), INNER,
                        col, BLOCK // 32, PACKED,
                    )  # fmt: skip
                    total = p.added(total, routed_sums, t)
            place = begin + tl.arange(0, TOKENS)
            live = place < end
            pair = tl.load(pairs + place, mask=live, other=0)
            routed_at = out + pair[:, None] * hidden + row[None, :]
            tl.store(routed_at, total.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def _gate_and_shared_up(
    x, values, unit, gate, logits, codes, scale, act, tokens, inner, experts, limit, gate_blocks,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GATE_BLOCK: tl.constexpr,
    GATE_ROWS: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = tl.program_id(1) * TOKENS
    mine = token + tl.arange(0, TOKENS)
    live = (mine < tokens)[:, None]
    if block < gate_blocks:
        row = block * GATE_ROWS + tl.arange(0, GATE_ROWS)
        total = tl.zeros([TOKENS, GATE_ROWS], tl.float32)
        for first in tl.static_range(0, HIDDEN, GATE_BLOCK):
            col = first + tl.arange(0, GATE_BLOCK)
            weights = tl.load(gate + row[:, None] * HIDDEN + col[None, :])
            for t in tl.static_range(TOKENS):
                here = tl.minimum(token + t, tokens - 1)
                gate_sums = p.plain_row_sums(weights, tl.load(x + here * HIDDEN + col))
                total = p.added(total, gate_sums, t)
        tl.store(logits + mine[:, None] * experts + row[None, :], total, mask=live)
    else:
        shared_row = (block - gate_blocks) * ROWS + tl.arange(0, ROWS)
        gate_scale = scale + (block - gate_blocks) * ROWS // 128 * (HIDDEN // 128)
        up_scale = gate_scale + inner // 128 * (HIDDEN // 128)
        gated = tl.zeros([TOKENS, ROWS], tl.float32)
        up = tl.zeros([TOKENS, ROWS], tl.float32)
        for first in tl.static_range(0, HIDDEN, BLOCK):
            words1 = p.load_words(codes, shared_row, HIDDEN // 4, first // 4, BLOCK // 16)
            words3 = p.load_words(codes, inner + shared_row, HIDDEN // 4, first // 4, BLOCK // 16)
            for t in tl.static_range(TOKENS):
                here = tl.minimum(token + t, tokens - 1)
                own, own_unit = values + here * HIDDEN, unit + here * (HIDDEN // 128)
                sums = p.fp8_row_sums(
                    words1, gate_scale, own, own_unit, HIDDEN, first, BLOCK // 16, PACKED
                )
                gated = p.added(gated, sums, t)
                sums = p.fp8_row_sums(
                    words3, up_scale, own, own_unit, HIDDEN, first, BLOCK // 16, PACKED
                )
                up = p.added(up, sums, t)
        shared = swiglu(gated, up, limit, act.dtype.element_ty)
        at = act + mine[:, None] * inner + shared_row[None, :]
        tl.store(at, shared.to(act.dtype.element_ty), mask=live)


@register("packed_moe", "triton")
def stored_moe(
    x: torch.Tensor,
    token_ids: torch.Tensor,
    gate: torch.Tensor,
    routed: tuple[torch.Tensor, ...],
    shared: tuple[torch.Tensor, ...],
    *,
    topk: int,
    scaling_factor: float,
    limit: float,
    bias: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference. x: [tokens, hidden], at most 64 tokens; token_ids: [tokens] int64; gate:
    [experts, hidden]; routed, shared, bias, table: the same as there. Returns (pairs [tokens, topk,
    hidden], shared output [tokens, hidden], indices [tokens, topk] int32).
    """
    w1, s1, w3, s3, w2, s2 = routed
    shared_up, shared_up_scale, shared_down, shared_down_scale = shared
    (tokens, hidden), (experts, inner) = x.shape, w1.shape[:2]
    make = {"dtype": torch.float32, "device": x.device}
    packed, tile = x.dtype != torch.float32, p.token_tile(tokens)
    rounded = p.round_inputs(x, fp4_below=tokens)
    logits = torch.empty(tokens, experts, **make)
    count = tokens * topk
    acts = torch.empty(count + tokens, inner, dtype=x.dtype, device=x.device)  # shared ones last
    block, gate_block = p.block_columns(hidden, 4), min(hidden & -hidden, PLAIN_VALUES)
    rows = max(1, min(inner, p.program_rows(block, 4) // 2))  # of each of two matrices
    gate_rows = max(1, min(experts & -experts, PLAIN_VALUES // gate_block // 2))
    _gate_and_shared_up[(experts // gate_rows + inner // rows, triton.cdiv(tokens, tile))](
        x, rounded.for_fp8, rounded.unit, gate, logits, shared_up, shared_up_scale, acts[count:],
        tokens, inner, experts, limit, experts // gate_rows, HIDDEN=hidden, BLOCK=block, ROWS=rows,
        GATE_BLOCK=gate_block, GATE_ROWS=gate_rows, TOKENS=tile, PACKED=packed, num_warps=WARPS,
    )  # fmt: skip
    size = max(16, triton.next_power_of_2(count))
    index = {"dtype": torch.int32, "device": x.device}
    indices, weights = torch.empty(tokens, topk, **index), torch.empty(tokens, topk, **make)
    pairs, run_expert = torch.empty(size, **index), torch.empty(size, **index)
    run_start, runs = torch.empty(size + 1, **index), torch.empty(1, **index)
    _route[(1,)](
        logits, bias if bias is not None else logits, table if table is not None else token_ids,
        token_ids, indices, weights, pairs, run_expert, run_start, runs, tokens, experts, topk,
        scaling_factor, HASHED=table is not None, TOKENS=max(1, triton.next_power_of_2(tokens)),
        EXPERTS=triton.next_power_of_2(experts), PAIRS=size, num_warps=4,
    )  # fmt: skip
    most = min(count, experts)
    few = min(2, tile)  # tokens of a run are few even in large batches
    block = p.block_columns(hidden, 8)
    rows = max(1, min(inner, p.program_rows(block, 8) // UP_SHARE))
    _up[(inner // rows, most)](
        rounded.for_fp4, rounded.unit, w1, s1, w3, s3, pairs, run_expert, run_start, runs, weights,
        acts, inner, topk, limit, HIDDEN=hidden, BLOCK=block, ROWS=rows, TOKENS=few, PACKED=packed,
        num_warps=WARPS,
    )  # fmt: skip
    out = torch.empty(tokens, topk, hidden, dtype=x.dtype, device=x.device)
    shared_out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    rounded = p.round_inputs(acts, fp8_from=count, fp4_below=count)
    block = p.block_columns(inner, 8)
    rows = max(1, min(hidden, p.program_rows(block, 8) // DOWN_SHARE))
    _down[(hidden // rows, most + triton.cdiv(tokens, few))](
        rounded.for_fp4, rounded.unit, w2, s2, pairs, run_expert, run_start, runs, out,
        rounded.for_fp8[count:], rounded.unit[count:], shared_down, shared_down_scale, shared_out,
        tokens, hidden, most, INNER=inner, BLOCK=block, ROWS=rows, TOKENS=few, PACKED=packed,
        num_warps=WARPS,
    )  # fmt: skip
    return out, shared_out, indices
