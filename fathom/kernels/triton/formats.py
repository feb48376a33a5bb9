"""Device functions that read and round the stored formats, on bits, as fathom/quant does it.

Decoding shifts a code's exponent and mantissa into place in a wider type, whose exponent bias
differs: the result is off by a constant power of two, which the caller multiplies back (E4M3_UNIT,
E2M1_UNIT). This is exact for every code, subnormal ones included.

NaN stays NaN. A group that holds a NaN or an infinity comes out as NaN, and in a cache has the
scale byte 255 (or an infinite scale), by which readers make NaN of every code. Weights have neither
NaN codes nor that byte: they are refused when a checkpoint is read.

Paper: §2.3.4 (mixed precision of KV entries, FP4 indexer); §3.4 (FP8 and FP4).
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_UNIT = tl.constexpr(256.0)  # what decode_e4m3 leaves out: 2 ** (15 - 7)
E2M1_UNIT = tl.constexpr(16384.0)  # what decode_e2m1 leaves out: 2 ** (15 - 1)
E4M3_MAX = tl.constexpr(448.0)
E4M3_RECIPROCAL = tl.constexpr(1 / 448)
E2M1_RECIPROCAL = tl.constexpr(1 / 6)
FP8_FLOOR = tl.constexpr(1e-4)  # smallest amax of an activation group
FP4_FLOOR = tl.constexpr(6 * 2.0**-126)


@triton.jit
def decode_e4m3(byte):
    """uint8 codes to float16, to be multiplied by E4M3_UNIT."""
    b = byte.to(tl.uint16)
    return (((b & 0x7F) << 7) | ((b & 0x80) << 8)).to(tl.float16, bitcast=True)


@triton.jit
def decode_e2m1(code):
    """Four-bit codes in the low bits of an unsigned integer to float16, times E2M1_UNIT."""
    c = code.to(tl.uint16)
    return (((c & 7) << 9) | ((c & 8) << 12)).to(tl.float16, bitcast=True)


@triton.jit
def decode_e4m3_exactly(byte, NATIVE: tl.constexpr):
    """uint8 codes to float32; NATIVE: by the device's own conversion."""
    if NATIVE:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = decode_e4m3(byte).to(tl.float32) * E4M3_UNIT
        return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def decode_e8m0(byte):
    """uint8 exponents of weights to float32; byte 0 is 2**-127, a subnormal, byte 255 infinity."""
    b = byte.to(tl.int32)
    return tl.where(b == 0, 0x00400000, b << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode_unit(byte):
    """uint8 exponents of a cache entry to float32; byte 0 is 2**-127, a subnormal, byte 255 NaN."""
    b = byte.to(tl.int32)
    extreme = tl.where(((b + 1) & 0xFE) == 0, 0x00400000, 0)
    return ((b << 23) | extreme).to(tl.float32, bitcast=True)


@triton.jit
def largest_magnitude(values, axis: tl.constexpr, floor):
    """Of float32 values along an axis, but at least `floor`; NaN where there is one.

    As integers magnitudes have the same order, and NaN is above all of them; a maximum of numbers
    would leave it out.
    """
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis)
    return tl.maximum(bits.to(tl.float32, bitcast=True), floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power_of_two_scale(amax, reciprocal):
    """The smallest power of two not below amax * reciprocal, as float32, and its inverse; of
    infinity and NaN infinity and 0, whose products with anything finite or not are 0, then NaN.
    """
    bits = tl.minimum((amax * reciprocal).to(tl.int32, bitcast=True), 0x7F800000)
    bits = (bits + 0x007FFFFF) & 0x7F800000
    inverse = tl.maximum(0x7F000000 - bits, 0)
    return bits.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def exponent_byte(scale):
    """A power of two as its ue8m0 byte; infinity as 255."""
    return (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)


@triton.jit
def clamped(v, limit):
    """float32 between -limit and limit; NaN stays."""
    v = tl.maximum(v, -limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_e4m3(v):
    """float32 to the nearest e4m3 value (ties to even), still float32; clamps to 448."""
    v = clamped(v, E4M3_MAX)
    exponent = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(exponent, 0.015625) * 1572864.0  # 2 ** -6; 1.5 * 2 ** 20
    return (v + shift) - shift


@triton.jit
def round_e2m1(v):
    """float32 of at most 6 in magnitude to the nearest e2m1 value (ties to even), still float32."""
    exponent = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(exponent, 1.0) * 6291456.0  # 1.5 * 2 ** 22
    return (v + shift) - shift


@triton.jit
def encode_e4m3(rounded, original):
    """The uint8 code of a value that round_e4m3 returned; `original` gives zeros their sign."""
    bits = rounded.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    small = (tl.abs(rounded) * 512.0).to(tl.int32)
    code = tl.where(tl.abs(rounded) < 0.015625, small, (magnitude >> 20) - 960)
    code = tl.where(rounded != rounded, 0x7F, code)
    return (code | ((original.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode_e2m1(rounded, original):
    """The four-bit code of a value that round_e2m1 returned, in the low bits of an int32. There is
    none for NaN: it becomes zero, of which the group's scale makes NaN, also an infinite one.
    """
    magnitude = rounded.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    small = (tl.abs(rounded) * 2.0).to(tl.int32)
    code = tl.where(tl.abs(rounded) < 1.0, small, (magnitude >> 22) - 252)
    code = tl.where(rounded != rounded, 0, code)
    return code | ((original.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def bfloat16_bits(v):
    """float32 rounded to bfloat16 (ties to even), as its uint16 bits."""
    bits = v.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(v != v, 0x7FC0, bits).to(tl.uint16)


@triton.jit
def swiglu(gate, up, limit):
    """silu(min(gate, limit)) * clamp(up), float32."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = clamped(up, limit)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def round_group(values):
    """[groups, 128] float32 as FP8 with a power-of-two scale for each group would give it."""
    amax = largest_magnitude(values, 1, FP8_FLOOR)
    unit, inverse = power_of_two_scale(amax, E4M3_RECIPROCAL)
    return round_e4m3(values * inverse[:, None]) * unit[:, None]


@triton.jit
def store_groups(out, values, group, live, ORDER: tl.constexpr):
    """Store [groups, 128] in an order of columns (fp4_words.py): "columns", as they are; "words",
    column 8a + b of each at 16b + a; "ordered", column 64a + 32b + 8c + d at 16d + 8a + 2c + b.
    """
    if ORDER == "words":
        values = tl.permute(tl.reshape(values, [values.shape[0], 16, 8]), (0, 2, 1))
    elif ORDER == "ordered":
        parts = tl.reshape(values, [values.shape[0], 2, 2, 4, 8])
        values = tl.permute(parts, (0, 4, 1, 3, 2))
    values = tl.reshape(values, [values.shape[0], 128])
    at = out + group[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=live[:, None])
