"""CUDA versions of operations, under the names of their references; imported where Triton exists.

Paper: §3.1 (fused kernels).
"""

from fathom.kernels.triton import (
    attention,
    chunk_attention,
    chunk_entries,
    chunk_experts,
    chunk_index,
    chunk_linear,
    chunk_mhc,
    entries,
    experts,
    few_experts,
    few_linear,
    index,
    index_keys,
    mhc,
    route,
    sinkhorn,
    step,
)

__all__ = [
    "attention",
    "chunk_attention",
    "chunk_entries",
    "chunk_experts",
    "chunk_index",
    "chunk_linear",
    "chunk_mhc",
    "entries",
    "experts",
    "few_experts",
    "few_linear",
    "index",
    "index_keys",
    "mhc",
    "route",
    "sinkhorn",
    "step",
]
