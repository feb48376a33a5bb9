"""Routed experts in their stored FP4 form, and the shared one, for many tokens.

(token, choice) pairs are sorted by expert, and their inputs, rounded to FP8 (exact in BF16), are
laid out in that order. A program of `_grouped` owns ROWS rows of one expert's matrix and up to
TOKENS of its pairs: FP4 codes become BF16 on their way into the matrix units, as the operand that
may come from registers, so that no widened weight is ever stored and, with at most TOKENS pairs on
an expert, every code is unpacked once. Columns of inputs are in the order in which codes are
unpacked: of every 128, those of the lowest place in a word of eight codes first, and words in the
order that suits the operand's registers.

FLOP at 8,192 tokens of V4-Flash: 8,192 x 6 x 3 x 2 x 4,096 x 2,048 = 2.5e12, 3.2 ms at 770 TFLOP/s;
uniform routing gives an expert 192 pairs, which fill three quarters of a tile. Bytes: 3.4 GB of
weights, 1.1 ms; 2.4 GB of inputs, activations and outputs, 0.8 ms.

Paper: §2.1 (DeepSeekMoE: sqrt-softplus affinity, hash routing); §3.4 (FP4 experts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fathom.kernels.registry import register
from fathom.kernels.triton import formats as f
from fathom.kernels.triton.chunk_linear import FEW, chunk_linear, float_product, rounded_rows
from fathom.kernels.triton.few_experts import stored_moe
from fathom.kernels.triton.fp4_words import factors_of_words, ordered, settled, unpacked

ROWS, TOKENS = 128, 256  # of one program's tile
WARPS, STAGES = 8, 3


@triton.jit
def _grouped(
    x, codes, scale, out, order, starts, tile_expert, tile_first, rows, out_stride, experts,
    SCATTER: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """out[place] = x[place] times the expert's matrix [rows, COLS]; a place is a pair's in the
    order by expert. SCATTER: out[pair] instead. x: a descriptor of [pairs, COLS], of tiles
    [TOKENS, 128].

    COLS is a constant for speed: with a loop that might not run at all, the assembler would wait
    for every product before it issues the next.
    """
    # Row blocks of one tile follow one another, since they read the same inputs.
    block, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tile_expert + tile)
    if expert < experts:
        first = tl.load(tile_first + tile)
        row, place = tl.arange(0, ROWS), tl.arange(0, TOKENS)
        start = expert.to(tl.int64) * rows + block * ROWS
        words = codes.to(tl.pointer_type(tl.int32)) + start * (COLS // 8)
        words = words + row[:, None] * (COLS // 8) + tl.arange(0, 16)[None, :]
        scales = scale.to(tl.pointer_type(tl.int32)) + start * (COLS // 128)
        scales = scales + row * (COLS // 128)
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        for k in range(COLS // 128):
            word = ordered(tl.load(words + k * 16))
            factor = factors_of_words(tl.load(scales + k), BF16)
            weight = unpacked(word, factor, BF16)
            # Behind the expert's last place are another's inputs: their products are not stored.
            value = x.load([first, k * 128])
            total = tl.dot(weight, tl.trans(value), total, input_precision="ieee")
            total = settled(total, BF16)
        if BF16:
            total *= 4611686018427387904.0  # 2**62
        place += first
        live = place < tl.load(starts + expert + 1)
        target = place
        if SCATTER:
            target = tl.load(order + place, mask=live, other=0)
        own = block * ROWS + row
        at = out + target[:, None].to(tl.int64) * out_stride + own[None, :]
        tl.store(at, tl.trans(total.to(out.dtype.element_ty)), mask=live[:, None])


@triton.jit
def _swiglu_rounded(
    both, weights, order, out, groups, limit,
    WEIGHED: tl.constexpr, PLANES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Rows of gate | up -> silu(min(gate, limit)) * clamp(up) * weight, rounded to FP8."""
    row = tl.program_id(0).to(tl.int64)
    group, col = tl.arange(0, GROUPS), tl.arange(0, 128)
    live = group < groups
    at = both + row * 2 * groups * 128 + group[:, None] * 128 + col[None, :]
    gate = tl.load(at, mask=live[:, None], other=0.0).to(tl.float32)
    up = tl.load(at + groups * 128, mask=live[:, None], other=0.0).to(tl.float32)
    values = f.swiglu(gate, up, limit)
    if WEIGHED:
        values *= tl.load(weights + tl.load(order + row))
    values = values.to(out.dtype.element_ty).to(tl.float32)
    f.store_groups(out + row * groups * 128, f.round_group(values), group, live, PLANES)


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """Pairs sorted by expert, and the tiles of up to `tile_tokens` of them, all on the device.

    order: [pairs] int32, the pair (token * topk + choice) at each place; starts: [experts + 1]
    int32, each expert's first place; tile_expert, tile_first: [tiles] int32, as many as there can
    be at most; a surplus tile's expert is the number of experts.
    """

    order: torch.Tensor
    starts: torch.Tensor
    tile_expert: torch.Tensor
    tile_first: torch.Tensor
    tile_tokens: int

    @classmethod
    def of(cls, indices: torch.Tensor, experts: int, tokens: int) -> ExpertOrder:
        """indices: [tokens, topk]; experts: how many there are; tokens: of a tile. No waiting."""
        flat = indices.flatten()
        by_expert, order = flat.sort(stable=True)
        every = torch.arange(experts + 1, device=flat.device)
        starts = torch.searchsorted(by_expert, every.to(by_expert.dtype))
        tiles = (starts.diff() + tokens - 1) // tokens
        ends = tiles.cumsum(0)
        most = -(-len(flat) // tokens) + min(experts, len(flat))
        number = torch.arange(most, device=flat.device)
        expert = torch.searchsorted(ends, number, right=True)
        within = number - (ends - tiles)[expert.clamp(max=experts - 1)]
        first = starts[expert.clamp(max=experts - 1)] + within * tokens
        return cls(order.int(), starts.int(), expert.int(), first.int(), tokens)


def grouped_fp4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    plan: ExpertOrder,
    out: torch.Tensor,
    *,
    scatter: bool,
) -> None:
    """Each pair's input times its expert's matrix.

    x: [tokens, cols], one for each pair by place, rounded, its columns in the order of planes;
    codes: [experts, rows, cols / 2] uint8; scale: [experts, rows, cols / 32] uint8; out: [tokens,
    rows], rows apart by any stride, one for each pair by place or (scatter) by pair.
    """
    experts, rows, half = codes.shape
    small = x.dtype == torch.float32
    tile = min(64, rows) if small else ROWS
    _grouped[(rows // tile, len(plan.tile_expert))](
        TensorDescriptor.from_tensor(x, [plan.tile_tokens, 128]), codes, scale, out, plan.order,
        plan.starts, plan.tile_expert, plan.tile_first, rows, out.stride(0), experts,
        SCATTER=scatter, COLS=2 * half, ROWS=tile, TOKENS=plan.tile_tokens, BF16=not small,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def _rounded_act(
    both: torch.Tensor,
    limit: float,
    weights: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """both: [rows, 2 * cols], gate | up; weights: [pairs] float32; order: [rows]. Returns [rows,
    cols], with weights in the order of planes.
    """
    rows, cols = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, cols, dtype=both.dtype, device=both.device)
    _swiglu_rounded[(rows,)](
        both, weights if weights is not None else both, order if order is not None else both, out,
        cols // 128, limit, WEIGHED=weights is not None, PLANES=weights is not None,
        GROUPS=triton.next_power_of_2(cols // 128), num_warps=4,
    )  # fmt: skip
    return out


def routed_experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    routed: tuple[torch.Tensor, ...],
    limit: float,
) -> torch.Tensor:
    """x: [tokens, hidden]; indices, weights: [tokens, topk]; routed: [experts, ...] each, as in
    `chunk_moe`. Returns [tokens, topk, hidden].
    """
    w1, s1, w3, s3, w2, s2 = routed
    (tokens, hidden), topk, (experts, inner) = x.shape, indices.shape[1], w1.shape[:2]
    plan = ExpertOrder.of(indices, experts, TOKENS)
    rounded = rounded_rows(x, planes=True, source=plan.order // topk)
    both = torch.empty(tokens * topk, 2 * inner, dtype=x.dtype, device=x.device)
    grouped_fp4(rounded, w1, s1, plan, both[:, :inner], scatter=False)
    grouped_fp4(rounded, w3, s3, plan, both[:, inner:], scatter=False)
    del rounded
    act = _rounded_act(both, limit, weights, plan.order)
    del both
    out = torch.empty(tokens * topk, hidden, dtype=x.dtype, device=x.device)
    grouped_fp4(act, w2, s2, plan, out, scatter=True)
    return out.unflatten(0, (tokens, topk))


@register("chunk_moe", "triton")
def chunk_moe(
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
    """As the reference. x: [tokens, hidden]; token_ids: [tokens] int64; gate: [experts, hidden];
    routed, shared, bias, table: the same as there. Returns (pairs [tokens, topk, hidden], shared
    output [tokens, hidden], indices [tokens, topk] int32).
    """
    if x.shape[0] <= FEW:  # few_experts.py multiplies
        return stored_moe(
            x, token_ids, gate, routed, shared, topk=topk, scaling_factor=scaling_factor,
            limit=limit, bias=bias, table=table,
        )  # fmt: skip
    scores = F.softplus(float_product(x, gate)).sqrt()
    chosen = table[token_ids] if table is not None else None
    if chosen is None:
        chosen = (scores if bias is None else scores + bias).topk(topk, dim=-1).indices
    weights = scores.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) * scaling_factor
    both, _ = chunk_linear(x, *shared[:2])
    # Rounded here already; rounding once more changes nothing.
    shared_out, _ = chunk_linear(_rounded_act(both, limit), *shared[2:])
    del both
    return routed_experts(x, chosen, weights, routed, limit), shared_out, chosen.int()
