"""One block for one token as one compiled function, in the order of the paper's figure 2.

Eager decoding spends its time between operations: a block is some 300 of them, on vectors of a few
hundred values. Here a block is one call. Dimensions: streams n, hidden d, heads H, head_dim c.

Paper: §2.2, eq. 1-8 (mHC); §2.3.1, eq. 9-19 (CSA); §2.3.2, eq. 20-26 (HCA); §2.1 (DeepSeekMoE).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fathom.kernels.numba.primitives import (
    copy,
    dot,
    hadamard,
    inner,
    matvec,
    mean_square,
    outer,
    rmsnorm,
    rope,
    round_e4m3,
    round_fp4,
    sigmoid,
    swiglu,
)

# numba keeps compiled functions until the file that defines them changes, whatever they call. So
# this file changes with primitives.py, whose SHA-256 begins with this; a test compares them.
PRIMITIVES = "91c217fa59fe4ab9"


class Site(NamedTuple):
    """One mHC site: fn [cols, n * d], base [cols], scale [3], all float32."""

    fn: Any
    base: Any
    scale: Any


class PackedCompressor(NamedTuple):
    """ape [ratio, width] float32; wkv, wgate [width, d] stored weights; norm [cols] float32."""

    ape: Any
    wkv: Any
    wgate: Any
    norm: Any


class PackedBlock(NamedTuple):
    """A block's parameters; matrices [rows, cols] as float32, or uint16 holding bfloat16.

    `rounds` says which inputs are rounded to FP8: wq_a and wkv, wq_b, wo_b, experts, shared expert,
    the indexer's wq_b, and, last, whether stored entries and index keys are rounded.
    """

    attn_site: Any
    ffn_site: Any
    attn_norm: Any
    ffn_norm: Any
    wq_a: Any
    q_norm: Any
    wq_b: Any
    wkv: Any
    kv_norm: Any
    sink: Any
    wo_a: Any
    wo_b: Any
    compressor: Any
    index_compressor: Any
    index_wq_b: Any
    index_weights: Any
    gate: Any
    gate_bias: Any
    tid2eid: Any
    w1: Any
    w2: Any
    w3: Any
    shared_w1: Any
    shared_w2: Any
    shared_w3: Any
    rounds: Any
    ratio: Any


class CompressorRows(NamedTuple):
    """A compressor's state, written in place; see model.cache.CompressorState, batch dropped."""

    kv: Any
    gate: Any
    previous_kv: Any
    previous_gate: Any


class State(NamedTuple):
    """A layer's cache, written in place: window [window - 1, c]; entries [rows, c] and index_keys
    [rows, index_dim], with room for one more.
    """

    window: Any
    entries: Any
    compressor: Any
    index_keys: Any
    index_compressor: Any


class Constants(NamedTuple):
    """Numbers of the configuration that the block needs."""

    heads: int
    groups: int
    index_heads: int
    index_topk: int
    topk: int
    sinkhorn_iters: int
    hc_eps: Any
    norm_eps: Any
    swiglu_limit: Any
    routed_scaling: Any


@inner
def read_streams(streams: Any, site: Any, k: Any, x: Any, post: Any, comb: Any) -> None:
    """mHC before a sublayer: its input x [d], and post [n], comb [n, n] for writing back."""
    n, d = streams.shape
    mixes = np.empty(site.base.shape[0], np.float32)
    flat = streams.reshape(n * d)
    r = np.float32(1) / np.float32(math.sqrt(mean_square(flat) + k.norm_eps))
    matvec(site.fn, flat, mixes)
    for j in range(d):
        x[j] = 0
    for i in range(n):
        pre = sigmoid(mixes[i] * r * site.scale[0] + site.base[i]) + k.hc_eps
        for j in range(d):
            x[j] += pre * streams[i, j]
        post[i] = np.float32(2) * sigmoid(mixes[n + i] * r * site.scale[1] + site.base[n + i])
        for j in range(n):
            c = 2 * n + i * n + j
            comb[i, j] = mixes[c] * r * site.scale[2] + site.base[c]
    _sinkhorn(comb, k.sinkhorn_iters, k.hc_eps)


@inner
def _sinkhorn(m: Any, iterations: int, eps: Any) -> None:
    n = m.shape[0]
    for i in range(n):
        high = m[i, 0]
        for j in range(1, n):
            high = max(high, m[i, j])
        total = np.float32(0)
        for j in range(n):
            m[i, j] = np.float32(math.exp(m[i, j] - high))
            total += m[i, j]
        for j in range(n):
            m[i, j] = m[i, j] / total + eps
    for step in range(2 * iterations - 1):
        columns = step % 2 == 0  # the softmax was the first row step
        for a in range(n):
            total = np.float32(0)
            for b in range(n):
                total += m[b, a] if columns else m[a, b]
            total += eps
            for b in range(n):
                if columns:
                    m[b, a] /= total
                else:
                    m[a, b] /= total


