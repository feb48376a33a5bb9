"""Linear layers as the official kernels compute them.

A weight stored in FP8 or FP4 meets an input quantised to FP8 in 1x128 groups. `quant_linear` is the
official operator on stored codes. The model holds weights dequantised and uses `linear`: every
product of two codes is exact in float32, so with power-of-two scales dequantising first is the same
sum. With float32 scales (base checkpoints) it is not: there the codes are multiplied, and each
tile's sum is scaled.

Paper: §3.4 (FP8 and FP4 training and inference).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fathom.kernels.registry import register
from fathom.quant import fp8

FEW_ROWS = 2  # so many inputs meet BF16 weights as they are, more are worth widening them for


@register("linear", "reference")
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    quantize_input: bool = False,
    tile_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight^T, with the input first rounded to FP8 in 1x128 groups when asked.

    x: [..., cols]; weight: [rows, cols] float32 or bfloat16; tile_scale: float32 [ceil(rows / 128),
    ceil(cols / 128)], if the weight is FP8 codes times these. Float32 accumulation, one rounding
    at the end. Returns [..., rows] in x's dtype.
    """
    if quantize_input:
        x = fp8.simulate(x, 128)
    if tile_scale is not None:
        return _by_tiles(x, fp8.weight_codes(weight, tile_scale), tile_scale, 128)
    return matmul(x.to(weight.dtype), weight).to(x.dtype)


def matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight^T in their common dtype, added up in float32 and rounded once.

    x: [..., cols]; weight: [rows, cols]. Returns [..., rows]. PyTorch's bfloat16 product on a CPU
    without instructions for it is three to nine times slower than a float32 one of many rows.
    """
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return F.linear(x, weight)
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight)
    return F.linear(x.float(), weight.float()).to(x.dtype)


@register("grouped_linear", "reference")
def grouped_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every group of x times its own matrix, never quantised.

    x: [..., groups, cols]; weight: [groups, rows, cols]. Returns [..., groups, rows] in x's dtype.
    """
    wide = x.to(weight.dtype)
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        wide, weight = wide.float(), weight.float()  # as in `matmul`
    return torch.einsum("...gk,grk->...gr", wide, weight).to(x.dtype)


@register("quant_linear", "reference")
def quant_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, block: int = 128
) -> torch.Tensor:
    """x @ weight^T from stored codes: per tile of columns, an exact product, then both scales.

    x: [..., cols] float32 or bfloat16; codes: [rows, cols], the weight's unscaled values (decoded
    FP4 or e4m3) in any float dtype; scale: float32, [ceil(rows / 128), ceil(cols / block)] for FP8
    (block 128) or [rows, ceil(cols / block)] for FP4 (block 32). Partial sums are added in float32.
    Returns [..., rows] in x's dtype.
    """
    return _by_tiles(fp8.simulate(x, 128), codes, scale, block)


def _by_tiles(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, block: int
) -> torch.Tensor:
    """As `quant_linear`, of an input that is rounded to FP8 already.

    x: [..., cols]; codes: [rows, cols]. The input's scales are powers of two, so it does not matter
    that they were multiplied in before the sum. Returns [..., rows] in x's dtype.
    """
    if scale.shape[0] != codes.shape[0]:
        scale = scale.repeat_interleave(128, dim=0)[: codes.shape[0]]
    out = torch.zeros(*x.shape[:-1], codes.shape[0], dtype=torch.float32, device=x.device)
    for tile, first in enumerate(range(0, codes.shape[1], block)):
        cols = slice(first, first + block)
        out = out + F.linear(x[..., cols].float(), codes[:, cols].float()) * scale[:, tile]
    return out.to(x.dtype)
