"""Decode attention over stored entries: the window's ring and compressed entries of paged blocks.

`attention_queries` normalises and rotates the queries. `attention_attend` gives every chunk of
entries a program with all heads, or 64 of them, which reads the 584-byte entries once, decodes them
in registers and keeps an online softmax; `attention_combine` joins the chunks in a fixed order,
adds the sink and turns the outputs back. Chunks are cut by position alone, never by the batch or
the longest context, so that a sequence's result does not depend on its company.

Bytes: 584 an entry for every 64 heads where they fit the L2 cache; 4 * head_dim * heads a chunk for
the partial results.

Paper: §2.3.1 (core attention), §2.3.3 (attention sink, inverse rotation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f
from fathom.kernels.triton.entries import turn
from fathom.quant import kv_pack


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How a layer's entries are divided: heads of a program, entries of a program in the window and
    beyond it, entries of one step of the online softmax.
    """

    heads: int
    near: int
    far: int
    step: int


# By the layer's compress ratio. Few entries: small programs keep the whole device busy with a
# single token. HCA sees thousands in a long context: more heads share what was decoded.
TILES = {
    0: _Tiles(heads=64, near=32, far=32, step=32),
    4: _Tiles(heads=64, near=32, far=32, step=32),
    128: _Tiles(heads=64, near=64, far=64, step=64),
}
WARPS, STAGES = 8, 2
TURNED_HEADS = 4  # of one program of attention_queries
PART = 128  # columns of one program of attention_combine
AT_ONCE = 32  # chunks that it reads at once


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 as the arithmetic's dtype keeps it, still float32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def turned_heads(
    query, cos, eps, COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Queries at pointers [HEADS, WIDE], COLS of it used, normalised per head and rotated."""
    dtype: tl.constexpr = query.dtype.element_ty
    q = tl.load(query, mask=tl.arange(0, WIDE)[None, :] < COLS, other=0.0).to(tl.float32)
    mean = rounded(tl.sum(rounded(q * q, dtype), axis=1) / COLS, dtype)
    r = rounded(1.0 / tl.sqrt(rounded(mean + eps, dtype)), dtype)
    q = rounded(q * r[:, None], dtype)
    even, odd = tl.split(tl.reshape(q, [HEADS, WIDE // 2, 2]))
    even, odd = turn(even, odd, cos, cos + ROPE // 2, WIDE // 2, (COLS - ROPE) // 2, ROPE // 2)
    return tl.reshape(tl.join(even, odd), [HEADS, WIDE]).to(dtype)


@triton.jit
def attention_queries(
    query, query_stride, rotation, turned, heads, eps,
    COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Queries normalised per head and rotated: turned [tokens, heads, COLS]."""
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, WIDE)[None, :]
    at = head[:, None] * COLS + col
    own, cos = query + token * query_stride + at, rotation + token * ROPE
    both = turned_heads(own, cos, eps, COLS, ROPE, WIDE, HEADS)
    tl.store(turned + token * heads * COLS + at, both, mask=col < COLS)


