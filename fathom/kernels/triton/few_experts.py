"""Routed experts in their stored FP4 form for a few tokens, beside the shared expert in FP8.

The router's pairs are sorted by expert into tiles of up to 8 (route.py). A program of `experts_up`
or `experts_down` multiplies 64 rows of an expert's matrix with one tile's inputs on the matrix
units, so that every chosen expert's weights come from memory once for 8 tokens, and from the L2
cache for further ones. Each pair's sums are formed by the same instructions in the same order
whatever else is in the tile: a token's result does not depend on the batch.

Bytes for one token of V4-Flash: 6 experts x 3 matrices x 4096 x 2048 / 2, 80 MB with the scales.

Paper: §2.1 (DeepSeekMoE: sqrt-softplus affinity, hash routing); §3.4 (FP4 experts).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import few_linear as few
from fathom.kernels.triton import formats as f
from fathom.kernels.triton.fp4_words import byte_shifts, stored_factors, unpacked
from fathom.kernels.triton.route import TILE, Routing, routing

ROWS, WARPS, STAGES = 64, 4, 3
# Tiles of 128 columns that a program fetches at once, where they divide so: for few tokens, whose
# programs should all fit into the multiprocessors together, and for many.
AT_ONCE = (2, 4)
MANY_TOKENS = 16
SHARED_ROWS, SHARED_TOKENS = 16, 16  # of a program of the shared expert's


@triton.jit
def _fp4_products(
    codes, scale, x, live, shifts, COLS: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of FP4 codes from `codes` on times the inputs at `x`, pointers [pairs] to their
    columns in the order of planes: [ROWS, pairs] float32. shifts: as `byte_shifts` gives them.
    """
    row, col = tl.arange(0, ROWS), tl.arange(0, 128)
    words = codes.to(tl.pointer_type(tl.int32)) + row[:, None] * (COLS // 8)
    words = words + tl.arange(0, 16)[None, :]
    scales = scale.to(tl.pointer_type(tl.int32)) + row * (COLS // 128)
    value_at = x[None, :] + col[:, None]
    total = tl.zeros([ROWS, x.shape[0]], tl.float32)
    for k in range(0, COLS // 128, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            factor = stored_factors(tl.load(scales + k + i), shifts, BF16)
            weight = unpacked(tl.load(words + (k + i) * 16), factor, BF16)
            value = tl.load(value_at + (k + i) * 128, mask=live[None, :], other=0.0)
            total = tl.dot(weight, value, total, input_precision="ieee")
    if BF16:
        total *= 4611686018427387904.0  # 2**62, see fp4_words.py
    return total


@triton.jit
def experts_up(
    x, w1, s1, w3, s3, pairs, tile_expert, tile_first, tile_last, tiles, both, inner, topk,
    COLS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BF16: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """gate | up of each pair: both [pairs, 2 * inner]."""
    block, tile = tl.program_id(0), tl.program_id(1)
    count = tl.load(tiles)
    if tile < count:
        shifts = byte_shifts(tiles, tl.minimum(count, 0))
        expert = tl.load(tile_expert + tile).to(tl.int64)
        place = tl.load(tile_first + tile) + tl.arange(0, TILE)
        live = place < tl.load(tile_last + tile)
        pair = tl.load(pairs + place, mask=live, other=0)
        first = block * ROWS
        codes, scale = w1, s1
        if first >= inner:
            codes, scale = w3, s3
        start = expert * inner + first % inner
        total = _fp4_products(
            codes + start * (COLS // 2), scale + start * (COLS // 32), x + pair // topk * COLS,
            live, shifts, COLS, ROWS, BF16, AT_ONCE,
        )  # fmt: skip
        at = both + pair[:, None] * 2 * inner + (first + tl.arange(0, ROWS))[None, :]
        tl.store(at, tl.trans(total.to(both.dtype.element_ty)), mask=live[:, None])


@triton.jit
def experts_swiglu(
    both, shared, weights, planes, codes, unit, count, groups, limit, GROUPS: tl.constexpr
):  # fmt: skip
    """Rows of gate | up -> silu(min(gate, limit)) * clamp(up), rounded to FP8: of the routed pairs,
    times their weights, in the order of planes, then of the shared expert, as codes and units.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    live = group < groups
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    own = both + row * 2 * groups * 128
    if row >= count:
        own = shared + (row - count) * 2 * groups * 128
    gate = tl.load(own + at, mask=live[:, None], other=0.0).to(tl.float32)
    up = tl.load(own + groups * 128 + at, mask=live[:, None], other=0.0).to(tl.float32)
    values = f.swiglu(gate, up, limit)
    dtype: tl.constexpr = both.dtype.element_ty
    if row < count:
        values = (values * tl.load(weights + row)).to(dtype).to(tl.float32)
        f.store_groups(planes + row * groups * 128, f.round_group(values), group, live, "words")
    else:
        values = values.to(dtype).to(tl.float32)
        few.store_codes(
            values, codes + (row - count) * groups * 128, unit + (row - count) * groups, group, live
        )


@triton.jit
def experts_down(
    act, w2, s2, pairs, tile_expert, tile_first, tile_last, tiles, out, shared_codes,
    shared_scale, values, unit, shared_out, tokens, hidden, shared_blocks, blocks,
    COLS: tl.constexpr, ROWS: tl.constexpr, SHARED_ROWS: tl.constexpr, TILE: tl.constexpr,
    TOKENS: tl.constexpr, BF16: tl.constexpr, AT_ONCE: tl.constexpr, SHARED_PARTS: tl.constexpr,
):  # fmt: skip
    """Outputs of the shared expert's tokens, then of the routed pairs: [pairs, hidden]."""
    number = tl.program_id(0)
    tile = (number - shared_blocks) // blocks
    count = tl.load(tiles)
    if number < shared_blocks:
        own = number % (hidden // SHARED_ROWS) * SHARED_ROWS
        begin = number // (hidden // SHARED_ROWS) * TOKENS
        token = begin + tl.arange(0, TOKENS)
        shared = few.fp8_products(
            shared_codes + own * COLS, shared_scale + own // 128 * (COLS // 128),
            values + begin * COLS, COLS, unit + begin * (COLS // 128), tokens - begin, COLS,
            SHARED_ROWS, TOKENS, True, BF16, SHARED_PARTS,
        )  # fmt: skip
        shared_at = shared_out + token[None, :] * hidden
        shared_at = shared_at + (own + tl.arange(0, SHARED_ROWS))[:, None]
        live_token = (token < tokens)[None, :]
        tl.store(shared_at, shared.to(shared_out.dtype.element_ty), mask=live_token)
    elif tile < count:
        shifts = byte_shifts(tiles, tl.minimum(count, 0))
        expert = tl.load(tile_expert + tile).to(tl.int64)
        place = tl.load(tile_first + tile) + tl.arange(0, TILE)
        live = place < tl.load(tile_last + tile)
        pair = tl.load(pairs + place, mask=live, other=0)
        first = (number - shared_blocks) % blocks * ROWS
        start = expert * hidden + first
        total = _fp4_products(
            w2 + start * (COLS // 2), s2 + start * (COLS // 32), act + pair * COLS, live,
            shifts, COLS, ROWS, BF16, AT_ONCE,
        )  # fmt: skip
        at = out + pair[:, None] * hidden + (first + tl.arange(0, ROWS))[None, :]
        tl.store(at, tl.trans(total.to(out.dtype.element_ty)), mask=live[:, None])


def at_once(cols: int, tokens: int) -> int:
    """Tiles of 128 columns that a program fetches at once; sums have the same order with any."""
    tiles = cols // 128
    return min(AT_ONCE[tokens >= MANY_TOKENS], tiles & -tiles)


def _experts(
    values: few.Rounded,
    r: Routing,
    shared_both: torch.Tensor,
    routed: tuple[torch.Tensor, ...],
    shared: tuple[torch.Tensor, ...],
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """values: of x, with planes; shared_both: [tokens, 2 * inner]. Returns ([tokens, topk, hidden],
    [tokens, hidden]).
    """
    w1, s1, w3, s3, w2, s2 = routed
    assert values.planes is not None
    x, lists = values.planes, r.lists()
    (tokens, topk), hidden, inner = r.indices.shape, x.shape[1], w1.shape[1]
    count, bf16 = tokens * topk, x.dtype != torch.float32
    make = {"dtype": x.dtype, "device": x.device}
    rows = min(ROWS, inner)
    both = torch.empty(count, 2 * inner, **make)
    experts_up[(2 * inner // rows, r.most)](
        x=x, w1=w1, s1=s1, w3=w3, s3=s3, **lists, both=both, inner=inner, topk=topk, COLS=hidden,
        ROWS=rows, TILE=TILE, BF16=bf16, AT_ONCE=at_once(hidden, tokens), num_warps=WARPS,
        num_stages=STAGES,
    )  # fmt: skip
    act = torch.empty(count, inner, **make)
    codes = torch.empty(tokens, inner, dtype=values.codes.dtype, device=x.device)
    unit = torch.empty(tokens, inner // 128, dtype=torch.float32, device=x.device)
    experts_swiglu[(count + tokens,)](
        both, shared_both, r.weights, act, codes, unit, count, inner // 128, limit,
        GROUPS=triton.next_power_of_2(inner // 128), num_warps=4,
    )  # fmt: skip
    out = torch.empty(tokens, topk, hidden, **make)
    shared_out = torch.empty(tokens, hidden, **make)
    rows = min(ROWS, hidden)
    shared_blocks = hidden // SHARED_ROWS * triton.cdiv(tokens, SHARED_TOKENS)
    blocks = hidden // rows
    experts_down[(shared_blocks + blocks * r.most,)](
        act=act, w2=w2, s2=s2, **lists, out=out, shared_codes=shared[2], shared_scale=shared[3],
        values=codes, unit=unit, shared_out=shared_out, tokens=tokens, hidden=hidden,
        shared_blocks=shared_blocks, blocks=blocks, COLS=inner, ROWS=rows,
        SHARED_ROWS=SHARED_ROWS, TILE=TILE, TOKENS=SHARED_TOKENS, BF16=bf16,
        AT_ONCE=at_once(inner, tokens),
        SHARED_PARTS=few.column_parts(inner), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out, shared_out


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
    values = few.rounded(x, planes=True)
    shared_both, logits = few.few_linear(x, values, *shared[:2], plain=gate)
    assert logits is not None
    r = routing(logits, token_ids, topk=topk, scaling_factor=scaling_factor, bias=bias, table=table)
    out, shared_out = _experts(values, r, shared_both, routed, shared, limit)
    return out, shared_out, r.indices
