"""Attention in compiled code: projections, the choice of entries, one softmax per row.

Paper: §2.3.1, eq. 13-19 (CSA); §2.3.2, eq. 24-26 (HCA); §2.3.3 (sliding window, sink).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fathom.kernels.numba import layout
from fathom.kernels.numba.compiled import external, inner, once
from fathom.kernels.numba.entries import FP8, FP8_GROUP, load_kv, round_fp4, round_fp8, store_kv
from fathom.kernels.numba.index_scan import search
from fathom.kernels.numba.lanes import softmax
from fathom.kernels.numba.layout import (
    line,
    matrix,
    of_row,
    part,
    place,
    record_at,
    rounds,
    slab_of,
    slot_of,
    vector,
)
from fathom.kernels.numba.llvm import LANES
from fathom.kernels.numba.memory import address, view_float32, view_int32, view_int64, view_uint32
from fathom.kernels.numba.primitives import copy, hadamard, mean_square, rmsnorm, rope
from fathom.kernels.numba.selection import compiled_capacity, keep_best
from fathom.kernels.numba.vector import product


@inner
def _turn(k: Any, far: bool, t: int, x: Any, direction: Any) -> None:
    """Rotate x by row t's position, in the frequencies of compressed layers if `far`."""
    pairs = k.rope_dim // 2
    cos = line(k.far_cos if far else k.plain_cos, k.w_plain_cos, t, pairs)
    rope(x, cos, line(k.far_sin if far else k.plain_sin, k.w_plain_cos, t, pairs), direction)


def _project(record: int, layer: int, a: int, b: int, scratch: int) -> int:
    """Queries, raw entries, what the compressors and the indexer need, of normed inputs."""
    k = record_at(record)
    ratio, c, one = place(k, layer, layout.RATIO), k.head_dim, np.float32(1)
    source = k.normed
    if rounds(k, layer, layout.R_QKV):
        source = k.rounded
        for t in range(a, b):
            own = line(source, k.w_normed, t, k.hidden)
            copy(line(k.normed, k.w_normed, t, k.hidden), own)
            round_fp8(own, FP8_GROUP)
    x, latent = source + 4 * a * k.w_normed, k.q_latent + 4 * a * k.w_q_latent
    matrix(k, layer, layout.WQ_A, layout.ZERO, b - a, x, k.w_normed, latent, k.w_q_latent, scratch)
    raw = k.kv + 4 * a * k.w_kv
    matrix(k, layer, layout.WKV, layout.ZERO, b - a, x, k.w_normed, raw, k.w_kv, scratch)
    q_norm, kv_norm = vector(k, layer, layout.Q_NORM), vector(k, layer, layout.KV_NORM)
    exact = np.empty((b - a) * k.q_rank, np.float32)
    for t in range(a, b):
        qr, kv = line(k.q_latent, k.w_q_latent, t, k.q_rank), line(k.kv, k.w_kv, t, c)
        rmsnorm(qr, q_norm, k.norm_eps, qr)
        copy(qr, part(exact, k.q_rank, t - a, k.q_rank))
        if rounds(k, layer, layout.R_WQ_B):
            round_fp8(qr, FP8_GROUP)
        rmsnorm(kv, kv_norm, k.norm_eps, kv)
        _turn(k, ratio != 0, t, kv, one)
        store_kv(kv, k.rope_dim, k.kv_form, layout.ZERO, layout.ZERO)
    q = k.q + 4 * a * k.w_q
    matrix(k, layer, layout.WQ_B, layout.ZERO, b - a, latent, k.w_q_latent, q, k.w_q, scratch)
    for t in range(a, b):
        for h in range(k.heads):
            head = view_float32(k.q + 4 * (t * k.w_q + h * c), c)
            r = one / np.float32(math.sqrt(mean_square(head) + k.norm_eps))
            for j in range(c):
                head[j] *= r
            _turn(k, ratio != 0, t, head, one)
    if ratio:
        _project_tail(k, layer, layout.COMP_KV, layout.COMP_APE, a, b, scratch)
    if ratio == 4:
        _project_tail(k, layer, layout.INDEX_KV, layout.INDEX_APE, a, b, scratch)
        _project_index(k, layer, a, b, exact, scratch)
    return 1