@triton.jit
def attention_attend(
    turned, rows, tokens, ring, ring_stride, pool, page_stride, entry_offset, table, pages, picks,
    picks_count, partial, sums, heads, scale,
    KIND: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr, WIDE: tl.constexpr,
    WINDOW: tl.constexpr, RING: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr,
    NEAR: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """A chunk's entries as seen by HEADS heads: a partial output, its maximum and its sum."""
    chunk, group, token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = turned.dtype.element_ty
    DATA: tl.constexpr = COLS + ROPE
    STILL: tl.constexpr = COLS - ROPE
    SCALES: tl.constexpr = (STILL // 64 + 7) // 8 * 8
    WINDOW_CHUNKS: tl.constexpr = (WINDOW + NEAR - 1) // NEAR
    position = tl.load(rows + token)
    slot = tl.load(rows + tokens + token).to(tl.int64)
    head = group * HEADS + tl.arange(0, HEADS)
    col, rope_col = tl.arange(0, WIDE), tl.arange(0, ROPE)
    beyond = tl.zeros([STEP], tl.int32) + chunk >= WINDOW_CHUNKS
    # The ring is read as a page of its own: no branch is left in the loop, and a step's entries are
    # fetched while the one before is multiplied.
    count = tl.minimum(position + 1, WINDOW)
    oldest = position + 1 - count
    first, room, size = chunk * NEAR, RING, NEAR
    source = ring + slot * ring_stride
    if chunk >= WINDOW_CHUNKS:
        count = (position + 1) // KIND if KIND > 0 else 0
        if PICKED:
            count = tl.minimum(count, picks_count)
        first, room, size = (chunk - WINDOW_CHUNKS) * CHUNK, PAGE, CHUNK
        source = pool + entry_offset
    last = tl.minimum(count, first + size)
    at = (token * tl.num_programs(0) + chunk) * heads + head
    high = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    if first < last:
        own = turned + (token * heads + head[:, None]) * COLS
        # Loaded as they are, so that the matrix units read them from shared memory. The rotated
        # half meets entries of another type: a product of its own.
        q = tl.load(own + col[None, :], mask=(col < COLS)[None, :], other=0.0)
        q_turned = tl.load(own + STILL + rope_col[None, :])
        out = tl.zeros([HEADS, WIDE], tl.float32)
        out_turned = tl.zeros([HEADS, ROPE], tl.float32)
        scaled, inside = tl.arange(0, WIDE // 64), tl.arange(0, 64)  # 64 codes with one scale
        for start in range(first, last, STEP):
            index = start + tl.arange(0, STEP)
            live = index < last
            entry = index
            if PICKED:
                picked = tl.load(picks + token * picks_count + index, mask=live & beyond, other=0)
                live = live & (picked >= 0)
                entry = tl.where(beyond, tl.maximum(picked, 0), index)
            page = tl.load(table + slot * pages + entry // PAGE, mask=live & beyond, other=0)
            block = source + page.to(tl.int64) * page_stride
            place = tl.where(beyond, entry % PAGE, (oldest + entry) % RING)
            data = block + place * DATA
            scales = block + room * DATA + place * SCALES
            codes = tl.load(
                data[:, None, None] + scaled[None, :, None] * 64 + inside[None, None, :],
                mask=live[:, None, None] & (scaled < STILL // 64)[None, :, None], other=0,
            )  # fmt: skip
            unit = tl.load(
                scales[:, None] + scaled[None, :],
                mask=live[:, None] & (scaled < STILL // 64)[None, :], other=0,
            )  # fmt: skip
            kv = f.decode_e4m3_exactly(codes, dtype != tl.float32)
            kv = (kv * f.decode_unit(unit)[:, :, None]).to(dtype)
            kv = tl.reshape(kv, [STEP, WIDE])  # zero in the rotated half
            rope = (data + STILL).to(tl.pointer_type(tl.bfloat16))
            kv_turned = tl.load(
                rope[:, None] + rope_col[None, :], mask=live[:, None], other=0.0
            ).to(dtype)
            logits = tl.dot(q, tl.trans(kv), input_precision="ieee")
            logits = tl.dot(q_turned, tl.trans(kv_turned), logits, input_precision="ieee") * scale
            logits = tl.where(live[None, :], logits, -float("inf"))
            higher = tl.maximum(high, tl.max(logits, axis=1))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            fade = tl.exp(high - base)
            p = tl.exp(logits - base[:, None])
            total = total * fade + tl.sum(p, axis=1)
            p = p.to(dtype)
            out = tl.dot(p, kv, out * fade[:, None], input_precision="ieee")
            out_turned = tl.dot(p, kv_turned, out_turned * fade[:, None], input_precision="ieee")
            high = higher
        row = partial + at[:, None] * COLS
        tl.store(row + col[None, :], out, mask=(col < STILL)[None, :])
        tl.store(row + STILL + rope_col[None, :], out_turned)
    tl.store(sums + 2 * at, high)
    tl.store(sums + 2 * at + 1, total)


@triton.jit
def attention_combine(
    partial, sums, sink, rotation, out, chunks, heads,
    COLS: tl.constexpr, ROPE: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """PART columns of a head's output from all its chunks, turned back."""
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = (token * chunks) * heads + head
    every = tl.arange(0, CHUNKS)
    used = every < chunks
    highs = tl.load(sums + 2 * (own + every * heads), mask=used, other=-float("inf"))
    totals = tl.load(sums + 2 * (own + every * heads) + 1, mask=used, other=0.0)
    high = tl.max(highs, axis=0)
    total = tl.exp(tl.load(sink + head) - high) + tl.sum(tl.exp(highs - high) * totals, axis=0)
    part = tl.program_id(2)
    col = part * PART + tl.arange(0, PART)
    inside = (col < COLS)[None, :]
    value = tl.zeros([PART], tl.float32)
    for first in range(0, chunks, AT_ONCE):
        chunk = first + tl.arange(0, AT_ONCE)
        at = own + chunk * heads
        each = tl.load(sums + 2 * at, mask=chunk < chunks, other=-float("inf"))
        rows = tl.load(
            partial + at[:, None] * COLS + col[None, :],
            mask=(each > -float("inf"))[:, None] & inside, other=0.0,
        )  # fmt: skip
        value += tl.sum(tl.exp(each - high)[:, None] * rows, axis=0)
    dtype: tl.constexpr = out.dtype.element_ty
    even, odd = tl.split(tl.reshape(rounded(value / total, dtype), [PART // 2, 2]))
    pair = part * (PART // 2) + tl.arange(0, PART // 2) - (COLS - ROPE) // 2
    live = (pair >= 0) & (pair < ROPE // 2)
    cos = tl.load(rotation + token * ROPE + pair, mask=live, other=1.0)
    sin = tl.load(rotation + token * ROPE + ROPE // 2 + pair, mask=live, other=0.0)
    turned = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [PART])
    tl.store(out + (token * heads + head) * COLS + col, turned.to(dtype), mask=col < COLS)


@register("entry_attention", "triton")
def entry_attention(
    query: torch.Tensor,
    rows: torch.Tensor,
    rotation: torch.Tensor,
    ring: torch.Tensor,
    sink: torch.Tensor,
    *,
    kind: int,
    head_dim: int,
    window: int,
    norm_eps: float,
    pool: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    entry_offset: int = 0,
    page_entries: int = 1,
    picks: torch.Tensor | None = None,
    most_entries: int = 0,
) -> torch.Tensor:
    """As the reference. query: [tokens, rows], heads * head_dim of them first; rows: [4, tokens]
    int32; rotation: [tokens, 2, rope_dim / 2]; ring: [slots, bytes] uint8; sink: [heads]; pool:
    [pages, bytes] uint8; table: [slots, pages] int32; picks: [tokens, topk] int32.
    Returns [tokens, heads * head_dim] in the query's dtype.
    """
    tokens, heads = query.shape[0], sink.shape[0]
    tiles = TILES[kind]
    own_heads = min(heads, tiles.heads)
    count = picks.shape[1] if picks is not None else most_entries
    chunks = triton.cdiv(window, tiles.near) + triton.cdiv(count, tiles.far)
    partial = torch.empty(tokens, chunks, heads, head_dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(tokens, chunks, heads, 2, dtype=torch.float32, device=query.device)
    turned = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    out = torch.empty(tokens, heads * head_dim, dtype=query.dtype, device=query.device)
    rope, each = 2 * rotation.shape[-1], min(heads, TURNED_HEADS)
    wide = triton.next_power_of_2(head_dim)
    attention_queries[(heads // each, tokens)](
        query, query.stride(0), rotation, turned, heads, norm_eps, COLS=head_dim, ROPE=rope,
        WIDE=wide, HEADS=each, num_warps=4,
    )  # fmt: skip
    attention_attend[(chunks, heads // own_heads, tokens)](
        turned=turned, rows=rows, tokens=tokens, ring=ring, ring_stride=ring.stride(0),
        pool=pool if pool is not None else ring,
        page_stride=pool.stride(0) if pool is not None else 0, entry_offset=entry_offset,
        table=table if table is not None else rows,
        pages=table.stride(0) if table is not None else 0,
        picks=picks if picks is not None else rows, picks_count=count, partial=partial, sums=sums,
        heads=heads, scale=head_dim**-0.5,
        KIND=kind, COLS=head_dim, ROPE=rope, WIDE=wide, WINDOW=window,
        RING=kv_pack.ring_entries(ring, head_dim, rope), PAGE=page_entries, CHUNK=tiles.far,
        NEAR=tiles.near, STEP=tiles.step, HEADS=own_heads, PICKED=picks is not None,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    attention_combine[(heads, tokens, triton.cdiv(head_dim, PART))](
        partial,
        sums,
        sink,
        rotation,
        out,
        chunks,
        heads,
        COLS=head_dim,
        ROPE=rope,
        CHUNKS=triton.next_power_of_2(chunks),
        AT_ONCE=AT_ONCE,
        PART=PART,
        num_warps=4,
    )
    return out
