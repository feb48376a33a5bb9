"""Routing and experts in compiled code: rows are gathered per expert, so that they share weights.

Paper: §2.1 (DeepSeekMoE, hash routing).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fathom.kernels.numba import layout
from fathom.kernels.numba.compiled import external, inner, once
from fathom.kernels.numba.entries import FP8_GROUP, round_fp8
from fathom.kernels.numba.lanes import exp32
from fathom.kernels.numba.layout import line, matrix, of_row, part, record_at, rounds, vector
from fathom.kernels.numba.memory import address, view_int16, view_int64
from fathom.kernels.numba.primitives import copy
from fathom.kernels.numba.vector import PANEL


@once
def _route(k: Any, layer: int, token: int, scores: Any, chosen: Any, weights: Any) -> None:
    """Choose experts for one row; `scores` holds the router's logits and then the affinities."""
    for i in range(k.experts):
        v = scores[i]
        soft = v if v > 20 else np.float32(math.log1p(math.exp(v)))
        scores[i] = np.float32(math.sqrt(soft))
    if layer < k.hash_layers:
        at = (layer * k.vocab + token) * k.topk
        copy(view_int64(k.hashes + 8 * at, k.topk), chosen)
    else:
        bias = vector(k, layer, layout.GATE_BIAS)
        for i in range(k.topk):
            found = -1
            for j in range(k.experts):
                taken = False
                for other in range(i):
                    taken = taken or chosen[other] == j
                if not taken and (found < 0 or scores[j] + bias[j] > scores[found] + bias[found]):
                    found = j
            chosen[i] = found
    total = np.float32(0)
    for i in range(k.topk):
        total += scores[chosen[i]]
    for i in range(k.topk):
        weights[i] = scores[chosen[i]] / total * k.routed_scaling


@inner
def _swiglu(gate: Any, up: Any, limit: Any, weight: Any) -> None:
    """gate = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight."""
    for j in range(gate.shape[0]):
        g = min(gate[j], limit)
        u = min(max(up[j], -limit), limit)
        gate[j] = g / (np.float32(1) + exp32(-max(g, np.float32(-80)))) * u * weight


@inner
def _expert(
    k: Any, layer: int, first: int, expert: int, count: int, rounded: bool, weights: Any,
    x: Any, gate: Any, up: Any, y: Any, scratch: int,
) -> None:  # fmt: skip
    """y = one expert's output for `count` gathered rows x, each times its weight."""
    wide, d = (k.inner + PANEL - 1) // PANEL * PANEL, k.w_normed
    at, to, other = address(x), address(gate), address(up)
    matrix(k, layer, first, expert, count, at, d, to, wide, scratch)
    matrix(k, layer, first + 2, expert, count, at, d, other, wide, scratch)
    for i in range(count):
        own = part(gate, wide, i, k.inner)
        _swiglu(own, part(up, wide, i, k.inner), k.swiglu_limit, weights[i])
        if rounded:
            round_fp8(own, FP8_GROUP)
    matrix(k, layer, first + 1, expert, count, to, wide, address(y), d, scratch)


def _run_experts(record: int, layer: int, a: int, b: int, scratch: int) -> int:
    """The expert sublayer: y = routed experts in ascending order, then the shared one."""
    k = record_at(record)
    d, count, width = k.hidden, b - a, k.w_normed
    lines, wide = (k.experts + PANEL - 1) // PANEL * PANEL, (k.inner + PANEL - 1) // PANEL * PANEL
    logits = np.empty(count * lines, np.float32)
    normed = k.normed + 4 * a * width
    matrix(
        k, layer, layout.GATE, layout.ZERO, count, normed, width, address(logits), lines, scratch
    )
    chosen, weights = np.empty(count * k.topk, np.int64), np.empty(count * k.topk, np.float32)
    for i in range(count):
        own, scores = slice(i * k.topk, (i + 1) * k.topk), part(logits, lines, i, k.experts)
        _route(k, layer, of_row(k, layout.TOKEN, a + i), scores, chosen[own], weights[own])
        if k.export:
            kept = view_int16(k.chosen + 2 * (layer * k.capacity + a + i) * k.topk, k.topk)
            for j in range(k.topk):
                kept[j] = chosen[i * k.topk + j]
        rounded_line = line(k.rounded, width, a + i, d)
        copy(line(k.normed, width, a + i, d), rounded_line)
        round_fp8(rounded_line, FP8_GROUP)
        total = line(k.y, k.w_y, a + i, d)
        for j in range(d):
            total[j] = np.float32(0)
    x, y = np.empty(count * width, np.float32), np.empty(count * width, np.float32)
    gate, up = np.empty(count * wide, np.float32), np.empty(count * wide, np.float32)
    members, shares = np.empty(count, np.int64), np.empty(count, np.float32)
    for expert in range(k.experts + 1):
        shared = expert == k.experts
        rounded = rounds(k, layer, layout.R_SHARED if shared else layout.R_EXPERTS)
        source = k.rounded if rounded else k.normed
        found = 0
        for i in range(count):
            hit, share = shared, np.float32(1 if shared else 0)
            for j in range(0 if shared else k.topk):
                if chosen[i * k.topk + j] == expert:  # a table may name an expert twice
                    hit, share = True, share + weights[i * k.topk + j]
            if hit:
                members[found], shares[found] = i, share
                copy(line(source, width, a + i, d), part(x, width, found, d))
                found += 1
        if found == 0:
            continue
        first, number = (layout.SHARED_1, 0) if shared else (layout.W1, expert)
        _expert(k, layer, first, number, found, rounded, shares, x, gate, up, y, scratch)
        for i in range(found):
            total, own = line(k.y, k.w_y, a + members[i], d), part(y, width, i, d)
            for j in range(d):
                total[j] += own[j]
    return 1


run_experts = external("fathom_experts", _run_experts, 5, fails=True)
