"""What a chunk of one sequence leaves in its caches: raw entries in the window's ring, compressed
entries and index keys of the windows it completes, the compressors' states; and the indexer's
queries, rotated and rounded.

Raw entries are also returned, decoded, for the chunk's own attention: `_older` reads those of the
window before the chunk from the ring before `_raw` overwrites it. Windows are independent programs
of `_compressed`; the ones that began before the chunk read the states, of which a copy is kept
until all have, since the last window writes them.

Bytes a token of a CSA layer at V4-Flash's sizes: 10 KB of projections and 1 KB of raw entry read,
16 KB of index queries read and written each; 0.3 GB and 0.1 ms for 8,192 tokens.

Paper: §2.3.1, eq. 9-14; §2.3.2, eq. 20-23; §2.3.4 (storage); §3.5.1 (state slot and blocks).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f
from fathom.kernels.triton.entries import finish_entry, signs, store_entry, turn

Compressor = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
READ_ROWS = 16  # entries of one program of _read_entries
STEP = 16  # tokens of one step through a window of 128
INDEX_HEADS = 64  # of one program of _index_queries, at most


@triton.jit
def decode_entries(data, scales, live, dtype: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr):
    """Entries at pointers [rows] to their data and scale bytes: [rows, COLS] float32."""
    STILL: tl.constexpr = COLS - ROPE
    col = tl.arange(0, COLS)
    still = live[:, None] & (col < STILL)[None, :]
    codes = tl.load(data[:, None] + col[None, :], mask=still, other=0)
    unit = tl.load(scales[:, None] + col[None, :] // 64, mask=still, other=0)
    value = f.decode_e4m3(codes).to(tl.float32) * (f.decode_e8m0(unit) * f.E4M3_UNIT)
    rope = (data + STILL).to(tl.pointer_type(tl.bfloat16))
    turned = live[:, None] & (col >= STILL)[None, :]
    bits = tl.load(rope[:, None] + (col - STILL)[None, :], mask=turned, other=0.0)
    return tl.where((col < STILL)[None, :], value, bits.to(tl.float32))


@triton.jit
def _read_entries(
    pool, page_stride, entry_offset, table, out, count,
    COLS: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = entry < count
    DATA: tl.constexpr = COLS + ROPE
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    page = tl.load(table + entry // PAGE, mask=live, other=0).to(tl.int64)
    block = pool + page * page_stride + entry_offset
    data, scales = block + entry % PAGE * DATA, block + PAGE * DATA + entry % PAGE * SCALES
    value = decode_entries(data, scales, live, out.dtype.element_ty, COLS, ROPE)
    at = out + entry[:, None].to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=live[:, None])


def read_entries(
    pool: torch.Tensor,
    table: torch.Tensor,
    count: int,
    out: torch.Tensor,
    *,
    entry_offset: int,
    page_entries: int,
    rope_dim: int,
) -> None:
    """Decode a sequence's first `count` compressed entries. pool: [pages, bytes] uint8; table:
    [pages] int32; out: [entries, head_dim].
    """
    if count:
        _read_entries[(triton.cdiv(count, READ_ROWS),)](
            pool, pool.stride(0), entry_offset, table, out, count, COLS=out.shape[1],
            ROPE=rope_dim, PAGE=page_entries, ROWS=READ_ROWS, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["start"])
def _older(ring, recent, start, COLS: tl.constexpr, ROPE: tl.constexpr, WINDOW: tl.constexpr):
    """The window before the chunk, from its ring: row r holds token start - WINDOW + r."""
    place = tl.program_id(0) + tl.zeros([1], tl.int32)
    token = start - WINDOW + place
    DATA: tl.constexpr = COLS + ROPE
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    slot = (token + WINDOW) % WINDOW
    value = decode_entries(
        ring + slot * DATA, ring + WINDOW * DATA + slot * SCALES, token >= 0,
        recent.dtype.element_ty, COLS, ROPE,
    )  # fmt: skip
    at = recent + place[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(at, value.to(recent.dtype.element_ty))


@triton.jit
def _as_stored(value, COLS: tl.constexpr, ROPE: tl.constexpr):
    """One entry [COLS] float32 as reading it back from its bytes would give it."""
    groups = tl.reshape(value, [COLS // 64, 64])
    amax = tl.maximum(tl.max(tl.abs(groups), axis=1), f.FP8_FLOOR)
    unit, inverse = f.power_of_two_scale(amax, f.E4M3_RECIPROCAL)
    rounded = f.round_e4m3(groups * inverse[:, None]) * unit[:, None]
    turned = (f.bfloat16_bits(groups).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    still = tl.arange(0, COLS // 64) < (COLS - ROPE) // 64
    return tl.reshape(tl.where(still[:, None], rounded, turned), [COLS])


@triton.jit(do_not_specialize=["start", "tokens"])
def _raw(
    low, low_stride, kv_norm, rotation, ring, recent, start, tokens, eps,
    COLS: tl.constexpr, ROPE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = low.dtype.element_ty
    DATA: tl.constexpr = COLS + ROPE
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    value = tl.load(low + token * low_stride + tl.arange(0, COLS)).to(tl.float32)
    cos = rotation + token * ROPE
    value = finish_entry(value, kv_norm, cos, cos + ROPE // 2, eps, dtype, COLS, ROPE)
    kept = _as_stored(value, COLS, ROPE)
    tl.store(recent + (WINDOW + token) * COLS + tl.arange(0, COLS), kept.to(dtype))
    if token >= tokens - WINDOW:
        slot = (start + token) % WINDOW
        store_entry(value, ring + slot * DATA, ring + WINDOW * DATA + slot * SCALES, COLS, ROPE)


@triton.jit
def _overlapping(
    projected, stride, ape, state, entry, start, WIDTH: tl.constexpr, COLS: tl.constexpr
):
    """The two windows of 4 tokens that make entry `entry`: [COLS] float32."""
    row, col = tl.arange(0, 8), tl.arange(0, COLS)
    at = 4 * entry - 4 + row
    half = tl.where(row < 4, 0, COLS)
    here = (at >= start)[:, None]
    before = ((at >= 0) & (at < start))[:, None]
    new = projected + (at - start).to(tl.int64)[:, None] * stride + half[:, None] + col[None, :]
    bias = tl.load(ape + ((at + 4) % 4 * WIDTH + half)[:, None] + col[None, :])
    old = state + ((at + 8) % 8 * 2 * WIDTH + half)[:, None] + col[None, :]
    kv = tl.load(new, mask=here, other=0.0) + tl.load(old, mask=before, other=0.0)
    gate = tl.load(new + WIDTH, mask=here, other=0.0) + tl.where(here, bias, 0.0)
    gate += tl.load(old + WIDTH, mask=before, other=0.0)
    gate = tl.where((at >= 0)[:, None], gate, -float("inf"))
    p = tl.exp(gate - tl.max(gate, axis=0)[None, :])
    return tl.sum(p * kv, axis=0) / tl.sum(p, axis=0)


@triton.jit
def _whole(
    projected, stride, ape, state, new_state, entry, start, end,
    WINDOW: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The softmax over a window of 128 tokens as far as they are there: [COLS] float32."""
    col = tl.arange(0, COLS)
    first = entry * WINDOW
    began = first + col * 0 < start
    high = tl.load(state + col, mask=began, other=-float("inf"))
    total = tl.load(state + COLS + col, mask=began, other=0.0)
    value = tl.load(state + 2 * COLS + col, mask=began, other=0.0)
    last = tl.minimum(end, first + WINDOW)
    for begin in range(tl.maximum(first, start), last, STEP):
        token = begin + tl.arange(0, STEP)
        live = (token < last)[:, None]
        own = projected + (token - start).to(tl.int64)[:, None] * stride + col[None, :]
        gate = tl.load(own + COLS, mask=live, other=-float("inf"))
        gate += tl.load(ape + (token % WINDOW)[:, None] * COLS + col[None, :])
        higher = tl.maximum(high, tl.max(gate, axis=0))
        fade, p = tl.exp(high - higher), tl.exp(gate - higher[None, :])
        total = total * fade + tl.sum(p, axis=0)
        value = value * fade + tl.sum(p * tl.load(own, mask=live, other=0.0), axis=0)
        high = higher
    if last == end:
        tl.store(new_state + col, high)
        tl.store(new_state + COLS + col, total)
        tl.store(new_state + 2 * COLS + col, value)
    return value / total


