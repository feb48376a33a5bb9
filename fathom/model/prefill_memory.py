"""How much device memory a prefill takes, known before anything is allocated.

A plan lists what is live while each operation of a layer runs; the operation with the most decides.
It counts tensors, in the order in which fathom/model/stored_forward.py makes and drops them, and
one fixed workspace of the matrix library; the allocator rounds each tensor up by less than 2 MiB.

Paper: §3.5.1 (cache layout); otherwise none (engineering).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fathom.errors import ConfigError
from fathom.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import SLAB_TOKENS, SlabLayout
from fathom.quant import kv_pack
from fathom.quant.kv_pack import IndexerFormat

MATRIX_WORKSPACE = 32 * 2**20  # what cuBLAS keeps for itself on this generation of cards
SCORE_BYTES = 256 * 2**20  # of the index scores of one block of queries, at most
CHUNK_STEP = 128  # chunks are proposed in multiples of this
VALUE, FLOAT, INT = 2, 4, 4  # bytes: BF16 activations, float32, int32


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of a prefill: weights and cache, and what is live during each operation."""

    tokens: int
    context: int
    key_format: IndexerFormat
    weights: int
    cache: int
    operations: tuple[tuple[str, dict[str, int]], ...]

    @property
    def working(self) -> int:
        """Bytes above weights and cache while the largest operation runs."""
        return sum(self.largest[1].values())

    @property
    def largest(self) -> tuple[str, dict[str, int]]:
        """The operation that needs most, and its tensors."""
        return max(self.operations, key=lambda item: sum(item[1].values()))

    @property
    def total(self) -> int:
        """Bytes of everything at the worst moment."""
        return self.weights + self.cache + self.working

    def lines(self) -> list[str]:
        """The plan for a reader, to the byte."""
        name, tensors = self.largest
        rows = [("weights", self.weights), ("cache", self.cache)]
        rows += [(f"{name}: {tensor}", size) for tensor, size in tensors.items()]
        rows.append(("total", self.total))
        return [f"{size:>18,}  {label}" for label, size in rows]


