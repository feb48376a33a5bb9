"""DeepSeekMoE: routed experts chosen per token, plus one shared expert.

Paper: §2.1 (DeepSeekMoE, sqrt-softplus affinity, hash routing in the first layers).
"""

from __future__ import annotations

import torch
from torch import nn

from fathom.kernels import operation
from fathom.model.config import ModelConfig
from fathom.model.context import LayerSignals
from fathom.model.layers import Linear
from fathom.model.router import HashRouter, Router
from fathom.quant import fake_quant

_experts = operation("experts")
_swiglu = operation("swiglu")


class Expert(nn.Module):
    """The shared expert: w1 (gate), w3 (up), w2 (down), clamped like the routed ones."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = Linear(hidden, inner, dtype)
        self.w2 = Linear(inner, hidden, dtype)
        self.w3 = Linear(hidden, inner, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, hidden]. Returns the same shape and dtype."""
        return self.w2(_swiglu(self.w1(x), self.w3(x), self.limit))


class RoutedExperts(nn.Module):
    """All routed experts, stacked: w1, w3 [experts, inner, hidden] and w2 [experts, hidden, inner].

    `weight_format`, `quantize_input` and `simulate_weight` mean what they mean for Linear; so do
    `w1_tile_scale`, `w2_tile_scale` and `w3_tile_scale`, with experts in front.
    """

    w1_tile_scale: torch.Tensor | None
    w2_tile_scale: torch.Tensor | None
    w3_tile_scale: torch.Tensor | None

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        experts, hidden = config.n_routed_experts, config.hidden_size
        inner = config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.empty(experts, inner, hidden, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, inner, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(experts, inner, hidden, dtype=dtype))
        self.weight_format = "bf16"
        self.quantize_input = False
        self.simulate_weight = False
        for name in ("w1", "w2", "w3"):
            self.register_buffer(f"{name}_tile_scale", None, persistent=False)

    def forward(
        self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """x: [tokens, hidden]; indices, weights: [tokens, topk] -> [tokens, hidden] float32."""
        w1, w2, w3 = self.w1, self.w2, self.w3
        if self.simulate_weight and self.weight_format != "bf16":
            w1, w2, w3 = (fake_quant.weight(w, self.weight_format) for w in (w1, w2, w3))
        arguments = (x, w1, w2, w3, indices, weights, self.limit, self.quantize_input)
        scales = (self.w1_tile_scale, self.w2_tile_scale, self.w3_tile_scale)
        if any(s is not None for s in scales):
            return _experts(*arguments, tile_scales=scales)
        return _experts(*arguments)


class MoE(nn.Module):
    """The feed-forward half of a block. `hashed` layers route by token id."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, hashed: bool) -> None:
        super().__init__()
        self.gate = HashRouter(config) if hashed else Router(config)
        self.experts = RoutedExperts(config, dtype)
        self.shared_experts = Expert(config, dtype)

    def forward(
        self, x: torch.Tensor, tokens: torch.Tensor, signals: LayerSignals | None = None
    ) -> torch.Tensor:
        """x: [batch, seq, hidden], normed; tokens: [batch, seq] int64 -> x's shape and dtype."""
        flat = x.flatten(0, -2)  # [tokens, hidden]
        indices, weights = self.gate(flat, tokens.flatten(), signals)
        routed = self.experts(flat, indices, weights)
        return (routed + self.shared_experts(flat).float()).to(x.dtype).view_as(x)