@inner
def write_streams(streams: Any, y: Any, post: Any, comb: Any) -> None:
    """mHC after a sublayer, in place: stream j = post_j * y + sum_i comb[i, j] * stream i."""
    n, d = streams.shape
    old = np.empty(n, np.float32)
    for t in range(d):
        for i in range(n):
            old[i] = streams[i, t]
        for j in range(n):
            mixed = np.float32(0)
            for i in range(n):
                mixed += comb[i, j] * old[i]
            streams[j, t] = post[j] * y[t] + mixed


@inner
def compress_token(
    x: Any, weights: Any, state: Any, ratio: int, position: int, eps: Any, entry: Any
) -> bool:
    """Take one token in; True when it completes a window, whose normed entry [cols] is then in
    `entry`, not yet rotated.
    """
    place = position % ratio
    matvec(weights.wkv, x, state.kv[place])
    matvec(weights.wgate, x, state.gate[place])
    for j in range(weights.ape.shape[1]):
        state.gate[place, j] += weights.ape[place, j]
    if place != ratio - 1:
        return False
    cols = entry.shape[0]
    overlap = state.kv.shape[1] == 2 * cols
    own = cols if overlap else 0
    pooled = np.empty(cols, np.float32)
    for j in range(cols):
        high = np.float32(-np.inf)
        for t in range(ratio):
            high = max(high, state.gate[t, own + j])
            if overlap:
                high = max(high, state.previous_gate[t, j])
        total, value = np.float32(0), np.float32(0)
        for t in range(ratio):
            p = np.float32(math.exp(state.gate[t, own + j] - high))
            total += p
            value += p * state.kv[t, own + j]
            if overlap:
                p = np.float32(math.exp(state.previous_gate[t, j] - high))
                total += p
                value += p * state.previous_kv[t, j]
        pooled[j] = value / total
    if overlap:
        for t in range(ratio):
            copy(state.kv[t, :cols], state.previous_kv[t])
            copy(state.gate[t, :cols], state.previous_gate[t])
    rmsnorm(pooled, weights.norm, eps, entry)
    return True


@inner
def store_entry(entry: Any, rope_dim: int, rounds: Any) -> None:
    """Round an entry in place to what its stored form gives back: FP8 for all but the last dims."""
    if rounds:
        nope = entry[: entry.shape[0] - rope_dim]
        round_e4m3(nope, 64, nope)


@inner
def pick_entries(
    x: Any, qr: Any, b: Any, state: Any, count: int, k: Any, cos: Any, sin: Any
) -> Any:
    """The entries that the query attends to: all, or the indexer's best, ties to the lower."""
    if count <= k.index_topk:
        return np.arange(count)
    dim = state.index_keys.shape[1]
    q = np.empty(k.index_heads * dim, np.float32)
    matvec(b.index_wq_b, qr, q)
    weights = np.empty(k.index_heads, np.float32)
    matvec(b.index_weights, x, weights)
    factor = np.float32(dim**-0.5 * k.index_heads**-0.5)
    scores = np.zeros(count, np.float32)
    for h in range(k.index_heads):
        head = q[h * dim : (h + 1) * dim]
        rope(head, cos, sin, np.float32(1))
        if b.rounds[6]:
            hadamard(head)
            round_fp4(head, head)
        for e in range(count):
            s = dot(head, state.index_keys[e])
            if s > 0:
                scores[e] -= s * weights[h] * factor  # negated: the sort below ascends
    return np.argsort(scores, kind="mergesort")[: k.index_topk]


@inner
def attend(q: Any, kv: Any, state: Any, first: int, picks: Any, sink: Any, out: Any) -> None:
    """One head over window rows from `first`, the token and the picked entries; q, out: [c]."""
    rows = state.window.shape[0]
    near = rows - first
    total_keys = near + 1 + picks.shape[0]
    scale = np.float32(q.shape[0] ** -0.5)
    logits = np.empty(total_keys, np.float32)
    for i in range(near):
        logits[i] = dot(q, state.window[first + i]) * scale
    logits[near] = dot(q, kv) * scale
    for i in range(picks.shape[0]):
        logits[near + 1 + i] = dot(q, state.entries[picks[i]]) * scale
    high = logits[0]
    for i in range(1, total_keys):
        high = max(high, logits[i])
    total = np.float32(math.exp(sink - high))
    for j in range(out.shape[0]):
        out[j] = 0
    for i in range(total_keys):
        p = np.float32(math.exp(logits[i] - high))
        total += p
        if i < near:
            _add_scaled(out, state.window[first + i], p)
        elif i == near:
            _add_scaled(out, kv, p)
        else:
            _add_scaled(out, state.entries[picks[i - near - 1]], p)
    inverse = np.float32(1) / total
    for j in range(out.shape[0]):
        out[j] *= inverse


