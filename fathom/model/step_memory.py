"""How much device memory a decode step takes, known before anything is allocated.

As fathom/model/prefill_memory.py for a prompt: what is live while each operation runs, in the order
in which fathom/model/stored_forward.py makes and drops it; the operation with the most decides. The
allocator rounds every tensor up to 512 bytes, the big ones to 2 MiB.

Paper: §3.5.1 (cache layout); otherwise none (engineering).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fathom.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fathom.model.prefill_memory import plain_rows

FLOAT, INT, LONG = 4, 4, 8  # bytes: float32, int32, int64
FAR = {0: 32, CSA_RATIO: 32, HCA_RATIO: 64}  # entries of a program of attention, by compress ratio
NEAR = FAR  # and in the window
SCORED = 1024  # scores of a token are padded to a multiple of this
MAXIMA = 16384  # group maxima of a token, at most
MIX_SLICE, MIXES = 64, 32  # columns with sums of their own, and those sums, padded

Operation = tuple[str, dict[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Bytes of a step of `rows` rows whose positions lie below `bound`.

    `operations`: what is live during each; `results`: what the step leaves, which a graph keeps.
    """

    rows: int
    bound: int
    operations: tuple[Operation, ...]
    results: int

    @property
    def working(self) -> int:
        """Bytes while the largest operation runs."""
        return sum(self.largest[1].values())

    @property
    def largest(self) -> Operation:
        """The operation that needs most, and its tensors."""
        return max(self.operations, key=lambda item: sum(item[1].values()))


def plan_step(
    config: ModelConfig, rows: int, bound: int, dtype: torch.dtype = torch.bfloat16
) -> StepPlan:
    """The plan of a step through all main layers, in the arithmetic of `dtype`."""
    found: list[Operation] = []
    for index, ratio in enumerate(config.compress_ratios):
        chosen = {"choices of layers before": results(config, rows, index)}
        layer = _layer(config, ratio, index == 0, rows, bound, dtype)
        found += [(name, own | chosen) for name, own in layer]
    return StepPlan(
        rows=rows,
        bound=bound,
        operations=tuple(found),
        results=results(config, rows, config.num_hidden_layers),
    )


def results(config: ModelConfig, rows: int, layers: int) -> int:
    """Bytes of the experts and entries that the first layers chose."""
    picking = sum(ratio == CSA_RATIO for ratio in config.compress_ratios[:layers])
    each = layers * config.num_experts_per_tok + picking * config.index_topk
    return rows * each * INT


def head_bytes(config: ModelConfig, rows: int) -> int:
    """Bytes of the final merge and head for some rows: hidden states and logits, which stay."""
    partial = rows * config.hidden_size // MIX_SLICE * MIXES
    return FLOAT * (rows * (config.hidden_size + config.vocab_size) + partial)


def _layer(
    c: ModelConfig, ratio: int, first: bool, rows: int, bound: int, dtype: torch.dtype
) -> list[Operation]:
    value = dtype.itemsize
    hidden = rows * c.hidden_size * value
    mixing = rows * c.hc_mult * (c.hc_mult + 1) * FLOAT
    streams = c.hc_mult * hidden
    held = {
        "streams given": streams,
        "streams now": 0 if first else streams,
        "normed input": hidden,
        "mixing weights": mixing,
        "rotations": 4 * rows * c.qk_rope_head_dim * FLOAT,
        "rows, ids": rows * (4 * INT + LONG),
    }
    after = held | {"streams now": streams}
    written = {
        "sublayer's output": hidden,
        "streams before": 0 if first else streams,
        "mixing logits": rows * c.hidden_size // MIX_SLICE * MIXES * FLOAT,
        "mixing weights before": mixing,
    }
    experts = 0 if first else rows * c.num_experts_per_tok * c.hidden_size * value
    before = after | written | {"experts' outputs": experts, "normed input before": hidden}
    attention = _attention(c, ratio, rows, bound, value)
    return [
        (f"boundary before attention {ratio}", before),
        *((f"{name} {ratio}", held | own) for name, own in attention),
        (f"boundary before experts {ratio}", after | written | {"normed input before": hidden}),
        (f"experts {ratio}", after | _experts(c, rows, value)),
    ]


def _attention(c: ModelConfig, ratio: int, rows: int, bound: int, value: int) -> list[Operation]:
    heads = c.num_attention_heads * c.head_dim
    index = c.index_n_heads * c.index_head_dim if ratio == CSA_RATIO else 0
    plain = plain_rows(c, ratio)
    projected = {
        "low-rank queries": rows * (c.q_lora_rank + c.head_dim) * value,
        "compressor's input": rows * plain * FLOAT,
        "queries": rows * (heads + index) * value,
    }
    entries = max(1, bound // ratio) if ratio else 0
    room = -(-entries // SCORED) * SCORED
    found: list[Operation] = []
    chosen: dict[str, int] = {}
    if index:
        chosen = {
            "index queries": rows * index * value,
            "picks": rows * c.index_topk * INT,
        }
        own = {
            "scores": rows * room * FLOAT,
            "group maxima, groups chosen": rows * min(room, MAXIMA) * (FLOAT + INT),
            "candidates": rows * room * LONG,
        }
        found.append(("choice of entries", projected | chosen | own))
        entries = c.index_topk
    chunks = -(-c.sliding_window // NEAR[ratio]) + -(-entries // FAR[ratio])
    out = {"attention's output": rows * heads * value}
    partial = {
        "partial results": rows * chunks * (heads + 2 * c.num_attention_heads) * FLOAT,
        "turned queries": rows * heads * value,
    }
    found.append(("attention", projected | chosen | out | partial))
    grouped = {"low-rank output": rows * c.o_groups * c.o_lora_rank * value}
    picks = {"picks": chosen.get("picks", 0)}
    found.append(("output projection", out | grouped | picks))
    rounded = {"rounded input": _rounded(c.o_groups * c.o_lora_rank, rows, value)}
    found.append(
        ("last projection", picks | grouped | rounded | {"output": rows * c.hidden_size * value})
    )
    return found


def _rounded(cols: int, rows: int, value: int) -> int:
    """Codes, in an arithmetic that holds them exactly, and a float32 unit for every 128."""
    return rows * (cols * value + cols // 128 * FLOAT)


def _experts(c: ModelConfig, rows: int, value: int) -> dict[str, int]:
    pairs, inner = rows * c.num_experts_per_tok, c.moe_intermediate_size
    return {
        "rounded input": _rounded(c.hidden_size, rows, value) + rows * c.hidden_size * value,
        "shared gate and up": rows * 2 * inner * value,
        "scores, order": rows * c.n_routed_experts * FLOAT + 6 * pairs * INT,
        "gate and up": pairs * 2 * inner * value,
        "activation": pairs * inner * value + _rounded(inner, rows, value),
        "outputs": (pairs + rows) * c.hidden_size * value,
    }
