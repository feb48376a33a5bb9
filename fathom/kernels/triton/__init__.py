"""CUDA versions of operations, under the names of their references; imported where Triton exists.

Paper: §3.1 (fused kernels).
"""

from fathom.kernels.triton import (
    attention,
    entries,
    experts,
    index,
    linear,
    mhc,
    sinkhorn,
    stored_experts,
)

__all__ = [
    "attention",
    "entries",
    "experts",
    "index",
    "linear",
    "mhc",
    "sinkhorn",
    "stored_experts",
]