@inner
def _project_tail(k: Any, layer: int, which: int, ape: int, a: int, b: int, scratch: int) -> None:
    """What a compressor makes of each token: values, and gates with their position bias."""
    ratio = place(k, layer, layout.RATIO)
    kv, gate, width = k.tail_kv, k.tail_gate, k.w_tail_kv
    if which == layout.INDEX_KV:
        kv, gate, width = k.key_kv, k.key_gate, k.w_key_kv
    x, kvs, gates = k.normed + 4 * a * k.w_normed, kv + 4 * a * width, gate + 4 * a * width
    matrix(k, layer, which, layout.ZERO, b - a, x, k.w_normed, kvs, width, scratch)
    matrix(k, layer, which + 1, layout.ZERO, b - a, x, k.w_normed, gates, width, scratch)
    bias = vector(k, layer, ape)
    cols = bias.shape[0] // ratio
    for t in range(a, b):
        at = of_row(k, layout.POSITION, t) % ratio * cols
        own = line(gate, width, t, cols)
        for j in range(cols):
            own[j] += bias[at + j]


@once
def _project_index(k: Any, layer: int, a: int, b: int, exact: Any, scratch: int) -> None:
    """The indexer's queries and head weights, where there is something to choose."""
    needed = False
    for t in range(a, b):
        needed = needed or (of_row(k, layout.POSITION, t) + 1) // 4 > k.index_topk
    if not needed:
        return
    x, x_row = k.q_latent + 4 * a * k.w_q_latent, k.w_q_latent
    if rounds(k, layer, layout.R_INDEX_Q) != rounds(k, layer, layout.R_WQ_B):
        x, x_row = address(exact), k.q_rank
    q, w, normed = k.index_q + 4 * a * k.w_index_q, k.index_w + 4 * a * k.w_index_w, k.normed
    matrix(k, layer, layout.INDEX_Q, layout.ZERO, b - a, x, x_row, q, k.w_index_q, scratch)
    normed += 4 * a * k.w_normed
    width = k.w_normed
    matrix(k, layer, layout.INDEX_W, layout.ZERO, b - a, normed, width, w, k.w_index_w, scratch)
    exact[0] = 0  # keep it alive until here: its address is in use
    for t in range(a, b):
        for h in range(k.index_heads):
            head = view_float32(k.index_q + 4 * (t * k.w_index_q + h * k.index_dim), k.index_dim)
            _turn(k, True, t, head, np.float32(1))
            if rounds(k, layer, layout.R_ENTRIES):
                hadamard(head)
                if k.key_form == FP8:
                    round_fp8(head, k.index_dim)
                else:
                    round_fp4(head)


@inner
def search_entries(
    k: Any, layer: int, t: int, first: int, last: int, values: int, places: int, held: int
) -> None:
    """The best of the entries first .. last - 1 for row t, into the arrays at these addresses."""
    table = k.tables + 4 * of_row(k, layout.SLOT, t) * k.table_columns
    data, scales = place(k, layer, layout.KEY_DATA), place(k, layer, layout.KEY_SCALES)
    done = search(
        k.index_q + 4 * t * k.w_index_q, k.index_w + 4 * t * k.w_index_w, k.index_heads,
        k.index_dim, k.slabs, table, k.slab_bytes, data, scales, k.key_data, k.key_scales,
        k.key_form, k.slab_tokens // 4, first, last, k.index_topk, values, places, held,
    )  # fmt: skip
    if not done:
        raise MemoryError


@once
def _pick(k: Any, layer: int, t: int, shares: int, values: Any, places: Any, held: Any) -> int:
    """The entries that row t attends to, ascending, in `places`; returns their number.

    shares: so many parts of the entries have been searched already.
    """
    ratio = place(k, layer, layout.RATIO)
    count = (of_row(k, layout.POSITION, t) + 1) // ratio if ratio else 0
    if ratio != 4 or count <= k.index_topk:
        for i in range(count):
            places[i] = i
        return count
    if not shares:
        to = address(values), address(places), address(held)
        search_entries(k, layer, t, layout.ZERO, count, to[0], to[1], to[2])
        return held[0]
    found = 0
    for share in range(shares):
        number = view_int64(k.held + 8 * share, 1)[0]
        own_values = view_uint32(k.values + 4 * share * k.room, number)
        own_places = view_int64(k.places + 8 * share * k.room, number)
        for i in range(number):
            values[found], places[found] = own_values[i], own_places[i]
            found += 1
    return keep_best(values, places, found, k.index_topk)


