"""Where everything lies that the compiled rows read and write: one record of numbers and addresses.

The record is what every function gets. Arrays are made of addresses where they are used: a function
that takes fifteen arrays compiles five times as long.

Paper: none (implementation of §2).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from fathom.kernels.numba.compiled import inner
from fathom.kernels.numba.memory import pointer, view_float32, view_int32, view_int64
from fathom.kernels.numba.vector import PANEL, panels


def _numbered(count: int) -> Any:
    """Numbers to pass on: numba compiles a function anew for every literal integer it is given."""
    return map(np.int64, range(count))


ZERO, ONE = _numbered(2)
# Matrices of a block, by their place in the table `meta`.
(ATTN_FN, FFN_FN, WQ_A, WQ_B, WKV, WO_A, WO_B, COMP_KV, COMP_GATE, INDEX_KV, INDEX_GATE,
 INDEX_Q, INDEX_W, GATE, W1, W2, W3, SHARED_1, SHARED_2, SHARED_3, HEAD_FN, HEAD, E_PROJ,
 H_PROJ) = _numbered(24)  # fmt: skip
MATRICES = 24
# Vectors of a block.
(ATTN_BASE, ATTN_SCALE, FFN_BASE, FFN_SCALE, ATTN_NORM, FFN_NORM, Q_NORM, KV_NORM, SINK, COMP_APE,
 COMP_NORM, INDEX_APE, INDEX_NORM, GATE_BIAS, HEAD_BASE, HEAD_SCALE, NORM, E_NORM,
 H_NORM) = _numbered(19)  # fmt: skip
VECTORS = 19
# Which inputs are rounded to FP8.
R_QKV, R_WQ_B, R_WO_B, R_EXPERTS, R_SHARED, R_INDEX_Q, R_ENTRIES, R_MTP = _numbered(8)
ROUNDS = 8
# Where a layer's entries lie in a slab and its state in a slot, in bytes.
(KV_DATA, KV_SCALES, KEY_DATA, KEY_SCALES, WINDOW_DATA, WINDOW_SCALES, TAIL_KV, TAIL_GATE,
 KEY_TAIL_KV, KEY_TAIL_GATE, ONLINE, RATIO) = _numbered(12)  # fmt: skip
PLACES = 12
# Columns of `meta`: per matrix its offset, 1 for bfloat16, rows and cols; per vector its offset and
# length; then roundings and places.
ROUND_0 = 4 * MATRICES + 2 * VECTORS
PLACE_0 = ROUND_0 + ROUNDS
COLUMNS = PLACE_0 + PLACES
TOKEN, POSITION, SLOT, FIRST, KNOWN = _numbered(5)

INTEGERS = (
    "streams", "hidden", "heads", "head_dim", "rope_dim", "groups", "o_rank", "q_rank",
    "index_heads", "index_dim", "index_topk", "experts", "topk", "inner", "window", "ring", "tail",
    "online", "sinkhorn_iters", "slab_tokens", "slab_bytes", "slot_bytes", "kv_form", "key_form",
    "kv_data", "kv_scales", "key_data", "key_scales", "hash_layers", "vocab",
)  # fmt: skip
REALS = ("hc_eps", "norm_eps", "swiglu_limit", "routed_scaling")
# Buffers of a step, a line per row; the width of a line is in `w_NAME`, in float32.
BUFFERS = (
    "flow", "mixes", "post", "comb", "normed", "rounded", "q_latent", "q", "kv", "tail_kv",
    "tail_gate", "key_kv", "key_gate", "index_q", "index_w", "attended", "low", "y", "plain_cos",
    "plain_sin", "far_cos", "far_sin",
)  # fmt: skip
# half: uint16 (bfloat16) and full: float32, all parameters, a matrix as panels [panels, cols, 32],
# experts and groups one after the other; meta: int64 [layers, COLUMNS]; hashes: int64 [hash layers,
# vocab, topk]; embed: float32 [vocab, hidden]; slabs, slots: uint8; tables: int32 [slots, columns];
# frequencies: float32 [2, rope_dim / 2]; rows: int64 [5, capacity]: token, position, slot, first
# row of its sequence's piece, known length; values: uint32, places: int64 [threads, room], held:
# int64 [threads], what each found in a search that they share; chosen: int16 [layers, capacity,
# topk], picked: int32 [layers, capacity, index_topk], both only with `export`.
ARRAYS = (
    "half", "full", "meta", "hashes", "embed", "slabs", "slots", "tables", "frequencies", "rows",
    "values", "places", "held", "chosen", "picked",
)  # fmt: skip
RECORD = np.dtype(
    [(name, np.int64) for name in (*INTEGERS, *ARRAYS, *BUFFERS)]
    + [(f"w_{name}", np.int64) for name in BUFFERS]
    + [(name, np.int64) for name in ("capacity", "table_columns", "slabs_size", "room", "export")]
    + [(name, np.float32) for name in REALS],
    align=True,
)


def matrix_column(which: int) -> int:
    """Column of `meta` with a matrix's offset; then 1 for bfloat16, then rows, then cols."""
    return 4 * int(which)


