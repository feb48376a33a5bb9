"""Routed experts as grouped matrix products over tokens sorted by expert; the host never waits.

Paper: §2.1 (DeepSeekMoE); §3.1 (grouped expert computation).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fathom.kernels.reference.experts import swiglu
from fathom.kernels.registry import register
from fathom.quant import fp8


def _accepts(x: torch.Tensor, w1: torch.Tensor, *_: object, tile_scales: object = None) -> bool:
    # The grouped product wants BF16 and 16-byte rows; a handful of tokens is cheaper one by one.
    if tile_scales is not None:
        return False
    return x.dtype == w1.dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and w1.shape[1] % 8 == 0


@register("experts", "triton", accepts=_accepts)
def experts(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    limit: float,
    quantize_input: bool = False,
) -> torch.Tensor:
    """As the reference, with gradients, summed over a token's experts in the order of its choice.

    x: [tokens, hidden] bfloat16; w1, w3: [experts, cols, hidden]; w2: [experts, hidden, cols];
    indices, weights: [tokens, topk]. Returns [tokens, hidden] float32.
    """
    topk, cols = indices.shape[1], w1.shape[1]
    order = indices.flatten().argsort(stable=True)  # slots (token * topk + choice) by expert
    token = order // topk
    counts = torch.zeros(w1.shape[0], dtype=torch.int32, device=x.device)
    counts = counts.scatter_add(0, indices.flatten(), torch.ones_like(order, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    inputs = fp8.simulate(x, 128) if quantize_input else x
    both = torch.cat((w1, w3), dim=1)  # [experts, 2 * cols, hidden]
    gate_up = F.grouped_mm(inputs[token], both.transpose(1, 2), offs=ends)
    weight = weights.flatten()[order].unsqueeze(-1)
    act = swiglu(gate_up[:, :cols], gate_up[:, cols:], limit, weight)
    if quantize_input:
        act = fp8.simulate(act, 128)
    down = F.grouped_mm(act, w2.transpose(1, 2), offs=ends)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
    return down[place].unflatten(0, (-1, topk)).float().sum(1)  # [tokens, hidden]
