"""Linear layers over stored weights for a few tokens, on the matrix units.

A program of `fp8_linear` owns 16 or 32 rows of one of the stacked matrices and all tokens, in 8
columns of the matrix units each. FP8 weights become float16 in registers, inputs were rounded to
FP8 codes in float16 by one launch before; both are exact, and a 128-column tile's product is
multiplied by the two scales in float32. Each sum of a token is formed by the same instructions in
the same order whatever stands in the other columns, so that its result does not depend on the
batch.

Bytes: rows * cols for FP8 (1/128 squared of it for scales), twice that for BF16; the inputs, once
for every 16 or 32 rows, from the L2 cache.

Paper: §3.4 (FP8 linear layers, 1x128 by 128x128).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f

LEAST_TOKENS = 8  # columns of the smallest product
MANY_TOKENS = 32  # from which on programs take more rows, since inputs are read for each


@dataclass(frozen=True, slots=True)
class _Shape:
    """Rows of a program, its warps, and steps of its loop that are under way at once."""

    rows: int
    warps: int
    stages: int


# By the parts that columns are walked in, for a few tokens and for many.
SHAPES = {
    1: (_Shape(32, 2, 5), _Shape(32, 4, 3)),
    2: (_Shape(16, 4, 4), _Shape(32, 4, 2)),
    4: (_Shape(16, 4, 4), _Shape(32, 4, 2)),
}


@triton.jit
def store_codes(values, codes, unit, group, live):
    """Store [groups, 128] rounded to FP8: the codes' numbers, and each group's unit."""
    amax = f.largest_magnitude(values, 1, f.FP8_FLOOR)
    own_unit, inverse = f.power_of_two_scale(amax, f.E4M3_RECIPROCAL)
    at = codes + group[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(
        at, f.round_e4m3(values * inverse[:, None]).to(codes.dtype.element_ty), mask=live[:, None]
    )
    tl.store(unit + group, own_unit, mask=live)


@triton.jit
def fp8_round(
    x, x_stride, norm, codes, unit, planes, groups, eps,
    NORM: tl.constexpr, PLANES: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Some groups of a row: FP8 codes and units, and values in the order of FP4 planes."""
    row = tl.program_id(1).to(tl.int64)
    own = x + row * x_stride
    dtype: tl.constexpr = x.dtype.element_ty
    group, col = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, 128)
    live = group < groups
    at = group[:, None] * 128 + col[None, :]
    values = tl.load(own + at, mask=live[:, None], other=0.0).to(tl.float32)
    if NORM:
        every = tl.arange(0, WHOLE)
        whole = tl.load(own + every, mask=every < groups * 128, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(whole * whole, axis=0) / (groups * 128) + eps)
        values *= r * tl.load(norm + at, mask=live[:, None], other=0.0).to(tl.float32)
        values = values.to(dtype).to(tl.float32)
    store_codes(values, codes + row * groups * 128, unit + row * groups, group, live)
    if PLANES:
        f.store_groups(planes + row * groups * 128, f.round_group(values), group, live, "words")


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rows rounded to FP8 by groups of 128 columns.

    codes: [tokens, cols], the codes' numbers in float16 (float32 where x is); unit: [tokens,
    cols / 128] float32; planes: [tokens, cols] in x's dtype, or None: codes times units in the
    order in which FP4 columns are unpacked (fp4_words.py).
    """

    codes: torch.Tensor
    unit: torch.Tensor
    planes: torch.Tensor | None


def rounded(
    x: torch.Tensor, norm: torch.Tensor | None = None, norm_eps: float = 0.0, planes: bool = False
) -> Rounded:
    """x: [tokens, cols], rows apart by any stride; norm: [cols], which normalises them first."""
    tokens, cols = x.shape
    dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
    codes = torch.empty(tokens, cols, dtype=dtype, device=x.device)
    unit = torch.empty(tokens, cols // 128, dtype=torch.float32, device=x.device)
    ordered = torch.empty(tokens, cols, dtype=x.dtype, device=x.device) if planes else None
    groups = min(8, triton.next_power_of_2(cols // 128))
    fp8_round[(triton.cdiv(cols // 128, groups), tokens)](
        x, x.stride(0), norm if norm is not None else x, codes, unit,
        ordered if ordered is not None else x, cols // 128, norm_eps,
        NORM=norm is not None, PLANES=planes, GROUPS=groups,
        WHOLE=triton.next_power_of_2(cols), num_warps=4,
    )  # fmt: skip
    return Rounded(codes, unit, ordered)


@triton.jit
def fp8_products(
    codes, scale, x, x_stride, unit, tokens, COLS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, ROUNDED: tl.constexpr, NATIVE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of FP8 codes from `codes` on times every token: [ROWS, TOKENS] float32.

    scale: the rows' scales; x, unit: as `rounded` leaves them, or x in BF16 and unit unused. The
    columns' PARTS are walked side by side, each by warps of its own, and added in the end.
    """
    part, row = tl.arange(0, PARTS), tl.arange(0, ROWS)
    token, col = tl.arange(0, TOKENS), tl.arange(0, 128)
    live = token < tokens
    TILES: tl.constexpr = COLS // 128
    EACH: tl.constexpr = TILES // PARTS
    first = part[:, None, None] * EACH * 128
    w_at = codes + row[None, :, None] * COLS + first + col[None, None, :]
    x_at = x + token[None, None, :] * x_stride + first + col[None, :, None]
    total = tl.zeros([PARTS, ROWS, TOKENS], tl.float32)
    for i in range(EACH):
        w = tl.load(w_at + i * 128)
        values = tl.load(x_at + i * 128, mask=live[None, None, :], other=0.0)
        tile = part * EACH + i
        factors = f.decode_e8m0(tl.load(scale + tile))[:, None]
        if ROUNDED:
            own = unit + token[None, :] * TILES + tile[:, None]
            factors = factors * tl.load(own, mask=live[None, :], other=0.0)
        if not NATIVE:
            w = f.decode_e4m3_exactly(w, False).to(values.dtype)
        elif ROUNDED:
            w = w.to(tl.float8e4nv, bitcast=True).to(values.dtype)
        else:  # the direct conversion to bfloat16 is slow
            w = w.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32).to(values.dtype)
        total += tl.dot(w, values, input_precision="ieee") * factors[:, None, :]
    return tl.sum(total, axis=0)


