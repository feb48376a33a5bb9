"""Where a decode step begins and ends: embeddings and rotations of its tokens, and the output head.

A program of `head_products` owns some rows of the head and up to 64 tokens, on the matrix units: of
every output the products are added in one order, whatever the other tokens are. Bytes: vocab *
hidden of weights, 1.06 GB for V4-Flash, which every 64 tokens read once.

Paper: §2 (architecture), §2.3.3 (partial RoPE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register

ROWS, TOKENS, COLS = 128, 64, 128  # of one program of head_products, and columns of one step
WARPS, STAGES = 8, 3
COPIED = 1024  # columns of one program of embed_streams
PART = 4096  # logits that one program of a summary looks at


@triton.jit
def rope_rotations(rows, frequencies, out, tokens, PAIRS: tl.constexpr):
    """A token's cosines and sines, in one of the four ways of a step."""
    token, which = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    window = tl.where(which == 3, 128, tl.where(which == 2, 4, 1))
    first = tl.load(rows + token) // window * window
    phase = first.to(tl.float32) * tl.load(frequencies + tl.minimum(which, 1) * PAIRS + pair)
    at = out + (which * tokens + token) * 2 * PAIRS + pair
    tl.store(at, tl.cos(phase.to(tl.float64)).to(tl.float32))
    tl.store(at + PAIRS, tl.sin(phase.to(tl.float64)).to(tl.float32))


