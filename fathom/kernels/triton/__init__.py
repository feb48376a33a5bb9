"""CUDA versions of operations, under the names of their references; imported where Triton exists.

Paper: §3.1 (fused kernels).
"""

from fathom.kernels.triton import (
    attention,
    cache_keys,
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
    formats,
    fp4_words,
    index,
    index_keys,
    mhc,
    route,
    sinkhorn,
    step,
)

__all__ = [
    "attention",
    "cache_keys",
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
    "formats",
    "fp4_words",
    "index",
    "index_keys",
    "mhc",
    "route",
    "sinkhorn",
    "step",
]

cache_keys.name_kernels(globals()[name] for name in __all__)
