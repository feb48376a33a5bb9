"""Cache entries as bytes in compiled code: the same bytes as fathom.quant.kv_pack.

`data` and `scales` are addresses; lengths are multiples of 8. Formats of main entries: FP8 (codes,
then the rotated part as bfloat16, scales apart) or RAW float32; of indexer keys also FP4.

Paper: §2.3.4 (mixed precision of KV entries, FP4 indexer).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np

from fathom.kernels.numba.compiled import inner
from fathom.kernels.numba.lanes import decode_lanes, greatest, round_lanes, widen_lanes
from fathom.kernels.numba.llvm import LANES
from fathom.kernels.numba.memory import (
    address,
    bits_of_float,
    float_of_bits,
    peek_byte,
    peek_float,
    poke_byte,
    poke_float,
    poke_half,
    view_float32,
)
from fathom.kernels.numba.primitives import (
    E4M3_RECIPROCAL,
    FP4_RECIPROCAL,
    ceil_power_of_two,
    copy,
    power_of_two,
)

RAW, FP8, FP4 = 0, 1, 2
KV_GROUP, FP4_GROUP = 64, 32
FP8_GROUP, START = np.int64(128), np.int64(0)  # numba compiles anew for a literal number
DOWN = np.float32(2.0**-120)


@inner
def round_half(value: Any) -> Any:
    """A float32 rounded to bfloat16, ties to even, as float32."""
    bits = bits_of_float(value)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return float_of_bits(bits & np.uint32(0xFFFF0000))


@inner
def round_group(x: Any, first: int, last: int) -> int:
    """Round x[first:last] in place to FP8 with one power-of-two scale; returns its exponent."""
    start, count = address(x) + 4 * first, last - first
    exponent = ceil_power_of_two(max(np.float32(1e-4), greatest(start, count)) * E4M3_RECIPROCAL)
    scale, inverse = power_of_two(exponent), power_of_two(-exponent)
    for j in range(0, count, LANES):
        round_lanes(start + 4 * j, inverse, scale)
    return exponent


@inner
def round_fp8(x: Any, group: int) -> None:
    """Round x in place to FP8 with one scale per `group` values."""
    for first in range(0, x.shape[0], group):
        round_group(x, first, min(first + group, x.shape[0]))


@inner
def _store_e4m3(x: Any, first: int, last: int, data: int) -> int:
    """Round x[first:last] in place with one scale and write its codes; returns the exponent.

    With data = 0 nothing is written.
    """
    exponent = round_group(x, first, last)
    if data:
        factor = power_of_two(-exponent)
        for j in range(first, last):
            bits = bits_of_float(x[j] * factor * DOWN)
            code = ((bits >> np.uint32(20)) & np.uint32(0x7F)) | (
                (bits >> np.uint32(24)) & np.uint32(0x80)
            )
            poke_byte(data + j - first, np.uint8(code))
    return exponent


@inner
def store_kv(x: Any, rope_dim: int, form: int, data: int, scales: int) -> None:
    """Round a main entry x [c] in place to its stored value, and write its bytes to two addresses.

    With data = 0 nothing is written.
    """
    c = x.shape[0]
    if form == RAW:
        if data:
            copy(x, view_float32(data, c))
        return
    nope = c - rope_dim
    for first in range(0, nope, KV_GROUP):
        exponent = _store_e4m3(x, first, min(first + KV_GROUP, nope), data + first if data else 0)
        if data:
            poke_byte(scales + first // KV_GROUP, np.uint8(exponent + 127))
    for j in range(nope, c):
        x[j] = round_half(x[j])
        if data:
            half = np.uint16(bits_of_float(x[j]) >> np.uint32(16))
            poke_half(data + nope + 2 * (j - nope), half)


@inner
def _load_e4m3(data: int, count: int, scale: Any, to: int) -> None:
    """`count` values of codes, times their scale, as float32 at `to`."""
    for j in range(0, count, LANES):
        decode_lanes(data + j, to + 4 * j, scale)


@inner
def load_kv(data: int, scales: int, rope_dim: int, c: int, form: int, to: int) -> None:
    """A stored main entry as float32 [c] at the address `to`."""
    if form == RAW:
        copy(view_float32(data, c), view_float32(to, c))
        return
    nope = c - rope_dim
    for first in range(0, nope, KV_GROUP):
        scale = power_of_two(np.int32(peek_byte(scales + first // KV_GROUP)) - 127)
        _load_e4m3(data + first, min(KV_GROUP, nope - first), scale, to + 4 * first)
    for j in range(0, rope_dim, LANES):
        widen_lanes(data + nope + 2 * j, to + 4 * (nope + j))


@inner
def fp4_codes(x: Any, first: int, codes: Any, to: int) -> int:
    """Twice the FP4 values of x[first : first + 32], as int8; returns their scale's exponent."""
    amax = np.float32(6 * 2.0**-126)
    for j in range(first, first + FP4_GROUP):
        amax = max(amax, abs(x[j]))
    exponent = max(ceil_power_of_two(amax * FP4_RECIPROCAL), np.int32(-126))
    inverse = power_of_two(-exponent)
    for j in range(FP4_GROUP):
        v = x[first + j] * inverse
        e = np.int32((bits_of_float(v) >> np.uint32(23)) & np.uint32(255)) - np.int32(127)
        e = max(e, np.int32(0)) - np.int32(1)
        v = np.float32(np.rint(v * power_of_two(-e))) * power_of_two(e)
        codes[to + j] = np.int8(np.int32(v * np.float32(2)))
    return exponent


