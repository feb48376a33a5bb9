"""A batch of tokens through the blocks, in compiled code that treats every token alike.

A row is one token of one sequence. What a row computes does not depend on the rows beside it: not
on how many there are, nor on how a prompt was cut into pieces, nor on whether the token was part of
a prompt or just sampled. Dimensions: streams n, hidden d, heads H, head_dim c.

`forward` does any of four parts of a block, for some layers and rows:

    PROJECT   mHC read, queries, keys, what the compressors and the indexer need (row by row)
    ABSORB    compressor states move on, completed entries go into slabs (in order)
    ATTEND    attention, its projection, the experts (row by row)
    REMEMBER  the last raw entries go into the sliding window's ring (in order)

PROJECT and ATTEND may run in several threads over different rows; the others may not.

Paper: §2.2, eq. 1-8 (mHC); §2.3.1, eq. 9-19 (CSA); §2.3.2, eq. 20-26 (HCA); §2.1 (DeepSeekMoE).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fathom.kernels.numba.entries import FP8, load_kv, round_fp8, store_key, store_kv
from fathom.kernels.numba.index_scan import search
from fathom.kernels.numba.primitives import (
    copy,
    hadamard,
    mean_square,
    rmsnorm,
    rope,
    round_fp4,
    sigmoid,
)
from fathom.kernels.numba.selection import compiled_capacity, keep_best
from fathom.kernels.numba.vector import (
    LANES,
    PANEL,
    exp32,
    fma,
    inner,
    panels,
    product,
    softmax,
)

# numba keeps compiled functions until the file that defines them changes, whatever they call. So
# this file changes with the others: the SHA-256 of them together begins with this; a test compares.
PARTS = "62b01fdf738cdb2a"

PROJECT, ABSORB, ATTEND, REMEMBER, COMBINE = 1, 2, 4, 8, 16
BLOCK = 256  # rows that share a widened panel of weights

# Matrices of a block, by their place in `Weights.matrices`.
(ATTN_FN, FFN_FN, WQ_A, WQ_B, WKV, WO_A, WO_B, COMP_KV, COMP_GATE, INDEX_KV, INDEX_GATE,
 INDEX_Q, INDEX_W, GATE, W1, W2, W3, SHARED_1, SHARED_2, SHARED_3, HEAD_FN, HEAD, E_PROJ,
 H_PROJ) = range(24)  # fmt: skip
MATRICES = 24
# Vectors of a block, by their place in `Weights.vectors`.
(ATTN_BASE, ATTN_SCALE, FFN_BASE, FFN_SCALE, ATTN_NORM, FFN_NORM, Q_NORM, KV_NORM, SINK, COMP_APE,
 COMP_NORM, INDEX_APE, INDEX_NORM, GATE_BIAS, HEAD_BASE, HEAD_SCALE, NORM, E_NORM,
 H_NORM) = range(19)  # fmt: skip
VECTORS = 19
# Places in `Memory.layers`: where a layer's entries lie in a slab and its state in a slot, in bytes
# (rings of float32 in numbers).
(KV_DATA, KV_SCALES, KEY_DATA, KEY_SCALES, WINDOW_DATA, WINDOW_SCALES, TAIL_KV, TAIL_GATE,
 KEY_TAIL_KV, KEY_TAIL_GATE, ONLINE, RATIO) = range(12)  # fmt: skip
PLACES = 12
# Which inputs are rounded to FP8, by their place in `Weights.rounds`.
R_QKV, R_WQ_B, R_WO_B, R_EXPERTS, R_SHARED, R_INDEX_Q, R_ENTRIES, R_MTP = range(8)
ROUNDS = 8


INTEGERS = (
    "streams", "hidden", "heads", "head_dim", "rope_dim", "groups", "o_rank", "q_rank",
    "index_heads", "index_dim", "index_topk", "experts", "topk", "inner", "window", "ring", "tail",
    "online", "sinkhorn_iters", "slab_tokens", "slab_bytes", "slot_bytes", "kv_form", "key_form",
    "kv_data", "kv_scales", "key_data", "key_scales", "hash_layers", "vocab", "export",
)  # fmt: skip
REALS = ("hc_eps", "norm_eps", "swiglu_limit", "routed_scaling")
# Buffers of a step in the flat work array: for each, where it starts and the width of a row.
BUFFERS = (
    "flow", "mixes", "post", "comb", "normed", "rounded", "q_latent", "q", "kv", "tail_kv",
    "tail_gate", "key_kv", "key_gate", "index_q", "index_w", "attended", "low", "y", "plain_cos",
    "plain_sin", "far_cos", "far_sin",
)  # fmt: skip
SIZES = np.dtype(
    [(name, np.int64) for name in INTEGERS]
    + [(name, np.float32) for name in REALS]
    + [(f"{prefix}_{name}", np.int64) for name in BUFFERS for prefix in ("at", "w")],
    align=True,
)


class Env(NamedTuple):
    """Everything a compiled function reads or writes, flat.

    half: uint16 (bfloat16) and full: float32, all parameters; meta: int64 [layers, COLUMNS], where
    they lie (see `matrix_column` and those after it); hashes: int64 [hash layers * vocab * topk];
    embed: float32 [vocab * hidden]; slabs, slots: uint8, slots32 the same as float32; tables: int32
    [slots, slabs]; work: float32, the buffers; values: uint32, places: int64, held: int64
    [threads], what each found in a search that they share; frequencies: [2, rope_dim / 2];
    rows: int64 [5, rows]: token, position, slot, first row of its sequence's piece, known length;
    chosen: int16 [layers, rows, topk], picked: int32 [layers, rows, index_topk].

    A matrix is panels of 32 rows, [panels, cols, 32]; experts and groups follow each other.
    """

    half: Any
    full: Any
    meta: Any
    hashes: Any
    embed: Any
    slabs: Any
    slots: Any
    slots32: Any
    tables: Any
    work: Any
    values: Any
    places: Any
    held: Any
    frequencies: Any
    rows: Any
    chosen: Any
    picked: Any


TOKEN, POSITION, SLOT, FIRST, KNOWN = range(5)


def matrix_column(which: int) -> int:
    """Column of `meta` with a matrix's offset; then 1 for `half`, then rows, then cols."""
    return 4 * which


