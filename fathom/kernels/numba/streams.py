"""mHC in compiled code: reading the residual streams before a sublayer, writing them after it.

Paper: §2.2, eq. 1-8 (mHC); §2.1 (MTP: the block's input).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fathom.kernels.numba import layout
from fathom.kernels.numba.compiled import external, inner, once
from fathom.kernels.numba.entries import FP8_GROUP, round_fp8
from fathom.kernels.numba.lanes import exp32, fma
from fathom.kernels.numba.layout import line, matrix, of_row, part, record_at, rounds, vector
from fathom.kernels.numba.memory import address, view_float32
from fathom.kernels.numba.primitives import copy, mean_square, rmsnorm, sigmoid
from fathom.kernels.numba.vector import PANEL


@once
def _sinkhorn(m: Any, n: int, iterations: int, eps: Any) -> None:
    for i in range(n):
        high = m[i * n]
        for j in range(1, n):
            high = max(high, m[i * n + j])
        total = np.float32(0)
        for j in range(n):
            m[i * n + j] = exp32(m[i * n + j] - high)
            total += m[i * n + j]
        for j in range(n):
            m[i * n + j] = m[i * n + j] / total + eps
    for step in range(2 * iterations - 1):
        outer, along = (1, n) if step % 2 == 0 else (n, 1)  # the softmax was the first row step
        for i in range(n):
            total = eps
            for j in range(n):
                total += m[i * outer + j * along]
            inverse = np.float32(1) / total
            for j in range(n):
                m[i * outer + j * along] *= inverse


@inner
def _mix(flow: Any, mixes: Any, r: Any, scale: Any, base: Any, n: int, eps: Any, x: Any) -> None:
    """x [hidden] = the streams [n * hidden], each times its weight in `mixes`."""
    d = x.shape[0]
    for j in range(d):
        x[j] = np.float32(0)
    for i in range(n):
        weight = sigmoid(mixes[i] * r * scale + base[i]) + eps
        for j in range(d):
            x[j] = fma(weight, flow[i * d + j], x[j])


def _read_streams(record: int, layer: int, site: int, a: int, b: int, scratch: int) -> int:
    """mHC before a sublayer (site 0 attention, 1 experts): its normed input, and what writing back
    needs.
    """
    k = record_at(record)
    n, d = k.streams, k.hidden
    flows, mixed = k.flow + 4 * a * k.w_flow, k.mixes + 4 * a * k.w_mixes
    which = layout.FFN_FN if site else layout.ATTN_FN
    matrix(k, layer, which, layout.ZERO, b - a, flows, k.w_flow, mixed, k.w_mixes, scratch)
    base = vector(k, layer, layout.FFN_BASE if site else layout.ATTN_BASE)
    scale = vector(k, layer, layout.FFN_SCALE if site else layout.ATTN_SCALE)
    norm = vector(k, layer, layout.FFN_NORM if site else layout.ATTN_NORM)
    x = np.empty(d, np.float32)
    for t in range(a, b):
        flow, mixes = line(k.flow, k.w_flow, t, n * d), line(k.mixes, k.w_mixes, t, k.w_mixes)
        post, comb = line(k.post, k.w_post, t, n), line(k.comb, k.w_comb, t, n * n)
        r = np.float32(1) / np.float32(math.sqrt(mean_square(flow) + k.norm_eps))
        _mix(flow, mixes, r, scale[0], base, n, k.hc_eps, x)
        for i in range(n):
            post[i] = np.float32(2) * sigmoid(mixes[n + i] * r * scale[1] + base[n + i])
        for c in range(n * n):
            comb[c] = mixes[2 * n + c] * r * scale[2] + base[2 * n + c]
        _sinkhorn(comb, n, k.sinkhorn_iters, k.hc_eps)
        rmsnorm(x, norm, k.norm_eps, line(k.normed, k.w_normed, t, d))
    return 1


def _write_streams(record: int, a: int, b: int) -> int:
    """mHC after a sublayer, in place: stream j = post_j * y + sum_i comb[i, j] * stream i."""
    k = record_at(record)
    n, d = k.streams, k.hidden
    old = np.empty(n * d, np.float32)
    for t in range(a, b):
        flow, y = line(k.flow, k.w_flow, t, n * d), line(k.y, k.w_y, t, d)
        post, comb = line(k.post, k.w_post, t, n), line(k.comb, k.w_comb, t, n * n)
        copy(flow, old)
        for j in range(n):
            for c in range(d):
                flow[j * d + c] = post[j] * y[c]
            for i in range(n):
                factor = comb[i * n + j]
                for c in range(d):
                    flow[j * d + c] = fma(factor, old[i * d + c], flow[j * d + c])
    return 1


@inner
def merge_streams(k: Any, layer: int, t: int, x: Any, mixes: Any, scratch: int, out: Any) -> None:
    """out = the final hidden state of row t, by the stream head and norm of `layer`."""
    n, flow = k.streams, line(k.flow, k.w_flow, t, k.streams * k.hidden)
    r = np.float32(1) / np.float32(math.sqrt(mean_square(flow) + k.norm_eps))
    at, to, one = k.flow + 4 * t * k.w_flow, address(mixes), layout.ONE
    matrix(k, layer, layout.HEAD_FN, layout.ZERO, one, at, k.w_flow, to, PANEL, scratch)
    base, scale = vector(k, layer, layout.HEAD_BASE), vector(k, layer, layout.HEAD_SCALE)
    _mix(flow, mixes, r, scale[0], base, n, k.hc_eps, x)
    rmsnorm(x, vector(k, layer, layout.NORM), k.norm_eps, out)


def _combine(record: int, layer: int, a: int, b: int, scratch: int) -> int:
    """The MTP block's input, in place of the streams: each projected, plus the embedding."""
    k = record_at(record)
    n, d, width = k.streams, k.hidden, k.w_normed
    rounded = rounds(k, layer, layout.R_MTP)
    x, y = np.empty(n * width, np.float32), np.empty(n * width, np.float32)
    embedded = np.empty(width, np.float32)
    at, to, embedding = address(x), address(y), address(embedded)
    one = layout.ONE
    for t in range(a, b):
        own = part(x, width, 0, d)
        token = view_float32(k.embed + 4 * of_row(k, layout.TOKEN, t) * d, d)
        rmsnorm(token, vector(k, layer, layout.E_NORM), k.norm_eps, own)
        if rounded:
            round_fp8(own, FP8_GROUP)
        matrix(k, layer, layout.E_PROJ, layout.ZERO, one, at, width, embedding, width, scratch)
        flow = line(k.flow, k.w_flow, t, n * d)
        for i in range(n):
            own = part(x, width, i, d)
            rmsnorm(flow[i * d : (i + 1) * d], vector(k, layer, layout.H_NORM), k.norm_eps, own)
            if rounded:
                round_fp8(own, FP8_GROUP)
        matrix(k, layer, layout.H_PROJ, layout.ZERO, n, at, width, to, width, scratch)
        for i in range(n):
            for j in range(d):
                flow[i * d + j] = embedded[j] + y[i * width + j]
    x[0] = y[0] = 0  # keep them alive until here: their addresses are in use
    return 1


read_streams = external("fathom_read_streams", _read_streams, 6, fails=True)
write_streams = external("fathom_write_streams", _write_streams, 3, fails=True)
combine = external("fathom_combine", _combine, 5, fails=True)
