"""What a token leaves in the caches, in one launch a layer: the raw entry in its window's ring, the
compressors' states and, where the token completes a window, the compressed entry and its index key;
and the indexer's query, rotated and rounded.

Each of these is a role of the program grid; a token's roles are independent. Entries are packed as
fathom/quant/kv_pack.py describes: a ring or page holds all data bytes, then all scale bytes.

Bytes: a few kilobytes a token; the time is one launch.

Paper: §2.3.1, eq. 9-14; §2.3.2, eq. 20-23; §2.3.4 (storage); §3.5.1 (state slot and blocks).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f

QUERY_HEADS = 16  # index heads of one program


@triton.jit
def turn(even, odd, cos, sin, PAIRS: tl.constexpr, TURNED: tl.constexpr):
    """Rotate the last TURNED of PAIRS pairs; the others pass through unchanged."""
    pair = tl.arange(0, PAIRS)
    live = pair >= PAIRS - TURNED
    c = tl.load(cos + pair - (PAIRS - TURNED), mask=live, other=1.0)
    s = tl.load(sin + pair - (PAIRS - TURNED), mask=live, other=0.0)
    return even * c - odd * s, even * s + odd * c


@triton.jit
def finish_entry(
    value, norm, cos, sin, eps, dtype: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr
):
    """RMSNorm and rotation of one entry [COLS] float32, rounded to the arithmetic's dtype."""
    value = value.to(dtype).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / COLS + eps)
    weight = tl.load(norm + tl.arange(0, COLS)).to(tl.float32)
    value = (value * r * weight).to(dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [COLS // 2, 2]))
    even, odd = turn(even, odd, cos, sin, COLS // 2, ROPE // 2)
    return tl.reshape(tl.join(even, odd), [COLS]).to(dtype).to(tl.float32)


@triton.jit
def store_entry(value, data, scales, COLS: tl.constexpr, ROPE: tl.constexpr):
    """Pack one entry [COLS]: e4m3 in groups of 64, the rotated part in BF16."""
    groups = tl.reshape(value, [COLS // 64, 64])
    group, col = tl.arange(0, COLS // 64), tl.arange(0, 64)
    still = group < (COLS - ROPE) // 64
    amax = tl.maximum(tl.max(tl.abs(groups), axis=1), f.FP8_FLOOR)
    unit, inverse = f.power_of_two_scale(amax, f.E4M3_RECIPROCAL)
    rounded = f.round_e4m3(groups * inverse[:, None])
    at = group[:, None] * 64 + col[None, :]
    tl.store(data + at, f.encode_e4m3(rounded, groups), mask=still[:, None])
    tl.store(scales + group, f.exponent_byte(unit), mask=still)
    rotated = (data + (COLS - ROPE)).to(tl.pointer_type(tl.uint16))
    last = (group >= (COLS - ROPE) // 64)[:, None]
    tl.store(rotated + at - (COLS - ROPE), f.bfloat16_bits(groups), mask=last)


@triton.jit
def _overlapped(
    projected, ape, state, position, kv_col, gate_col, WIDTH: tl.constexpr, COLS: tl.constexpr
):
    """Put this token into the ring of 8 and weigh the two windows that meet: [COLS] float32.

    The result means something only when the token completes a window.
    """
    wide = tl.arange(0, WIDTH)
    kv = tl.load(projected + kv_col + wide)
    gate = tl.load(projected + gate_col + wide) + tl.load(ape + position % 4 * WIDTH + wide)
    slot = position % 8
    tl.store(state + slot * 2 * WIDTH + wide, kv)
    tl.store(state + (slot * 2 + 1) * WIDTH + wide, gate)
    row, col = tl.arange(0, 8), tl.arange(0, COLS)
    at = position - 7 + row  # the token of each row; the last one is this token
    half = tl.where(row < 4, 0, COLS)
    source = state + ((at + 8) % 8 * 2 * WIDTH + half)[:, None] + col[None, :]
    old = ((row < 7) & (at >= 0))[:, None]
    this = (row == 7)[:, None]
    own_kv = tl.load(projected + kv_col + COLS + col)[None, :]
    own_gate = tl.load(projected + gate_col + COLS + col) + tl.load(
        ape + position % 4 * WIDTH + COLS + col
    )
    values = tl.where(this, own_kv, tl.load(source, mask=old, other=0.0))
    gates = tl.where(
        this, own_gate[None, :], tl.load(source + WIDTH, mask=old, other=-float("inf"))
    )
    p = tl.exp(gates - tl.max(gates, axis=0)[None, :])
    return tl.sum(values * (p / tl.sum(p, axis=0)[None, :]), axis=0)


@triton.jit
def _accumulated(projected, ape, state, position, COLS: tl.constexpr):
    """Fold this token into the running softmax of its window of 128: [COLS] float32.

    state: maximum, sum and weighted sum of each column. The result means something only when the
    token completes a window.
    """
    col = tl.arange(0, COLS)
    place = position % 128
    kv = tl.load(projected + col)
    gate = tl.load(projected + COLS + col) + tl.load(ape + place * COLS + col)
    begun = place + col * 0 > 0
    high = tl.load(state + col, mask=begun, other=-float("inf"))
    total = tl.load(state + COLS + col, mask=begun, other=0.0)
    value = tl.load(state + 2 * COLS + col, mask=begun, other=0.0)
    higher = tl.maximum(high, gate)
    fade, p = tl.exp(high - higher), tl.exp(gate - higher)
    total = total * fade + p
    value = value * fade + p * kv
    tl.store(state + col, higher)
    tl.store(state + COLS + col, total)
    tl.store(state + 2 * COLS + col, value)
    return value / total


@triton.jit
def signs(DIM: tl.constexpr):
    """The Hadamard matrix in natural order, without its factor: [DIM, DIM] of +-1."""
    i, j = tl.arange(0, DIM), tl.arange(0, DIM)
    x = i[:, None] & j[None, :]
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return (1 - 2 * (x & 1)).to(tl.float32)


@triton.jit
def _prepare(
    low, low_stride, kv_first, kv_norm, projected, projected_stride, ape, norm, index_ape,
    index_norm, query, query_stride, query_first, positions, rotation, entry_rotation, table,
    pages, ring, ring_stride, state, index_state, pool, page_stride, entry_offset, index_offset,
    index_query, eps,
    KIND: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr, WINDOW: tl.constexpr,
    INDEX_COLS: tl.constexpr, INDEX_HEADS: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    role, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = low.dtype.element_ty
    DATA: tl.constexpr = COLS + ROPE  # data bytes of an entry
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    position = tl.load(positions + token)
    cos = rotation + token * ROPE
    sin = cos + ROPE // 2
    if role == 0:
        raw = tl.load(low + token * low_stride + kv_first + tl.arange(0, COLS)).to(tl.float32)
        value = finish_entry(raw, kv_norm, cos, sin, eps, dtype, COLS, ROPE)
        slot = position % WINDOW
        own = ring + token * ring_stride
        store_entry(value, own + slot * DATA, own + WINDOW * DATA + slot * SCALES, COLS, ROPE)
    if KIND > 0:
        entry = position // KIND
        entry_cos = entry_rotation + token * ROPE
        entry_sin = entry_cos + ROPE // 2
        complete = position % KIND == KIND - 1
        page = tl.load(table + token * pages + entry // PAGE).to(tl.int64)
        place = entry % PAGE
        row = projected + token * projected_stride
        if role == 1:
            if KIND == 4:
                own = state + token * 8 * 2 * 2 * COLS
                value = _overlapped(row, ape, own, position, 0, 2 * COLS, 2 * COLS, COLS)
            else:
                value = _accumulated(row, ape, state + token * 3 * COLS, position, COLS)
            if complete:
                value = finish_entry(value, norm, entry_cos, entry_sin, eps, dtype, COLS, ROPE)
                data = pool + page * page_stride + entry_offset
                store_entry(
                    value, data + place * DATA, data + PAGE * DATA + place * SCALES, COLS, ROPE
                )
    if KIND == 4:
        if role == 2:
            own = index_state + token * 8 * 2 * 2 * INDEX_COLS
            first = 4 * COLS
            value = _overlapped(
                row, index_ape, own, position, first, first + 2 * INDEX_COLS, 2 * INDEX_COLS,
                INDEX_COLS,
            )  # fmt: skip
            if complete:
                value = finish_entry(
                    value, index_norm, entry_cos, entry_sin, eps, dtype, INDEX_COLS, ROPE
                )
                value = tl.sum(value[None, :] * signs(INDEX_COLS), axis=1) * INDEX_COLS**-0.5
                value = value.to(dtype).to(tl.float32)
                groups = tl.reshape(value, [INDEX_COLS // 32, 32])
                amax = tl.maximum(tl.max(tl.abs(groups), axis=1), f.FP4_FLOOR)
                unit, inverse = f.power_of_two_scale(amax, f.E2M1_RECIPROCAL)
                codes = f.encode_e2m1(f.round_e2m1(groups * inverse[:, None]), groups)
                even, odd = tl.split(tl.reshape(codes, [INDEX_COLS // 2, 2]))
                keys = pool + page * page_stride + index_offset
                at = place * (INDEX_COLS // 2) + tl.arange(0, INDEX_COLS // 2)
                tl.store(keys + at, (even | (odd << 4)).to(tl.uint8))
                at = PAGE * (INDEX_COLS // 2) + place * (INDEX_COLS // 32)
                tl.store(keys + at + tl.arange(0, INDEX_COLS // 32), f.exponent_byte(unit))
        if role >= 3:
            head = (role - 3) * HEADS + tl.arange(0, HEADS)
            col = tl.arange(0, INDEX_COLS)
            at = head[:, None] * INDEX_COLS + col[None, :]
            q = tl.load(query + token * query_stride + query_first + at).to(tl.float32)
            even, odd = tl.split(tl.reshape(q, [HEADS, INDEX_COLS // 2, 2]))
            even, odd = turn(even, odd, cos, sin, INDEX_COLS // 2, ROPE // 2)
            q = tl.reshape(tl.join(even, odd), [HEADS, INDEX_COLS]).to(dtype)
            q = tl.dot(q.to(DOT), signs(INDEX_COLS).to(DOT), input_precision="ieee")
            q = (q * INDEX_COLS**-0.5).to(dtype).to(tl.float32)
            groups = tl.reshape(q, [HEADS, INDEX_COLS // 32, 32])
            amax = tl.maximum(tl.max(tl.abs(groups), axis=2), f.FP4_FLOOR)
            unit, inverse = f.power_of_two_scale(amax, f.E2M1_RECIPROCAL)
            q = tl.reshape(
                f.round_e2m1(groups * inverse[:, :, None]) * unit[:, :, None], [HEADS, INDEX_COLS]
            )
            tl.store(index_query + token * INDEX_HEADS * INDEX_COLS + at, q.to(dtype))


@register("store_entries", "triton")
def store_entries(
    low: torch.Tensor,
    kv_norm: torch.Tensor,
    positions: torch.Tensor,
    rotation: torch.Tensor,
    ring: torch.Tensor,
    *,
    kind: int,
    window: int,
    norm_eps: float,
    projected: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    compressor: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    index_compressor: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    entry_rotation: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    pool: torch.Tensor | None = None,
    offsets: tuple[int, int] = (0, 0),
    page_entries: int = 1,
    index_heads: int = 0,
) -> torch.Tensor | None:
    """As the reference. low: [tokens, rows], whose last head_dim columns are the raw entry;
    kv_norm: [head_dim]; positions: [tokens] int32; rotation, entry_rotation: [tokens, 2,
    rope_dim / 2]; ring: [tokens, bytes] uint8; projected: [tokens, cols] float32; query:
    [tokens, rows]; table: [tokens, pages] int32; pool: [pages, bytes] uint8; compressor,
    index_compressor: the same as there. Returns index queries [tokens, index_heads, index_dim] or
    None.
    """
    tokens, head_dim = low.shape[0], kv_norm.shape[0]
    none = low
    ape, norm, state = compressor or (none, none, none)
    index_ape, index_norm, index_state = index_compressor or (none, none, none)
    index_cols = index_norm.shape[0] if index_compressor else 64
    index_query = None
    if index_compressor is not None:
        index_query = torch.empty(
            tokens, index_heads, index_cols, dtype=low.dtype, device=low.device
        )
    roles = {0: 1, 4: 3 + index_heads // QUERY_HEADS}.get(kind, 2)
    heads_at = query.shape[1] - index_heads * index_cols if query is not None else 0
    _prepare[(roles, tokens)](
        low, low.stride(0), low.shape[1] - head_dim, kv_norm,
        projected if projected is not None else none,
        projected.stride(0) if projected is not None else 0,
        ape, norm, index_ape, index_norm,
        query if query is not None else none,
        query.stride(0) if query is not None else 0, heads_at,
        positions, rotation, entry_rotation if entry_rotation is not None else rotation,
        table if table is not None else positions, table.shape[1] if table is not None else 0,
        ring, ring.stride(0), state, index_state, pool if pool is not None else ring,
        pool.stride(0) if pool is not None else 0, *offsets,
        index_query if index_query is not None else none, norm_eps,
        KIND=kind, COLS=head_dim, ROPE=2 * rotation.shape[-1], WINDOW=window,
        INDEX_COLS=index_cols, INDEX_HEADS=index_heads, PAGE=page_entries, HEADS=QUERY_HEADS,
        DOT=tl.float32 if low.dtype == torch.float32 else tl.bfloat16, num_warps=4,
    )  # fmt: skip
    return index_query