def vector_column(which: int) -> int:
    """Column of `meta` with a vector's offset in `full`; then its length."""
    return 4 * MATRICES + 2 * which


ROUND_0 = 4 * MATRICES + 2 * VECTORS
PLACE_0 = ROUND_0 + ROUNDS
COLUMNS = PLACE_0 + PLACES


@inner
def _matrix(
    e: Any, layer: int, which: int, expert: int, rows: int, x: int, x_row: int, out: int,
    out_row: int, scratch: int,
) -> None:  # fmt: skip
    """out = x times the transposed matrix; x, out, scratch are addresses."""
    m = 4 * which
    count = (e.meta[layer, m + 2] + PANEL - 1) // PANEL
    cols = e.meta[layer, m + 3]
    offset = e.meta[layer, m] + expert * count * PANEL * cols
    half = e.meta[layer, m + 1]
    w = e.half.ctypes.data + 2 * offset if half else e.full.ctypes.data + 4 * offset
    panels(half, rows, count, cols, x, x_row, w, scratch, out, out_row)


@inner
def _vector(e: Any, layer: int, which: int) -> Any:
    v = 4 * MATRICES + 2 * which
    return e.full[e.meta[layer, v] : e.meta[layer, v] + e.meta[layer, v + 1]]


@inner
def _rounds(e: Any, layer: int, which: int) -> bool:
    return e.meta[layer, ROUND_0 + which] != 0


@inner
def _place(e: Any, layer: int, which: int) -> int:
    return e.meta[layer, PLACE_0 + which]


@inner
def _line(f: Any, at: int, width: int, t: int, cols: int) -> Any:
    """The first `cols` numbers of row t of a buffer."""
    return f[at + t * width : at + t * width + cols]


@inner
def _address(f: Any, at: int) -> int:
    return f.ctypes.data + 4 * at


@inner
def _round_rows(f: Any, source: int, target: int, width: int, a: int, b: int, cols: int) -> None:
    for t in range(a, b):
        own = _line(f, target, width, t, cols)
        if source != target:
            copy(_line(f, source, width, t, cols), own)
        round_fp8(own, 128)


@inner
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
def _read_streams(e: Any, k: Any, layer: int, site: int, a: int, b: int, scratch: int) -> None:
    """mHC before a sublayer: its normed input, and what writing back needs."""
    f, n, d = e.work, k.streams, k.hidden
    _matrix(
        e, layer, FFN_FN if site else ATTN_FN, 0, b - a, _address(f, k.at_flow + a * k.w_flow),
        k.w_flow, _address(f, k.at_mixes + a * k.w_mixes), k.w_mixes, scratch,
    )  # fmt: skip
    base = _vector(e, layer, FFN_BASE if site else ATTN_BASE)
    scale = _vector(e, layer, FFN_SCALE if site else ATTN_SCALE)
    norm = _vector(e, layer, FFN_NORM if site else ATTN_NORM)
    x = np.empty(d, np.float32)
    for t in range(a, b):
        flow = _line(f, k.at_flow, k.w_flow, t, n * d)
        mixes = _line(f, k.at_mixes, k.w_mixes, t, k.w_mixes)
        post = _line(f, k.at_post, k.w_post, t, n)
        comb = _line(f, k.at_comb, k.w_comb, t, n * n)
        r = np.float32(1) / np.float32(math.sqrt(mean_square(flow) + k.norm_eps))
        for j in range(d):
            x[j] = np.float32(0)
        for i in range(n):
            pre = sigmoid(mixes[i] * r * scale[0] + base[i]) + k.hc_eps
            for j in range(d):
                x[j] = fma(pre, flow[i * d + j], x[j])
            post[i] = np.float32(2) * sigmoid(mixes[n + i] * r * scale[1] + base[n + i])
        for c in range(n * n):
            comb[c] = mixes[2 * n + c] * r * scale[2] + base[2 * n + c]
        _sinkhorn(comb, n, k.sinkhorn_iters, k.hc_eps)
        rmsnorm(x, norm, k.norm_eps, _line(f, k.at_normed, k.w_normed, t, d))


