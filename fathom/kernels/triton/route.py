"""The router's choice for a few tokens, and the order in which the experts take their pairs.

`router_choose` scores the experts of one token and picks the best, or reads the hash table's.
`router_order` sorts the (token, choice) pairs by expert without a sort: a pair's rank within its
expert is the number of earlier tokens' pairs that have it too. A token may have an expert more than
once, as no router but a hash table would choose.

Paper: §2.1 (DeepSeekMoE: sqrt-softplus affinity, hash routing).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE = 8  # pairs of one expert that are multiplied at once
EXPERTS = 256  # that router_order looks at together, at most: more do not fit the shared memory


@triton.jit
def _affinity(x):
    """sqrt(log(1 + exp(x)))."""
    e = tl.exp(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL))
    small = e * (1.0 - e * (0.5 - e / 3.0))  # log(1 + e) where adding 1 would round e away
    softplus = tl.where(x > 20.0, x, tl.where(e < 1e-2, small, tl.log(1.0 + e)))
    return tl.sqrt(softplus)


@triton.jit
def router_choose(
    logits, bias, table, token_ids, indices, weights, pairs, tile_expert, tile_first, tile_last,
    tiles, experts, topk, factor,
    HASHED: tl.constexpr, ALONE: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A token's experts and their weights, and for a token alone the tiles of its pairs."""
    token = tl.program_id(0)
    expert, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    live = expert < experts
    score = _affinity(tl.load(logits + token * experts + expert, mask=live, other=0.0))
    steered = score
    if not HASHED:
        steered += tl.load(bias + expert, mask=live, other=0.0)
    # NaN is chosen first, and then makes the weights NaN: left in, it would make any number of the
    # largest one's, also one of no expert.
    steered = tl.where(steered == steered, steered, float("inf"))
    steered = tl.where(live, steered, -float("inf"))
    chosen = tl.zeros([SLOTS], tl.int32)
    kept = tl.zeros([SLOTS], tl.float32)
    for choice in range(topk):
        if HASHED:
            best = tl.load(table + tl.load(token_ids + token) * topk + choice).to(tl.int32)
        else:
            best = tl.argmax(steered, axis=0).to(tl.int32)
        own = tl.sum(tl.where(expert == best, score, 0.0), axis=0)
        steered = tl.where(expert == best, -float("inf"), steered)
        chosen = tl.where(slot == choice, best, chosen)
        kept = tl.where(slot == choice, own, kept)
    used = slot < topk
    at = token * topk + slot
    tl.store(indices + at, chosen, mask=used)
    tl.store(weights + at, kept / tl.sum(kept, axis=0) * factor, mask=used)
    if ALONE:  # every pair is a tile of its own
        tl.store(pairs + slot, slot, mask=used)
        tl.store(tile_expert + slot, chosen, mask=used)
        tl.store(tile_first + slot, slot, mask=used)
        tl.store(tile_last + slot, slot + 1, mask=used)
        tl.store(tiles, topk)