@register("step_rotations", "triton")
def step_rotations(rows: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """As the reference. rows: [4, tokens] int32; frequencies: [2, rope_dim / 2]. Returns [4,
    tokens, 2, rope_dim / 2].
    """
    tokens, pairs = rows.shape[1], frequencies.shape[1]
    out = torch.empty(4, tokens, 2, pairs, dtype=torch.float32, device=rows.device)
    rope_rotations[(tokens, 4)](rows, frequencies, out, tokens, PAIRS=pairs, num_warps=1)
    return out


@triton.jit
def embed_streams(token_ids, embed, out, hidden, COPIES: tl.constexpr, COLS: tl.constexpr):
    """A token's embedding, COPIES times."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = col < hidden
    value = tl.load(embed + tl.load(token_ids + token).to(tl.int64) * hidden + col, mask=live)
    for copy in tl.static_range(COPIES):
        tl.store(out + (token * COPIES + copy) * hidden + col, value, mask=live)


@register("step_streams", "triton")
def step_streams(token_ids: torch.Tensor, embed: torch.Tensor, copies: int) -> torch.Tensor:
    """As the reference. token_ids: [tokens]; embed: [vocab, hidden]. Returns [tokens, streams,
    hidden].
    """
    tokens, hidden = token_ids.shape[0], embed.shape[1]
    out = torch.empty(tokens, copies, hidden, dtype=embed.dtype, device=embed.device)
    embed_streams[(tokens, triton.cdiv(hidden, COPIED))](
        token_ids, embed, out, hidden, COPIES=copies, COLS=COPIED, num_warps=4
    )
    return out


@triton.jit
def head_products(
    hidden, weight, out, tokens, vocab, cols,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Logits of up to TOKENS tokens for ROWS rows of the head."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live, used = token < tokens, row < vocab
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        at = weight + row[:, None].to(tl.int64) * cols + col[None, :]
        w = tl.load(at, mask=used[:, None], other=0.0)
        x = tl.load(hidden + token[None, :] * cols + col[:, None], mask=live[None, :], other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")
    at = out + token[None, :].to(tl.int64) * vocab + row[:, None]
    tl.store(at, total, mask=live[None, :] & used[:, None])


@register("head_logits", "triton")
def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As the reference. hidden: [tokens, hidden] float32, of the weight's precision; weight:
    [vocab, hidden]. Returns [tokens, vocab] float32.
    """
    (tokens, cols), vocab = hidden.shape, weight.shape[0]
    out = torch.empty(tokens, vocab, dtype=torch.float32, device=hidden.device)
    head_products[(triton.cdiv(tokens, TOKENS), triton.cdiv(vocab, ROWS))](
        hidden.to(weight.dtype), weight, out, tokens, vocab, cols, ROWS=ROWS, TOKENS=TOKENS,
        COLS=min(COLS, cols & -cols), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


@triton.jit
def logits_maxima(logits, highs, places, vocab, parts, PART: tl.constexpr):
    """The largest logit of a part of a token's vocabulary, and its first place."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * PART + tl.arange(0, PART)
    value = tl.load(logits + token * vocab + i, mask=i < vocab, other=-float("inf"))
    high = tl.max(value, axis=0)
    tl.store(highs + token * parts + part, high)
    tl.store(places + token * parts + part, tl.min(tl.where(value == high, i, vocab), axis=0))


@triton.jit
def logits_sums(
    logits, draws, highs, sums, vocab, tokens, parts, PARTS: tl.constexpr, PART: tl.constexpr
):
    """Of a part, the sums of exponentials: as they are, and at the draw's temperature."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tl.arange(0, PARTS)
    high = tl.load(highs + token * parts + p, mask=p < parts, other=-float("inf"))
    i = part * PART + tl.arange(0, PART)
    value = tl.load(logits + token * vocab + i, mask=i < vocab, other=-float("inf"))
    below = value - tl.max(high, axis=0)
    at = sums + token * parts + part
    tl.store(at, tl.sum(tl.exp(below).to(tl.float64), axis=0))
    temperature = tl.load(draws + token)
    if temperature > 0:
        shares = tl.exp(below.to(tl.float64) / temperature)
        tl.store(at + tokens * parts, tl.sum(shares, axis=0))


@triton.jit
def logits_choice(
    logits, draws, highs, places, sums, out, vocab, tokens, parts,
    PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """What the parts come to, and the place within one of them where the draw ends."""
    token = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS)
    at, live = token * parts + p, p < parts
    high = tl.load(highs + at, mask=live, other=-float("inf"))
    largest = tl.max(high, axis=0)
    place = tl.load(places + at, mask=live, other=0)
    place = tl.min(tl.where((high == largest) & live, place, vocab), axis=0)
    place = tl.minimum(place, vocab - 1)  # among NaN none is the largest; a draft looks it up
    total = tl.sum(tl.load(sums + at, mask=live, other=0.0), axis=0)
    finite = total == total  # a NaN among the logits, or an infinity, makes the sum one
    highest = tl.where(finite, largest, float("nan")).to(tl.float64)
    tl.store(out + token * 6, highest)
    tl.store(out + token * 6 + 1, place.to(tl.float64))
    tl.store(out + token * 6 + 2, highest + tl.log(total))
    temperature, number = tl.load(draws + token), tl.load(draws + tokens + token)
    if temperature > 0:
        mass = tl.load(sums + tokens * parts + at, mask=live, other=0.0)
        whole = tl.sum(mass, axis=0)
        target = number * whole
        upto = tl.cumsum(mass, axis=0)
        part = tl.sum(((upto <= target) & live).to(tl.int32), axis=0)
        part = tl.minimum(part, parts - 1)
        before = tl.sum(tl.where(p == part - 1, upto, 0.0), axis=0)
        i = part * PART + tl.arange(0, PART)
        value = tl.load(logits + token * vocab + i, mask=i < vocab, other=-float("inf"))
        shares = tl.exp((value - largest).to(tl.float64) / temperature)
        ends = before + tl.cumsum(shares, axis=0)
        inside = tl.sum(((ends <= target) & (i < vocab)).to(tl.int32), axis=0)
        # One beyond the part has no end in it: then nothing is sure.
        here = i == part * PART + inside
        end = tl.sum(tl.where(here, ends, 0.0), axis=0)
        begin = end - tl.sum(tl.where(here, shares, 0.0), axis=0)
        slack = tl.minimum(target - begin, end - target) / whole
        drawn = tl.minimum(part * PART + inside, vocab - 1)
        tl.store(out + token * 6 + 3, drawn.to(tl.float64))
        logit = tl.sum(tl.where(here, value, 0.0), axis=0)
        tl.store(out + token * 6 + 4, logit.to(tl.float64))
        tl.store(out + token * 6 + 5, slack)
    else:
        tl.store(out + token * 6 + 3, -1.0)
        tl.store(out + token * 6 + 4, 0.0)
        tl.store(out + token * 6 + 5, 0.0)


@register("logit_summary", "triton")
def logit_summary(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """As the reference. logits: [tokens, vocab] float32; draws: [2, tokens] float64. Returns
    [tokens, 6] float64.
    """
    (tokens, vocab), device = logits.shape, logits.device
    parts = triton.cdiv(vocab, PART)
    size = {"PARTS": triton.next_power_of_2(parts), "PART": PART}
    highs = torch.empty(tokens, parts, dtype=torch.float32, device=device)
    places = torch.empty(tokens, parts, dtype=torch.int32, device=device)
    sums = torch.empty(2, tokens, parts, dtype=torch.float64, device=device)
    out = torch.empty(tokens, 6, dtype=torch.float64, device=device)
    grid = (tokens, parts)
    logits_maxima[grid](logits, highs, places, vocab, parts, PART=PART, num_warps=4)
    logits_sums[grid](logits, draws, highs, sums, vocab, tokens, parts, **size, num_warps=4)
    logits_choice[(tokens,)](
        logits, draws, highs, places, sums, out, vocab, tokens, parts, **size, num_warps=8
    )
    return out