@inner
def _write_streams(e: Any, k: Any, a: int, b: int) -> None:
    """mHC after a sublayer, in place: stream j = post_j * y + sum_i comb[i, j] * stream i."""
    f, n, d = e.work, k.streams, k.hidden
    old = np.empty(n * d, np.float32)
    for t in range(a, b):
        flow = _line(f, k.at_flow, k.w_flow, t, n * d)
        y = _line(f, k.at_y, k.w_y, t, d)
        post = _line(f, k.at_post, k.w_post, t, n)
        comb = _line(f, k.at_comb, k.w_comb, t, n * n)
        copy(flow, old)
        for j in range(n):
            for c in range(d):
                flow[j * d + c] = post[j] * y[c]
            for i in range(n):
                factor = comb[i * n + j]
                for c in range(d):
                    flow[j * d + c] = fma(factor, old[i * d + c], flow[j * d + c])


@inner
def _turn(e: Any, k: Any, far: bool, t: int, x: Any, direction: Any) -> None:
    """Rotate x by row t's position, in the frequencies of compressed layers if `far`."""
    at_cos, at_sin = (k.at_far_cos, k.at_far_sin) if far else (k.at_plain_cos, k.at_plain_sin)
    pairs = k.rope_dim // 2
    cos = _line(e.work, at_cos, k.w_plain_cos, t, pairs)
    rope(x, cos, _line(e.work, at_sin, k.w_plain_cos, t, pairs), direction)


@inner
def _project(e: Any, k: Any, layer: int, a: int, b: int, scratch: int) -> None:
    f, ratio, c, one = e.work, _place(e, layer, RATIO), k.head_dim, np.float32(1)
    _read_streams(e, k, layer, 0, a, b, scratch)
    source = k.at_normed
    if _rounds(e, layer, R_QKV):
        source = k.at_rounded
        _round_rows(f, k.at_normed, source, k.w_normed, a, b, k.hidden)
    x = _address(f, source + a * k.w_normed)
    latent, kvs = k.at_q_latent + a * k.w_q_latent, k.at_kv + a * k.w_kv
    _matrix(e, layer, WQ_A, 0, b - a, x, k.w_normed, _address(f, latent), k.w_q_latent, scratch)
    _matrix(e, layer, WKV, 0, b - a, x, k.w_normed, _address(f, kvs), k.w_kv, scratch)
    q_norm, kv_norm = _vector(e, layer, Q_NORM), _vector(e, layer, KV_NORM)
    exact = np.empty((b - a) * k.q_rank, np.float32)
    for t in range(a, b):
        qr = _line(f, k.at_q_latent, k.w_q_latent, t, k.q_rank)
        kv = _line(f, k.at_kv, k.w_kv, t, c)
        rmsnorm(qr, q_norm, k.norm_eps, qr)
        copy(qr, _line(exact, 0, k.q_rank, t - a, k.q_rank))
        if _rounds(e, layer, R_WQ_B):
            round_fp8(qr, 128)
        rmsnorm(kv, kv_norm, k.norm_eps, kv)
        _turn(e, k, ratio != 0, t, kv, one)
        store_kv(kv, k.rope_dim, k.kv_form, 0, e.slots, 0, 0)
    _matrix(
        e, layer, WQ_B, 0, b - a, _address(f, latent), k.w_q_latent,
        _address(f, k.at_q + a * k.w_q), k.w_q, scratch,
    )  # fmt: skip
    for t in range(a, b):
        for h in range(k.heads):
            head = f[k.at_q + t * k.w_q + h * c : k.at_q + t * k.w_q + (h + 1) * c]
            r = one / np.float32(math.sqrt(mean_square(head) + k.norm_eps))
            for j in range(c):
                head[j] *= r
            _turn(e, k, ratio != 0, t, head, one)
    if ratio:
        _project_tail(e, k, layer, COMP_KV, COMP_APE, a, b, scratch)
    if ratio == 4:
        _project_tail(e, k, layer, INDEX_KV, INDEX_APE, a, b, scratch)
        _project_index(e, k, layer, a, b, exact, scratch)


@inner
def _project_tail(
    e: Any, k: Any, layer: int, which: int, ape: int, a: int, b: int, scratch: int
) -> None:
    """What a compressor makes of each token: values, and gates with their position bias."""
    f, ratio = e.work, _place(e, layer, RATIO)
    kv, gate, width = k.at_tail_kv, k.at_tail_gate, k.w_tail_kv
    if which == INDEX_KV:
        kv, gate, width = k.at_key_kv, k.at_key_gate, k.w_key_kv
    x = _address(f, k.at_normed + a * k.w_normed)
    for i in range(2):
        to = _address(f, (gate if i else kv) + a * width)
        _matrix(e, layer, which + i, 0, b - a, x, k.w_normed, to, width, scratch)
    bias = _vector(e, layer, ape)
    cols = bias.shape[0] // ratio
    for t in range(a, b):
        place = e.rows[POSITION, t] % ratio * cols
        own = _line(f, gate, width, t, cols)
        for j in range(cols):
            own[j] += bias[place + j]


