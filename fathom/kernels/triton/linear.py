"""Linear layers over stored weights for a few tokens, where reading weights is all the time.

A program owns some whole rows of one of the stacked matrices and up to four tokens. FP8 weights
meet inputs that one launch before has normalised and rounded; see packed.py.

Bytes: rows * cols for FP8 (1/128 squared of it for scales), twice that for BF16; inputs and outputs
are negligible up to 64 tokens, but every four tokens read the weights again (from the L2 cache as
far as they fit).

Paper: §3.4 (FP8 linear layers, 1x128 by 128x128).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import packed as p

PLAIN_VALUES = 16384  # unquantised weights of one program
WARPS = 4


@triton.jit
def _linear(
    x, x_stride, unit, codes, scale, out, plain_x, plain_stride, plain, plain_out,
    tokens, rows, plain_count, group_rows, fp8_blocks,
    COLS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PLAIN_BLOCK: tl.constexpr,
    PLAIN_ROWS: tl.constexpr, TOKENS: tl.constexpr, ROUNDED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = tl.program_id(1) * TOKENS
    mine = token + tl.arange(0, TOKENS)
    if block < fp8_blocks:
        row = block * ROWS + tl.arange(0, ROWS)
        group = block * ROWS // group_rows  # a group of rows reads its own columns of the input
        own_scale = scale + block * ROWS // 128 * (COLS // 128)
        total = tl.zeros([TOKENS, ROWS], tl.float32)
        for first in tl.static_range(0, COLS, BLOCK):
            words = p.load_words(codes, row, COLS // 4, first // 4, BLOCK // 16)
            for t in tl.static_range(TOKENS):
                here = tl.minimum(token + t, tokens - 1).to(tl.int64)
                if ROUNDED:
                    sums = p.fp8_row_sums(
                        words, own_scale, x + here * x_stride, unit + here * (COLS // 128), COLS,
                        first, BLOCK // 16, PACKED,
                    )  # fmt: skip
                else:
                    sums = p.fp8_row_sums_unrounded(
                        words, own_scale, x + here * x_stride + group * COLS, COLS, first,
                        BLOCK // 16, PACKED,
                    )  # fmt: skip
                total = p.added(total, sums, t)
        at = out + mine[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=(mine < tokens)[:, None])
    else:
        plain_row = (block - fp8_blocks) * PLAIN_ROWS + tl.arange(0, PLAIN_ROWS)
        live = plain_row < plain_count
        plain_total = tl.zeros([TOKENS, PLAIN_ROWS], tl.float32)
        for first in tl.static_range(0, COLS, PLAIN_BLOCK):
            col = first + tl.arange(0, PLAIN_BLOCK)
            weights = tl.load(
                plain + plain_row[:, None] * COLS + col[None, :], mask=live[:, None], other=0.0
            )
            for t in tl.static_range(TOKENS):
                here = tl.minimum(token + t, tokens - 1).to(tl.int64)
                plain_sums = p.plain_row_sums(weights, tl.load(plain_x + here * plain_stride + col))
                plain_total = p.added(plain_total, plain_sums, t)
        plain_at = plain_out + mine[:, None] * plain_count + plain_row[None, :]
        tl.store(plain_at, plain_total, mask=(mine < tokens)[:, None] & live[None, :])


@register("packed_linear", "triton")
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
    out: torch.Tensor | None = None,
    plain_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the reference. x: [tokens, groups * cols]; codes: [rows, cols] uint8, rows a multiple
    of 32 and cols of 128, one group where the input is rounded; scale: [rows / 128, cols / 128]
    uint8; norm: [cols]; plain: [rows, cols] unquantised; out, plain_out: where to write, the same
    shapes as below. Returns ([tokens, rows] in x's dtype, plain's products [tokens, rows] float32
    or None).
    """
    tokens, (rows, cols) = x.shape[0], codes.shape
    assert quantize_input or norm is None
    assert groups == 1 or not quantize_input
    count = 0 if plain is None else plain.shape[0]
    if out is None:
        out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if plain is not None and plain_out is None:
        plain_out = torch.empty(tokens, count, dtype=torch.float32, device=x.device)
    values = unit = x
    if quantize_input:
        rounded = p.round_inputs(x, norm=norm, norm_eps=norm_eps)
        values, unit = rounded.for_fp8, rounded.unit
    block = p.block_columns(cols, 4)
    each = rows // groups
    own_rows = min(each & -each, p.program_rows(block, 4))
    plain_block = min(cols & -cols, PLAIN_VALUES)
    plain_rows = max(1, PLAIN_VALUES // plain_block)
    tile = p.token_tile(tokens)
    fp8_blocks = rows // own_rows
    _linear[(fp8_blocks + triton.cdiv(count, plain_rows), triton.cdiv(tokens, tile))](
        values, values.stride(0), unit, codes, scale, out, x, x.stride(0),
        plain if plain is not None else x, plain_out if plain_out is not None else out,
        tokens, rows, count, each, fp8_blocks,
        COLS=cols, BLOCK=block, ROWS=own_rows, PLAIN_BLOCK=plain_block, PLAIN_ROWS=plain_rows,
        TOKENS=tile, ROUNDED=quantize_input, PACKED=x.dtype != torch.float32, num_warps=WARPS,
    )  # fmt: skip
    return out, plain_out if plain is not None else None
