"""The readable torch reference of every numeric operation; importing it registers them all.

Paper: none (infrastructure).
"""

from fathom.kernels.reference import (
    attention,
    compress,
    experts,
    hadamard,
    index,
    linear,
    mhc,
    norm,
    prefill,
    rope,
    route,
    step,
    stored,
)

__all__ = [
    "attention",
    "compress",
    "experts",
    "hadamard",
    "index",
    "linear",
    "mhc",
    "norm",
    "prefill",
    "rope",
    "route",
    "step",
    "stored",
]
