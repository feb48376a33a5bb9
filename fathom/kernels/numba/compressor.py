"""What a token leaves behind, in order: compressor states, completed entries, the window's ring.

Paper: §2.3.1, eq. 9-12 (CSA compression); §2.3.2, eq. 20-23 (HCA compression); §3.5.1 (tails).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fathom.kernels.numba import layout
from fathom.kernels.numba.compiled import external, inner, once
from fathom.kernels.numba.entries import store_key, store_kv
from fathom.kernels.numba.lanes import exp32, fma
from fathom.kernels.numba.layout import (
    line,
    of_row,
    place,
    record_at,
    rounds,
    slab_of,
    slot_of,
    vector,
)
from fathom.kernels.numba.memory import view_float32
from fathom.kernels.numba.primitives import copy, hadamard, rmsnorm, rope


@inner
def _pool(kvs: int, gates: int, ring: int, position: int, cols: int, out: Any) -> None:
    """CSA: the second halves of the window that ends here, the first halves of the one before."""
    high, total = np.empty(cols, np.float32), np.zeros(cols, np.float32)
    for j in range(cols):
        high[j] = np.float32(-np.inf)
        out[j] = np.float32(0)
    for sweep in range(2):
        for back in range(7, -1, -1):
            if back > position:
                continue
            at = 4 * (((position - back) % ring) * 2 * cols + (cols if back < 4 else 0))
            kv, gate = view_float32(kvs + at, cols), view_float32(gates + at, cols)
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


@once
def _pool_online(
    ring: int, size: int, position: int, ratio: int, kv: Any, gate: Any, out: Any
) -> None:
    """HCA: move the running softmax on by one token; `out` = its average so far.

    The ring holds (maximum, sum, weighted sum), each [cols], after each of the last `size` tokens.
    """
    cols = out.shape[0]
    new = view_float32(ring + 12 * (position % size) * cols, 3 * cols)
    high, total, value = new[:cols], new[cols : 2 * cols], new[2 * cols :]
    if position % ratio == 0:
        for j in range(cols):
            high[j] = gate[j]
            total[j] = np.float32(1)
            value[j] = kv[j]
    else:
        old = view_float32(ring + 12 * ((position - 1) % size) * cols, 3 * cols)
        old_high, old_total, old_value = old[:cols], old[cols : 2 * cols], old[2 * cols :]
        for j in range(cols):
            m = max(old_high[j], gate[j])
            fade, p = exp32(old_high[j] - m), exp32(gate[j] - m)
            high[j] = m
            total[j] = fma(old_total[j], fade, p)
            value[j] = fma(old_value[j], fade, p * kv[j])
    for j in range(cols):
        out[j] = value[j] / total[j]


def _absorb(record: int, layer: int, a: int, b: int) -> int:
    """Compressor states move on by the rows; entries that are complete go into slabs."""
    k = record_at(record)
    c, ratio = k.head_dim, place(k, layer, layout.RATIO)
    if ratio == 0:
        return 1
    pooled, entry = np.empty(c, np.float32), np.empty(c, np.float32)
    key, wide = np.empty(k.index_dim, np.float32), 2 * k.index_dim
    for t in range(a, b):
        position, slot = of_row(k, layout.POSITION, t), slot_of(k, t)
        ends = position % ratio == ratio - 1 and position - ratio + 1 >= of_row(k, layout.KNOWN, t)
        if ratio == 4:
            at = position % k.tail
            kvs, gates = (
                slot + place(k, layer, layout.TAIL_KV),
                slot + place(k, layer, layout.TAIL_GATE),
            )
            key_kvs = slot + place(k, layer, layout.KEY_TAIL_KV)
            key_gates = slot + place(k, layer, layout.KEY_TAIL_GATE)
            copy(line(k.tail_kv, k.w_tail_kv, t, 2 * c), line(kvs, 2 * c, at, 2 * c))
            copy(line(k.tail_gate, k.w_tail_gate, t, 2 * c), line(gates, 2 * c, at, 2 * c))
            copy(line(k.key_kv, k.w_key_kv, t, wide), line(key_kvs, wide, at, wide))
            copy(line(k.key_gate, k.w_key_gate, t, wide), line(key_gates, wide, at, wide))
            if ends:
                _pool(kvs, gates, k.tail, position, c, pooled)
                _pool(key_kvs, key_gates, k.tail, position, k.index_dim, key)
                _store_index_key(k, layer, t, position, key)
        else:
            kv, gate = line(k.tail_kv, k.w_tail_kv, t, c), line(k.tail_gate, k.w_tail_gate, t, c)
            online = slot + place(k, layer, layout.ONLINE)
            _pool_online(online, k.online, position, ratio, kv, gate, pooled)
        if ends:
            _store_entry(k, layer, t, position, pooled, entry)
    return 1


@inner
def _turn_entry(k: Any, first: int, x: Any) -> None:
    """Rotate an entry to the position of its window's first token."""
    pairs = k.rope_dim // 2
    cos, sin = np.empty(pairs, np.float32), np.empty(pairs, np.float32)
    frequencies = view_float32(k.frequencies + 4 * pairs, pairs)
    for j in range(pairs):
        phase = np.float32(first) * frequencies[j]
        cos[j] = np.float32(math.cos(phase))
        sin[j] = np.float32(math.sin(phase))
    rope(x, cos, sin, np.float32(1))


