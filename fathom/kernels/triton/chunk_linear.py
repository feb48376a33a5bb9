"""Linear layers over stored weights for many tokens, by the matrix products of torch.

An input is rounded once to FP8 in groups of 128. Where torch's library multiplies such an input
with the stored codes, scaling each 1x128 by 128x128 product before the float32 sum, it does so: no
weight is copied. Elsewhere, and for inputs that are not rounded, the weight is widened for the
call: rounded inputs and weights times their power-of-two scales are exact in BF16, and so the plain
BF16 product computes the same. Up to 64 tokens, where reading the weight is all the time,
few_linear.py multiplies.

FLOP: 2 * tokens * rows * cols, 2.3e12 for all of a CSA layer's at 8,192 tokens of V4-Flash. Bytes:
three for each value of the input that is rounded; a widened weight's rows * cols read, and twice
that written and read again, a fiftieth of the product's time at 8,192 tokens.

Paper: §3.4 (FP8 linear layers, 1x128 by 128x128).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fathom.kernels.device import multiplies_scaled_fp8
from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f
from fathom.kernels.triton.few_linear import stored_linear
from fathom.quant import fp8

FEW = 64  # tokens up to which few_linear.py (and few_experts.py) multiplies
ROUNDED_ROWS = 4  # warps of a program that rounds one row
PADDED = 16  # rows of such a product are a multiple of this
SCALES_ALIGNED = 4  # it wants a row of scales to be a multiple of this


@triton.jit
def _row_to_round(x, norm, groups, eps, NORM: tl.constexpr, GROUPS: tl.constexpr):
    """The row at x, normalised first if asked: [GROUPS, 128] float32, and the places of these."""
    group, col = tl.arange(0, GROUPS), tl.arange(0, 128)
    live = (group < groups)[:, None]
    at = group[:, None] * 128 + col[None, :]
    values = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(tl.sum(values * values, axis=1), axis=0) / (groups * 128)
        weight = tl.load(norm + at, mask=live, other=0.0).to(tl.float32)
        values = values * (1.0 / tl.sqrt(mean + eps)) * weight
        values = values.to(x.dtype.element_ty).to(tl.float32)
    return values, at


@triton.jit
def chunk_fp8_round(
    x, x_stride, norm, out, groups, eps, NORM: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """A row as FP8 with a scale for 128 columns would give it."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    live = group < groups
    values, _ = _row_to_round(x + row * x_stride, norm, groups, eps, NORM, GROUPS)
    f.store_groups(out + row * groups * 128, f.round_group(values), group, live, "columns")


