"""The mHC boundary between two sublayers in two launches.

`_write_and_mix` writes the last sublayer's output into the streams and, while they are in
registers, multiplies them with the next site's `fn`; programs own slices of the hidden dimension.
`_read` adds those partial products in a fixed order, reads the next sublayer's input out of the
streams and normalises it, and in a second program runs Sinkhorn.

Bytes for one token of V4-Flash: fn 24 x 16384 x 4 = 1.5 MB, streams 3 x 32 KB.

Paper: §2.2, eq. 1-8; §3.1 (fused mHC kernels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register

SLICE = 64  # hidden columns of one program
MIXES = 32  # 24 mixing logits and the square sum, padded to a power of two


@triton.jit
def _write_and_mix(
    y, pairs, streams, post, comb, fn, new, partial, hidden,
    N: tl.constexpr, SLOTS: tl.constexpr, WRITE: tl.constexpr, MIXES: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    slice_, token = tl.program_id(0), tl.program_id(1)
    col = slice_ * SLICE + tl.arange(0, SLICE)
    base = token.to(tl.int64) * N * hidden
    dtype = streams.dtype.element_ty
    mix = tl.arange(0, MIXES)
    total = tl.zeros([MIXES], tl.float32)
    square = tl.zeros([SLICE], tl.float32)
    if WRITE:
        value = tl.load(y + token * hidden + col).to(tl.float32)
        if SLOTS > 0:  # routed experts in the order of their choice, then the shared one
            routed = tl.zeros([SLICE], tl.float32)
            for slot in range(SLOTS):
                routed += tl.load(pairs + (token * SLOTS + slot) * hidden + col).to(tl.float32)
            value = (routed + value).to(dtype).to(tl.float32)
    for j in tl.static_range(N):
        if WRITE:
            stream = tl.load(post + token * N + j) * value
            for i in tl.static_range(N):
                old = tl.load(streams + base + i * hidden + col).to(tl.float32)
                stream += tl.load(comb + token * N * N + i * N + j) * old
            stream = stream.to(dtype).to(tl.float32)
            tl.store(new + base + j * hidden + col, stream.to(dtype))
        else:
            stream = tl.load(streams + base + j * hidden + col).to(tl.float32)
        weight = tl.load(
            fn + mix[:, None] * N * hidden + j * hidden + col[None, :],
            mask=(mix < N * (N + 2))[:, None], other=0.0,
        )  # fmt: skip
        total += tl.sum(weight * stream[None, :], axis=1)
        square += stream * stream
    total = tl.where(mix == N * (N + 2), tl.sum(square, axis=0), total)
    at = (token * tl.num_programs(0) + slice_) * MIXES
    tl.store(partial + at + mix, total)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _read(
    streams, partial, base, scale, norm, x, post, comb, hidden, eps, norm_eps,
    N: tl.constexpr, SLICES: tl.constexpr, MIXES: tl.constexpr, ROUNDS: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    row = tl.arange(0, SLICES) * MIXES + token * SLICES * MIXES
    square = tl.sum(tl.load(partial + row + N * (N + 2)), axis=0)
    r = 1.0 / tl.sqrt(square / (N * hidden) + norm_eps)
    if tl.program_id(0) == 0:
        col = tl.arange(0, HIDDEN)
        live = col < hidden
        value = tl.zeros([HIDDEN], tl.float32)
        dtype: tl.constexpr = streams.dtype.element_ty
        for j in tl.static_range(N):
            logit = tl.sum(tl.load(partial + row + j), axis=0) * r
            pre = _sigmoid(logit * tl.load(scale) + tl.load(base + j)) + eps
            at = streams + (token.to(tl.int64) * N + j) * hidden + col
            value += pre * tl.load(at, mask=live, other=0.0).to(tl.float32)
        value = value.to(dtype).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / hidden + norm_eps)
        value = value * inverse * tl.load(norm + col, mask=live, other=0.0).to(tl.float32)
        tl.store(x + token * hidden + col, value.to(dtype), mask=live)
    else:
        # Needed only by the next write: another program does it meanwhile.
        n = tl.arange(0, N)
        cell = n[:, None] * N + n[None, :]
        mixes = tl.sum(tl.load(partial + row[:, None, None] + 2 * N + cell[None]), axis=0) * r
        m = mixes * tl.load(scale + 2) + tl.load(base + 2 * N + cell)
        m = tl.exp(m - tl.max(m, axis=1)[:, None])
        m = m / tl.sum(m, axis=1)[:, None] + eps
        m = m / (tl.sum(m, axis=0) + eps)[None, :]
        for _ in range(ROUNDS - 1):
            m = m / (tl.sum(m, axis=1) + eps)[:, None]
            m = m / (tl.sum(m, axis=0) + eps)[None, :]
        tl.store(comb + token * N * N + cell, m)
        write = tl.sum(tl.load(partial + row[:, None] + N + n[None, :]), axis=0) * r
        write = 2 * _sigmoid(write * tl.load(scale + 1) + tl.load(base + N + n))
        tl.store(post + token * N + n, write)


@register("mhc_boundary", "triton")
def mhc_boundary(
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
    slices = hidden // SLICE
    partial = torch.empty(tokens, slices, MIXES, dtype=torch.float32, device=streams.device)
    new = torch.empty_like(streams) if y is not None else streams
    slots = pairs.shape[1] if pairs is not None else 0
    _write_and_mix[(slices, tokens)](
        y if y is not None else streams, pairs if pairs is not None else streams, streams,
        post if post is not None else base, comb if comb is not None else base, fn, new, partial,
        hidden, N=n, SLOTS=slots, WRITE=y is not None, MIXES=MIXES, SLICE=SLICE, num_warps=4,
    )  # fmt: skip
    x = torch.empty(tokens, hidden, dtype=streams.dtype, device=streams.device)
    post = torch.empty(tokens, n, dtype=torch.float32, device=streams.device)
    comb = torch.empty(tokens, n, n, dtype=torch.float32, device=streams.device)
    _read[(2, tokens)](
        new, partial, base, scale, norm, x, post, comb, hidden, eps, norm_eps,
        N=n, SLICES=slices, MIXES=MIXES, ROUNDS=iterations,
        HIDDEN=triton.next_power_of_2(hidden), num_warps=8,
    )  # fmt: skip
    return new, x, post, comb
