"""The best of many scores: candidates are gathered and, when there are too many, thinned out.

A score becomes 32 bits that compare as the floats do. The k-th best is found bit by bit, which
counts candidates in vectors; what comes later must exceed it, so of a long run nearly all scores
are passed over by one comparison in eight lanes.

Paper: §2.3.1, eq. 17 (top-k selector).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fathom.kernels.numba.compiled import inner
from fathom.kernels.numba.llvm import I32, I64, INTS, LANES, every, load, loop, pointer, splat
from fathom.kernels.numba.memory import address, bits_of_float

SPARE = 1024  # candidates beyond the best k that are gathered before the worst are dropped


def capacity(k: int) -> int:
    """Room for candidates that a search for the k best needs."""
    return (k + SPARE + LANES - 1) // LANES * LANES


compiled_capacity = inner(capacity)


@intrinsic
def _reaching(typingctx: Any, values: Any, count: Any, least: Any) -> Any:
    """How many of the uint32 numbers at an address reach `least`; count is a multiple of 8."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, bound = pointer(builder, args[0], I32), splat(builder, args[2])

        def body(i: Any, values: list[Any]) -> list[Any]:
            reached = builder.icmp_unsigned(">=", load(builder, at, i, INTS), bound)
            return [builder.sub(values[0], builder.sext(reached, INTS))]

        (grown,) = loop(builder, args[1], [every(0)], body, LANES)
        total = ir.Constant(I32, 0)
        for lane in range(LANES):
            total = builder.add(total, builder.extract_element(grown, ir.Constant(I32, lane)))
        return builder.zext(total, I64)

    return types.int64(types.int64, types.int64, types.uint32), generate


@inner
def keep_best(values: Any, places: Any, count: int, k: int) -> int:
    """Keep the k greatest of `count` candidates, in their order, ties to the first; their number.

    values: uint32 with room for a multiple of 8; places follow them.
    """
    if count <= k:
        return count
    padded = (count + LANES - 1) // LANES * LANES
    for i in range(count, padded):
        values[i] = np.uint32(0)
    least = np.uint32(0)
    for bit in range(31, -1, -1):  # the greatest number that k of them reach
        trial = least | (np.uint32(1) << np.uint32(bit))
        if _reaching(address(values), padded, trial) >= k:
            least = trial
    left = k
    if least != np.uint32(0xFFFFFFFF):
        left -= _reaching(address(values), padded, least + np.uint32(1))
    kept = 0
    for i in range(count):
        value = values[i]
        if value < least or (value == least and left == 0):
            continue
        if value == least:
            left -= 1
        values[kept], places[kept] = value, places[i]
        kept += 1
    return kept


@inner
def ordered(value: Any) -> Any:
    """Bits that compare as the floats do; both zeros are equal."""
    bits = bits_of_float(value + np.float32(0))
    return ~bits if bits >> np.uint32(31) else bits | np.uint32(0x80000000)


@inner
def offer(
    scores: Any, count: int, first: int, k: int, values: Any, places: Any, held: int, least: Any
) -> Any:
    """Take in scores[:count] of entries from `first` on; returns how many candidates are held, and
    what a later entry must exceed.
    """
    high = np.uint32(0)
    for i in range(count):
        high = max(high, ordered(scores[i]))
    if held and high <= least:
        return held, least
    if held + count > values.shape[0]:
        held = keep_best(values, places, held, k)
        least = values[0]
        for i in range(held):
            least = min(least, values[i])
    for i in range(count):
        value = ordered(scores[i])
        if value > least or held < k:
            values[held], places[held] = value, first + i
            held += 1
    return held, least