@triton.jit(do_not_specialize=["start", "tokens"])
def _compressed(
    projected, stride, ape, norm, state, new_state, index_ape, index_norm, index_state,
    entry_rotation, table, pool, page_stride, entry_offset, index_offset, start, tokens, eps,
    dtype: tl.constexpr, KIND: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr,
    INDEX_COLS: tl.constexpr, PAGE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    DATA: tl.constexpr = COLS + ROPE
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    entry = start // KIND + tl.program_id(0)
    end = start + tokens
    complete = (entry + 1) * KIND <= end
    page = tl.load(table + entry // PAGE, mask=complete, other=0).to(tl.int64)
    place = entry % PAGE
    cos = entry_rotation + tl.program_id(0) * ROPE
    sin = cos + ROPE // 2
    if tl.program_id(1) == 0:
        if KIND == 4:
            value = _overlapping(projected, stride, ape, state, entry, start, 2 * COLS, COLS)
        else:
            value = _whole(
                projected, stride, ape, state, new_state, entry, start, end, KIND, COLS, STEP
            )
        if complete:
            value = finish_entry(value, norm, cos, sin, eps, dtype, COLS, ROPE)
            data = pool + page * page_stride + entry_offset
            store_entry(value, data + place * DATA, data + PAGE * DATA + place * SCALES, COLS, ROPE)
    elif complete:
        value = _overlapping(
            projected + 4 * COLS, stride, index_ape, index_state, entry, start, 2 * INDEX_COLS,
            INDEX_COLS,
        )  # fmt: skip
        value = finish_entry(value, index_norm, cos, sin, eps, dtype, INDEX_COLS, ROPE)
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


@triton.jit
def _index_queries(
    query, query_stride, rotation, out,
    ROPE: tl.constexpr, COLS: tl.constexpr, TOTAL: tl.constexpr, HEADS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = query.dtype.element_ty
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = head[:, None] * COLS + tl.arange(0, COLS)[None, :]
    q = tl.load(query + token * query_stride + at).to(tl.float32)
    even, odd = tl.split(tl.reshape(q, [HEADS, COLS // 2, 2]))
    cos = rotation + token * ROPE
    even, odd = turn(even, odd, cos, cos + ROPE // 2, COLS // 2, ROPE // 2)
    q = tl.reshape(tl.join(even, odd), [HEADS, COLS]).to(dtype)
    q = tl.dot(q.to(DOT), signs(COLS).to(DOT), input_precision="ieee")
    q = (q * COLS**-0.5).to(dtype).to(tl.float32)
    groups = tl.reshape(q, [HEADS, COLS // 32, 32])
    amax = tl.maximum(tl.max(tl.abs(groups), axis=2), f.FP4_FLOOR)
    unit, inverse = f.power_of_two_scale(amax, f.E2M1_RECIPROCAL)
    q = tl.reshape(f.round_e2m1(groups * inverse[:, :, None]) * unit[:, :, None], [HEADS, COLS])
    tl.store(out + token * TOTAL * COLS + at, q.to(dtype))


def _keep_last(projected: torch.Tensor, first: int, compressor: Compressor, start: int) -> None:
    """Bring a ring of the last eight tokens up to date.

    projected: [tokens, cols] float32, kv from column `first` on, then gate.
    """
    ape, _, state = compressor
    tokens, width = projected.shape[0], state.shape[-1]
    kept = min(8, tokens)
    at = torch.arange(start + tokens - kept, start + tokens, device=projected.device)
    last = projected[tokens - kept :, first : first + 2 * width].unflatten(1, (2, width))
    bias = torch.stack((torch.zeros_like(ape), ape), dim=1)  # [4, 2, width]
    state[at % 8] = last + bias[at % 4]


@register("chunk_entries", "triton")
def chunk_entries(
    low: torch.Tensor,
    kv_norm: torch.Tensor,
    start: int,
    rotation: torch.Tensor,
    ring: torch.Tensor,
    *,
    kind: int,
    window: int,
    norm_eps: float,
    projected: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    compressor: Compressor | None = None,
    index_compressor: Compressor | None = None,
    entry_rotation: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    pool: torch.Tensor | None = None,
    offsets: tuple[int, int] = (0, 0),
    page_entries: int = 1,
    index_heads: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the reference. low: [tokens, rows], whose last head_dim columns are the raw entry;
    kv_norm: [head_dim]; rotation: [tokens, 2, rope_dim / 2]; ring: [bytes] uint8; projected:
    [tokens, cols] float32; query: [tokens, rows]; entry_rotation: [entries, 2, rope_dim / 2];
    table: [pages] int32; pool: [pages, bytes] uint8; compressor, index_compressor: the same as
    there. Returns (raw entries [window + tokens, head_dim], index queries [tokens, index_heads,
    index_dim] or None).
    """
    tokens, head_dim = low.shape[0], kv_norm.shape[0]
    sizes = {"COLS": head_dim, "ROPE": 2 * rotation.shape[-1]}
    recent = torch.empty(window + tokens, head_dim, dtype=low.dtype, device=low.device)
    _older[(window,)](ring, recent, start, WINDOW=window, **sizes)
    _raw[(tokens,)](
        low[:, low.shape[1] - head_dim :], low.stride(0), kv_norm, rotation, ring, recent, start,
        tokens, norm_eps, WINDOW=window, num_warps=4, **sizes,
    )  # fmt: skip
    if kind == 0:
        return recent, None
    assert projected is not None
    assert compressor is not None
    assert pool is not None
    ape, norm, state = compressor
    _, index_norm, _ = index = index_compressor or compressor
    touched = (start + tokens - 1) // kind - start // kind + 1
    _compressed[(touched, 2 if kind == 4 else 1)](
        projected, projected.stride(0), ape, norm, state.clone(), state, index[0], index_norm,
        index[2], entry_rotation, table, pool, pool.stride(0), *offsets, start, tokens, norm_eps,
        dtype=tl.float32 if low.dtype == torch.float32 else tl.bfloat16,
        KIND=kind, INDEX_COLS=index_norm.shape[0], PAGE=page_entries, STEP=STEP, num_warps=4,
        **sizes,
    )  # fmt: skip
    if kind != 4:
        return recent, None
    assert index_compressor is not None
    assert query is not None
    _keep_last(projected, 0, compressor, start)
    _keep_last(projected, 4 * head_dim, index_compressor, start)
    cols = index_norm.shape[0]
    index_query = torch.empty(tokens, index_heads, cols, dtype=low.dtype, device=low.device)
    each = min(INDEX_HEADS, index_heads)
    _index_queries[(tokens, index_heads // each)](
        query[:, query.shape[1] - index_heads * cols :], query.stride(0), rotation, index_query,
        ROPE=sizes["ROPE"], COLS=cols, TOTAL=index_heads, HEADS=each,
        DOT=tl.float32 if low.dtype == torch.float32 else tl.bfloat16, num_warps=4,
    )  # fmt: skip
    return recent, index_query