@inner
def _project_index(e: Any, k: Any, layer: int, a: int, b: int, exact: Any, scratch: int) -> None:
    """The indexer's queries and head weights, where there is something to choose."""
    needed = False
    for t in range(a, b):
        needed = needed or (e.rows[POSITION, t] + 1) // 4 > k.index_topk
    if not needed:
        return
    f = e.work
    x, x_row = _address(f, k.at_q_latent + a * k.w_q_latent), k.w_q_latent
    if _rounds(e, layer, R_INDEX_Q) != _rounds(e, layer, R_WQ_B):
        x, x_row = _address(exact, 0), k.q_rank
    _matrix(
        e, layer, INDEX_Q, 0, b - a, x, x_row, _address(f, k.at_index_q + a * k.w_index_q),
        k.w_index_q, scratch,
    )  # fmt: skip
    _matrix(
        e, layer, INDEX_W, 0, b - a, _address(f, k.at_normed + a * k.w_normed), k.w_normed,
        _address(f, k.at_index_w + a * k.w_index_w), k.w_index_w, scratch,
    )  # fmt: skip
    for t in range(a, b):
        for h in range(k.index_heads):
            at = k.at_index_q + t * k.w_index_q + h * k.index_dim
            head = f[at : at + k.index_dim]
            _turn(e, k, True, t, head, np.float32(1))
            if _rounds(e, layer, R_ENTRIES):
                hadamard(head)
                if k.key_form == FP8:
                    round_fp8(head, k.index_dim)
                else:
                    round_fp4(head, head)


@inner
def _pool(f: Any, at_kv: int, at_gate: int, ring: int, position: int, cols: int, out: Any) -> None:
    """CSA: the second halves of the window that ends here, the first halves of the one before."""
    high, total = np.empty(cols, np.float32), np.zeros(cols, np.float32)
    for j in range(cols):
        high[j] = np.float32(-np.inf)
        out[j] = np.float32(0)
    for sweep in range(2):
        for back in range(7, -1, -1):
            if back > position:
                continue
            at = ((position - back) % ring) * 2 * cols + (cols if back < 4 else 0)
            kv, gate = f[at_kv + at : at_kv + at + cols], f[at_gate + at : at_gate + at + cols]
            if sweep == 0:
                for j in range(cols):
                    high[j] = max(high[j], gate[j])
            else:
                for j in range(cols):
                    p = exp32(gate[j] - high[j])
                    total[j] += p
                    out[j] = fma(p, kv[j], out[j])
    for j in range(cols):
        out[j] /= total[j]


@inner
def _pool_online(
    f: Any, ring: int, size: int, position: int, ratio: int, kv: Any, gate: Any, out: Any
) -> None:
    """HCA: move the running softmax on by one token; `out` = its average so far.

    The ring holds (maximum, sum, weighted sum), each [cols], after each of the last `size` tokens.
    """
    cols = out.shape[0]
    at = ring + (position % size) * 3 * cols
    high, total = f[at : at + cols], f[at + cols : at + 2 * cols]
    value = f[at + 2 * cols : at + 3 * cols]
    if position % ratio == 0:
        for j in range(cols):
            high[j] = gate[j]
            total[j] = np.float32(1)
            value[j] = kv[j]
    else:
        at = ring + ((position - 1) % size) * 3 * cols
        old_high, old_total = f[at : at + cols], f[at + cols : at + 2 * cols]
        old_value = f[at + 2 * cols : at + 3 * cols]
        for j in range(cols):
            m = max(old_high[j], gate[j])
            fade, p = exp32(old_high[j] - m), exp32(gate[j] - m)
            high[j] = m
            total[j] = fma(old_total[j], fade, p)
            value[j] = fma(old_value[j], fade, p * kv[j])
    for j in range(cols):
        out[j] = value[j] / total[j]


@inner
def _keep_tail(e: Any, source: int, width: int, t: int, ring: int, place: int, cols: int) -> None:
    copy(_line(e.work, source, width, t, cols), _line(e.slots32, ring, cols, place, cols))


