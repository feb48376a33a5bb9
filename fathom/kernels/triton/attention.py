"""Decode attention over stored entries: the window's ring and compressed entries of paged blocks.

`_attend` gives every chunk of entries and every 16 heads a program, which reads the 584-byte
entries once, decodes them in registers and keeps an online softmax; `_combine` joins the chunks
in a fixed order, adds the sink and turns the outputs back. Chunks are cut by position alone, never
by the batch or the longest context, so that a sequence's result does not depend on its company.

Bytes: 584 an entry for every 64 heads where they fit the L2 cache; 4 * head_dim * heads a chunk for
the partial results.

Paper: §2.3.1 (core attention), §2.3.3 (attention sink, inverse rotation).
"""

# triton is not installed where the types are checked:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f

HEADS = 16  # of one program
STEP = 32  # entries of one step of the online softmax
CHUNKS = {0: 64, 4: 64, 128: 256}  # entries of one program, by the layer's compress ratio


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _attend(
    query, query_stride, rotation, positions, ring, ring_stride, pool, page_stride, entry_offset,
    table, pages, picks, picks_count, partial, sums, heads, scale, eps,
    KIND: tl.constexpr, COLS: tl.constexpr, ROPE: tl.constexpr, WINDOW: tl.constexpr,
    PAGE: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, HEADS: tl.constexpr,
    PICKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    chunk, group, token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = query.dtype.element_ty
    DATA: tl.constexpr = COLS + ROPE
    STILL: tl.constexpr = COLS - ROPE
    SCALES: tl.constexpr = (STILL // 64 + 7) // 8 * 8
    WINDOW_CHUNKS: tl.constexpr = (WINDOW + CHUNK - 1) // CHUNK
    position = tl.load(positions + token)
    head = group * HEADS + tl.arange(0, HEADS)
    col, pair = tl.arange(0, COLS), tl.arange(0, ROPE // 2)
    in_window = chunk < WINDOW_CHUNKS
    if in_window:
        count = tl.minimum(position + 1, WINDOW)
        first = chunk * CHUNK
    else:
        count = (position + 1) // KIND if KIND > 0 else 0
        if PICKED:
            count = tl.minimum(count, picks_count)
        first = (chunk - WINDOW_CHUNKS) * CHUNK
    last = tl.minimum(count, first + CHUNK)
    at = (token * tl.num_programs(0) + chunk) * heads + head
    high = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    if first < last:
        # The query: normalised per head, rotated; its rotated half is a matrix of its own.
        own = query + token * query_stride + head[:, None] * COLS
        q = tl.load(own + col[None, :]).to(tl.float32)
        mean = _rounded(tl.sum(_rounded(q * q, dtype), axis=1) / COLS, dtype)
        r = _rounded(1.0 / tl.sqrt(_rounded(mean + eps, dtype)), dtype)[:, None]
        still = tl.where((col < STILL)[None, :], _rounded(q * r, dtype), 0.0)
        even = _rounded(tl.load(own + STILL + 2 * pair[None, :]).to(tl.float32) * r, dtype)
        odd = _rounded(tl.load(own + STILL + 2 * pair[None, :] + 1).to(tl.float32) * r, dtype)
        cos = tl.load(rotation + token * ROPE + pair)[None, :]
        sin = tl.load(rotation + token * ROPE + ROPE // 2 + pair)[None, :]
        turned = tl.reshape(
            tl.join(even * cos - odd * sin, even * sin + odd * cos), [HEADS, ROPE]
        ).to(dtype)
        still = still.to(DOT)
        turned = turned.to(DOT)
        out = tl.zeros([HEADS, COLS], tl.float32)
        out_turned = tl.zeros([HEADS, ROPE], tl.float32)
        rope_col = tl.arange(0, ROPE)
        for start in range(first, last, STEP):
            index = start + tl.arange(0, STEP)
            live = index < last
            if in_window:
                data = ring + token * ring_stride + index.to(tl.int64) * DATA
                scales = ring + token * ring_stride + WINDOW * DATA + index.to(tl.int64) * SCALES
            else:
                entry = index
                if PICKED:
                    entry = tl.load(picks + token * picks_count + index, mask=live, other=0)
                    live = live & (entry >= 0)
                    entry = tl.maximum(entry, 0)
                page = tl.load(table + token * pages + entry // PAGE, mask=live, other=0)
                block = pool + page.to(tl.int64) * page_stride + entry_offset
                data = block + entry % PAGE * DATA
                scales = block + PAGE * DATA + entry % PAGE * SCALES
            codes = tl.load(
                data[:, None] + col[None, :], mask=live[:, None] & (col < STILL)[None, :], other=0
            )
            unit = tl.load(
                scales[:, None] + col[None, :] // 64,
                mask=live[:, None] & (col < STILL)[None, :], other=0,
            )  # fmt: skip
            kv = f.decode_e4m3(codes).to(tl.float32) * (f.decode_e8m0(unit) * f.E4M3_UNIT)
            kv = kv.to(DOT)
            rope = (data + STILL).to(tl.pointer_type(tl.bfloat16))
            kv_turned = tl.load(
                rope[:, None] + rope_col[None, :], mask=live[:, None], other=0.0
            ).to(DOT)
            logits = tl.dot(still, tl.trans(kv), input_precision="ieee")
            logits = tl.dot(turned, tl.trans(kv_turned), logits, input_precision="ieee") * scale
            logits = tl.where(live[None, :], logits, -float("inf"))
            higher = tl.maximum(high, tl.max(logits, axis=1))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            fade = tl.exp(high - base)
            p = tl.exp(logits - base[:, None])
            total = total * fade + tl.sum(p, axis=1)
            p = p.to(dtype).to(DOT)
            out = tl.dot(p, kv, out * fade[:, None], input_precision="ieee")
            out_turned = tl.dot(p, kv_turned, out_turned * fade[:, None], input_precision="ieee")
            high = higher
        row = partial + at[:, None] * COLS
        tl.store(row + col[None, :], out, mask=(col < STILL)[None, :])
        tl.store(row + STILL + rope_col[None, :], out_turned)
    tl.store(sums + 2 * at, high)
    tl.store(sums + 2 * at + 1, total)


@triton.jit
def _combine(
    partial, sums, sink, rotation, out, chunks, heads,
    COLS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    STILL: tl.constexpr = COLS - ROPE
    col, pair = tl.arange(0, COLS), tl.arange(0, ROPE // 2)
    first = token * chunks * heads + head
    high = -float("inf")
    for chunk in range(chunks):
        high = tl.maximum(high, tl.load(sums + 2 * (first + chunk * heads)))
    total = tl.exp(tl.load(sink + head) - high)
    still = tl.zeros([COLS], tl.float32)
    even = tl.zeros([ROPE // 2], tl.float32)
    odd = tl.zeros([ROPE // 2], tl.float32)
    for chunk in range(chunks):
        at = first + chunk * heads
        own = tl.load(sums + 2 * at)
        if own > -float("inf"):
            weight = tl.exp(own - high)
            total += weight * tl.load(sums + 2 * at + 1)
            row = partial + at * COLS
            still += weight * tl.load(row + col, mask=col < STILL, other=0.0)
            even += weight * tl.load(row + STILL + 2 * pair)
            odd += weight * tl.load(row + STILL + 2 * pair + 1)
    dtype: tl.constexpr = out.dtype.element_ty
    cos = tl.load(rotation + token * ROPE + pair)
    sin = tl.load(rotation + token * ROPE + ROPE // 2 + pair)
    even = _rounded(even / total, dtype)
    odd = _rounded(odd / total, dtype)
    own = out + (token * heads + head) * COLS
    tl.store(own + col, (still / total).to(dtype), mask=col < STILL)
    tl.store(own + STILL + 2 * pair, (even * cos + odd * sin).to(dtype))
    tl.store(own + STILL + 2 * pair + 1, (odd * cos - even * sin).to(dtype))


@register("entry_attention", "triton")
def entry_attention(
    query: torch.Tensor,
    positions: torch.Tensor,
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
    """As the reference. query: [tokens, rows], heads * head_dim of them first; positions: [tokens]
    int32; rotation: [tokens, 2, rope_dim / 2]; ring: [tokens, bytes] uint8; sink: [heads]; pool:
    [pages, bytes] uint8; table: [tokens, pages] int32; picks: [tokens, topk] int32.
    Returns [tokens, heads * head_dim] in the query's dtype.
    """
    tokens, heads = query.shape[0], sink.shape[0]
    chunk = CHUNKS[kind]
    count = picks.shape[1] if picks is not None else most_entries
    chunks = triton.cdiv(window, chunk) + triton.cdiv(count, chunk)
    partial = torch.empty(tokens, chunks, heads, head_dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(tokens, chunks, heads, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(tokens, heads * head_dim, dtype=query.dtype, device=query.device)
    rope = 2 * rotation.shape[-1]
    _attend[(chunks, heads // HEADS, tokens)](
        query, query.stride(0), rotation, positions, ring, ring.stride(0),
        pool if pool is not None else ring, pool.stride(0) if pool is not None else 0,
        entry_offset, table if table is not None else positions,
        table.shape[1] if table is not None else 0,
        picks if picks is not None else positions, count, partial, sums, heads,
        head_dim**-0.5, norm_eps,
        KIND=kind, COLS=head_dim, ROPE=rope, WINDOW=window, PAGE=page_entries, CHUNK=chunk,
        STEP=STEP, HEADS=HEADS, PICKED=picks is not None,
        DOT=tl.float32 if query.dtype == torch.float32 else tl.bfloat16, num_warps=4,
    )  # fmt: skip
    _combine[(heads, tokens)](
        partial, sums, sink, rotation, out, chunks, heads, COLS=head_dim, ROPE=rope, num_warps=4
    )
    return out