@triton.jit
def router_order(
    indices, pairs, tile_expert, tile_first, tile_last, tiles, tokens, topk,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Pairs in the order of their experts, of which BLOCKS times EXPERTS are looked at one block
    after the other, and the tiles of up to TILE of them.
    """
    token = tl.arange(0, TOKENS)
    placed, tiled = 0, 0  # pairs and tiles of the experts before a block's
    for block in tl.static_range(BLOCKS):
        expert = block * EXPERTS + tl.arange(0, EXPERTS)
        # The number of choices that are an expert, and in the lower 16 bits their sum.
        table = tl.zeros([TOKENS, EXPERTS], tl.int32)
        for choice in range(topk):
            own = tl.load(indices + token * topk + choice, mask=token < tokens, other=-1)
            here = own[:, None] == expert[None, :]
            table += tl.where(here, 65536 + choice, 0)
        present = table >> 16
        counts = tl.sum(present, axis=0)
        starts = placed + tl.cumsum(counts, axis=0) - counts
        place = starts[None, :] + tl.cumsum(present, axis=0) - present
        if tl.max(tl.max(present, axis=1), axis=0) > 1:
            for choice in range(topk):
                own = tl.load(indices + token * topk + choice, mask=token < tokens, other=-1)
                here = own[:, None] == expert[None, :]
                at = tl.sum(tl.where(here, place, 0), axis=1)
                for earlier in range(choice):
                    other = tl.load(indices + token * topk + earlier, mask=token < tokens, other=-1)
                    at += (other == own).to(tl.int32)
                used = token < tokens
                if BLOCKS > 1:
                    used = used & (own // EXPERTS == block)
                tl.store(pairs + at, token * topk + choice, mask=used)
        else:
            tl.store(pairs + place, token[:, None] * topk + (table & 0xFFFF), mask=present > 0)
        own_tiles = (counts + TILE - 1) // TILE
        first_tile = tiled + tl.cumsum(own_tiles, axis=0) - own_tiles
        for i in range(tl.max(own_tiles, axis=0)):
            at, used, first = first_tile + i, i < own_tiles, starts + i * TILE
            tl.store(tile_expert + at, expert, mask=used)
            tl.store(tile_first + at, first, mask=used)
            tl.store(tile_last + at, tl.minimum(first + TILE, starts + counts), mask=used)
        placed += tl.sum(counts, axis=0)
        tiled += tl.sum(own_tiles, axis=0)
    tl.store(tiles, tiled)


@dataclass(frozen=True, slots=True)
class Routing:
    """What the router decided.

    indices: [tokens, topk] int32; weights: [tokens, topk] float32; pairs: [pairs] int32, the pair
    (token * topk + choice) at each place in the order by expert; tile_expert, tile_first,
    tile_last: [tiles] int32, for each tile its expert and the places from first to before last;
    tiles: [1] int32, how many tiles there are; most: how many there can be.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    pairs: torch.Tensor
    tile_expert: torch.Tensor
    tile_first: torch.Tensor
    tile_last: torch.Tensor
    tiles: torch.Tensor
    most: int

    def lists(self) -> dict[str, torch.Tensor]:
        """Pairs and tiles by the names that kernels have for them, each of the same shape."""
        return {
            "pairs": self.pairs, "tile_expert": self.tile_expert, "tile_first": self.tile_first,
            "tile_last": self.tile_last, "tiles": self.tiles,
        }  # fmt: skip


def routing(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    topk: int,
    scaling_factor: float,
    bias: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> Routing:
    """logits: [tokens, experts] float32; token_ids: [tokens] int64; bias: [experts]; table: [vocab,
    topk] int64, which replaces the choice. The host learns nothing and does not wait.
    """
    tokens, experts = logits.shape
    count = tokens * topk
    most = min(count, min(count, experts) + count // TILE)
    make = {"dtype": torch.int32, "device": logits.device}
    r = Routing(
        indices=torch.empty(tokens, topk, **make),
        weights=torch.empty(tokens, topk, dtype=torch.float32, device=logits.device),
        pairs=torch.empty(count, **make),
        tile_expert=torch.empty(most, **make),
        tile_first=torch.empty(most, **make),
        tile_last=torch.empty(most, **make),
        tiles=torch.empty(1, **make),
        most=most,
    )
    router_choose[(tokens,)](
        logits=logits, bias=bias if bias is not None else logits,
        table=table if table is not None else token_ids, token_ids=token_ids, indices=r.indices,
        weights=r.weights, **r.lists(), experts=experts, topk=topk, factor=scaling_factor,
        HASHED=table is not None, ALONE=tokens == 1, EXPERTS=triton.next_power_of_2(experts),
        SLOTS=triton.next_power_of_2(topk), num_warps=1,
    )  # fmt: skip
    if tokens > 1:
        own = min(EXPERTS, triton.next_power_of_2(experts))
        router_order[(1,)](
            indices=r.indices, **r.lists(), tokens=tokens, topk=topk,
            TOKENS=triton.next_power_of_2(tokens), EXPERTS=own, TILE=TILE,
            BLOCKS=triton.cdiv(experts, own), num_warps=8,
        )  # fmt: skip
    return r
