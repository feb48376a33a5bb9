"""What a token leaves in the caches, in one launch a layer: the raw entry in its window's ring, the
compressors' states and, where the token completes a window, the compressed entry and its index key;
and the indexer's query, rotated and rounded.

Each of these is a role of the program grid; roles and tokens are independent: what a token needs of
those before it in the same step it takes from their projections, not from the states that they are
writing. Entries are packed as fathom/quant/kv_pack.py describes: a ring or page holds all data
bytes, then all scale bytes. Vectors are as wide as the next power of two (WIDE), COLS of it used.

Bytes: a few kilobytes a token; the time is one launch.

Paper: §2.3.1, eq. 9-14; §2.3.2, eq. 20-23; §2.3.4 (storage); §3.5.1 (state slot and blocks).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f
from fathom.kernels.triton import index_keys
from fathom.quant import kv_pack

QUERY_HEADS = 16  # index heads of one program


@triton.jit
def turn(even, odd, cos, sin, PAIRS: tl.constexpr, FIRST: tl.constexpr, TURNED: tl.constexpr):
    """Rotate TURNED of PAIRS pairs, from FIRST on; the others pass through unchanged."""
    pair = tl.arange(0, PAIRS)
    live = (pair >= FIRST) & (pair < FIRST + TURNED)
    c = tl.load(cos + pair - FIRST, mask=live, other=1.0)
    s = tl.load(sin + pair - FIRST, mask=live, other=0.0)
    return even * c - odd * s, even * s + odd * c


@triton.jit
def finish_entry(
    value, norm, cos, sin, eps, dtype: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """RMSNorm and rotation of one entry [WIDE] float32, rounded to the arithmetic's dtype."""
    value = value.to(dtype).to(tl.float32)
    col = tl.arange(0, WIDE)
    r = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / COLS + eps)
    weight = tl.load(norm + col, mask=col < COLS, other=0.0).to(tl.float32)
    value = (value * r * weight).to(dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [WIDE // 2, 2]))
    even, odd = turn(even, odd, cos, sin, WIDE // 2, (COLS - ROPE) // 2, ROPE // 2)
    return tl.reshape(tl.join(even, odd), [WIDE]).to(dtype).to(tl.float32)


@triton.jit
def store_entry(
    value, data, scales, COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Pack one entry [WIDE]: e4m3 in groups of 64, the rotated part in BF16."""
    groups = tl.reshape(value, [WIDE // 64, 64])
    group, col = tl.arange(0, WIDE // 64), tl.arange(0, 64)
    still = group < (COLS - ROPE) // 64
    amax = f.largest_magnitude(groups, 1, f.FP8_FLOOR)
    unit, inverse = f.power_of_two_scale(amax, f.E4M3_RECIPROCAL)
    rounded = f.round_e4m3(groups * inverse[:, None])
    at = group[:, None] * 64 + col[None, :]
    tl.store(data + at, f.encode_e4m3(rounded, groups), mask=still[:, None])
    tl.store(scales + group, f.exponent_byte(unit), mask=still)
    rotated = (data + (COLS - ROPE)).to(tl.pointer_type(tl.uint16))
    last = (at >= COLS - ROPE) & (at < COLS)
    tl.store(rotated + at - (COLS - ROPE), f.bfloat16_bits(groups), mask=last)


@triton.jit
def store_key(
    value, keys, place, dtype: tl.constexpr, PAGE: tl.constexpr, COLS: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Rotate one index key [COLS] by the Hadamard matrix and pack it."""
    value = tl.sum(value[None, :] * signs(COLS), axis=1) * COLS**-0.5
    index_keys.store(value.to(dtype).to(tl.float32), keys, place, PAGE, COLS, FP8)


@triton.jit
def index_queries(
    query, cos, out, at, dtype: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr,
    HEADS: tl.constexpr, DOT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS index queries, then by the Hadamard matrix, and round them as keys are."""
    q = tl.load(query + at).to(tl.float32)
    even, odd = tl.split(tl.reshape(q, [HEADS, COLS // 2, 2]))
    even, odd = turn(even, odd, cos, cos + ROPE // 2, COLS // 2, (COLS - ROPE) // 2, ROPE // 2)
    q = tl.reshape(tl.join(even, odd), [HEADS, COLS]).to(dtype)
    q = tl.dot(q.to(DOT), signs(COLS).to(DOT), input_precision="ieee")
    q = index_keys.rounded((q * COLS**-0.5).to(dtype).to(tl.float32), FP8)
    tl.store(out + at, q.to(dtype))


@triton.jit
def overlapped(
    projected, stride, ape, state, last, start,
    COLS: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The two windows of 4 tokens that make the entry whose last token is `last`: [WIDE] float32.

    projected: the token at `start`, kv then gate; tokens before it are in the state's ring.
    """
    row, col = tl.arange(0, 8), tl.arange(0, WIDE)
    at = last - 7 + row
    half = tl.where(row < 4, 0, COLS)
    used = (col < COLS)[None, :]
    here = (at >= start)[:, None] & used
    before = ((at >= 0) & (at < start))[:, None] & used
    new = projected + (at - start).to(tl.int64)[:, None] * stride + half[:, None] + col[None, :]
    bias = ape + ((at + 8) % 4 * 2 * COLS + half)[:, None] + col[None, :]
    old = state + ((at + TAIL) % TAIL * 2 * COLS + half)[:, None] + col[None, :]
    kv = tl.load(new, mask=here, other=0.0) + tl.load(old, mask=before, other=0.0)
    gate = tl.load(new + 2 * COLS, mask=here, other=0.0) + tl.load(bias, mask=here, other=0.0)
    gate += tl.load(old + TAIL * 2 * COLS, mask=before, other=0.0)
    gate = tl.where((at >= 0)[:, None], gate, -float("inf"))
    p = tl.exp(gate - tl.max(gate, axis=0)[None, :])
    return tl.sum(p * kv, axis=0) / tl.sum(p, axis=0)


@triton.jit
def _keep(projected, ape, state, position, COLS: tl.constexpr, WIDE: tl.constexpr,
          TAIL: tl.constexpr):  # fmt: skip
    """Put a token's kv and gate into the ring of the last tokens; WIDE: of two windows."""
    col = tl.arange(0, WIDE)
    live = col < 2 * COLS
    kv = tl.load(projected + col, mask=live)
    gate = tl.load(projected + 2 * COLS + col, mask=live)
    gate += tl.load(ape + position % 4 * 2 * COLS + col, mask=live)
    place = position % TAIL * 2 * COLS
    tl.store(state + place + col, kv, mask=live)
    tl.store(state + TAIL * 2 * COLS + place + col, gate, mask=live)


@triton.jit
def _accumulated(
    projected, stride, ape, state, position, start,
    COLS: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Fold the tokens start .. position into the running softmax of their windows of 128.

    projected: the token at `start`; state: after each of the last tokens, every column's maximum,
    sum and weighted sum. Returns [WIDE] float32, which means something where the token completes a
    window.
    """
    col = tl.arange(0, WIDE)
    live = col < COLS
    own = state + (start + TAIL - 1) % TAIL * 3 * COLS + col
    high = tl.load(own, mask=live, other=0.0)
    total = tl.load(own + COLS, mask=live, other=0.0)
    value = tl.load(own + 2 * COLS, mask=live, other=0.0)
    for token in range(start, position + 1):
        place = token % 128
        row = projected + (token - start).to(tl.int64) * stride + col
        kv = tl.load(row, mask=live, other=0.0)
        gate = tl.load(row + COLS, mask=live, other=0.0)
        gate += tl.load(ape + place * COLS + col, mask=live, other=0.0)
        first = place + col * 0 == 0  # nothing of another window, whatever is there
        high = tl.where(first, -float("inf"), high)
        higher = tl.maximum(high, gate)
        fade, p = tl.exp(high - higher), tl.exp(gate - higher)
        total = tl.where(first, 0.0, total) * fade + p
        value = tl.where(first, 0.0, value) * fade + p * kv
        high = higher
    own = state + position % TAIL * 3 * COLS + col
    tl.store(own, high, mask=live)
    tl.store(own + COLS, total, mask=live)
    tl.store(own + 2 * COLS, value, mask=live)
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
def entries_store(
    low, low_stride, kv_first, kv_norm, projected, projected_stride, ape, norm, index_ape,
    index_norm, query, query_stride, query_first, rows, tokens, rotation, entry_rotation, table,
    pages, ring, ring_stride, state, state_stride, index_state, index_state_stride, pool,
    page_stride, entry_offset, index_offset, index_query, eps,
    KIND: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr,
    RING: tl.constexpr, TAIL: tl.constexpr, INDEX_COLS: tl.constexpr, INDEX_HEADS: tl.constexpr,
    PAGE: tl.constexpr, HEADS: tl.constexpr, DOT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One role of a token: its raw entry, its compressed entry, its index key or index queries."""
    role, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = low.dtype.element_ty
    DATA: tl.constexpr = COLS + ROPE  # data bytes of an entry
    SCALES: tl.constexpr = ((COLS - ROPE) // 64 + 7) // 8 * 8
    position = tl.load(rows + token)
    slot = tl.load(rows + tokens + token).to(tl.int64)
    cos = rotation + token * ROPE
    if role == 0:
        col = tl.arange(0, WIDE)
        at = low + token * low_stride + kv_first + col
        raw = tl.load(at, mask=col < COLS, other=0.0).to(tl.float32)
        value = finish_entry(raw, kv_norm, cos, cos + ROPE // 2, eps, dtype, COLS, ROPE, WIDE)
        place = position % RING
        own = ring + slot * ring_stride
        store_entry(value, own + place * DATA, own + RING * DATA + place * SCALES, COLS, ROPE, WIDE)
    if KIND > 0:
        first = tl.load(rows + 2 * tokens + token)
        start = position - (token.to(tl.int32) - first)
        piece = projected + first.to(tl.int64) * projected_stride
        entry = position // KIND
        entry_cos = entry_rotation + token * ROPE
        entry_sin = entry_cos + ROPE // 2
        complete = position % KIND == KIND - 1
        complete = complete & (entry * KIND >= tl.load(rows + 3 * tokens + token))
        page = tl.load(table + slot * pages + entry // PAGE, mask=complete, other=0).to(tl.int64)
        page = pool + page * page_stride
        place = entry % PAGE
        row = projected + token * projected_stride
        if role == 1:
            own = state + slot * state_stride
            if KIND == 4:
                _keep(row, ape, own, position, COLS, 2 * WIDE, TAIL)
                value = overlapped(
                    piece, projected_stride, ape, own, position, start, COLS, WIDE, TAIL
                )
            else:
                value = _accumulated(
                    piece, projected_stride, ape, own, position, start, COLS, WIDE, TAIL
                )
            if complete:
                value = finish_entry(
                    value, norm, entry_cos, entry_sin, eps, dtype, COLS, ROPE, WIDE
                )
                data = page + entry_offset
                scales = data + PAGE * DATA + place * SCALES
                store_entry(value, data + place * DATA, scales, COLS, ROPE, WIDE)
    if KIND == 4:
        if role == 2:
            index_own = index_state + slot * index_state_stride
            _keep(row + 4 * COLS, index_ape, index_own, position, INDEX_COLS, 2 * INDEX_COLS, TAIL)
            if complete:
                key = overlapped(
                    piece + 4 * COLS, projected_stride, index_ape, index_own, position, start,
                    INDEX_COLS, INDEX_COLS, TAIL,
                )  # fmt: skip
                key = finish_entry(
                    key, index_norm, entry_cos, entry_sin, eps, dtype, INDEX_COLS, ROPE, INDEX_COLS
                )
                store_key(key, page + index_offset, place, dtype, PAGE, INDEX_COLS, FP8)
        if role >= 3:
            head = (role - 3) * HEADS + tl.arange(0, HEADS)
            at = head[:, None] * INDEX_COLS + tl.arange(0, INDEX_COLS)[None, :]
            index_queries(
                query + token * query_stride + query_first, cos,
                index_query + token * INDEX_HEADS * INDEX_COLS, at, dtype, INDEX_COLS, ROPE, HEADS,
                DOT, FP8,
            )  # fmt: skip


@register("store_entries", "triton")
def store_entries(
    low: torch.Tensor,
    kv_norm: torch.Tensor,
    rows: torch.Tensor,
    rotation: torch.Tensor,
    ring: torch.Tensor,
    *,
    kind: int,
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
    key_format: str = "fp4",
) -> torch.Tensor | None:
    """As the reference. low: [tokens, rows], whose last head_dim columns are the raw entry;
    kv_norm: [head_dim]; rows: [4, tokens] int32; rotation, entry_rotation: [tokens, 2,
    rope_dim / 2]; ring: [slots, bytes] uint8; projected: [tokens, cols] float32; query: [tokens,
    rows]; table: [slots, pages] int32; pool: [pages, bytes] uint8; compressor, index_compressor:
    the same as there. Returns index queries [tokens, index_heads, index_dim] or None.
    """
    tokens, head_dim, rope = low.shape[0], kv_norm.shape[0], 2 * rotation.shape[-1]
    none = low
    ape, norm, state = compressor or (none, none, none)
    index_ape, index_norm, index_state = index_compressor or (none, none, none)
    index_cols = index_norm.shape[0] if index_compressor else 64
    index_query = None
    if index_compressor is not None:
        index_query = torch.empty(
            tokens, index_heads, index_cols, dtype=low.dtype, device=low.device
        )
    each = min(QUERY_HEADS, index_heads)
    roles = {0: 1, 4: 3 + index_heads // max(1, each)}.get(kind, 2)
    heads_at = query.shape[1] - index_heads * index_cols if query is not None else 0
    entries_store[(roles, tokens)](
        low=low, low_stride=low.stride(0), kv_first=low.shape[1] - head_dim, kv_norm=kv_norm,
        projected=projected if projected is not None else none,
        projected_stride=projected.stride(0) if projected is not None else 0,
        ape=ape, norm=norm, index_ape=index_ape, index_norm=index_norm,
        query=query if query is not None else none,
        query_stride=query.stride(0) if query is not None else 0, query_first=heads_at,
        rows=rows, tokens=tokens, rotation=rotation,
        entry_rotation=entry_rotation if entry_rotation is not None else rotation,
        table=table if table is not None else rows,
        pages=table.stride(0) if table is not None else 0,
        ring=ring, ring_stride=ring.stride(0), state=state, state_stride=state.stride(0),
        index_state=index_state, index_state_stride=index_state.stride(0),
        pool=pool if pool is not None else ring,
        page_stride=pool.stride(0) if pool is not None else 0,
        entry_offset=offsets[0], index_offset=offsets[1],
        index_query=index_query if index_query is not None else none, eps=norm_eps,
        KIND=kind, COLS=head_dim, ROPE=rope, WIDE=triton.next_power_of_2(head_dim),
        RING=kv_pack.ring_entries(ring, head_dim, rope), TAIL=state.shape[{4: 2}.get(kind, 1)],
        INDEX_COLS=index_cols, INDEX_HEADS=index_heads, PAGE=page_entries, HEADS=max(1, each),
        DOT=tl.float32 if low.dtype == torch.float32 else tl.bfloat16, FP8=key_format == "fp8",
        num_warps=4,
    )  # fmt: skip
    return index_query