@triton.jit
def plain_products(
    weight, x, x_stride, tokens, left, COLS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ROWS unquantised rows, of which `left` exist, times every token: [ROWS, TOKENS] float32.

    A float32 weight meets an input in BF16 as three BF16 numbers whose sum it is exactly.
    """
    WIDE: tl.constexpr = weight.dtype.element_ty == tl.float32
    SUMMANDS: tl.constexpr = 3 if WIDE and x.dtype.element_ty != tl.float32 else 1
    part, row = tl.arange(0, PARTS), tl.arange(0, ROWS)
    token, col = tl.arange(0, TOKENS), tl.arange(0, 128)
    live, exists = (token < tokens)[None, None, :], (row < left)[None, :, None]
    EACH: tl.constexpr = COLS // 128 // PARTS
    first = part[:, None, None] * EACH * 128
    w_at = weight + row[None, :, None] * COLS + first + col[None, None, :]
    x_at = x + token[None, None, :] * x_stride + first + col[None, :, None]
    total = tl.zeros([PARTS, ROWS, TOKENS], tl.float32)
    for i in range(EACH):
        w = tl.load(w_at + i * 128, mask=exists, other=0.0)
        values = tl.load(x_at + i * 128, mask=live, other=0.0)
        for _ in tl.static_range(SUMMANDS):
            own = w.to(values.dtype)
            total = tl.dot(own, values, total, input_precision="ieee")
            if SUMMANDS > 1:
                w -= own.to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def fp8_linear(
    x, x_stride, unit, codes, scale, out, plain_x, plain_stride, plain, plain_out,
    tokens, rows, plain_count, group_rows, fp8_blocks,
    COLS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, ROUNDED: tl.constexpr,
    NATIVE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the FP8 matrices, or behind them of the plain one, times every token."""
    block, token = tl.program_id(0), tl.arange(0, TOKENS)
    live = (token < tokens)[None, :]
    if block < fp8_blocks:
        first = block * ROWS
        group = first // group_rows  # a group of rows reads its own columns of the input
        total = fp8_products(
            codes + first.to(tl.int64) * COLS, scale + first // 128 * (COLS // 128),
            x + group * COLS, x_stride, unit, tokens, COLS, ROWS, TOKENS, ROUNDED, NATIVE,
            PARTS,
        )  # fmt: skip
        at = out + token[None, :] * rows + (first + tl.arange(0, ROWS))[:, None]
        tl.store(at, total.to(out.dtype.element_ty), mask=live)
    else:
        plain_first = (block - fp8_blocks) * ROWS
        own = plain_first + tl.arange(0, ROWS)
        plain_total = plain_products(
            plain + plain_first.to(tl.int64) * COLS, plain_x, plain_stride, tokens,
            plain_count - plain_first, COLS, ROWS, TOKENS, PARTS,
        )  # fmt: skip
        plain_at = plain_out + token[None, :] * plain_count + own[:, None]
        tl.store(plain_at, plain_total, mask=live & (own < plain_count)[:, None])


def column_parts(cols: int) -> int:
    """Parts of the columns that a program walks side by side; the batch has no say in it."""
    tiles = cols // 128
    most = 4 if tiles >= 32 else 2 if tiles >= 16 else 1  # of at least 8 tiles each
    return min(most, tiles & -tiles)


def token_columns(tokens: int) -> int:
    """Columns of a product with that many tokens."""
    return max(LEAST_TOKENS, triton.next_power_of_2(tokens))


def few_linear(
    x: torch.Tensor,
    values: Rounded | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    groups: int = 1,
    plain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The products of rounded `values`, or where there are none of x, with FP8 codes, and those of
    x with `plain`. x: [tokens, groups * cols]; codes: [rows, cols] uint8; scale: [rows / 128,
    cols / 128] uint8; plain: [rows, cols]. Returns ([tokens, rows], [tokens, rows] float32 or
    None).
    """
    tokens, (rows, cols) = x.shape[0], codes.shape
    count = 0 if plain is None else plain.shape[0]
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    plain_out = torch.empty(tokens, count, dtype=torch.float32, device=x.device) if count else None
    own, unit = (values.codes, values.unit) if values is not None else (x, x)
    parts, columns = column_parts(cols), token_columns(tokens)
    shape = SHAPES[parts][columns >= MANY_TOKENS]
    own_rows = min(shape.rows, (rows // groups) & -(rows // groups))
    blocks = rows // own_rows
    fp8_linear[(blocks + triton.cdiv(count, own_rows),)](
        x=own, x_stride=own.stride(0), unit=unit, codes=codes, scale=scale, out=out,
        plain_x=x, plain_stride=x.stride(0), plain=plain if plain is not None else x,
        plain_out=plain_out if plain_out is not None else out,
        tokens=tokens, rows=rows, plain_count=count, group_rows=rows // groups, fp8_blocks=blocks,
        COLS=cols, ROWS=own_rows, TOKENS=columns, ROUNDED=values is not None,
        NATIVE=x.dtype != torch.float32, PARTS=parts,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out, plain_out


@register("stored_linear", "triton")
def stored_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    quantize_input: bool = True,
    groups: int = 1,
    norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    plain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the reference. x: [tokens, groups * cols], at most 64 tokens; codes: [rows, cols] uint8,
    rows and cols multiples of 128, one group where the input is rounded; scale: [rows / 128,
    cols / 128] uint8; norm: [cols]; plain: [rows, cols] unquantised. Returns ([tokens, rows] in
    x's dtype, plain's products [tokens, rows] float32 or None).
    """
    assert quantize_input or norm is None
    assert groups == 1 or not quantize_input
    values = rounded(x, norm, norm_eps) if quantize_input else None
    return few_linear(x, values, codes, scale, groups=groups, plain=plain)