def plan_prefill(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    tokens: int,
    context: int,
    key_format: IndexerFormat = "fp4",
) -> MemoryPlan:
    """The plan for chunks of `tokens` of one sequence that reaches `context` tokens in all."""
    ratios = [layer.ratio for layer in layers]
    layout = SlabLayout.of(config, ratios, key_format)
    slabs = -(-context // SLAB_TOKENS)
    cache = slabs * (layout.num_bytes + INT)
    for ratio in ratios:
        cache += config.sliding_window * kv_pack.kv_entry_bytes(
            config.head_dim, config.qk_rope_head_dim
        )
        if ratio == CSA_RATIO:
            cache += 8 * 2 * 2 * (config.head_dim + config.index_head_dim) * FLOAT
        elif ratio == HCA_RATIO:
            cache += 3 * config.head_dim * FLOAT
    weights = sum(layer.num_bytes() for layer in layers)
    operations = tuple(prefill_operations(config, ratios, tokens, context))
    return MemoryPlan(
        tokens=tokens, context=context, key_format=key_format, weights=weights, cache=cache,
        operations=operations,
    )  # fmt: skip


def prefill_operations(
    config: ModelConfig, ratios: Sequence[int], tokens: int, context: int
) -> list[tuple[str, dict[str, int]]]:
    """What is live during each operation of a chunk through layers of these compress ratios."""
    found: list[tuple[str, dict[str, int]]] = []
    before = 0
    for index, ratio in enumerate(ratios):
        layer = _layer(config, ratio, index == 0, tokens, context)
        found += [(name, own | {"choices of the layer before": before}) for name, own in layer]
        before = tokens * config.num_experts_per_tok * INT
        before += tokens * config.index_topk * INT if ratio == CSA_RATIO else 0
    return found


def check_memory(
    config: ModelConfig, layers: Sequence[StoredLayer], plan: MemoryPlan, free: int
) -> None:
    """Raise ConfigError, naming what to change, where `free` bytes do not hold a plan.

    free: bytes of the device that nothing else uses, weights and cache not yet allocated.
    """
    if plan.total <= free:
        return
    needs = (
        f"prefill in chunks of {plan.tokens:,} up to {plan.context:,} tokens needs "
        f"{plan.total:,} bytes ({plan.weights:,} weights, {plan.cache:,} cache, {plan.working:,} "
        f"during {plan.largest[0]}), and {free:,} are free"
    )
    if plan.weights + plan.cache > free:
        raise ConfigError(f"{needs}: keep fewer layers on this device or a shorter context")
    chunk = plan.tokens // CHUNK_STEP * CHUNK_STEP
    while chunk > 0:
        if plan_prefill(config, layers, chunk, plan.context, plan.key_format).total <= free:
            raise ConfigError(f"{needs}: feed chunks of at most {chunk:,} tokens")
        chunk = chunk // 2 // CHUNK_STEP * CHUNK_STEP
    raise ConfigError(f"{needs}: keep fewer layers on this device or a shorter context")


def _layer(
    c: ModelConfig, ratio: int, first: bool, tokens: int, context: int
) -> list[tuple[str, dict[str, int]]]:
    """What is live during each operation of one layer."""
    hidden = tokens * c.hidden_size * VALUE
    streams = c.hc_mult * hidden
    pairs = tokens * c.num_experts_per_tok
    mixes = c.hc_mult * (c.hc_mult + 2)
    rotations = sum(
        count * c.qk_rope_head_dim * FLOAT
        for count in (tokens, tokens, tokens // CSA_RATIO + 1, tokens // HCA_RATIO + 1)
    )
    mixing = tokens * (mixes - c.hc_mult) * FLOAT
    held = {
        "streams given": streams,
        "streams now": 0 if first else streams,
        "normed input": hidden,
        "mixing weights": mixing,
        "rotations, ids": rotations + tokens * 8,
        "matrix workspace": MATRIX_WORKSPACE,
    }
    after = held | {"streams now": streams}
    logits = {
        "mixing logits": tokens * 3 * mixes * FLOAT,
        "fn in three parts": mixes * c.hc_mult * c.hidden_size * (3 * 2 + 2 * FLOAT),
        "mixing weights before": mixing,
    }
    written = {"sublayer's output": hidden, "streams before": 0 if first else streams}
    experts = {} if first else {"experts' outputs": pairs * c.hidden_size * VALUE}
    found = [(f"boundary before attention {ratio}", after | written | logits | experts)]
    found += [
        (f"{name} {ratio}", held | own) for name, own in _attention(c, ratio, tokens, context)
    ]
    found.append((f"boundary before experts {ratio}", after | written | logits))
    found += [(f"{name} {ratio}", after | own) for name, own in _experts(c, tokens)]
    return found


def plain_rows(c: ModelConfig, ratio: int) -> int:
    """Rows of a layer's unquantised matrices: of its compressors, and the index heads' weights."""
    if ratio == CSA_RATIO:
        return 4 * (c.head_dim + c.index_head_dim) + c.index_n_heads
    return 2 * c.head_dim if ratio == HCA_RATIO else 0


def _attention(
    c: ModelConfig, ratio: int, tokens: int, context: int
) -> list[tuple[str, dict[str, int]]]:
    heads = c.num_attention_heads * c.head_dim
    index = c.index_n_heads * c.index_head_dim if ratio == CSA_RATIO else 0
    plain = plain_rows(c, ratio)
    entries = context // ratio if ratio else 0
    grouped = c.o_groups * c.o_lora_rank
    low = {"low-rank queries": tokens * (c.q_lora_rank + c.head_dim) * VALUE}
    projected = {"compressor's input": tokens * plain * FLOAT}
    query = {"queries": tokens * (heads + index) * VALUE}
    near = (c.sliding_window + tokens) * c.head_dim * VALUE
    recent = {"raw entries": near}
    picks = {"picks": tokens * c.index_topk * INT if index else 0}
    room = -(-max(entries, 1) // 128) * 128
    scores = min(tokens * room * FLOAT, SCORE_BYTES)
    return [
        (
            "query projection",
            low | projected | query
            | {
                "rounded input": tokens * c.q_lora_rank * VALUE,
                "widened weight": (heads + index) * c.q_lora_rank * VALUE,
            },
        ),
        (
            "choice of entries",
            low | projected | query | recent | picks
            | {"index queries": tokens * index * VALUE}
            | ({"index keys": room * c.index_head_dim * VALUE, "scores": scores} if index else {}),
        ),
        (
            "attention",
            query | recent | picks
            | {"decoded entries": (near + entries * c.head_dim * VALUE) if ratio else 0},
        ),
        (
            "output projection",
            query | recent | picks
            | {
                "low-rank output": tokens * grouped * VALUE,
                "widened weight": grouped * heads // c.o_groups * VALUE,
            },
        ),
        (
            "last projection",
            recent | picks
            | {
                "low-rank output": tokens * grouped * VALUE,
                "rounded input": tokens * grouped * VALUE,
                "widened weight": grouped * c.hidden_size * VALUE,
                "output": tokens * c.hidden_size * VALUE,
            },
        ),
    ]  # fmt: skip


def _experts(c: ModelConfig, tokens: int) -> list[tuple[str, dict[str, int]]]:
    hidden, inner = tokens * c.hidden_size * VALUE, c.moe_intermediate_size
    pairs = tokens * c.num_experts_per_tok
    plan = {"scores, order": tokens * c.n_routed_experts * FLOAT + pairs * 5 * 8}
    return [
        (
            "shared expert",
            plan
            | {
                "rounded input": hidden,
                "widened weight": 2 * inner * c.hidden_size * VALUE,
                "gate and up": tokens * 2 * inner * VALUE,
                "activation": tokens * inner * VALUE,
            },
        ),
        (
            "experts up",
            plan
            | {
                "shared output": hidden,
                "rounded inputs": pairs * c.hidden_size * VALUE,
                "gate and up": pairs * 2 * inner * VALUE,
            },
        ),
        (
            "experts' activation",
            plan
            | {
                "shared output": hidden,
                "gate and up": pairs * 2 * inner * VALUE,
                "activation": pairs * inner * VALUE,
            },
        ),
        (
            "experts down",
            plan
            | {
                "shared output": hidden,
                "activation": pairs * inner * VALUE,
                "outputs": pairs * c.hidden_size * VALUE,
            },
        ),
    ]
