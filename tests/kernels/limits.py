"""How far a kernel's results may be from its reference's, in BF16 on a GPU, and why.

Against the reference in float32, given the same BF16 numbers and bytes, the distance is what
rounding to BF16 does between the kernel's launches. Where such a number is rounded to FP8 or FP4
afterwards, one in 20 to 30 falls to a neighbouring code, and the distance is that of the codes.
Against the reference in BF16, which rounds in the same places, only sums in another order are left:
single numbers that fall the other way. Sums of FP8 products on the matrix units (prompts of more
than 64 tokens) have fewer bits than float32: that is left room for where it says so. The figures
behind each limit are the worst rows and elements, of an H100 or of the BF16 reference (its sums in
float64, its softmax in shorter blocks), at V4-Flash's sizes, V4-Pro's and odd ones; limits are
at least twice as high.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.kernels.agreement import BF16_STEP, Limits

# Arithmetic in float32, as in the interpreter: the same sums in another order.
FLOAT32 = Limits(1e-5, 2e-5, 0.0)
E4M3_STEP, E2M1_STEP = 1 / 8, 1 / 2  # to the next code at most, of the larger number


class Pair(NamedTuple):
    """In BF16 against the reference in float32 and against the one in BF16; and in float32, where
    only codes may fall the other way.
    """

    exact: Limits
    expected: Limits
    float32: Limits = FLOAT32


def _codes(exact: Limits, expected: Limits) -> Pair:
    return Pair(exact, expected, expected)


# Nothing is rounded, neither before nor after: float32 sums of BF16 products, which matrix units
# truncate. 4e-7, 2e-6.
EXACT = Pair(Limits(5e-5, 2e-4, 0.0), Limits(5e-5, 2e-4, 0.0))
# The input is the operand, or is rounded to FP8 in both from the same numbers: one rounding, of the
# result. 1.96e-3, 3e-8; 2.5e-4, 2e-8. Room for sums of FP8 products: 1e-3 of a row.
PRODUCT = Pair(Limits(4e-3, 1e-2), Limits(4e-3, 1e-2, BF16_STEP))
# The normalised input is rounded to BF16, then to FP8. 3.9e-2, 0.12; 2.8e-3, 3.6e-3.
NORMED = Pair(Limits(8e-2, 0.25), Limits(1e-2, 4e-2, BF16_STEP))
# The sublayer's output and the sum are rounded. 2.9e-3, 1.1e-2; 0, 0.
STREAMS = Pair(Limits(6e-3, 2.2e-2), Limits(1e-3, 1e-2, BF16_STEP))
# Streams are rounded before they are weighed, their sum before its norm. 4.9e-3, 2.7e-2; 1.5e-3,
# 1.4e-2.
READ = Pair(Limits(1e-2, 5.5e-2), Limits(3e-3, 2.5e-2, BF16_STEP))
# Of streams that were not written before: as EXACT, then Sinkhorn. 4e-6, 7e-6.
EXACT_MIXES = Pair(Limits(1e-4, 2e-4, 0.0), Limits(1e-4, 2e-4, 0.0))
# Mixing logits of rounded streams, of which single ones fall the other way on a device. 1.6e-2,
# 3.1e-2; 3.4e-4, 6.6e-4.
MIXES = Pair(Limits(3e-2, 6e-2, 0.0), Limits(1e-3, 2e-3, 0.0))
# Two layers, between which numbers are rounded to BF16 twice, then to FP8. 9.9e-2, 0.27; 1.5e-2,
# 5.1e-2, both with sums of FP8 products, after which many of these numbers fall the other way.
EXPERTS = Pair(Limits(0.2, 0.55), Limits(4e-2, 0.2, BF16_STEP))
# Queries are rounded four times, the root of their mean square once for a whole head, which makes
# all logits larger or smaller alike; then probabilities. 1.3e-2, 3.6e-2; 4.6e-3, 1.7e-2.
ATTENTION = Pair(Limits(2.5e-2, 7e-2), Limits(1e-2, 3.5e-2, BF16_STEP))
# The heads' weights are rounded to BF16. 2.8e-3, 1.2e-2; 0, 0.
SCORES = Pair(Limits(6e-3, 3e-2, 0.0), Limits(1e-4, 5e-4, 0.0))
# Entries behind norm and rotation, rounded to FP8: all to the next code at most. 5.8e-2, 0; 0, 0.
CODED = _codes(Limits(0.12, 1e-2, E4M3_STEP), Limits(2e-2, 1e-2, E4M3_STEP))
# Their rotated columns in BF16, after norm and rotation. 5.5e-3, 1.6e-2; 8e-4, 4e-4.
TURNED = Pair(Limits(1.1e-2, 3.2e-2), Limits(4e-3, 1e-2, BF16_STEP))
# Index queries and keys, behind the Hadamard matrix, in groups of 32 (FP4), where a code is up to
# half of its number, and of 128 (FP8). 0.17, 0.29; 0, 0. 5.1e-2, 7.5e-3; 0, 0.
ROUNDED = {
    "fp4": _codes(Limits(0.34, 0.6, E2M1_STEP), Limits(0.1, 0.6, E2M1_STEP)),
    "fp8": _codes(Limits(0.1, 1.5e-2, E4M3_STEP), Limits(2e-2, 1.5e-2, E4M3_STEP)),
}
