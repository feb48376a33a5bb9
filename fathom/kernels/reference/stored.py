"""Operations of the decode step on weights and caches as they are stored, one fused step each.

They compute what the unfused operations beside this file compute, from bytes: FP8 and FP4 codes
with their scales, 584-byte entries in rings and pages, FP4 index keys. Every sequence has its own
slot (window ring, compressor states) and page table.

    rows: [4, tokens] int32, what a step knows of each token: its position, the slot of its
    sequence, the first token of its piece (consecutive tokens of one sequence) in this step, and
    the length up to which the sequence's entries are there already and stay as they are.

A ring holds a few entries or states more than are looked at, so that the last tokens of a piece may
be taken back: everything is found by position, and a later token simply overwrites.

A token whose numbers are not finite leaves entries and keys that read as NaN, and so do the results
of all who see them: nothing makes a finite number of it again.

Paper: §2.2 (mHC), §2.3 (attention), §2.1 (experts), §3.5.1 (cache layout).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from fathom.kernels.reference.attention import sparse_attention
from fathom.kernels.reference.experts import swiglu
from fathom.kernels.reference.hadamard import hadamard
from fathom.kernels.reference.linear import linear
from fathom.kernels.reference.norm import head_rmsnorm, rmsnorm
from fathom.kernels.reference.rope import rope
from fathom.kernels.reference.route import route, router_scores
from fathom.kernels.registry import register
from fathom.quant import fp4, fp8, kv_pack

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def fp8_matrix(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes: [rows, cols] uint8; scale: [rows / 128, cols / 128] uint8 -> [rows, cols] float32."""
    return fp8.dequantize_weight(codes.view(E4M3), scale.view(E8M0)).float()


