"""Linear layers over stored weights for a few tokens, where reading weights is all the time.

One program owns ROWS output rows of a matrix and a tile of TOKENS tokens, walks the columns in
groups of 128 and keeps its sums in registers, always in the same order: a token's result depends
neither on the batch nor on its place in it. The weight is the left operand, so that a single token
costs the padding of the narrow side. Normalising and rounding the input is repeated by every
program: it is a few kilobytes from the cache, and saves two launches.

Bytes: rows * cols for FP8 (1/128 squared of it for scales), twice that for BF16; inputs and outputs
are negligible up to 64 tokens.

Paper: §3.4 (FP8 linear layers, 1x128 by 128x128).
"""

# triton is not installed where the types are checked:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f

WARPS = 4
STAGES = 4


@triton.jit
def input_group(x, token, live, stride, first, r, norm, NORM: tl.constexpr):
    """128 columns of some tokens, transposed: [128, tokens] float32, normalised where asked."""
    col = first + tl.arange(0, 128)
    tile = tl.load(x + token[None, :] * stride + col[:, None], mask=live[None, :], other=0.0)
    tile = tile.to(tl.float32)
    if NORM:
        weight = tl.load(norm + col).to(tl.float32)
        tile = (tile * r[None, :] * weight[:, None]).to(x.dtype.element_ty).to(tl.float32)
    return tile


@triton.jit
def root_mean_square(x, token, live, stride, cols, eps, NORM: tl.constexpr):
    """1 / sqrt(mean square + eps) of each token's row: [tokens] float32."""
    total = tl.full([token.shape[0]], 1.0, tl.float32)
    if NORM:
        total = tl.zeros([token.shape[0]], tl.float32)
        for first in range(0, cols, 128):
            col = first + tl.arange(0, 128)
            tile = tl.load(
                x + token[None, :] * stride + col[:, None], mask=live[None, :], other=0.0
            ).to(tl.float32)
            total += tl.sum(tile * tile, axis=0)
    return 1.0 / tl.sqrt(total / cols + eps)  # unused without NORM


@triton.jit
def fp8_rows(
    x, token, live, stride, cols, norm, eps, codes, scale, row,
    NORM: tl.constexpr, QUANTIZE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Products of FP8 rows [ROWS] with tokens [TOKENS]: [ROWS, TOKENS] float32."""
    r = root_mean_square(x, token, live, stride, cols, eps, NORM)
    total = tl.zeros([row.shape[0], token.shape[0]], tl.float32)
    tiles = cols // 128
    for tile in range(tiles):
        values = input_group(x, token, live, stride, tile * 128, r, norm, NORM)
        col = tile * 128 + tl.arange(0, 128)
        w = f.decode_e4m3(tl.load(codes + row[:, None].to(tl.int64) * cols + col[None, :]))
        factor = f.decode_e8m0(tl.load(scale + row // 128 * tiles + tile)) * f.E4M3_UNIT
        if QUANTIZE:
            amax = tl.maximum(tl.max(tl.abs(values), axis=0), f.FP8_FLOOR)
            unit, inverse = f.power_of_two_scale(amax, f.E4M3_RECIPROCAL)
            values = f.round_e4m3(values * inverse[None, :])
            part = tl.dot(w.to(DOT), values.to(DOT), input_precision="ieee")
            total += part * factor[:, None] * unit[None, :]
        else:
            part = tl.dot(w.to(DOT), values.to(DOT), input_precision="ieee")
            total += part * factor[:, None]
    return total


@triton.jit
def plain_rows(
    x, token, live, stride, cols, weight, row, row_live, DOT: tl.constexpr
):  # fmt: skip
    """Products of BF16 (or float32) rows with tokens: [ROWS, TOKENS] float32."""
    total = tl.zeros([row.shape[0], token.shape[0]], tl.float32)
    for first in range(0, cols, 128):
        values = input_group(x, token, live, stride, first, 1.0, x, False)
        col = first + tl.arange(0, 128)
        w = tl.load(
            weight + row[:, None].to(tl.int64) * cols + col[None, :],
            mask=row_live[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(w.to(DOT), values.to(DOT), total, input_precision="ieee")
    return total


@triton.jit
def _linear(
    x, norm, codes, scale, out, plain, plain_out, tokens, cols, rows, plain_rows_count,
    group_rows, x_stride, eps, fp8_blocks,
    NORM: tl.constexpr, QUANTIZE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    DOT: tl.constexpr, PLAIN_DOT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    if block < fp8_blocks:
        row = block * ROWS + tl.arange(0, ROWS)
        group = block * ROWS // group_rows  # a group of rows reads its own columns of the input
        total = fp8_rows(
            x + group * cols, token, live, x_stride, cols, norm, eps, codes, scale, row,
            NORM, QUANTIZE, DOT,
        )  # fmt: skip
        at = out + token[None, :] * rows + row[:, None]
        tl.store(at, total.to(out.dtype.element_ty), mask=live[None, :])
    else:
        plain_row = (block - fp8_blocks) * ROWS + tl.arange(0, ROWS)
        row_live = plain_row < plain_rows_count
        plain_total = plain_rows(
            x, token, live, x_stride, cols, plain, plain_row, row_live, PLAIN_DOT
        )
        plain_at = plain_out + token[None, :] * plain_rows_count + plain_row[:, None]
        tl.store(plain_at, plain_total, mask=live[None, :] & row_live[:, None])


def dot_types(x: torch.Tensor, quantize: bool) -> tuple[tl.dtype, tl.dtype]:
    """Operand types for FP8 and for plain weights; float32 inputs keep everything in float32.

    x: [tokens, cols]. FP8 codes are exact in float16; unrounded inputs need BF16's range.
    """
    if x.dtype == torch.float32:
        return tl.float32, tl.float32
    return (tl.float16 if quantize else tl.bfloat16), tl.bfloat16


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
    out: torch.Tensor | None = None,
    plain_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the reference. x: [tokens, groups * cols]; codes: [rows, cols] uint8, rows and cols
    multiples of 128; scale: [rows / 128, cols / 128] uint8; norm: [cols]; plain: [rows, cols]
    unquantised; out, plain_out: where to write, the same shapes as below. Returns ([tokens, rows]
    in x's dtype, plain's products [tokens, rows] float32 or None).
    """
    tokens, (rows, cols) = x.shape[0], codes.shape
    block = 16 if rows <= 4096 else 32
    count = 0 if plain is None else plain.shape[0]
    if out is None:
        out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if plain is not None and plain_out is None:
        plain_out = torch.empty(tokens, count, dtype=torch.float32, device=x.device)
    dot, plain_dot = dot_types(x, quantize_input)
    fp8_blocks = rows // block
    width = 16 if tokens <= 16 else 32
    grid = (fp8_blocks + triton.cdiv(count, block), triton.cdiv(tokens, width))
    _linear[grid](
        x, norm if norm is not None else x, codes, scale, out,
        plain if plain is not None else x, plain_out if plain_out is not None else out,
        tokens, cols, rows, count, rows // groups, x.stride(0), norm_eps, fp8_blocks,
        NORM=norm is not None, QUANTIZE=quantize_input, ROWS=block, TOKENS=width,
        DOT=dot, PLAIN_DOT=plain_dot, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out, plain_out if plain is not None else None