def vector_column(which: int) -> int:
    """Column of `meta` with a vector's offset; then its length."""
    return 4 * MATRICES + 2 * int(which)


@inner
def record_at(address: int) -> Any:
    """The record that lies at an address."""
    return carray(pointer(address), (1,), RECORD)[0]


@inner
def _number(k: Any, layer: int, column: int) -> int:
    return view_int64(k.meta + 8 * (layer * COLUMNS + column), 1)[0]


@inner
def matrix(
    k: Any, layer: int, which: int, expert: int, rows: int, x: int, x_row: int, out: int,
    out_row: int, scratch: int,
) -> None:  # fmt: skip
    """out = x times the transposed matrix; x, out, scratch are addresses."""
    m = view_int64(k.meta + 8 * (layer * COLUMNS + 4 * which), 4)
    count, cols = (m[2] + PANEL - 1) // PANEL, m[3]
    offset = m[0] + expert * count * PANEL * cols
    w = k.half + 2 * offset if m[1] else k.full + 4 * offset
    panels(m[1], rows, count, cols, x, x_row, w, scratch, out, out_row)


@inner
def vector(k: Any, layer: int, which: int) -> Any:
    """A vector of parameters."""
    v = view_int64(k.meta + 8 * (layer * COLUMNS + 4 * MATRICES + 2 * which), 2)
    return view_float32(k.full + 4 * v[0], v[1])


@inner
def rounds(k: Any, layer: int, which: int) -> bool:
    """Whether an input is rounded to FP8."""
    return _number(k, layer, ROUND_0 + which) != 0


@inner
def place(k: Any, layer: int, which: int) -> int:
    """Where something of a layer lies in a slab or slot."""
    return _number(k, layer, PLACE_0 + which)


@inner
def of_row(k: Any, which: int, t: int) -> int:
    """The token, position, slot, first row or known length of row t."""
    return view_int64(k.rows + 8 * (which * k.capacity + t), 1)[0]


@inner
def line(buffer: int, width: int, t: int, cols: int) -> Any:
    """The first `cols` numbers of line t of a buffer."""
    return view_float32(buffer + 4 * t * width, cols)


@inner
def part(array: Any, width: int, i: int, cols: int) -> Any:
    """The same of an array [lines * width] that a function made for itself."""
    return array[i * width : i * width + cols]


@inner
def slab_of(k: Any, t: int, number: int) -> int:
    """The address of a slab of row t's sequence."""
    at = k.tables + 4 * (of_row(k, SLOT, t) * k.table_columns + number)
    return k.slabs + np.int64(view_int32(at, 1)[0]) * k.slab_bytes


@inner
def slot_of(k: Any, t: int) -> int:
    """The address of the slot of row t's sequence."""
    return k.slots + of_row(k, SLOT, t) * k.slot_bytes