@inner
def _add_scaled(out: Any, row: Any, factor: Any) -> None:
    for j in range(out.shape[0]):
        out[j] += factor * row[j]


@inner
def attention(
    x: Any, b: Any, state: Any, position: int, k: Any, cos: Any, sin: Any, ecos: Any, esin: Any
) -> Any:
    """The attention sublayer for one normed token x [d]; updates `state`. Returns [d].

    cos, sin belong to its position; ecos, esin to the first token of its compression window.
    """
    heads, c = k.heads, state.window.shape[1]
    rope_dim = 2 * cos.shape[0]
    rounded = np.empty(x.shape[0], np.float32)
    if b.rounds[0]:
        round_e4m3(x, 128, rounded)
    else:
        copy(x, rounded)
    latent = np.empty(b.wq_a.shape[0], np.float32)
    matvec(b.wq_a, rounded, latent)
    qr, q_in = np.empty(latent.shape[0], np.float32), np.empty(latent.shape[0], np.float32)
    rmsnorm(latent, b.q_norm, k.norm_eps, qr)
    kv_raw, kv = np.empty(c, np.float32), np.empty(c, np.float32)
    matvec(b.wkv, rounded, kv_raw)
    rmsnorm(kv_raw, b.kv_norm, k.norm_eps, kv)
    rope(kv, cos, sin, np.float32(1))
    store_entry(kv, rope_dim, b.rounds[6])
    if b.rounds[1]:
        round_e4m3(qr, 128, q_in)
    else:
        copy(qr, q_in)
    q = np.empty(heads * c, np.float32)
    matvec(b.wq_b, q_in, q)

    picks = np.arange(0)
    if b.ratio:
        entry = np.empty(c, np.float32)
        if compress_token(x, b.compressor, state.compressor, b.ratio, position, k.norm_eps, entry):
            rope(entry, ecos, esin, np.float32(1))
            store_entry(entry, rope_dim, b.rounds[6])
            copy(entry, state.entries[position // b.ratio])
        count = (position + 1) // b.ratio
        picks = np.arange(count)
        if b.ratio == 4:
            key = np.empty(state.index_keys.shape[1], np.float32)
            if compress_token(
                x, b.index_compressor, state.index_compressor, 4, position, k.norm_eps, key
            ):
                rope(key, ecos, esin, np.float32(1))
                if b.rounds[6]:
                    hadamard(key)
                    round_fp4(key, key)
                copy(key, state.index_keys[position // 4])
            index_in = q_in if b.rounds[5] == b.rounds[1] else qr
            picks = pick_entries(x, index_in, b, state, count, k, cos, sin)

    first = max(0, state.window.shape[0] - position)  # rows before the first token
    out = np.empty(heads * c, np.float32)
    for h in range(heads):
        head = q[h * c : (h + 1) * c]
        r = np.float32(1) / np.float32(math.sqrt(mean_square(head) + k.norm_eps))
        for j in range(c):
            head[j] *= r
        rope(head, cos, sin, np.float32(1))
        result = out[h * c : (h + 1) * c]
        attend(head, kv, state, first, picks, b.sink[h], result)
        rope(result, cos, sin, np.float32(-1))
    last = state.window.shape[0] - 1
    for i in range(last):
        copy(state.window[i + 1], state.window[i])
    if last >= 0:
        copy(kv, state.window[last])

    low = np.empty(b.wo_a.shape[0], np.float32)
    width, rank = out.shape[0] // k.groups, low.shape[0] // k.groups
    for g in range(k.groups):
        first_row, end_row = g * rank, (g + 1) * rank
        own = out[g * width : (g + 1) * width]
        matvec(b.wo_a[first_row:end_row], own, low[first_row:end_row])
    if b.rounds[2]:
        round_e4m3(low, 128, low)
    y = np.empty(x.shape[0], np.float32)
    matvec(b.wo_b, low, y)
    return y


@inner
def _expert(
    x: Any, w1: Any, w2: Any, w3: Any, limit: Any, weight: Any, rounds: Any, y: Any
) -> None:
    gate, up = np.empty(w1.shape[0], np.float32), np.empty(w1.shape[0], np.float32)
    matvec(w1, x, gate)
    matvec(w3, x, up)
    swiglu(gate, up, limit, weight, gate)
    if rounds:
        round_e4m3(gate, 128, gate)
    matvec(w2, gate, y)


@inner
def route(x: Any, b: Any, token: int, k: Any) -> Any:
    """(chosen experts [topk], their weights [topk]) of one normed token."""
    scores = np.empty(b.gate.shape[0], np.float32)
    matvec(b.gate, x, scores)
    for e in range(scores.shape[0]):
        v = scores[e]
        soft = v if v > 20 else np.float32(math.log1p(math.exp(v)))
        scores[e] = np.float32(math.sqrt(soft))
    chosen = np.empty(k.topk, np.int64)
    if b.tid2eid.shape[0]:
        copy(b.tid2eid[token], chosen)
    else:
        biased = np.empty(scores.shape[0], np.float32)
        for e in range(scores.shape[0]):
            biased[e] = scores[e] + b.gate_bias[e]
        for i in range(k.topk):
            best = 0
            for e in range(1, scores.shape[0]):
                if biased[e] > biased[best]:
                    best = e
            chosen[i] = best
            biased[best] = -np.inf
    total = np.float32(0)
    for i in range(k.topk):
        total += scores[chosen[i]]
    weights = np.empty(k.topk, np.float32)
    for i in range(k.topk):
        weights[i] = scores[chosen[i]] / total * k.routed_scaling
    return chosen, weights


@inner
def experts(x: Any, b: Any, token: int, k: Any) -> Any:
    """The expert sublayer for one normed token x [d]. Returns [d]."""
    chosen, weights = route(x, b, token, k)
    rounded = np.empty(x.shape[0], np.float32)
    round_e4m3(x, 128, rounded)
    total = np.zeros(x.shape[0], np.float32)
    y = np.empty(x.shape[0], np.float32)
    inputs = rounded if b.rounds[3] else x
    for i in range(k.topk):
        e = chosen[i]
        _expert(inputs, b.w1[e], b.w2[e], b.w3[e], k.swiglu_limit, weights[i], b.rounds[3], y)
        for j in range(y.shape[0]):
            total[j] += y[j]
    inputs = rounded if b.rounds[4] else x
    one = np.float32(1)
    _expert(inputs, b.shared_w1, b.shared_w2, b.shared_w3, k.swiglu_limit, one, b.rounds[4], y)
    for j in range(y.shape[0]):
        total[j] += y[j]
    return total


@outer
def decode_block(
    streams: Any,
    token: int,
    b: Any,
    state: Any,
    position: int,
    k: Any,
    cos: Any,
    sin: Any,
    ecos: Any,
    esin: Any,
) -> None:
    """One token through one block: streams [n, d] and the layer's state change in place."""
    n, d = streams.shape
    x, normed = np.empty(d, np.float32), np.empty(d, np.float32)
    post, comb = np.empty(n, np.float32), np.empty((n, n), np.float32)

    read_streams(streams, b.attn_site, k, x, post, comb)
    rmsnorm(x, b.attn_norm, k.norm_eps, normed)
    y = attention(normed, b, state, position, k, cos, sin, ecos, esin)
    write_streams(streams, y, post, comb)

    read_streams(streams, b.ffn_site, k, x, post, comb)
    rmsnorm(x, b.ffn_norm, k.norm_eps, normed)
    y = experts(normed, b, token, k)
    write_streams(streams, y, post, comb)


@outer
def decode_head(
    streams: Any, fn: Any, base: Any, scale: Any, norm: Any, head: Any, k: Any, logits: Any
) -> None:
    """Merge the streams [n, d], norm, and logits [vocab]."""
    n, d = streams.shape
    mixes = np.empty(n, np.float32)
    flat = streams.reshape(n * d)
    r = np.float32(1) / np.float32(math.sqrt(mean_square(flat) + k.norm_eps))
    matvec(fn, flat, mixes)
    x, normed = np.zeros(d, np.float32), np.empty(d, np.float32)
    for i in range(n):
        weight = sigmoid(mixes[i] * r * scale[0] + base[i]) + k.hc_eps
        for j in range(d):
            x[j] += weight * streams[i, j]
    rmsnorm(x, norm, k.norm_eps, normed)
    matvec(head, normed, logits)
