"""Routed experts in their stored FP4 form for a few tokens: weights are unpacked on the way to the
matrix units, and every chosen expert's weights are read once for all its tokens.

`_route` chooses the experts and sorts the (token, choice) pairs by expert into runs. A program of
`_up` or `_down` then owns some rows of one run's expert and multiplies them with the run's tokens.
The grids are as large as the most runs there can be; programs without a run end at once.

Bytes for one token of V4-Flash: 6 experts x 3 matrices x 4096 x 2048 / 2, 80 MB with the scales.

Paper: §2.1 (DeepSeekMoE: sqrt-softplus affinity, hash routing); §3.4 (FP4 experts).
"""

# triton is not installed where the types are checked:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f
from fathom.kernels.triton.linear import dot_types, fp8_rows

TOKENS = 16  # of a run that are multiplied at once
WARPS = 4
STAGES = 4


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
def _half(x, token, live, stride, first, PART: tl.constexpr):
    col = first + 2 * tl.arange(0, 64) + PART
    at = x + token[None, :] * stride + col[:, None]
    return tl.load(at, mask=live[None, :], other=0.0).to(tl.float32)


@triton.jit
def _fp4_group(codes, scale, row, cols, tile, DOT: tl.constexpr):
    """128 columns of FP4 rows: the even and the odd ones, [ROWS, 64] each."""
    byte = tl.arange(0, 64)
    packed = tl.load(codes + row[:, None] * (cols // 2) + tile * 64 + byte[None, :])
    unit = tl.load(scale + row[:, None] * (cols // 32) + tile * 4 + byte[None, :] // 16)
    unit = f.decode_e8m0(unit) * f.E2M1_UNIT
    low = f.decode_e2m1(packed & 15).to(tl.float32) * unit
    high = f.decode_e2m1(packed >> 4).to(tl.float32) * unit
    return low.to(DOT), high.to(DOT)


@triton.jit
def _rounded_group(x, token, live, stride, tile, DOT: tl.constexpr):
    """128 columns of the tokens' inputs, rounded to FP8: even, odd [64, TOKENS] and their unit."""
    even = _half(x, token, live, stride, tile * 128, 0)
    odd = _half(x, token, live, stride, tile * 128, 1)
    amax = tl.maximum(tl.max(tl.abs(even), axis=0), tl.max(tl.abs(odd), axis=0))
    unit, inverse = f.power_of_two_scale(tl.maximum(amax, f.FP8_FLOOR), f.E4M3_RECIPROCAL)
    even = f.round_e4m3(even * inverse[None, :])
    odd = f.round_e4m3(odd * inverse[None, :])
    return even.to(DOT), odd.to(DOT), unit


@triton.jit
def _up(
    x, w1, s1, w3, s3, pairs, run_expert, run_start, runs, weights, act, hidden, inner, topk,
    limit,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    run, block = tl.program_id(1), tl.program_id(0)
    if run < tl.load(runs):
        expert = tl.load(run_expert + run).to(tl.int64)
        row = block * ROWS + tl.arange(0, ROWS)
        codes1, codes3 = w1 + expert * inner * (hidden // 2), w3 + expert * inner * (hidden // 2)
        scale1, scale3 = s1 + expert * inner * (hidden // 32), s3 + expert * inner * (hidden // 32)
        end = tl.load(run_start + run + 1)
        for first in range(tl.load(run_start + run), end, TOKENS):
            place = first + tl.arange(0, TOKENS)
            live = place < end
            pair = tl.load(pairs + place, mask=live, other=0)
            gate = tl.zeros([ROWS, TOKENS], tl.float32)
            up = tl.zeros([ROWS, TOKENS], tl.float32)
            for tile in range(hidden // 128):
                even, odd, unit = _rounded_group(x, pair // topk, live, hidden, tile, DOT)
                low, high = _fp4_group(codes1, scale1, row, hidden, tile, DOT)
                part = tl.dot(low, even, input_precision="ieee")
                gate += tl.dot(high, odd, part, input_precision="ieee") * unit[None, :]
                low, high = _fp4_group(codes3, scale3, row, hidden, tile, DOT)
                part = tl.dot(low, even, input_precision="ieee")
                up += tl.dot(high, odd, part, input_precision="ieee") * unit[None, :]
            weight = tl.load(weights + pair, mask=live, other=0.0)
            value = swiglu(gate, up, limit, x.dtype.element_ty) * weight[None, :]
            at = act + pair[None, :] * inner + row[:, None]
            tl.store(at, value.to(act.dtype.element_ty), mask=live[None, :])


@triton.jit
def swiglu(gate, up, limit, dtype: tl.constexpr):
    """silu(min(gate, limit)) * clamp(up), from matrix outputs that are rounded to `dtype` first."""
    gate = tl.minimum(gate.to(dtype).to(tl.float32), limit)
    up = tl.minimum(tl.maximum(up.to(dtype).to(tl.float32), -limit), limit)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _down(
    act, w2, s2, pairs, run_expert, run_start, runs, out, shared_act, shared_codes, shared_scale,
    shared_out, tokens, hidden, inner, most_runs,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr, FP8_DOT: tl.constexpr,
):  # fmt: skip
    run, block = tl.program_id(1), tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    if run >= most_runs:
        token = (run - most_runs) * TOKENS + tl.arange(0, TOKENS)
        live = token < tokens
        total = fp8_rows(
            shared_act, token, live, inner, inner, shared_act, 0.0, shared_codes, shared_scale,
            row, False, True, FP8_DOT,
        )  # fmt: skip
        at = shared_out + token[None, :] * hidden + row[:, None]
        tl.store(at, total.to(shared_out.dtype.element_ty), mask=live[None, :])
    elif run < tl.load(runs):
        expert = tl.load(run_expert + run).to(tl.int64)
        codes = w2 + expert * hidden * (inner // 2)
        scale = s2 + expert * hidden * (inner // 32)
        end = tl.load(run_start + run + 1)
        for first in range(tl.load(run_start + run), end, TOKENS):
            place = first + tl.arange(0, TOKENS)
            live = place < end
            pair = tl.load(pairs + place, mask=live, other=0)
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            for tile in range(inner // 128):
                even, odd, unit = _rounded_group(act, pair, live, inner, tile, DOT)
                low, high = _fp4_group(codes, scale, row, inner, tile, DOT)
                part = tl.dot(low, even, input_precision="ieee")
                total += tl.dot(high, odd, part, input_precision="ieee") * unit[None, :]
            at = out + pair[None, :] * hidden + row[:, None]
            tl.store(at, total.to(out.dtype.element_ty), mask=live[None, :])


@triton.jit
def _gate_and_shared_up(
    x, gate, logits, codes, scale, act, tokens, hidden, inner, experts, limit, gate_blocks,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr, PLAIN_DOT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    if block < gate_blocks:
        row = block * ROWS + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        for first in range(0, hidden, 128):
            col = first + tl.arange(0, 128)
            values = tl.load(
                x + token[None, :] * hidden + col[:, None], mask=live[None, :], other=0.0
            )
            w = tl.load(gate + row[:, None] * hidden + col[None, :])
            total = tl.dot(w.to(PLAIN_DOT), values.to(PLAIN_DOT), total, input_precision="ieee")
        tl.store(logits + token[None, :] * experts + row[:, None], total, mask=live[None, :])
    else:
        shared_row = (block - gate_blocks) * ROWS + tl.arange(0, ROWS)
        gated = fp8_rows(
            x, token, live, hidden, hidden, x, 0.0, codes, scale, shared_row, False, True, DOT
        )
        up = fp8_rows(
            x,
            token,
            live,
            hidden,
            hidden,
            x,
            0.0,
            codes,
            scale,
            inner + shared_row,
            False,
            True,
            DOT,
        )
        shared = swiglu(gated, up, limit, x.dtype.element_ty)
        shared_at = act + token[None, :] * inner + shared_row[:, None]
        tl.store(shared_at, shared.to(act.dtype.element_ty), mask=live[None, :])


@register("stored_moe", "triton")
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
    logits = torch.empty(tokens, experts, **make)
    shared_act = torch.empty(tokens, inner, dtype=x.dtype, device=x.device)
    dot, plain = dot_types(x, True)
    block = 16
    width = TOKENS if tokens <= TOKENS else 32
    _gate_and_shared_up[(experts // block + inner // block, triton.cdiv(tokens, width))](
        x, gate, logits, shared_up, shared_up_scale, shared_act, tokens, hidden, inner, experts,
        limit, experts // block, ROWS=block, TOKENS=width, DOT=dot, PLAIN_DOT=plain,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    count = tokens * topk
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
    act = torch.empty(count, inner, dtype=x.dtype, device=x.device)
    rows = 32
    _up[(inner // rows, most)](
        x, w1, s1, w3, s3, pairs, run_expert, run_start, runs, weights, act, hidden, inner, topk,
        limit, ROWS=rows, TOKENS=TOKENS, DOT=plain, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    out = torch.empty(tokens, topk, hidden, dtype=x.dtype, device=x.device)
    shared_out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    _down[(hidden // rows, most + triton.cdiv(tokens, TOKENS))](
        act, w2, s2, pairs, run_expert, run_start, runs, out, shared_act, shared_down,
        shared_down_scale, shared_out, tokens, hidden, inner, most,
        ROWS=rows, TOKENS=TOKENS, DOT=plain, FP8_DOT=dot, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out, shared_out, indices
