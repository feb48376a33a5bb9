"""SwiGLU experts with clamped halves: the routed ones, and the shared one as a single expert.

Paper: §2.1 (DeepSeekMoE); §4.2.2 (SwiGLU clamp).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fathom.kernels.registry import operation, register

_linear = operation("linear")


@register("swiglu", "reference")
def swiglu(
    gate: torch.Tensor, up: torch.Tensor, limit: float, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), times the routing weight if given.

    gate, up: [..., cols]; weight: [..., 1] float32. Returns [..., cols] in gate's dtype; float32
    inside. The routing weight belongs here: what follows requantises its input.
    """
    wide = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)
    if weight is not None:
        wide = wide * weight
    return wide.to(gate.dtype)


@register("experts", "reference")
def experts(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    limit: float,
    quantize_input: bool = False,
    tile_scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The weighted sum of every token's routed experts, accumulated in float32.

    x: [tokens, hidden]; w1 (gate), w3 (up): [experts, cols, hidden]; w2 (down):
    [experts, hidden, cols]; indices, weights: [tokens, topk]. `quantize_input` rounds the inputs of
    all three matrices to FP8; tile_scales: [experts, ...] each, what `linear` takes for w1, w2 and
    w3. Returns [tokens, hidden] float32.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in indices.unique().tolist():
        token, slot = (indices == expert).nonzero(as_tuple=True)
        inputs = x[token]
        s1, s2, s3 = (s[expert] for s in tile_scales) if tile_scales else (None, None, None)
        gate = _linear(inputs, w1[expert], quantize_input, s1)
        up = _linear(inputs, w3[expert], quantize_input, s3)
        act = swiglu(gate, up, limit, weights[token, slot].unsqueeze(-1))
        out = out.index_add(0, token, _linear(act, w2[expert], quantize_input, s2).float())
    return out