@once
def _attend_row(
    k: Any, layer: int, t: int, picks: Any, count: int, turned: Any, logits: Any, keys: Any
) -> None:
    """One softmax over the window, the picked entries and the sink, all heads side by side.

    turned: [head_dim, lanes]; logits: [keys, lanes]; keys: [keys, head_dim], flat.
    """
    c, heads, ratio = k.head_dim, k.heads, place(k, layer, layout.RATIO)
    lanes = (heads + LANES - 1) // LANES * LANES
    position, slot, first = of_row(k, layout.POSITION, t), slot_of(k, t), of_row(k, layout.FIRST, t)
    start = of_row(k, layout.POSITION, first)  # from here on raw entries lie in this batch
    low = max(0, position - k.window + 1)
    old = max(0, min(start, position + 1) - low)
    near = position + 1 - low
    scale = np.float32(float(c) ** -0.5)
    for h in range(heads):
        head = view_float32(k.q + 4 * (t * k.w_q + h * c), c)
        for j in range(c):
            turned[j * lanes + h] = head[j] * scale
    query, p, at = address(turned), address(logits), address(keys)
    data, scales = (
        slot + place(k, layer, layout.WINDOW_DATA),
        slot + place(k, layer, layout.WINDOW_SCALES),
    )
    for i in range(old):
        n = (low + i) % k.ring
        load_kv(
            data + n * k.kv_data, scales + n * k.kv_scales, k.rope_dim, c, k.kv_form, at + 4 * i * c
        )
    per_slab = k.slab_tokens // ratio if ratio else 1
    data, scales = place(k, layer, layout.KV_DATA), place(k, layer, layout.KV_SCALES)
    for i in range(count):
        slab, n = slab_of(k, t, picks[i] // per_slab), picks[i] % per_slab
        load_kv(
            slab + data + n * k.kv_data, slab + scales + n * k.kv_scales, k.rope_dim, c, k.kv_form,
            at + 4 * (old + i) * c,
        )  # fmt: skip
    fresh = k.kv + 4 * (first + low + old - start) * k.w_kv  # the first raw entry of these
    far = at + 4 * old * c
    product(old, lanes, c, at, c, 1, query, lanes, p, lanes, 0)
    product(near - old, lanes, c, fresh, k.w_kv, 1, query, lanes, p + 4 * old * lanes, lanes, 0)
    product(count, lanes, c, far, c, 1, query, lanes, p + 4 * near * lanes, lanes, 0)
    sink, total = vector(k, layer, layout.SINK), np.empty(lanes, np.float32)
    for h in range(lanes):
        total[h] = sink[h] if h < heads else np.float32(-1e30)
    softmax(p, near + count, lanes, address(total))
    out = k.attended + 4 * t * k.w_attended
    product(heads, c, old, p, 1, lanes, at, c, out, c, 0)
    product(heads, c, near - old, p + 4 * old * lanes, 1, lanes, fresh, k.w_kv, out, c, 1)
    product(heads, c, count, p + 4 * near * lanes, 1, lanes, far, c, out, c, 1)
    for h in range(heads):
        head = view_float32(out + 4 * h * c, c)
        inverse = np.float32(1) / total[h]
        for j in range(c):
            head[j] *= inverse
        _turn(k, ratio != 0, t, head, np.float32(-1))


def _attend(record: int, layer: int, a: int, b: int, shares: int, scratch: int) -> int:
    """y = attention over window and entries, and its output projection."""
    k = record_at(record)
    ratio = place(k, layer, layout.RATIO)
    most = 0
    for t in range(a, b):
        most = max(most, of_row(k, layout.POSITION, t) + 1)
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
        count = _pick(k, layer, t, shares, values, picks, held)
        if ratio == 4 and k.export:
            at = (layer * k.capacity + t) * k.index_topk
            picked = view_int32(k.picked + 4 * at, k.index_topk)
            for i in range(k.index_topk):
                picked[i] = picks[i] if i < count else -1
        _attend_row(k, layer, t, picks, count, turned, logits, keys)
    turned[0] = logits[0] = keys[0] = 0  # keep them alive until here: their addresses were in use

    own = k.heads * k.head_dim // k.groups
    attended, low = k.attended + 4 * a * k.w_attended, k.low + 4 * a * k.w_low
    for g in range(k.groups):
        x, to = attended + 4 * g * own, low + 4 * g * k.o_rank
        matrix(k, layer, layout.WO_A, g, b - a, x, k.w_attended, to, k.w_low, scratch)
    if rounds(k, layer, layout.R_WO_B):
        for t in range(a, b):
            round_fp8(line(k.low, k.w_low, t, k.groups * k.o_rank), FP8_GROUP)
    y = k.y + 4 * a * k.w_y
    matrix(k, layer, layout.WO_B, layout.ZERO, b - a, low, k.w_low, y, k.w_y, scratch)
    return 1


project = external("fathom_project", _project, 5, fails=True)
attend = external("fathom_attend", _attend, 6, fails=True)