@inner
def _absorb(e: Any, k: Any, layer: int, a: int, b: int) -> None:
    f, c, ratio = e.work, k.head_dim, _place(e, layer, RATIO)
    if ratio == 0:
        return
    pooled, entry = np.empty(c, np.float32), np.empty(c, np.float32)
    wide = 2 * k.index_dim
    for t in range(a, b):
        position, slot = e.rows[POSITION, t], e.rows[SLOT, t] * (k.slot_bytes // 4)
        ends = position % ratio == ratio - 1 and position - ratio + 1 >= e.rows[KNOWN, t]
        if ratio == 4:
            place = position % k.tail
            kv, gate = slot + _place(e, layer, TAIL_KV), slot + _place(e, layer, TAIL_GATE)
            key_kv = slot + _place(e, layer, KEY_TAIL_KV)
            key_gate = slot + _place(e, layer, KEY_TAIL_GATE)
            _keep_tail(e, k.at_tail_kv, k.w_tail_kv, t, kv, place, 2 * c)
            _keep_tail(e, k.at_tail_gate, k.w_tail_gate, t, gate, place, 2 * c)
            _keep_tail(e, k.at_key_kv, k.w_key_kv, t, key_kv, place, wide)
            _keep_tail(e, k.at_key_gate, k.w_key_gate, t, key_gate, place, wide)
            if ends:
                _pool(e.slots32, kv, gate, k.tail, position, c, pooled)
                _store_entry(e, k, layer, t, position, pooled, entry)
                average = np.empty(k.index_dim, np.float32)
                _pool(e.slots32, key_kv, key_gate, k.tail, position, k.index_dim, average)
                _store_index_key(e, k, layer, t, position, average)
        else:
            _pool_online(
                e.slots32, slot + _place(e, layer, ONLINE), k.online, position, ratio,
                _line(f, k.at_tail_kv, k.w_tail_kv, t, c),
                _line(f, k.at_tail_gate, k.w_tail_gate, t, c), pooled,
            )  # fmt: skip
            if ends:
                _store_entry(e, k, layer, t, position, pooled, entry)


@inner
def _turn_entry(e: Any, k: Any, first: int, x: Any) -> None:
    """Rotate an entry to the position of its window's first token."""
    pairs = k.rope_dim // 2
    cos, sin = np.empty(pairs, np.float32), np.empty(pairs, np.float32)
    for j in range(pairs):
        phase = np.float32(first) * e.frequencies[1, j]
        cos[j] = np.float32(math.cos(phase))
        sin[j] = np.float32(math.sin(phase))
    rope(x, cos, sin, np.float32(1))


@inner
def _slab(e: Any, k: Any, t: int, number: int) -> int:
    return np.int64(e.tables[e.rows[SLOT, t], number]) * k.slab_bytes


@inner
def _store_entry(
    e: Any, k: Any, layer: int, t: int, position: int, pooled: Any, entry: Any
) -> None:
    ratio = _place(e, layer, RATIO)
    number, per_slab = position // ratio, k.slab_tokens // ratio
    slab, i = _slab(e, k, t, number // per_slab), number % per_slab
    rmsnorm(pooled, _vector(e, layer, COMP_NORM), k.norm_eps, entry)
    _turn_entry(e, k, number * ratio, entry)
    store_kv(
        entry, k.rope_dim, k.kv_form, 1, e.slabs, slab + _place(e, layer, KV_DATA) + i * k.kv_data,
        slab + _place(e, layer, KV_SCALES) + i * k.kv_scales,
    )  # fmt: skip


@inner
def _store_index_key(e: Any, k: Any, layer: int, t: int, position: int, average: Any) -> None:
    number, per_slab = position // 4, k.slab_tokens // 4
    slab, i = _slab(e, k, t, number // per_slab), number % per_slab
    rmsnorm(average, _vector(e, layer, INDEX_NORM), k.norm_eps, average)
    _turn_entry(e, k, number * 4, average)
    if _rounds(e, layer, R_ENTRIES):
        hadamard(average)
    store_key(
        average, k.key_form, e.slabs, slab + _place(e, layer, KEY_DATA) + i * k.key_data,
        slab + _place(e, layer, KEY_SCALES) + i * k.key_scales,
    )  # fmt: skip


@inner
def _search(
    e: Any, k: Any, layer: int, t: int, first: int, last: int, values: int, places: int, held: int
) -> None:
    """The best of the entries first .. last - 1 for row t, into the arrays at these addresses."""
    search(
        _address(e.work, k.at_index_q + t * k.w_index_q),
        _address(e.work, k.at_index_w + t * k.w_index_w), k.index_heads, k.index_dim,
        e.slabs.ctypes.data, e.slabs.shape[0],
        e.tables.ctypes.data + 4 * e.rows[SLOT, t] * e.tables.shape[1], k.slab_bytes,
        _place(e, layer, KEY_DATA), _place(e, layer, KEY_SCALES), k.key_data, k.key_scales,
        k.key_form, k.slab_tokens // 4, first, last, k.index_topk, values, places, held,
    )  # fmt: skip


@inner
def _pick(
    e: Any, k: Any, layer: int, t: int, shares: int, values: Any, places: Any, held: Any
) -> int:
    """The entries that row t attends to, ascending, in `places`; returns their number.

    shares: so many parts of the entries have been searched already.
    """
    ratio = _place(e, layer, RATIO)
    count = (e.rows[POSITION, t] + 1) // ratio if ratio else 0
    if ratio != 4 or count <= k.index_topk:
        for i in range(count):
            places[i] = i
        return count
    if not shares:
        _search(e, k, layer, t, 0, count, values.ctypes.data, places.ctypes.data, held.ctypes.data)
        return held[0]
    found, room = 0, e.places.shape[0] // e.held.shape[0]
    for share in range(shares):
        for i in range(e.held[share]):
            values[found], places[found] = e.values[share * room + i], e.places[share * room + i]
            found += 1
    return keep_best(values, places, found, k.index_topk)


@inner
def _attend_row(
    e: Any, k: Any, layer: int, t: int, picks: Any, count: int, turned: Any, logits: Any, keys: Any
) -> None:
    """One softmax over the window, the picked entries and the sink, all heads side by side.

    turned: [head_dim, lanes]; logits: [keys, lanes]; keys: [keys, head_dim], flat.
    """
    f, c, heads, ratio = e.work, k.head_dim, k.heads, _place(e, layer, RATIO)
    lanes = (heads + LANES - 1) // LANES * LANES
    position, slot, first = e.rows[POSITION, t], e.rows[SLOT, t] * k.slot_bytes, e.rows[FIRST, t]
    start = e.rows[POSITION, first]  # from here on raw entries lie in this batch
    low = max(0, position - k.window + 1)
    old = max(0, min(start, position + 1) - low)
    near = position + 1 - low
    scale = np.float32(float(c) ** -0.5)
    for h in range(heads):
        head = f[k.at_q + t * k.w_q + h * c : k.at_q + t * k.w_q + (h + 1) * c]
        for j in range(c):
            turned[j * lanes + h] = head[j] * scale
    data, scales = slot + _place(e, layer, WINDOW_DATA), slot + _place(e, layer, WINDOW_SCALES)
    for i in range(old):
        place = (low + i) % k.ring
        load_kv(
            e.slots, data + place * k.kv_data, scales + place * k.kv_scales, k.rope_dim, c,
            k.kv_form, keys, i * c,
        )  # fmt: skip
    per_slab = k.slab_tokens // ratio if ratio else 1
    for i in range(count):
        slab, place = _slab(e, k, t, picks[i] // per_slab), picks[i] % per_slab
        load_kv(
            e.slabs, slab + _place(e, layer, KV_DATA) + place * k.kv_data,
            slab + _place(e, layer, KV_SCALES) + place * k.kv_scales, k.rope_dim, c, k.kv_form,
            keys, (old + i) * c,
        )  # fmt: skip
    query, p = _address(turned, 0), _address(logits, 0)
    fresh = _address(f, k.at_kv + (first + low + old - start) * k.w_kv)  # first raw entry of these
    far = _address(keys, old * c)
    product(old, lanes, c, _address(keys, 0), c, 1, query, lanes, p, lanes, 0)
    product(near - old, lanes, c, fresh, k.w_kv, 1, query, lanes, p + 4 * old * lanes, lanes, 0)
    product(count, lanes, c, far, c, 1, query, lanes, p + 4 * near * lanes, lanes, 0)
    sink, total = _vector(e, layer, SINK), np.empty(lanes, np.float32)
    for h in range(lanes):
        total[h] = sink[h] if h < heads else np.float32(-1e30)
    softmax(p, near + count, lanes, _address(total, 0))
    out = _address(f, k.at_attended + t * k.w_attended)
    product(heads, c, old, p, 1, lanes, _address(keys, 0), c, out, c, 0)
    product(heads, c, near - old, p + 4 * old * lanes, 1, lanes, fresh, k.w_kv, out, c, 1)
    product(heads, c, count, p + 4 * near * lanes, 1, lanes, far, c, out, c, 1)
    for h in range(heads):
        at = k.at_attended + t * k.w_attended + h * c
        head = f[at : at + c]
        inverse = np.float32(1) / total[h]
        for j in range(c):
            head[j] *= inverse
        _turn(e, k, ratio != 0, t, head, np.float32(-1))


@inner
def _attend(e: Any, k: Any, layer: int, a: int, b: int, shares: int, scratch: int) -> None:
    f, ratio = e.work, _place(e, layer, RATIO)
    most = 0
    for t in range(a, b):
        most = max(most, e.rows[POSITION, t] + 1)
    entries = most // ratio if ratio else 0
    kept = min(entries, k.index_topk) if ratio == 4 else entries
    lanes = (k.heads + LANES - 1) // LANES * LANES
    room = compiled_capacity(max(shares, 1) * k.index_topk)
    values = np.empty(room if ratio == 4 else 1, np.uint32)
    picks, held = np.empty(max(kept, values.shape[0]), np.int64), np.zeros(1, np.int64)
    turned = np.zeros(k.head_dim * lanes, np.float32)
    logits = np.empty((k.window + kept) * lanes, np.float32)
    keys = np.empty((k.window + kept) * k.head_dim, np.float32)
    for t in range(a, b):
        count = _pick(e, k, layer, t, shares, values, picks, held)
        if ratio == 4 and k.export:
            for i in range(k.index_topk):
                e.picked[layer, t, i] = picks[i] if i < count else -1
        _attend_row(e, k, layer, t, picks, count, turned, logits, keys)

    own, low = k.heads * k.head_dim // k.groups, k.at_low + a * k.w_low
    for g in range(k.groups):
        _matrix(
            e, layer, WO_A, g, b - a, _address(f, k.at_attended + a * k.w_attended + g * own),
            k.w_attended, _address(f, low + g * k.o_rank), k.w_low, scratch,
        )  # fmt: skip
    if _rounds(e, layer, R_WO_B):
        _round_rows(f, k.at_low, k.at_low, k.w_low, a, b, k.groups * k.o_rank)
    _matrix(
        e, layer, WO_B, 0, b - a, _address(f, low), k.w_low, _address(f, k.at_y + a * k.w_y), k.w_y,
        scratch,
    )  # fmt: skip
    _write_streams(e, k, a, b)
    _read_streams(e, k, layer, 1, a, b, scratch)
    _experts(e, k, layer, a, b, scratch)
    _write_streams(e, k, a, b)


@inner
def _route(e: Any, k: Any, layer: int, token: int, scores: Any, chosen: Any, weights: Any) -> None:
    """Choose experts for one row; `scores` holds the router's logits and then the affinities."""
    for i in range(k.experts):
        v = scores[i]
        soft = v if v > 20 else np.float32(math.log1p(math.exp(v)))
        scores[i] = np.float32(math.sqrt(soft))
    if layer < k.hash_layers:
        at = (layer * k.vocab + token) * k.topk
        for i in range(k.topk):
            chosen[i] = e.hashes[at + i]
    else:
        bias = _vector(e, layer, GATE_BIAS)
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
    e: Any, k: Any, layer: int, first: int, expert: int, count: int, rounds: bool, weights: Any,
    x: Any, gate: Any, up: Any, y: Any, scratch: int,
) -> None:  # fmt: skip
    """y = one expert's output for `count` gathered rows x, each times its weight."""
    wide, d = (k.inner + PANEL - 1) // PANEL * PANEL, k.w_normed
    to, other = _address(gate, 0), _address(up, 0)
    _matrix(e, layer, first, expert, count, _address(x, 0), d, to, wide, scratch)
    _matrix(e, layer, first + 2, expert, count, _address(x, 0), d, other, wide, scratch)
    for i in range(count):
        own = _line(gate, 0, wide, i, k.inner)
        _swiglu(own, _line(up, 0, wide, i, k.inner), k.swiglu_limit, weights[i])
        if rounds:
            round_fp8(own, 128)
    _matrix(e, layer, first + 1, expert, count, to, wide, _address(y, 0), d, scratch)


@inner
def _experts(e: Any, k: Any, layer: int, a: int, b: int, scratch: int) -> None:
    """The expert sublayer: y = routed experts in ascending order, then the shared one."""
    f, d, count, width = e.work, k.hidden, b - a, k.w_normed
    lines, wide = (k.experts + PANEL - 1) // PANEL * PANEL, (k.inner + PANEL - 1) // PANEL * PANEL
    logits = np.empty(count * lines, np.float32)
    _matrix(
        e, layer, GATE, 0, count, _address(f, k.at_normed + a * width), width, _address(logits, 0),
        lines, scratch,
    )  # fmt: skip
    chosen, weights = np.empty(count * k.topk, np.int64), np.empty(count * k.topk, np.float32)
    for i in range(count):
        own = slice(i * k.topk, (i + 1) * k.topk)
        scores = _line(logits, 0, lines, i, k.experts)
        _route(e, k, layer, e.rows[TOKEN, a + i], scores, chosen[own], weights[own])
        if k.export:
            for j in range(k.topk):
                e.chosen[layer, a + i, j] = chosen[i * k.topk + j]
    _round_rows(f, k.at_normed, k.at_rounded, width, a, b, d)
    x, y = np.empty(count * width, np.float32), np.empty(count * width, np.float32)
    gate, up = np.empty(count * wide, np.float32), np.empty(count * wide, np.float32)
    members, shares = np.empty(count, np.int64), np.empty(count, np.float32)
    for i in range(count):
        total = _line(f, k.at_y, k.w_y, a + i, d)
        for j in range(d):
            total[j] = np.float32(0)
    for expert in range(k.experts + 1):
        shared = expert == k.experts
        rounds = _rounds(e, layer, R_SHARED if shared else R_EXPERTS)
        source = k.at_rounded if rounds else k.at_normed
        found = 0
        for i in range(count):
            for j in range(1 if shared else k.topk):
                if shared or chosen[i * k.topk + j] == expert:
                    members[found] = i
                    shares[found] = np.float32(1) if shared else weights[i * k.topk + j]
                    copy(_line(f, source, width, a + i, d), _line(x, 0, width, found, d))
                    found += 1
        if found == 0:
            continue
        first, number = (SHARED_1, 0) if shared else (W1, expert)
        _expert(e, k, layer, first, number, found, rounds, shares, x, gate, up, y, scratch)
        for i in range(found):
            total = _line(f, k.at_y, k.w_y, a + members[i], d)
            part = _line(y, 0, width, i, d)
            for j in range(d):
                total[j] += part[j]


@inner
def _remember(e: Any, k: Any, layer: int, a: int, b: int) -> None:
    """The rows' raw entries into the window rings; of a long piece only what still counts."""
    entry = np.empty(k.head_dim, np.float32)
    for t in range(a, b):
        later = t + k.ring
        if later < b and e.rows[FIRST, later] == e.rows[FIRST, t]:
            continue
        place, slot = e.rows[POSITION, t] % k.ring, e.rows[SLOT, t] * k.slot_bytes
        copy(_line(e.work, k.at_kv, k.w_kv, t, k.head_dim), entry)
        store_kv(
            entry, k.rope_dim, k.kv_form, 1, e.slots,
            slot + _place(e, layer, WINDOW_DATA) + place * k.kv_data,
            slot + _place(e, layer, WINDOW_SCALES) + place * k.kv_scales,
        )  # fmt: skip


@inner
def _combine(e: Any, k: Any, layer: int, a: int, b: int, scratch: int) -> None:
    """The MTP block's input, in place of the streams: each projected, plus the embedding."""
    n, d, width = k.streams, k.hidden, k.w_normed
    rounds = _rounds(e, layer, R_MTP)
    x, y = np.empty(n * width, np.float32), np.empty(n * width, np.float32)
    embedded = np.empty(width, np.float32)
    for t in range(a, b):
        own = _line(x, 0, width, 0, d)
        rmsnorm(
            _line(e.embed, 0, d, e.rows[TOKEN, t], d), _vector(e, layer, E_NORM), k.norm_eps, own
        )
        if rounds:
            round_fp8(own, 128)
        _matrix(
            e, layer, E_PROJ, 0, 1, _address(x, 0), width, _address(embedded, 0), width, scratch
        )
        flow = _line(e.work, k.at_flow, k.w_flow, t, n * d)
        for i in range(n):
            own = _line(x, 0, width, i, d)
            rmsnorm(flow[i * d : (i + 1) * d], _vector(e, layer, H_NORM), k.norm_eps, own)
            if rounds:
                round_fp8(own, 128)
        _matrix(e, layer, H_PROJ, 0, n, _address(x, 0), width, _address(y, 0), width, scratch)
        for i in range(n):
            for j in range(d):
                flow[i * d + j] = embedded[j] + y[i * width + j]


def compiled(function: Any) -> Any:
    """Compile for callers in Python, without the interpreter's lock, and keep the result on disk.

    numba looks for a place beside the source file, then below the user's home. Where neither can be
    written it would refuse to define the function: then every process compiles anew.
    """
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)


@compiled
def forward(
    e: Any, sizes: Any, first_layer: int, last_layer: int, parts: int, a: int, b: int, shares: int
) -> None:
    """The chosen parts of layers first .. last - 1, for rows a .. b - 1; see the module."""
    k = sizes[0]
    widest = 0
    for layer in range(first_layer, last_layer):
        for which in range(MATRICES):
            widest = max(widest, e.meta[layer, 4 * which + 3])
    panel = np.empty(widest * PANEL, np.float32)
    scratch = _address(panel, 0)
    for layer in range(first_layer, last_layer):
        if parts & COMBINE:
            _combine(e, k, layer, a, b, scratch)
        if parts & PROJECT:
            for t in range(a, b, BLOCK):
                _project(e, k, layer, t, min(t + BLOCK, b), scratch)
        if parts & ABSORB:
            _absorb(e, k, layer, a, b)
        if parts & ATTEND:
            for t in range(a, b, BLOCK):
                _attend(e, k, layer, t, min(t + BLOCK, b), shares, scratch)
        if parts & REMEMBER:
            _remember(e, k, layer, a, b)
    panel[0] = 0  # keep it alive until here: numba does not see that its address is in use


@compiled
def prepare(e: Any, sizes: Any, a: int, b: int, embed: int) -> None:
    """Rotations of rows a .. b - 1 and, if `embed`, their tokens' embeddings into all streams."""
    k = sizes[0]
    f = e.work
    for t in range(a, b):
        for far in range(2):
            at = t * k.w_plain_cos
            to_cos = (k.at_far_cos if far else k.at_plain_cos) + at
            to_sin = (k.at_far_sin if far else k.at_plain_sin) + at
            for j in range(k.rope_dim // 2):
                phase = np.float32(e.rows[POSITION, t]) * e.frequencies[far, j]
                f[to_cos + j] = np.float32(math.cos(phase))
                f[to_sin + j] = np.float32(math.sin(phase))
        if embed:
            d = k.hidden
            source = _line(e.embed, 0, d, e.rows[TOKEN, t], d)
            for i in range(k.streams):
                copy(source, _line(f, k.at_flow + i * d, k.w_flow, t, d))


@compiled
def search_share(e: Any, sizes: Any, layer: int, t: int, first: int, last: int, share: int) -> None:
    """A part of row t's search, into e.values and e.places: several threads share a long one."""
    at = share * (e.places.shape[0] // e.held.shape[0])
    _search(
        e, sizes[0], layer, t, first, last, e.values.ctypes.data + 4 * at,
        e.places.ctypes.data + 8 * at, e.held.ctypes.data + 8 * share,
    )  # fmt: skip


@compiled
def merge(e: Any, sizes: Any, layer: int, which: Any, hidden: Any) -> None:
    """The final hidden states of the rows `which`, by the stream head and norm of `layer`.

    which: [count] int64; hidden: [count * padded hidden] float32, out.
    """
    k = sizes[0]
    f, n, d = e.work, k.streams, k.hidden
    panel, mixes = np.empty(n * d * PANEL, np.float32), np.empty(PANEL, np.float32)
    base, scale = _vector(e, layer, HEAD_BASE), _vector(e, layer, HEAD_SCALE)
    norm, x = _vector(e, layer, NORM), np.empty(d, np.float32)
    for i in range(which.shape[0]):
        flow = _line(f, k.at_flow, k.w_flow, which[i], n * d)
        r = np.float32(1) / np.float32(math.sqrt(mean_square(flow) + k.norm_eps))
        _matrix(
            e, layer, HEAD_FN, 0, 1, _address(f, k.at_flow + which[i] * k.w_flow), k.w_flow,
            _address(mixes, 0), PANEL, _address(panel, 0),
        )  # fmt: skip
        for j in range(d):
            x[j] = np.float32(0)
        for s in range(n):
            weight = sigmoid(mixes[s] * r * scale[0] + base[s]) + k.hc_eps
            for j in range(d):
                x[j] = fma(weight, flow[s * d + j], x[j])
        rmsnorm(x, norm, k.norm_eps, _line(hidden, 0, k.w_normed, i, d))
    panel[0] = 0


@compiled
def output(e: Any, sizes: Any, count: int, hidden: Any, logits: Any) -> None:
    """logits [count * padded vocab] of hidden states [count * padded hidden]."""
    k = sizes[0]
    width = k.w_normed
    panel = np.empty(width * PANEL, np.float32)
    wide = (k.vocab + PANEL - 1) // PANEL * PANEL
    _matrix(
        e, 0, HEAD, 0, count, _address(hidden, 0), width, _address(logits, 0), wide,
        _address(panel, 0),
    )  # fmt: skip
    panel[0] = 0
