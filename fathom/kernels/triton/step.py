"""Where a decode step begins and ends: embeddings and rotations of its tokens, and the output head.

A program of `_logits` owns some rows of the head and up to 16 tokens, on the matrix units: of every
output the products are added in one order, whatever the other tokens are. Bytes: vocab * hidden of
weights, 1.06 GB for V4-Flash; every 16 tokens read them again, from the L2 cache as far as their
programs run beside one another.

Paper: §2 (architecture), §2.3.3 (partial RoPE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register

ROWS, TOKENS, COLS = 32, 16, 256  # of one program of _logits, and columns of one of its steps
WARPS, STAGES = 4, 4
COPIED = 1024  # columns of one program of _streams


@triton.jit
def _rotations(rows, frequencies, out, tokens, PAIRS: tl.constexpr):
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
    _rotations[(tokens, 4)](rows, frequencies, out, tokens, PAIRS=pairs, num_warps=1)
    return out


@triton.jit
def _streams(token_ids, embed, out, hidden, COPIES: tl.constexpr, COLS: tl.constexpr):
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
    _streams[(tokens, triton.cdiv(hidden, COPIED))](
        token_ids, embed, out, hidden, COPIES=copies, COLS=COPIED, num_warps=4
    )
    return out


@triton.jit
def _logits(
    hidden, weight, out, tokens, vocab, cols,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live, used = token < tokens, row < vocab
    dtype: tl.constexpr = weight.dtype.element_ty
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        at = weight + row[:, None].to(tl.int64) * cols + col[None, :]
        w = tl.load(at, mask=used[:, None], other=0.0)
        x = tl.load(hidden + token[None, :] * cols + col[:, None], mask=live[None, :], other=0.0)
        total = tl.dot(w, x.to(dtype), total, input_precision="ieee")
    at = out + token[None, :].to(tl.int64) * vocab + row[:, None]
    tl.store(at, total, mask=live[None, :] & used[:, None])


@register("head_logits", "triton")
def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As the reference. hidden: [tokens, hidden] float32, of the weight's precision; weight:
    [vocab, hidden]. Returns [tokens, vocab] float32.
    """
    (tokens, cols), vocab = hidden.shape, weight.shape[0]
    out = torch.empty(tokens, vocab, dtype=torch.float32, device=hidden.device)
    _logits[(triton.cdiv(tokens, TOKENS), triton.cdiv(vocab, ROWS))](
        hidden, weight, out, tokens, vocab, cols, ROWS=ROWS, TOKENS=TOKENS,
        COLS=min(COLS, cols & -cols), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out
