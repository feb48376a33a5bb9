"""What a chunk of one sequence leaves in its caches: raw entries in the window's ring, compressed
entries and index keys of the windows it completes, the compressors' states; and the indexer's
queries, rotated and rounded.

Raw entries are also returned, decoded, for the chunk's own attention: `chunk_entries_older` reads
those of the window before the chunk from the ring before `chunk_entries_raw` overwrites it. Windows
are independent programs of `chunk_entries_compressed`; the ones that began before the chunk read
the states, of which a copy is kept until all have, since the last window writes them.

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
from fathom.kernels.triton.entries import (
    finish_entry,
    index_queries,
    overlapped,
    store_entry,
    store_key,
)
from fathom.quant import kv_pack

Compressor = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
READ_ROWS = 16  # entries of one program of chunk_entries_read
STEP = 16  # tokens of one step through a window of 128
INDEX_HEADS = 64  # of one program of chunk_index_queries, at most


@triton.jit
def decode_entries(data, scales, live, COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr):
    """Entries at pointers [rows] to their data and scale bytes: [rows, WIDE] float32."""
    STILL: tl.constexpr = COLS - ROPE
    col = tl.arange(0, WIDE)
    still = live[:, None] & (col < STILL)[None, :]
    codes = tl.load(data[:, None] + col[None, :], mask=still, other=0)
    unit = tl.load(scales[:, None] + col[None, :] // 64, mask=still, other=0)
    value = f.decode_e4m3(codes).to(tl.float32) * (f.decode_unit(unit) * f.E4M3_UNIT)
    rope = (data + STILL).to(tl.pointer_type(tl.bfloat16))
    turned = live[:, None] & ((col >= STILL) & (col < COLS))[None, :]
    bits = tl.load(rope[:, None] + (col - STILL)[None, :], mask=turned, other=0.0)
    return tl.where((col < STILL)[None, :], value, bits.to(tl.float32))


@triton.jit
def chunk_entries_read(
    pool, page_stride, entry_offset, table, out, count,
    COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Compressed entries of a sequence, decoded: out [entries, COLS]."""
    entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = entry < count
    DATA: tl.constexpr = COLS + ROPE
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    page = tl.load(table + entry // PAGE, mask=live, other=0).to(tl.int64)
    block = pool + page * page_stride + entry_offset
    data, scales = block + entry % PAGE * DATA, block + PAGE * DATA + entry % PAGE * SCALES
    value = decode_entries(data, scales, live, COLS, ROPE, WIDE)
    col = tl.arange(0, WIDE)[None, :]
    at = out + entry[:, None].to(tl.int64) * COLS + col
    tl.store(at, value.to(out.dtype.element_ty), mask=live[:, None] & (col < COLS))


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
        chunk_entries_read[(triton.cdiv(count, READ_ROWS),)](
            pool, pool.stride(0), entry_offset, table, out, count, COLS=out.shape[1],
            ROPE=rope_dim, WIDE=triton.next_power_of_2(out.shape[1]), PAGE=page_entries,
            ROWS=READ_ROWS, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["start"])
def chunk_entries_older(
    ring, recent, start,
    COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """The window before the chunk, from its ring: row r holds token start - WINDOW + r."""
    place = tl.program_id(0) + tl.zeros([1], tl.int32)
    token = start - WINDOW + place
    DATA: tl.constexpr = COLS + ROPE
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    slot = (token + RING) % RING
    value = decode_entries(
        ring + slot * DATA, ring + RING * DATA + slot * SCALES, token >= 0, COLS, ROPE, WIDE
    )
    col = tl.arange(0, WIDE)[None, :]
    tl.store(
        recent + place[:, None] * COLS + col, value.to(recent.dtype.element_ty), mask=col < COLS
    )


@triton.jit
def _as_stored(value, COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr):
    """One entry [WIDE] float32 as reading it back from its bytes would give it."""
    groups = tl.reshape(value, [WIDE // 64, 64])
    amax = f.largest_magnitude(groups, 1, f.FP8_FLOOR)
    unit, inverse = f.power_of_two_scale(amax, f.E4M3_RECIPROCAL)
    rounded = f.round_e4m3(groups * inverse[:, None]) * unit[:, None]
    turned = (f.bfloat16_bits(groups).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    still = tl.arange(0, WIDE // 64) < (COLS - ROPE) // 64
    return tl.reshape(tl.where(still[:, None], rounded, turned), [WIDE])


@triton.jit(do_not_specialize=["start", "tokens"])
def chunk_entries_raw(
    low, low_stride, kv_norm, rotation, ring, recent, start, tokens, eps,
    COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """A token's raw entry: decoded for the chunk, and into the ring unless it is overwritten."""
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = low.dtype.element_ty
    DATA: tl.constexpr = COLS + ROPE
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    col = tl.arange(0, WIDE)
    value = tl.load(low + token * low_stride + col, mask=col < COLS, other=0.0).to(tl.float32)
    cos = rotation + token * ROPE
    value = finish_entry(value, kv_norm, cos, cos + ROPE // 2, eps, dtype, COLS, ROPE, WIDE)
    kept = _as_stored(value, COLS, ROPE, WIDE)
    tl.store(recent + (WINDOW + token) * COLS + col, kept.to(dtype), mask=col < COLS)
    if token >= tokens - RING:
        slot = (start + token) % RING
        store_entry(value, ring + slot * DATA, ring + RING * DATA + slot * SCALES, COLS, ROPE, WIDE)


@triton.jit
def _whole(
    projected, stride, ape, state, new_state, entry, start, end,
    WINDOW: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """The softmax over a window of 128 tokens as far as they are there: [WIDE] float32."""
    col = tl.arange(0, WIDE)
    used = col < COLS
    first = entry * WINDOW
    began = (first + col * 0 < start) & used
    own = state + (start + TAIL - 1) % TAIL * 3 * COLS + col
    high = tl.load(own, mask=began, other=-float("inf"))
    total = tl.load(own + COLS, mask=began, other=0.0)
    value = tl.load(own + 2 * COLS, mask=began, other=0.0)
    last = tl.minimum(end, first + WINDOW)
    for begin in range(tl.maximum(first, start), last, STEP):
        token = begin + tl.arange(0, STEP)
        live = (token < last)[:, None]
        row = projected + (token - start).to(tl.int64)[:, None] * stride + col[None, :]
        gate = tl.load(row + COLS, mask=live & used[None, :], other=0.0)
        bias = ape + (token % WINDOW)[:, None] * COLS + col[None, :]
        gate = tl.where(live, gate + tl.load(bias, mask=used[None, :], other=0.0), -float("inf"))
        # A NaN among the gates is left out here and makes the sums NaN.
        higher = tl.maximum(high, tl.max(gate, axis=0))
        fade, p = tl.exp(high - higher), tl.exp(gate - higher[None, :])
        kv = tl.load(row, mask=live & used[None, :], other=0.0)
        total = total * fade + tl.sum(p, axis=0)
        value = value * fade + tl.sum(p * kv, axis=0)
        high = higher
    if last == end:
        own = new_state + (end - 1) % TAIL * 3 * COLS + col
        tl.store(own, high, mask=used)
        tl.store(own + COLS, total, mask=used)
        tl.store(own + 2 * COLS, value, mask=used)
    return value / total


@triton.jit(do_not_specialize=["start", "tokens", "known"])
def chunk_entries_compressed(
    projected, stride, ape, norm, state, new_state, index_ape, index_norm, index_state,
    entry_rotation, table, pool, page_stride, entry_offset, index_offset, start, tokens, known, eps,
    dtype: tl.constexpr, KIND: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr,
    WIDE: tl.constexpr, INDEX_COLS: tl.constexpr, PAGE: tl.constexpr, TAIL: tl.constexpr,
    STEP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A window's compressed entry, or its index key, where the chunk completes it."""
    DATA: tl.constexpr = COLS + ROPE
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    entry = start // KIND + tl.program_id(0)
    end = start + tokens
    complete = ((entry + 1) * KIND <= end) & (entry * KIND >= known)
    page = tl.load(table + entry // PAGE, mask=complete, other=0).to(tl.int64)
    page = pool + page * page_stride
    place = entry % PAGE
    cos = entry_rotation + tl.program_id(0) * ROPE
    sin = cos + ROPE // 2
    last = entry * KIND + KIND - 1
    if tl.program_id(1) == 0:
        if KIND > 4:  # also of a window that is not complete: its state is kept
            value = _whole(
                projected, stride, ape, state, new_state, entry, start, end, KIND, COLS, WIDE, TAIL,
                STEP,
            )  # fmt: skip
        if complete:
            if KIND == 4:
                value = overlapped(projected, stride, ape, state, last, start, COLS, WIDE, TAIL)
            value = finish_entry(value, norm, cos, sin, eps, dtype, COLS, ROPE, WIDE)
            data = page + entry_offset
            scales = data + PAGE * DATA + place * SCALES
            store_entry(value, data + place * DATA, scales, COLS, ROPE, WIDE)
    elif complete:
        key = overlapped(
            projected + 4 * COLS, stride, index_ape, index_state, last, start, INDEX_COLS,
            INDEX_COLS, TAIL,
        )  # fmt: skip
        key = finish_entry(key, index_norm, cos, sin, eps, dtype, INDEX_COLS, ROPE, INDEX_COLS)
        store_key(key, page + index_offset, place, dtype, PAGE, INDEX_COLS, FP8)


@triton.jit
def chunk_index_queries(
    query, query_stride, rotation, out,
    ROPE: tl.constexpr, COLS: tl.constexpr, TOTAL: tl.constexpr, HEADS: tl.constexpr,
    DOT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """HEADS of a token's index queries, rotated and rounded."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = head[:, None] * COLS + tl.arange(0, COLS)[None, :]
    index_queries(
        query + token * query_stride, rotation + token * ROPE, out + token * TOTAL * COLS, at,
        query.dtype.element_ty, COLS, ROPE, HEADS, DOT, FP8,
    )  # fmt: skip


def _keep_last(projected: torch.Tensor, first: int, compressor: Compressor, start: int) -> None:
    """Bring a ring of the last tokens up to date.

    projected: [tokens, cols] float32, kv from column `first` on, then gate.
    """
    ape, _, state = compressor
    tokens, (_, tail, width) = projected.shape[0], state.shape
    kept = min(tail, tokens)
    at = torch.arange(start + tokens - kept, start + tokens, device=projected.device)
    last = projected[tokens - kept :, first : first + 2 * width].unflatten(1, (2, width))
    bias = torch.stack((torch.zeros_like(ape), ape), dim=1)  # [4, 2, width]
    state[:, at % tail] = (last + bias[at % 4]).transpose(0, 1)


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
    key_format: str = "fp4",
    known: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As the reference. low: [tokens, rows], whose last head_dim columns are the raw entry;
    kv_norm: [head_dim]; rotation: [tokens, 2, rope_dim / 2]; ring: [bytes] uint8; projected:
    [tokens, cols] float32; query: [tokens, rows]; entry_rotation: [entries, 2, rope_dim / 2];
    table: [pages] int32; pool: [pages, bytes] uint8; compressor, index_compressor: the same as
    there. Returns (raw entries [window + tokens, head_dim], index queries [tokens, index_heads,
    index_dim] or None).
    """
    tokens, head_dim, rope = low.shape[0], kv_norm.shape[0], 2 * rotation.shape[-1]
    sizes = {"COLS": head_dim, "ROPE": rope, "WIDE": triton.next_power_of_2(head_dim)}
    places = {"WINDOW": window, "RING": kv_pack.ring_entries(ring, head_dim, rope)}
    recent = torch.empty(window + tokens, head_dim, dtype=low.dtype, device=low.device)
    chunk_entries_older[(window,)](ring, recent, start, **sizes, **places)
    chunk_entries_raw[(tokens,)](
        low[:, low.shape[1] - head_dim :], low.stride(0), kv_norm, rotation, ring, recent, start,
        tokens, norm_eps, num_warps=4, **sizes, **places,
    )  # fmt: skip
    if kind == 0:
        return recent, None
    assert projected is not None
    assert compressor is not None
    assert pool is not None
    ape, norm, state = compressor
    _, index_norm, _ = index = index_compressor or compressor
    touched = (start + tokens - 1) // kind - start // kind + 1
    chunk_entries_compressed[(touched, 2 if kind == 4 else 1)](
        projected=projected, stride=projected.stride(0), ape=ape, norm=norm, state=state.clone(),
        new_state=state, index_ape=index[0], index_norm=index_norm, index_state=index[2],
        entry_rotation=entry_rotation, table=table, pool=pool, page_stride=pool.stride(0),
        entry_offset=offsets[0], index_offset=offsets[1], start=start, tokens=tokens, known=known,
        eps=norm_eps, dtype=tl.float32 if low.dtype == torch.float32 else tl.bfloat16,
        KIND=kind, INDEX_COLS=index_norm.shape[0] if kind == 4 else 64, PAGE=page_entries,
        TAIL=state.shape[1 if kind == 4 else 0], STEP=STEP, FP8=key_format == "fp8", num_warps=4,
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
    chunk_index_queries[(tokens, index_heads // each)](
        query[:, query.shape[1] - index_heads * cols :], query.stride(0), rotation, index_query,
        ROPE=rope, COLS=cols, TOTAL=index_heads, HEADS=each,
        DOT=tl.float32 if low.dtype == torch.float32 else tl.bfloat16, FP8=key_format == "fp8",
        num_warps=4,
    )  # fmt: skip
    return recent, index_query