@triton.jit
def chunk_fp8_codes(
    x, x_stride, norm, codes, scales, scales_stride, groups, eps,
    NORM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """As chunk_fp8_round, but codes [rows, cols] and float32 scales [groups, rows]."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    live = group < groups
    values, at = _row_to_round(x + row * x_stride, norm, groups, eps, NORM, GROUPS)
    amax = f.largest_magnitude(values, 1, f.FP8_FLOOR)
    unit, inverse = f.power_of_two_scale(amax, f.E4M3_RECIPROCAL)
    rounded = f.round_e4m3(values * inverse[:, None])
    tl.store(codes + row * groups * 128 + at, f.encode_e4m3(rounded, values), mask=live[:, None])
    tl.store(scales + group * scales_stride + row, unit, mask=live)


@triton.jit
def chunk_fp8_widen(codes, scale, out, cols, TILES: tl.constexpr):
    """One program widens 32 rows of TILES neighbouring tiles of 128 x 128."""
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    for i in tl.static_range(TILES):
        tile = tl.program_id(1) * TILES + i
        unit = tl.load(scale + tl.program_id(0) // 4 * (cols // 128) + tile)
        at = row[:, None].to(tl.int64) * cols + tile * 128 + tl.arange(0, 128)[None, :]
        values = f.decode_e4m3_exactly(tl.load(codes + at), out.dtype.element_ty != tl.float32)
        values *= f.decode_e8m0(unit)
        tl.store(out + at, values.to(out.dtype.element_ty))


def rounded_rows(
    x: torch.Tensor,
    norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> torch.Tensor:
    """x rounded to FP8 in groups of 128 columns, normalised first where `norm` [cols] is given.

    x: [tokens, cols], rows apart by any stride. Returns [tokens, cols] contiguous in x's dtype.
    """
    tokens, cols = x.shape
    out = torch.empty(tokens, cols, dtype=x.dtype, device=x.device)
    groups = cols // 128
    chunk_fp8_round[(tokens,)](
        x, x.stride(0), norm if norm is not None else x, out, groups, norm_eps,
        NORM=norm is not None, GROUPS=triton.next_power_of_2(groups), num_warps=ROUNDED_ROWS,
    )  # fmt: skip
    return out


def scaled_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    """The product of x, normalised where asked and rounded, with FP8 codes as they are stored.

    x: [tokens, cols] BF16; codes: [rows, cols] uint8; scale: [rows / 128, cols / 128] uint8; norm:
    [cols]. Returns [tokens, rows] BF16.
    """
    tokens, cols = x.shape
    padded, groups = triton.cdiv(tokens, PADDED) * PADDED, cols // 128
    own = torch.empty(padded, cols, dtype=torch.uint8, device=x.device)
    units = torch.empty(groups, padded, dtype=torch.float32, device=x.device)
    if padded > tokens:
        own[tokens:], units[:, tokens:] = 0, 1.0
    chunk_fp8_codes[(tokens,)](
        x, x.stride(0), norm if norm is not None else x, own, units, padded, groups, norm_eps,
        NORM=norm is not None, GROUPS=triton.next_power_of_2(groups), num_warps=ROUNDED_ROWS,
    )  # fmt: skip
    weight = codes.view(torch.float8_e4m3fn)
    factors = fp8.decode_e8m0(scale, check=False)
    out = torch._scaled_mm(
        own.view(torch.float8_e4m3fn), weight.t(), scale_a=units.t(), scale_b=factors.t(),
        out_dtype=x.dtype,
    )  # fmt: skip
    return out[:tokens]


def widened(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An FP8 matrix in the arithmetic's dtype. codes: [rows, cols] uint8, both multiples of 128;
    scale: [rows / 128, cols / 128] uint8. Returns [rows, cols].
    """
    rows, cols = codes.shape
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    tiles = 4 if cols % 512 == 0 else 1
    chunk_fp8_widen[(rows // 32, cols // (128 * tiles))](
        codes, scale, out, cols, TILES=tiles, num_warps=4
    )
    return out


def float_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight^T with float32 sums and a float32 result: x: [tokens, cols]; weight: [rows, cols].

    BF16 products are exact in float32, so nothing is lost against widening both first.
    """
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


@register("chunk_linear", "triton")
def chunk_linear(
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
    """As the reference. x: [tokens, groups * cols]; codes: [rows, cols] uint8, rows and cols
    multiples of 128; scale: [rows / 128, cols / 128] uint8; norm: [cols]; plain: [rows, cols]
    unquantised. Returns ([tokens, rows] in x's dtype, plain's products [tokens, rows] float32 or
    None).
    """
    if x.shape[0] <= FEW:
        return stored_linear(
            x, codes, scale, quantize_input=quantize_input, groups=groups, norm=norm,
            norm_eps=norm_eps, plain=plain,
        )  # fmt: skip
    other = float_product(x, plain) if plain is not None else None
    (rows, cols), each, tokens = codes.shape, codes.shape[0] // groups, x.shape[0]
    scaled = quantize_input and groups == 1 and x.dtype == torch.bfloat16
    scaled = scaled and cols % (128 * SCALES_ALIGNED) == 0
    if scaled and multiplies_scaled_fp8(x.device):
        return scaled_product(x, codes, scale, norm, norm_eps), other
    if quantize_input:
        x = rounded_rows(x, norm, norm_eps)
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    weight = widened(codes, scale, x.dtype)
    for group in range(groups):
        mine = slice(group * each, (group + 1) * each)
        own = x[:, group * cols : (group + 1) * cols]
        torch.mm(own, weight[mine].t(), out=out[:, mine])
    return out, other
