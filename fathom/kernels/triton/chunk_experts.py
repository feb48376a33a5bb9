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
from fathom.kernels.triton.fp4_words import factors_of_words, ordered, unpacked

HALF, TOKENS = 128, 128  # half of the rows and all pairs of one program's tile
WARPS, STAGES = 8, 3


@triton.jit
def _weight(words, scales, BF16: tl.constexpr):
    """128 columns of rows whose words and scales are pointed to, as an operand in registers."""
    return unpacked(ordered(tl.load(words)), factors_of_words(tl.load(scales), BF16), BF16)


@triton.jit
def _products(
    x, first, words, scales, out, live, HALF: tl.constexpr, COLS: tl.constexpr,
    TOKENS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Store the products of TOKENS inputs from `first` on with twice HALF rows.

    words, scales: pointers [HALF, 16] and [HALF] to the first rows; out: pointers [TOKENS] to each
    one's first result. The halves have sums of their own, so that one half's products run while the
    other's operand is unpacked.

    COLS is a constant for speed: with a loop that might not run at all, the assembler would wait
    for every product before it issues the next.
    """
    low_words, low_scales = words + HALF * (COLS // 8), scales + HALF * (COLS // 128)
    high = tl.zeros([HALF, TOKENS], tl.float32)
    low = tl.zeros([HALF, TOKENS], tl.float32)
    for k in range(COLS // 128):
        # Behind the expert's last place are another's inputs: their products are not stored.
        value = tl.trans(x.load([first, k * 128]))
        weight = _weight(words + k * 16, scales + k, BF16)
        high = tl.dot(weight, value, high, input_precision="ieee")
        weight = _weight(low_words + k * 16, low_scales + k, BF16)
        low = tl.dot(weight, value, low, input_precision="ieee")
    if BF16:
        high *= 4611686018427387904.0  # 2**62
        low *= 4611686018427387904.0
    at = out[:, None] + tl.arange(0, HALF)[None, :]
    tl.store(at, tl.trans(high.to(out.dtype.element_ty)), mask=live[:, None])
    tl.store(at + HALF, tl.trans(low.to(out.dtype.element_ty)), mask=live[:, None])


@triton.jit
def _grouped(
    x, few_x, codes, scale, out, order, starts, tile_expert, tile_first, rows, out_stride, experts,
    SCATTER: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """out[place] = x[place] times the expert's matrix [rows, COLS]; a place is a pair's in the
    order by expert. SCATTER: out[pair] instead. x, few_x: descriptors of [pairs, COLS], of tiles
    [TOKENS, 128] and of half as many pairs, which the last tile of an expert may do with.
    """
    # Row blocks of one tile follow one another, since they read the same inputs.
    block, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tile_expert + tile)
    if expert < experts:
        first = tl.load(tile_first + tile)
        row = tl.arange(0, HALF)
        start = expert.to(tl.int64) * rows + block * 2 * HALF
        words = codes.to(tl.pointer_type(tl.int32)) + start * (COLS // 8)
        words = words + row[:, None] * (COLS // 8) + tl.arange(0, 16)[None, :]
        scales = scale.to(tl.pointer_type(tl.int32)) + start * (COLS // 128)
        scales = scales + row * (COLS // 128)
        last = tl.load(starts + expert + 1)
        own = out + block * 2 * HALF
        if last - first > TOKENS // 2:
            place = first + tl.arange(0, TOKENS)
            live = place < last
            target = place
            if SCATTER:
                target = tl.load(order + place, mask=live, other=0)
            at = own + target.to(tl.int64) * out_stride
            _products(x, first, words, scales, at, live, HALF, COLS, TOKENS, BF16)
        else:
            few_place = first + tl.arange(0, TOKENS // 2)
            few_live = few_place < last
            few_target = few_place
            if SCATTER:
                few_target = tl.load(order + few_place, mask=few_live, other=0)
            few_at = own + few_target.to(tl.int64) * out_stride
            _products(
                few_x, first, words, scales, few_at, few_live, HALF, COLS, TOKENS // 2, BF16
            )


@triton.jit
def _swiglu_rounded(
    both, weights, order, out, groups, limit,
    WEIGHED: tl.constexpr, ORDER: tl.constexpr, GROUPS: tl.constexpr,
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
    f.store_groups(out + row * groups * 128, f.round_group(values), group, live, ORDER)


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
    experts, rows, half_cols = codes.shape
    small = x.dtype == torch.float32
    half = min(32 if small else HALF, (rows & -rows) // 2)
    tiles = [TensorDescriptor.from_tensor(x, [n, 128]) for n in (plan.tile_tokens, plan.tile_tokens // 2)]
    _grouped[(rows // (2 * half), len(plan.tile_expert))](
        *tiles, codes, scale, out, plan.order, plan.starts, plan.tile_expert, plan.tile_first,
        rows, out.stride(0), experts, SCATTER=scatter, HALF=half, COLS=2 * half_cols,
        TOKENS=plan.tile_tokens, BF16=not small, num_warps=WARPS, num_stages=STAGES,
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
        cols // 128, limit, WEIGHED=weights is not None,
        ORDER="columns" if weights is None else "ordered",
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