def fp4_matrix(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes: [rows, cols / 2] uint8; scale: [rows, cols / 32] uint8 -> [rows, cols] float32."""
    return fp4.dequantize(codes, scale.view(E8M0))


@register("stored_linear", "reference")
def stored_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    quantize_input: bool = True,
    groups: int = 1,
    norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    plain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An FP8 matrix, and an unquantised one of the same input, for a few tokens.

    x: [tokens, groups * cols]; codes: [rows, cols] uint8; scale: [rows / 128, cols / 128] uint8.
    Row group j reads columns j * cols onwards. `norm` [cols] normalises the input first. plain:
    [rows, cols] BF16 or float32, for the same (unnormalised) input. Returns ([tokens, rows] in x's
    dtype, [tokens, rows] float32 or None).
    """
    weight = fp8_matrix(codes, scale)
    other = F.linear(x.float(), plain.float()) if plain is not None else None
    if norm is not None:
        x = rmsnorm(x, norm, norm_eps)
    parts = zip(x.chunk(groups, dim=-1), weight.chunk(groups, dim=0), strict=True)
    return torch.cat([linear(part, w, quantize_input) for part, w in parts], dim=-1), other


@register("store_entries", "reference")
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
    """Write what the tokens add to the caches, in place; return the rounded index queries.

    low: [tokens, rows], whose last head_dim columns are wkv's output; kv_norm: [head_dim]; rows:
    [4, tokens] int32; rotation, entry_rotation: [tokens, 2, rope_dim / 2] cosines and sines, of
    this position and of the first position of its window; ring: [slots, bytes] uint8; projected:
    [tokens, cols] float32, the compressor's kv | gate, then the indexer's; query: [tokens, rows],
    whose last index_heads * index_dim columns are the index query; compressor, index_compressor:
    (ape, norm, state): for ratio 4 the state is the last tokens' kv and gate [slots, 2, tail, 2 *
    cols], for ratio 128 a running softmax's maximum, sum and weighted sum after each of the last
    tokens [slots, tail, 3, cols]; pool: [pages, bytes] uint8, `page_entries` entries at offsets[0]
    and index keys at offsets[1] of each page, stored as key_format "fp4" or "fp8", to which queries
    are rounded too; table: [slots, pages] int32. Returns [tokens, index_heads, index_dim] or None.
    """
    head_dim = kv_norm.shape[0]
    rope_dim = 2 * rotation.shape[-1]
    raw = rmsnorm(low[:, -head_dim:], kv_norm, norm_eps)
    raw = rope(raw.unsqueeze(1), rotation[:, 0:1], rotation[:, 1:2])[:, 0]
    room = kv_pack.ring_entries(ring, head_dim, rope_dim)
    positions, slots, _, known = rows.tolist()
    for token, (position, slot) in enumerate(zip(positions, slots, strict=True)):
        _write_row(ring[slot], position % room, room, raw[token], rope_dim)
    if kind == 0:
        return None
    assert projected is not None
    assert compressor is not None
    assert entry_rotation is not None
    assert table is not None
    assert pool is not None
    value = _compress_step(projected[:, : _width(kind, head_dim)], rows, kind, compressor)
    own = None
    if kind == 4:
        assert index_compressor is not None
        own = _compress_step(projected[:, 4 * head_dim :], rows, 4, index_compressor)
    for token, (position, slot) in enumerate(zip(positions, slots, strict=True)):
        entry, place = position // kind, position // kind % page_entries
        if position % kind != kind - 1 or entry * kind < known[token]:
            continue
        page = pool[int(table[slot, entry // page_entries])]
        turn = entry_rotation[token, :, None]
        row = rmsnorm(value[token].to(low.dtype), compressor[1], norm_eps)[None, None]
        _write_row(page[offsets[0] :], place, page_entries, rope(row, *turn)[0, 0], rope_dim)
        if own is not None:
            assert index_compressor is not None
            row = rmsnorm(own[token].to(low.dtype), index_compressor[1], norm_eps)[None, None]
            row = hadamard(rope(row, *turn))[0, 0]
            _write_key(page[offsets[1] :], place, page_entries, row, key_format)
    if kind != 4:
        return None
    assert query is not None
    assert own is not None
    q = query[:, query.shape[1] - index_heads * own.shape[1] :].unflatten(-1, (index_heads, -1))
    q = rope(q.unsqueeze(1), rotation[:, 0:1], rotation[:, 1:2])[:, 0]
    return simulate_index(hadamard(q), key_format)


def simulate_index(x: torch.Tensor, key_format: str) -> torch.Tensor:
    """Index queries or keys x [..., index_dim] as a format, "fp4" or "fp8", gives them back."""
    return fp4.simulate(x) if key_format == "fp4" else fp8.simulate(x, x.shape[-1])


def _write_key(
    block: torch.Tensor, place: int, room: int, row: torch.Tensor, key_format: str
) -> None:
    """row: [index_dim], to the `place`-th of `room` keys of block [bytes] uint8."""
    codes, scales = kv_pack.pack_indexer_entries(row, cast(kv_pack.IndexerFormat, key_format))
    size = codes.shape[0]
    block[place * size : (place + 1) * size] = codes
    at = room * size + place * scales.shape[0]
    block[at : at + scales.shape[0]] = scales


def _width(kind: int, head_dim: int) -> int:
    return 4 * head_dim if kind == 4 else 2 * head_dim


def _write_row(
    block: torch.Tensor, place: int, room: int, row: torch.Tensor, rope_dim: int
) -> None:
    """row: [head_dim], to the `place`-th of `room` entries of block [bytes] uint8."""
    data, scales = kv_pack.pack_kv_entries(row, rope_dim)
    size = data.shape[0]
    block[place * size : (place + 1) * size] = data
    first = room * size + place * scales.shape[0]
    # The padding byte stays as it is, as in the fast version.
    kept = -(-(row.shape[0] - rope_dim) // kv_pack.KV_GROUP)
    block[first : first + kept] = scales[:kept]


def _compress_step(
    projected: torch.Tensor,
    rows: torch.Tensor,
    kind: int,
    compressor: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Bring the states up to date; [tokens, cols] float32, meant where a window is complete."""
    ape, norm, state = compressor
    cols = norm.shape[0]
    out = projected.new_zeros(projected.shape[0], cols)
    for token, (position, slot) in enumerate(zip(*rows[:2].tolist(), strict=True)):
        width = 2 * cols if kind == 4 else cols
        kv = projected[token, :width]
        gate = projected[token, width : 2 * width] + ape[position % kind]
        if kind == 4:
            tail = state.shape[2]
            state[slot, 0, position % tail], state[slot, 1, position % tail] = kv, gate
            out[token] = _two_windows(state[slot], position, cols)
        else:
            old, new = (state[slot, p % state.shape[1]] for p in (position - 1, position))
            high, total, value = old
            if position % kind == 0:
                high, total, value = torch.full_like(kv, -torch.inf), kv * 0, kv * 0
            higher = torch.maximum(high, gate)
            fade, p = (high - higher).exp(), (gate - higher).exp()
            new.copy_(torch.stack((higher, total * fade + p, value * fade + p * kv)))
            out[token] = new[2] / new[1]
    return out


def _two_windows(state: torch.Tensor, position: int, cols: int) -> torch.Tensor:
    """state: [2, tail, 2 * cols], the last tokens -> the entry of the window ending here."""
    kvs, gates = [], []
    for row in range(8):
        token = position - 7 + row
        half = slice(0, cols) if row < 4 else slice(cols, 2 * cols)
        if token >= 0:
            kvs.append(state[0, token % state.shape[1], half])
            gates.append(state[1, token % state.shape[1], half])
    return (torch.stack(kvs) * torch.stack(gates).softmax(0)).sum(0)


def read_rows(
    block: torch.Tensor, count: int, head_dim: int, rope_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """All entries of a block. block: [bytes] uint8. Returns [entries, head_dim]."""
    size = head_dim + rope_dim
    scale_size = kv_pack.kv_entry_bytes(head_dim, rope_dim) - size
    data = block[: count * size].view(count, size)
    scales = block[count * size : count * (size + scale_size)].view(count, scale_size)
    return kv_pack.unpack_kv_entries(
        data.contiguous(), scales.contiguous(), rope_dim, dtype, check=False
    )


@register("entry_attention", "reference")
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
    """Attend to the window and to the picked (or all visible) entries; outputs turned back.

    query: [tokens, rows], wq_b's output, heads * head_dim of it first, neither normed nor rotated;
    rows: [4, tokens] int32; rotation: [tokens, 2, rope_dim / 2]; ring: [slots, bytes] uint8; sink:
    [heads]; pool: [pages, bytes] uint8; table: [slots, pages] int32; picks: [tokens, topk] int32,
    -1 = none; most_entries: a bound on visible entries where there are no picks. Returns
    [tokens, heads * head_dim].
    """
    heads, rope_dim = sink.shape[0], 2 * rotation.shape[-1]
    q = head_rmsnorm(query[:, : heads * head_dim].unflatten(-1, (heads, head_dim)), norm_eps)
    q = rope(q.unsqueeze(1), rotation[:, 0:1], rotation[:, 1:2])
    out = torch.empty_like(q)
    room = kv_pack.ring_entries(ring, head_dim, rope_dim)
    for token, (position, slot) in enumerate(zip(*rows[:2].tolist(), strict=True)):
        near = read_rows(ring[slot], room, head_dim, rope_dim, q.dtype)
        seen = torch.arange(max(0, position + 1 - window), position + 1, device=q.device)
        kv = near[seen % room]
        if kind:
            assert pool is not None
            assert table is not None
            count = (position + 1) // kind
            pages = table[slot, : -(-count // page_entries)].long()
            blocks = [
                read_rows(pool[p, entry_offset:], page_entries, head_dim, rope_dim, q.dtype)
                for p in pages
            ]
            far = torch.cat(blocks)[:count] if blocks else kv[:0]
            if picks is not None:
                far = far[picks[token][picks[token] >= 0].long()]
            kv = torch.cat((kv, far))
        every = torch.arange(kv.shape[0], device=q.device)[None, None]
        out[token] = sparse_attention(q[token : token + 1], kv[None], every, sink, head_dim**-0.5)[
            0
        ]
    out = rope(out, rotation[:, 0:1], rotation[:, 1:2], inverse=True)
    return out[:, 0].flatten(1)


@register("index_scores_paged", "reference")
def index_scores_paged(
    query: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    pool: torch.Tensor,
    table: torch.Tensor,
    *,
    index_offset: int,
    page_entries: int,
    ratio: int,
    most_entries: int,
    key_format: str = "fp4",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of all visible entries from their stored keys, -inf beyond; formed in float32.

    query: [tokens, index_heads, index_dim], rotated and rounded; weights: [tokens, cols] float32,
    weights_proj's output in its last index_heads columns; rows: [4, tokens] int32; pool: [pages,
    bytes] uint8; table: [slots, pages] int32; key_format: "fp4" or "fp8". Returns (scores [tokens,
    most_entries] float32, a bound per group of entries, here the scores themselves).
    """
    tokens, heads, dim = query.shape
    scores = torch.full((tokens, most_entries), -torch.inf, device=query.device)
    w = weights[:, weights.shape[1] - heads :].to(query.dtype).float() * dim**-0.5 * heads**-0.5
    for token, (position, slot) in enumerate(zip(*rows[:2].tolist(), strict=True)):
        count = (position + 1) // ratio
        if count == 0:
            continue
        pages = table[slot, : -(-count // page_entries)].long()
        form = cast(kv_pack.IndexerFormat, key_format)
        size = page_entries * kv_pack.indexer_entry_bytes(form, dim)
        keys = pool[pages, index_offset : index_offset + size]
        decoded = kv_pack.unpack_indexer_page(keys, form, dim, check=False).flatten(0, 1)[:count]
        products = (query[token].float() @ decoded.T).relu()
        scores[token, :count] = (products * w[token, :, None]).sum(0)
    return scores, scores


@register("topk_positions", "reference")
def topk_positions(
    scores: torch.Tensor, maxima: torch.Tensor, rows: torch.Tensor, *, k: int, ratio: int
) -> torch.Tensor:
    """Positions of the k best visible scores, ties to the lower position, -1 where fewer.

    scores: [tokens, entries] float32; maxima (not needed here): the same; rows: [4, tokens]
    int32. Returns [tokens, topk] int32, best first.
    """
    every = torch.arange(scores.shape[1], device=scores.device)
    visible = every < ((rows[0] + 1) // ratio)[:, None]
    masked = scores.masked_fill(~visible, -torch.inf)
    _, picks = masked.sort(dim=-1, descending=True, stable=True)
    picks = picks.int().masked_fill(~visible.gather(1, picks), -1)[:, :k]
    return F.pad(picks, (0, k - picks.shape[1]), value=-1)


@register("stored_moe", "reference")
def stored_moe(
    x: torch.Tensor,
    token_ids: torch.Tensor,
    gate: torch.Tensor,
    routed: tuple[torch.Tensor, ...],
    shared: tuple[torch.Tensor, ...],
    *,
    topk: int,
    scaling_factor: float,
    limit: float,
    bias: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router, FP4 experts and the FP8 shared expert; the sum is left to the mHC write.

    x: [tokens, hidden]; token_ids: [tokens] int64; gate: [experts, hidden]; routed: w1, its scale,
    w3, scale, w2, scale, all uint8: [experts, rows, cols / 2] and [experts, rows, cols / 32];
    shared: w1 over w3 [2 * cols, hidden], scale, w2 [hidden, cols], scale, uint8; bias:
    [experts]; table: [vocab, topk] int64, which replaces the choice. Returns (each choice's output
    [tokens, topk, hidden], the shared output [tokens, hidden], indices [tokens, topk] int32).
    """
    scores = router_scores(x, gate)
    chosen = table[token_ids] if table is not None else None
    indices, weights = route(scores, bias, chosen, topk, scaling_factor)
    w1, s1, w3, s3, w2, s2 = routed
    out = torch.empty(*indices.shape, x.shape[1], dtype=x.dtype, device=x.device)
    for token, own in enumerate(indices.tolist()):
        for slot, e in enumerate(own):
            row = x[token : token + 1]
            first = linear(row, fp4_matrix(w1[e], s1[e]), True)
            up = linear(row, fp4_matrix(w3[e], s3[e]), True)
            act = swiglu(first, up, limit, weights[token, slot : slot + 1, None])
            out[token, slot] = linear(act, fp4_matrix(w2[e], s2[e]), True)[0]
    both = linear(x, fp8_matrix(shared[0], shared[1]), True)
    act = swiglu(*both.chunk(2, dim=-1), limit)
    return out, linear(act, fp8_matrix(shared[2], shared[3]), True), indices.int()
