"""Small compiled functions that the rows are made of: norms, rotations.

Vectors are one-dimensional float32 arrays.

Paper: §2.2, §2.3 (the operations).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from fathom.kernels.numba.compiled import inner
from fathom.kernels.numba.memory import bits_of_float, float_of_bits

# Sums may be reordered and fused; nothing else may change, and roundings not even that.
SUMS = {"reassoc", "contract", "nsz"}
inner_sum = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy", fastmath=SUMS)

E4M3_RECIPROCAL = np.float32(1 / 448)
FP4_RECIPROCAL = np.float32(1 / 6)


@inner_sum
def mean_square(x: Any) -> Any:
    """Mean of squares of a float32 vector."""
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    return total / np.float32(x.shape[0])


@inner
def copy(x: Any, out: Any) -> None:
    """out = x. A loop compiles in a tenth of the time of numba's slice assignment."""
    for j in range(x.shape[0]):
        out[j] = x[j]


@inner
def rmsnorm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """out = x / rms(x) * weight."""
    r = np.float32(1) / np.float32(math.sqrt(mean_square(x) + eps))
    for j in range(x.shape[0]):
        out[j] = x[j] * r * weight[j]


@inner
def rope(x: Any, cos: Any, sin: Any, direction: Any) -> None:
    """Rotate the last 2 * len(cos) values of x in place; direction -1 is the inverse."""
    first = x.shape[0] - 2 * cos.shape[0]
    for i in range(cos.shape[0]):
        even, odd = x[first + 2 * i], x[first + 2 * i + 1]
        s = sin[i] * direction
        x[first + 2 * i] = even * cos[i] - odd * s
        x[first + 2 * i + 1] = even * s + odd * cos[i]


@inner
def ceil_power_of_two(value: Any) -> Any:
    """The exponent e of the smallest 2^e that is not below a positive normal float32."""
    bits = bits_of_float(np.float32(value))
    exponent = np.int32(bits >> np.uint32(23)) - np.int32(127)
    if bits & np.uint32(0x7FFFFF):
        exponent += np.int32(1)
    return exponent


@inner
def power_of_two(exponent: Any) -> Any:
    """2^exponent as float32, for -126 <= exponent <= 127."""
    return float_of_bits(np.uint32(exponent + np.int32(127)) << np.uint32(23))


@inner
def hadamard(x: Any) -> None:
    """The orthonormal Walsh-Hadamard transform, natural order, in place."""
    half = 1
    while half < x.shape[0]:
        for block in range(0, x.shape[0], 2 * half):
            for j in range(block, block + half):
                top, bottom = x[j], x[j + half]
                x[j], x[j + half] = top + bottom, top - bottom
        half *= 2
    factor = np.float32(x.shape[0] ** -0.5)
    for j in range(x.shape[0]):
        x[j] *= factor


@inner
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) in float32."""
    return np.float32(1) / (np.float32(1) + np.float32(math.exp(-x)))
