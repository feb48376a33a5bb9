"""Routed experts in their stored FP4 form, and the shared one, for many tokens.

(token, choice) pairs are sorted by expert, and their inputs, rounded to FP8 (exact in BF16), are
laid out in that order, columns in the order in which codes are unpacked (fp4_words.py). A program
of `chunk_experts_grouped` owns 256 rows of one expert's matrix, in two halves, and up to 128 of its
pairs: FP4 codes become BF16 on their way into the matrix units, as the operand that may come from
registers, so that no widened weight is ever stored. While the matrix units multiply one half, the
other half's codes are unpacked. That no register of a product under way is written to meanwhile is
not promised by anybody; tests/kernels/test_sass.py reads it from the machine code.

FLOP at 8,192 tokens of V4-Flash: 8,192 x 6 x 3 x 2 x 4,096 x 2,048 = 2.5e12, 3.2 ms at 770 TFLOP/s.
Uniform routing gives an expert 192 pairs: a tile of 128, then one of 64 or of 128, which are full
to 86%. Bytes: 3.4 GB of weights, 1.1 ms; 2.4 GB of inputs, activations and outputs, 0.8 ms.

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
from fathom.kernels.triton.chunk_linear import FEW, chunk_linear, float_product
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
    x, words, scales, out, out_cols, order, first, last,
    SCATTER: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """The products of twice HALF rows with TOKENS inputs from `first` on, stored up to `last`.

    words, scales: pointers [HALF, 16] and [HALF] to the first rows. The halves have sums of their
    own, so that one half's products run while the other's operand is unpacked.

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
    place = first + tl.arange(0, TOKENS)
    live = place < last
    target = place
    if SCATTER:
        target = tl.load(order + place, mask=live, other=0)
    at = out + target[:, None].to(tl.int64) * out_cols + tl.arange(0, HALF)[None, :]
    tl.store(at, tl.trans(high.to(out.dtype.element_ty)), mask=live[:, None])
    tl.store(at + HALF, tl.trans(low.to(out.dtype.element_ty)), mask=live[:, None])


