"""Linear and RMSNorm modules under the official parameter names.

Paper: §3.4 (which matrices are quantised, and how).
"""

from __future__ import annotations

import torch
from torch import nn

from fathom.kernels import operation
from fathom.quant import fake_quant

_linear = operation("linear")
_rmsnorm = operation("rmsnorm")


class Linear(nn.Module):
    """A matrix without bias, held dequantised in `weight` [rows, cols].

    `weight_format` ("bf16", "fp8" or "fp4") is how checkpoints store it. `quantize_input` performs
    the FP8 rounding of the input that stored FP8 and FP4 weights are multiplied with.
    `simulate_weight` also rounds the weight to its format at every call, with straight-through
    gradients, for quantisation-aware training. `tile_scale` [ceil(rows / 128), ceil(cols / 128)] is
    kept from checkpoints whose FP8 tiles have float32 scales, for the official order of products.
    """

    tile_scale: torch.Tensor | None

    def __init__(self, cols: int, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, cols, dtype=dtype))
        self.weight_format = "bf16"
        self.quantize_input = False
        self.simulate_weight = False
        self.register_buffer("tile_scale", None, persistent=False)

    def effective_weight(self) -> torch.Tensor:
        """The weight that a forward pass multiplies with: [rows, cols]."""
        if self.simulate_weight and self.weight_format != "bf16":
            return fake_quant.weight(self.weight, self.weight_format)
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., cols]. Returns [..., rows] in x's dtype."""
        return _linear(x, self.effective_weight(), self.quantize_input, self.tile_scale)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned weight [cols]; float32 inside."""

    def __init__(self, cols: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cols, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., cols]. Returns the same shape and dtype."""
        return _rmsnorm(x, self.weight, self.eps)