@once
def _store_entry(k: Any, layer: int, t: int, position: int, pooled: Any, entry: Any) -> None:
    ratio = place(k, layer, layout.RATIO)
    number, per_slab = position // ratio, k.slab_tokens // ratio
    slab, i = slab_of(k, t, number // per_slab), number % per_slab
    rmsnorm(pooled, vector(k, layer, layout.COMP_NORM), k.norm_eps, entry)
    _turn_entry(k, number * ratio, entry)
    data = slab + place(k, layer, layout.KV_DATA) + i * k.kv_data
    scales = slab + place(k, layer, layout.KV_SCALES) + i * k.kv_scales
    store_kv(entry, k.rope_dim, k.kv_form, data, scales)


@once
def _store_index_key(k: Any, layer: int, t: int, position: int, key: Any) -> None:
    number, per_slab = position // 4, k.slab_tokens // 4
    slab, i = slab_of(k, t, number // per_slab), number % per_slab
    rmsnorm(key, vector(k, layer, layout.INDEX_NORM), k.norm_eps, key)
    _turn_entry(k, number * 4, key)
    if rounds(k, layer, layout.R_ENTRIES):
        hadamard(key)
    data = slab + place(k, layer, layout.KEY_DATA) + i * k.key_data
    store_key(key, k.key_form, data, slab + place(k, layer, layout.KEY_SCALES) + i * k.key_scales)


def _remember(record: int, layer: int, a: int, b: int) -> int:
    """The rows' raw entries into the window rings; of a long piece only what still counts."""
    k = record_at(record)
    entry = np.empty(k.head_dim, np.float32)
    for t in range(a, b):
        later = t + k.ring
        if later < b and of_row(k, layout.FIRST, later) == of_row(k, layout.FIRST, t):
            continue
        at, slot = of_row(k, layout.POSITION, t) % k.ring, slot_of(k, t)
        copy(line(k.kv, k.w_kv, t, k.head_dim), entry)
        data = slot + place(k, layer, layout.WINDOW_DATA) + at * k.kv_data
        scales = slot + place(k, layer, layout.WINDOW_SCALES) + at * k.kv_scales
        store_kv(entry, k.rope_dim, k.kv_form, data, scales)
    return 1


absorb = external("fathom_absorb", _absorb, 4, fails=True)
remember = external("fathom_remember", _remember, 4, fails=True)