@triton.jit
def chunk_experts_grouped(
    x, few_x, codes, scale, more_codes, more_scale, out, order, starts, tile_expert, tile_first,
    rows, out_cols, experts,
    SCATTER: tl.constexpr, HALF: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """out[place] = x[place] times the expert's matrix [rows, COLS], and behind that times another's
    of the same shape where out is wide enough; a place is a pair's in the order by expert. SCATTER:
    out[pair] instead. x, few_x: descriptors of [pairs, COLS], of tiles [TOKENS, 128] and of half as
    many pairs, which the last tile of an expert may do with.
    """
    # Row blocks of one tile follow one another, since they read the same inputs.
    first_row, tile = tl.program_id(0) * 2 * HALF, tl.program_id(1)
    expert = tl.load(tile_expert + tile)
    if expert < experts:
        first, last = tl.load(tile_first + tile), tl.load(starts + expert + 1)
        row = tl.arange(0, HALF)
        if first_row >= rows:
            codes, scale = more_codes, more_scale
        start = expert.to(tl.int64) * rows + first_row % rows
        words = codes.to(tl.pointer_type(tl.int32)) + start * (COLS // 8)
        words = words + row[:, None] * (COLS // 8) + tl.arange(0, 16)[None, :]
        scales = scale.to(tl.pointer_type(tl.int32)) + start * (COLS // 128)
        scales = scales + row * (COLS // 128)
        if last - first > TOKENS // 2:
            _products(
                x, words, scales, out + first_row, out_cols, order, first, last,
                SCATTER, HALF, COLS, TOKENS, BF16,
            )  # fmt: skip
        else:
            _products(
                few_x, words, scales, out + first_row, out_cols, order, first, last,
                SCATTER, HALF, COLS, TOKENS // 2, BF16,
            )  # fmt: skip


@triton.jit
def chunk_experts_lay_out(x, x_stride, places, out, groups, topk, GROUPS: tl.constexpr):
    """A row of x, rounded to FP8, to the places of all its pairs."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    live = group < groups
    at = x + row * x_stride + group[:, None] * 128 + tl.arange(0, 128)[None, :]
    values = f.round_group(tl.load(at, mask=live[:, None], other=0.0).to(tl.float32))
    for choice in range(topk):
        place = tl.load(places + row * topk + choice).to(tl.int64)
        f.store_groups(out + place * groups * 128, values, group, live, "ordered")


@triton.jit
def chunk_experts_cut_tiles(
    starts, tile_expert, tile_first, experts, most, TOKENS: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    """The tiles of up to TOKENS places of each expert, and `experts` for each surplus tile."""
    expert = tl.arange(0, EXPERTS)
    live = expert < experts
    first = tl.load(starts + expert, mask=live, other=0)
    count = tl.load(starts + expert + 1, mask=live, other=0) - first
    tiles = (count + TOKENS - 1) // TOKENS
    begin = tl.cumsum(tiles, axis=0) - tiles
    for i in range(tl.max(tiles, axis=0)):
        tl.store(tile_expert + begin + i, expert, mask=i < tiles)
        tl.store(tile_first + begin + i, first + i * TOKENS, mask=i < tiles)
    for start in range(tl.sum(tiles, axis=0), most, EXPERTS):
        tl.store(tile_expert + start + expert, experts, mask=start + expert < most)


@triton.jit
def chunk_experts_swiglu(
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

    order: [pairs] int32, the pair (token * topk + choice) at each place; places: [pairs] int32, the
    place of each pair; starts: [experts + 1] int32, each expert's first place; tile_expert,
    tile_first: [tiles] int32, as many as there can be at most; a surplus tile's expert is the
    number of experts.
    """

    order: torch.Tensor
    places: torch.Tensor
    starts: torch.Tensor
    tile_expert: torch.Tensor
    tile_first: torch.Tensor
    tile_tokens: int

    @classmethod
    def of(cls, indices: torch.Tensor, experts: int, tokens: int) -> ExpertOrder:
        """indices: [tokens, topk]; experts: how many there are; tokens: of a tile. No waiting."""
        flat = indices.flatten()
        pairs, make = len(flat), {"dtype": torch.int32, "device": flat.device}
        by_expert, order = flat.sort(stable=True)
        every = torch.arange(experts + 1, dtype=flat.dtype, device=flat.device)
        starts = torch.searchsorted(by_expert, every, out_int32=True)
        places = torch.empty(pairs, **make).scatter_(0, order, torch.arange(pairs, **make))
        most = -(-pairs // tokens) + min(experts, pairs)
        tile_expert, tile_first = torch.empty(most, **make), torch.empty(most, **make)
        chunk_experts_cut_tiles[(1,)](
            starts, tile_expert, tile_first, experts, most, TOKENS=tokens,
            EXPERTS=triton.next_power_of_2(experts), num_warps=4,
        )  # fmt: skip
        return cls(order.int(), places, starts, tile_expert, tile_first, tokens)


def grouped_fp4(
    x: torch.Tensor,
    matrices: tuple[torch.Tensor, ...],
    plan: ExpertOrder,
    out: torch.Tensor,
    *,
    scatter: bool,
) -> None:
    """Each pair's input times its expert's matrix, or its expert's two matrices.

    x: [tokens, cols], one for each pair by place, rounded, its columns in the order of planes;
    matrices: codes [experts, rows, cols / 2] uint8 and scales [experts, rows, cols / 32] uint8,
    once or twice; out: [tokens, rows] or [tokens, 2 * rows] contiguous, one for each pair by place
    or (scatter) by pair.
    """
    codes, scale = matrices[:2]
    experts, rows, half_cols = codes.shape
    small = x.dtype == torch.float32
    half = min(32 if small else HALF, (rows & -rows) // 2)
    tiles = (plan.tile_tokens, plan.tile_tokens // 2)
    whole, part = (TensorDescriptor.from_tensor(x, [tokens, 128]) for tokens in tiles)
    chunk_experts_grouped[(out.shape[1] // (2 * half), len(plan.tile_expert))](
        x=whole, few_x=part, codes=codes, scale=scale, more_codes=matrices[-2],
        more_scale=matrices[-1], out=out, order=plan.order, starts=plan.starts,
        tile_expert=plan.tile_expert, tile_first=plan.tile_first, rows=rows,
        out_cols=out.shape[1], experts=experts, SCATTER=scatter, HALF=half,
        COLS=2 * half_cols, TOKENS=plan.tile_tokens, BF16=not small,
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
    chunk_experts_swiglu[(rows,)](
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
    (tokens, hidden), topk, (experts, inner) = x.shape, indices.shape[1], routed[0].shape[:2]
    plan = ExpertOrder.of(indices, experts, TOKENS)
    groups = hidden // 128
    rounded = torch.empty(tokens * topk, hidden, dtype=x.dtype, device=x.device)
    chunk_experts_lay_out[(tokens,)](
        x, x.stride(0), plan.places, rounded, groups, topk,
        GROUPS=triton.next_power_of_2(groups), num_warps=4,
    )  # fmt: skip
    both = torch.empty(tokens * topk, 2 * inner, dtype=x.dtype, device=x.device)
    grouped_fp4(rounded, routed[:4], plan, both, scatter=False)
    del rounded
    act = _rounded_act(both, limit, weights, plan.order)
    del both
    out = torch.empty(tokens * topk, hidden, dtype=x.dtype, device=x.device)
    grouped_fp4(act, routed[4:], plan, out, scatter=True)
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
        steered = scores if bias is None else scores + bias
        # Of equal scores the lower expert, as a decode step chooses; topk would promise nothing.
        chosen = steered.sort(dim=-1, descending=True, stable=True).indices[:, :topk].contiguous()
        del steered  # as the whole order, it would stay until the experts are done
    weights = scores.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) * scaling_factor
    both, _ = chunk_linear(x, *shared[:2])
    # Rounded here already; rounding once more changes nothing.
    shared_out, _ = chunk_linear(_rounded_act(both, limit), *shared[2:])
    del both
    return routed_experts(x, chosen, weights, routed, limit), shared_out, chosen.int()