@inner
def round_fp4(x: Any) -> None:
    """Round x in place to FP4 with one power-of-two scale per 32 values."""
    codes = np.empty(FP4_GROUP, np.int8)
    for first in range(0, x.shape[0], FP4_GROUP):
        half = power_of_two(fp4_codes(x, first, codes, 0)) * np.float32(0.5)
        for j in range(FP4_GROUP):
            x[first + j] = np.float32(codes[j]) * half


@inner
def _fp4_nibble(twice: Any, negative: bool) -> Any:
    magnitude = abs(np.int32(twice))
    if magnitude == 6:
        magnitude = np.int32(5)
    elif magnitude == 8:
        magnitude = np.int32(6)
    elif magnitude == 12:
        magnitude = np.int32(7)
    return magnitude | (np.int32(8) if negative else np.int32(0))


@inner
def _negative(value: Any) -> bool:
    return (bits_of_float(value) >> np.uint32(31)) != 0


@inner
def store_key(x: Any, form: int, data: int, scales: int) -> None:
    """Write an indexer key x [index_dim]; afterwards x holds what it is stored as."""
    dim = x.shape[0]
    if form == RAW:
        copy(x, view_float32(data, dim))
        return
    if form == FP8:
        poke_float(scales, power_of_two(_store_e4m3(x, START, dim, data)))
        return
    codes = np.empty(FP4_GROUP, np.int8)
    for first in range(0, dim, FP4_GROUP):
        exponent = fp4_codes(x, first, codes, 0)
        poke_byte(scales + first // FP4_GROUP, np.uint8(exponent + 127))
        half = power_of_two(exponent) * np.float32(0.5)
        for j in range(0, FP4_GROUP, 2):
            low = _fp4_nibble(codes[j], _negative(x[first + j]))
            high = _fp4_nibble(codes[j + 1], _negative(x[first + j + 1]))
            poke_byte(data + (first + j) // 2, np.uint8(low | (high << np.int32(4))))
        for j in range(FP4_GROUP):
            x[first + j] = np.float32(codes[j]) * half


@inner
def load_key(data: int, scales: int, dim: int, form: int, out: Any, at: int) -> None:
    """out[at : at + dim] = a stored indexer key as float32."""
    if form == RAW:
        copy(view_float32(data, dim), out[at : at + dim])
        return
    if form == FP8:
        _load_e4m3(data, dim, peek_float(scales), address(out) + 4 * at)
        return
    for first in range(0, dim, FP4_GROUP):
        exponent = np.int32(peek_byte(scales + first // FP4_GROUP)) - np.int32(127)
        half = power_of_two(exponent) * np.float32(0.5)
        for j in range(0, FP4_GROUP, 2):
            byte = np.int32(peek_byte(data + (first + j) // 2))
            out[at + first + j] = _fp4_twice(byte & np.int32(15)) * half
            out[at + first + j + 1] = _fp4_twice(byte >> np.int32(4)) * half


@inner
def _fp4_twice(nibble: Any) -> Any:
    """Twice the value of an FP4 code: 0, 1, 2, 3, 4, 6, 8, 12, and the same below zero."""
    m = nibble & np.int32(7)
    twice = m + max(m - np.int32(4), np.int32(0)) + (np.int32(2) if m == 7 else np.int32(0))
    return np.float32(-twice if nibble & np.int32(8) else twice)
