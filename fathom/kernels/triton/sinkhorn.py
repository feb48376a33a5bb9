"""Sinkhorn normalisation in one kernel each way.

The reference takes about 120 small launches a site, forward alone. Here one program holds its
matrices in registers through all rounds and stores only the divisors; the backward kernel walks the
rounds in reverse, recovering each state from the next by multiplying its divisor back.

Bytes per 4x4 matrix: 64 read, 64 + 16 per half round written forward; the same read backward.

Paper: §2.2, eq. 8 (Sinkhorn-Knopp); §3.1 (fused mHC kernels).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register

MATRICES = 64  # per program


@triton.jit
def sinkhorn_forward(
    logits, out, divisors, count, eps, ROUNDS: tl.constexpr, N: tl.constexpr, B: tl.constexpr
):
    """B matrices with rows and columns that sum to one, and every half round's divisors."""
    matrix = tl.program_id(0) * B + tl.arange(0, B)
    row, col = tl.arange(0, N), tl.arange(0, N)
    cells = matrix[:, None, None] * N * N + row[None, :, None] * N + col[None, None, :]
    live = (matrix < count)[:, None, None]
    m = tl.load(logits + cells, mask=live, other=0.0)
    m = tl.exp(m - tl.max(m, axis=2)[:, :, None])
    m = m / tl.sum(m, axis=2)[:, :, None] + eps
    lines = matrix[:, None] * N + row[None, :]  # where a half round's divisors go
    alive = (matrix < count)[:, None]
    s = tl.sum(m, axis=1) + eps
    tl.store(divisors + lines, s, mask=alive)
    m = m / s[:, None, :]
    for i in range(ROUNDS - 1):
        s = tl.sum(m, axis=2) + eps
        tl.store(divisors + (2 * i + 1) * count * N + lines, s, mask=alive)
        m = m / s[:, :, None]
        s = tl.sum(m, axis=1) + eps
        tl.store(divisors + (2 * i + 2) * count * N + lines, s, mask=alive)
        m = m / s[:, None, :]
    tl.store(out + cells, m, mask=live)


@triton.jit
def sinkhorn_backward(
    out,
    divisors,
    grad,
    grad_logits,
    count,
    eps,
    ROUNDS: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
):
    """The gradient of B matrices' logits, by the rounds in reverse."""
    matrix = tl.program_id(0) * B + tl.arange(0, B)
    row, col = tl.arange(0, N), tl.arange(0, N)
    cells = matrix[:, None, None] * N * N + row[None, :, None] * N + col[None, None, :]
    live = (matrix < count)[:, None, None]
    m = tl.load(out + cells, mask=live, other=0.0)
    g = tl.load(grad + cells, mask=live, other=0.0)
    lines = matrix[:, None] * N + row[None, :]
    alive = (matrix < count)[:, None]
    for j in range(ROUNDS - 1):
        i = ROUNDS - 2 - j
        s = tl.load(divisors + (2 * i + 2) * count * N + lines, mask=alive, other=1.0)
        g = (g - tl.sum(g * m, axis=1)[:, None, :]) / s[:, None, :]
        m = m * s[:, None, :]
        s = tl.load(divisors + (2 * i + 1) * count * N + lines, mask=alive, other=1.0)
        g = (g - tl.sum(g * m, axis=2)[:, :, None]) / s[:, :, None]
        m = m * s[:, :, None]
    s = tl.load(divisors + lines, mask=alive, other=1.0)
    g = (g - tl.sum(g * m, axis=1)[:, None, :]) / s[:, None, :]
    p = m * s[:, None, :] - eps  # the row softmax
    g = p * (g - tl.sum(g * p, axis=2)[:, :, None])
    tl.store(grad_logits + cells, g, mask=live)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
        n = logits.shape[-1]
        count = logits.numel() // (n * n)
        logits = logits.contiguous()
        out = torch.empty_like(logits)
        divisors = logits.new_empty(2 * iterations - 1, count, n)
        grid = (triton.cdiv(count, MATRICES),)
        sinkhorn_forward[grid](logits, out, divisors, count, eps, iterations, n, MATRICES)
        ctx.save_for_backward(out, divisors)
        ctx.constants = (iterations, eps)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        out, divisors = ctx.saved_tensors
        iterations, eps = ctx.constants
        _, count, n = divisors.shape
        grad = grads[0].contiguous()
        result = torch.empty_like(out)
        grid = (triton.cdiv(count, MATRICES),)
        sinkhorn_backward[grid](out, divisors, grad, result, count, eps, iterations, n, MATRICES)
        return result, None, None


@register("sinkhorn", "triton", accepts=lambda logits, *_: logits.dtype == torch.float32)
def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """As the reference, with gradients. logits: [..., streams, streams] float32 on CUDA."""
    return _Sinkhorn.apply(logits, iterations, eps)
