"""The mHC boundary for many tokens, bound by the bytes of the streams.

The last sublayer's output is written into the streams as a decode step's is (mhc.py); the mixing
logits are one matrix product of the new streams with `fn`, which enters as three BF16 matrices
whose sum it is exactly; `chunk_mhc_read` runs Sinkhorn and takes the next sublayer's normed input
out of the streams.

Bytes a token of V4-Flash: the streams (32 KB) read three times and written once, the output and the
input 8 KB each, 48 KB of expert outputs where they are added: 144 or 192 KB, at 3 TB/s 0.4 to 0.5
ms for 8,192 tokens.

Paper: §2.2, eq. 1-8; §3.1 (fused mHC kernels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import mhc
from fathom.kernels.triton.mhc import normed, sigmoid

PARTS = 3  # BF16 matrices whose sum is a float32 one: 24 bits of mantissa in three times eight


@triton.jit
def _sinkhorn(m, eps, ROUNDS: tl.constexpr):
    """Logits [N, N] to a matrix whose rows and columns sum to one.

    A step's (mhc.py) has a thread do all of it: quicker alone, more work for thousands of tokens.
    """
    m = tl.exp(m - tl.max(m, axis=1)[:, None])
    m = m / tl.sum(m, axis=1)[:, None] + eps
    m = m / (tl.sum(m, axis=0) + eps)[None, :]
    for _ in range(ROUNDS - 1):
        m = m / (tl.sum(m, axis=1) + eps)[:, None]
        m = m / (tl.sum(m, axis=0) + eps)[None, :]
    return m


@triton.jit
def _mixes(logits, at, r, SUMMANDS: tl.constexpr, MIXES: tl.constexpr):
    total = tl.load(logits + at)
    for part in tl.static_range(1, SUMMANDS):
        total += tl.load(logits + part * MIXES + at)
    return total * r


@triton.jit
def chunk_mhc_read(
    streams, logits, base, scale, norm, x, post, comb, hidden, eps, norm_eps,
    N: tl.constexpr, SUMMANDS: tl.constexpr, ROUNDS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """A token's next input, normed, and what the next write needs: post and comb."""
    token = tl.program_id(0).to(tl.int64)
    MIXES: tl.constexpr = N * (N + 2)
    dtype: tl.constexpr = streams.dtype.element_ty
    col = tl.arange(0, HIDDEN)
    live = col < hidden
    own = streams + token * N * hidden + col
    square = tl.zeros([HIDDEN], tl.float32)
    for j in tl.static_range(N):
        stream = tl.load(own + j * hidden, mask=live, other=0.0).to(tl.float32)
        square += stream * stream
    r = 1.0 / tl.sqrt(tl.sum(square, axis=0) / (N * hidden) + norm_eps)
    logits += token * SUMMANDS * MIXES
    n = tl.arange(0, N)
    cell = n[:, None] * N + n[None, :]
    m = _mixes(logits, 2 * N + cell, r, SUMMANDS, MIXES)
    m = _sinkhorn(m * tl.load(scale + 2) + tl.load(base + 2 * N + cell), eps, ROUNDS)
    tl.store(comb + token * N * N + cell, m)
    write = _mixes(logits, N + n, r, SUMMANDS, MIXES) * tl.load(scale + 1) + tl.load(base + N + n)
    tl.store(post + token * N + n, 2 * sigmoid(write))
    value = tl.zeros([HIDDEN], tl.float32)
    for j in tl.static_range(N):
        logit = _mixes(logits, j, r, SUMMANDS, MIXES) * tl.load(scale) + tl.load(base + j)
        stream = tl.load(own + j * hidden, mask=live, other=0.0).to(tl.float32)
        value += (sigmoid(logit) + eps) * stream
    weight = tl.load(norm + col, mask=live, other=0.0).to(tl.float32)
    value = normed(value, weight, hidden, norm_eps, dtype)
    tl.store(x + token * hidden + col, value, mask=live)


def _mixing_logits(streams: torch.Tensor, fn: torch.Tensor) -> torch.Tensor:
    """streams: [tokens, streams, hidden]; fn: [cols, streams * hidden] float32. Returns summands
    [tokens, parts, cols] float32: three where the streams are BF16, otherwise one.
    """
    flat = streams.flatten(1)
    if not streams.is_cuda or streams.dtype != torch.bfloat16:
        return F.linear(flat.float(), fn).unsqueeze(1)
    parts, rest = [], fn
    for _ in range(PARTS):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    product = torch.mm(flat, torch.cat(parts).t(), out_dtype=torch.float32)
    return product.unflatten(1, (PARTS, -1))


@register("chunk_mhc_boundary", "triton")
def chunk_mhc_boundary(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    y: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    post: torch.Tensor | None = None,
    comb: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference. streams: [tokens, streams, hidden]; y: [tokens, hidden]; pairs:
    [tokens, topk, hidden]; fn, base, scale, norm, post, comb: the same as there. Returns
    (streams, x [tokens, hidden], post, comb).
    """
    tokens, n, hidden = streams.shape
    new = streams
    if y is not None:
        assert post is not None
        assert comb is not None
        new = torch.empty_like(streams)
        mhc.write(streams, y, pairs, post, comb, new)
    logits = _mixing_logits(new, fn)
    x = torch.empty(tokens, hidden, dtype=streams.dtype, device=streams.device)
    post = torch.empty(tokens, n, dtype=torch.float32, device=streams.device)
    comb = torch.empty(tokens, n, n, dtype=torch.float32, device=streams.device)
    chunk_mhc_read[(tokens,)](
        new, logits, base, scale, norm, x, post, comb, hidden, eps, norm_eps,
        N=n, SUMMANDS=logits.shape[1], ROUNDS=iterations,
        HIDDEN=triton.next_power_of_2(hidden), num_warps=8,
    )  # fmt: skip
    return new, x, post, comb
