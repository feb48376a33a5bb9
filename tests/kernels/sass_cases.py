"""Compiles kernels for the card without one and prints what was found in them, as JSON: those that
use asynchronous matrix instructions, those that know the formats of index keys, and those that
V4-Pro's sizes ask the most of.

python -m tests.kernels.sass_cases
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from fathom.kernels.triton import (
    attention,
    chunk_attention,
    chunk_experts,
    chunk_index,
    entries,
    few_experts,
    index,
    mhc,
    step,
)
from fathom.kernels.triton.ahead import Launch, recorded
from tests.kernels.sass import compiled, examine, listing

BF16, U8 = torch.bfloat16, torch.uint8
HIDDEN, INNER, EXPERTS, HEADS, HEAD_DIM = 4096, 2048, 8, 64, 512
PRO_HIDDEN, PRO_INNER = 7168, 3072  # of V4-Pro
PAGE_BYTES = 899_648  # of V4-Flash's slabs


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Never read: only the shape, the dtype and the alignment of its memory matter."""
    return torch.empty(*shape, dtype=dtype)


def integers(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int32)


def paged(ratio: int) -> dict[str, Any]:
    if ratio == 0:
        return {}
    return {"pool": numbers(4, PAGE_BYTES, dtype=U8), "page_entries": 256 // ratio}


def decode_attention(ratio: int) -> None:
    extra = {"table": integers(1, 16), "entry_offset": 1024, "most_entries": 8192} if ratio else {}
    attention.entry_attention(
        numbers(1, HEADS * HEAD_DIM, dtype=BF16), integers(4, 1), numbers(1, 2, 32),
        numbers(1, 144 * 584, dtype=U8), numbers(HEADS), kind=ratio, head_dim=HEAD_DIM, window=128,
        norm_eps=1e-6, picks=integers(1, 512) if ratio == 4 else None, **paged(ratio), **extra,
    )  # fmt: skip


def prefill_attention(ratio: int, heads: int = HEADS) -> None:
    extra = {"table": integers(16), "entry_offset": 1024} if ratio else {}
    chunk_attention.chunk_attention(
        numbers(256, heads * HEAD_DIM, dtype=BF16), 0, numbers(256, 2, 32),
        numbers(384, HEAD_DIM, dtype=BF16), numbers(heads), kind=ratio, head_dim=HEAD_DIM,
        window=128, norm_eps=1e-6, picks=integers(256, 512) if ratio == 4 else None,
        **paged(ratio), **extra,
    )  # fmt: skip


def index_scores(key_format: str) -> None:
    index.index_scores_paged(
        numbers(1, 64, 128, dtype=BF16), numbers(1, 2688), integers(4, 1),
        numbers(4, PAGE_BYTES, dtype=U8), integers(1, 4096), index_offset=37_376, page_entries=64,
        ratio=4, most_entries=225_000, key_format=key_format,
    )  # fmt: skip


def index_keys(key_format: str) -> None:
    """Stored by a decode step."""
    tokens, width, index_dim = 4, 2 * HEAD_DIM, 128
    entries.store_entries(
        numbers(tokens, 1536, dtype=BF16), numbers(HEAD_DIM, dtype=BF16), integers(4, tokens),
        numbers(tokens, 2, 32), numbers(2, 136 * 584, dtype=U8), kind=4, norm_eps=1e-6,
        projected=numbers(tokens, 2 * width + 4 * index_dim + 64),
        query=numbers(tokens, HEADS * (HEAD_DIM + index_dim), dtype=BF16),
        compressor=(
            numbers(4, width), numbers(HEAD_DIM, dtype=BF16), numbers(2, 2, 16, width)
        ),
        index_compressor=(
            numbers(4, 2 * index_dim), numbers(index_dim, dtype=BF16),
            numbers(2, 2, 16, 2 * index_dim),
        ),
        entry_rotation=numbers(tokens, 2, 32), table=integers(2, 16), offsets=(0, 37_376),
        index_heads=HEADS, key_format=key_format, **paged(4),
    )  # fmt: skip


def prefill_picks(key_format: str) -> None:
    """Of a prompt: its keys are decoded first."""
    chunk_index.chunk_picks(
        numbers(4096, 64, 128, dtype=BF16), numbers(4096, 2688), 0,
        numbers(16, PAGE_BYTES, dtype=U8), integers(16), index_offset=37_376, page_entries=64,
        ratio=4, k=512, key_format=key_format,
    )  # fmt: skip


def prefill_experts(cols: int, rows: int, scatter: bool) -> None:
    pairs = 2048
    plan = chunk_experts.ExpertOrder(
        integers(pairs), integers(pairs), integers(EXPERTS + 1), integers(16), integers(16),
        chunk_experts.TOKENS,
    )  # fmt: skip
    matrix = (
        numbers(EXPERTS, rows, cols // 2, dtype=U8), numbers(EXPERTS, rows, cols // 32, dtype=U8)
    )  # fmt: skip
    chunk_experts.grouped_fp4(
        numbers(pairs, cols, dtype=BF16), matrix, plan, numbers(pairs, rows, dtype=BF16),
        scatter=scatter,
    )  # fmt: skip


def pro_boundary() -> None:
    mhc.mhc_boundary(
        numbers(1, 4, PRO_HIDDEN, dtype=BF16), numbers(24, 4 * PRO_HIDDEN), numbers(24), numbers(3),
        numbers(PRO_HIDDEN, dtype=BF16), iterations=20, eps=1e-6, norm_eps=1e-6,
    )  # fmt: skip


def pro_experts() -> None:
    """A step of 64 tokens; the router chooses among 384 experts, of which 8 are here."""
    gate, tokens = numbers(384, PRO_HIDDEN, dtype=BF16), 64
    up = numbers(8, PRO_INNER, PRO_HIDDEN // 2, dtype=U8), numbers(8, PRO_INNER, 224, dtype=U8)
    down = numbers(8, PRO_HIDDEN, PRO_INNER // 2, dtype=U8), numbers(8, PRO_HIDDEN, 96, dtype=U8)
    shared = (
        numbers(2 * PRO_INNER, PRO_HIDDEN, dtype=U8), numbers(48, 56, dtype=U8),
        numbers(PRO_HIDDEN, PRO_INNER, dtype=U8), numbers(56, 24, dtype=U8),
    )  # fmt: skip
    few_experts.stored_moe(
        numbers(tokens, PRO_HIDDEN, dtype=BF16), torch.empty(tokens, dtype=torch.int64), gate,
        (*up, *up, *down), shared, topk=6, scaling_factor=2.5, limit=10.0,
    )  # fmt: skip


def head() -> None:
    step.head_logits(numbers(64, HIDDEN), numbers(129_280, HIDDEN, dtype=BF16))


CASES: dict[str, tuple[Callable[[], None], str]] = {
    "decode attention, CSA": (lambda: decode_attention(4), "attention_attend"),
    "decode attention, HCA": (lambda: decode_attention(128), "attention_attend"),
    "prefill attention, CSA": (lambda: prefill_attention(4), "chunk_attention_attend"),
    "index scores": (lambda: index_scores("fp4"), "index_scores"),
    "index scores, FP8 keys": (lambda: index_scores("fp8"), "index_scores"),
    "index keys stored, FP8": (lambda: index_keys("fp8"), "entries_store"),
    "index keys decoded, FP8": (lambda: prefill_picks("fp8"), "chunk_index_keys"),
    "head": (head, "head_products"),
    "prefill experts, up": (
        lambda: prefill_experts(HIDDEN, INNER, scatter=False), "chunk_experts_grouped",
    ),
    "prefill experts, down": (
        lambda: prefill_experts(INNER, HIDDEN, scatter=True), "chunk_experts_grouped",
    ),
    "prefill attention, CSA of V4-Pro": (
        lambda: prefill_attention(4, heads=128), "chunk_attention_attend",
    ),
    "mHC read, V4-Pro": (pro_boundary, "mhc_read"),
    "router's order, V4-Pro": (pro_experts, "router_order"),
    "experts down, V4-Pro": (pro_experts, "experts_down"),
}  # fmt: skip


def launch_of(make: Callable[[], None], kernel: str) -> Launch:
    """The first launch of the kernel of that name."""
    with recorded() as launches:
        make()
    return next(own for own in launches if own.kernel.fn.__name__ == kernel)


def main() -> None:
    """Print the findings of every case."""
    report = {}
    for name, (make, kernel) in CASES.items():
        own = compiled(launch_of(make, kernel))
        found = examine(listing(own))
        report[name] = {
            "shared": own.metadata.shared,
            "matrix": found.matrix,
            "touched": sorted(found.touched),
            "memory": sorted(found.memory),
            "spills": found.spills,
            "registers": found.registers,
        }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
