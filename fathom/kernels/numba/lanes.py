"""Eight numbers at a time, which numba does not write by itself: codes to values, e^x, softmax.

Paper: §2.3.4 (FP8 entries); §3.4 (bitwise batch-invariant kernels).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fathom.kernels.numba.compiled import external, inner
from fathom.kernels.numba.llvm import (
    FLOAT,
    FLOATS,
    I8,
    I16,
    I32,
    INTS,
    LANES,
    ZERO,
    every,
    function,
    load,
    loop,
    pointer,
    splat,
    store,
)
from fathom.kernels.numba.memory import float_of_bits


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once; float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(function(builder, "fma.f32", FLOAT, FLOAT, FLOAT, FLOAT), list(args))

    f = types.float32
    return f(f, f, f), generate


@intrinsic
def widen_lanes(typingctx: Any, source: Any, target: Any) -> Any:
    """Eight bfloat16 numbers at one address to eight float32 numbers at another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        halves = load(builder, pointer(builder, args[0]), ZERO, ir.VectorType(I16, LANES))
        bits = builder.shl(builder.zext(halves, INTS), every(16))
        store(builder, bits, pointer(builder, args[1]), ZERO)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def decode_lanes(typingctx: Any, source: Any, target: Any, scale: Any) -> Any:
    """Eight e4m3 codes at one address to their values times `scale`, float32, at another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes = load(builder, pointer(builder, args[0]), ZERO, ir.VectorType(I8, LANES))
        codes = builder.zext(codes, INTS)
        size = builder.shl(builder.and_(codes, every(0x7F)), every(20))
        sign = builder.shl(builder.and_(codes, every(0x80)), every(24))
        value = builder.bitcast(builder.or_(size, sign), FLOATS)
        value = builder.fmul(value, every(2.0**120))
        value = builder.fmul(value, splat(builder, args[2]))
        store(builder, value, pointer(builder, args[1]), ZERO)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def greatest(typingctx: Any, x: Any, count: Any) -> Any:
    """The greatest magnitude among `count` float32 numbers at an address, a multiple of 8."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointer(builder, args[0], I32)

        def higher(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_unsigned(">", a, b), a, b)

        def body(j: Any, values: list[Any]) -> list[Any]:
            bits = builder.and_(load(builder, at, j, INTS), every(2**31 - 1))
            return [higher(bits, values[0])]

        (high,) = loop(builder, args[1], [every(0)], body, LANES)
        parts = [builder.extract_element(high, ir.Constant(I32, n)) for n in range(LANES)]
        while len(parts) > 1:
            parts = [*parts[2:], higher(parts[0], parts[1])]
        return builder.bitcast(parts[0], FLOAT)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def round_lanes(typingctx: Any, x: Any, inverse: Any, scale: Any) -> Any:
    """Eight float32 numbers at an address, rounded to e4m3 in units of `scale`, a power of two.

    Three mantissa bits down to 2^-6, then a fixed step of 2^-9.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = pointer(builder, args[0])
        v = builder.fmul(load(builder, at, ZERO, FLOATS), splat(builder, args[1]))
        e = builder.and_(builder.lshr(builder.bitcast(v, INTS), every(23)), every(255))
        e = builder.select(builder.icmp_signed(">", e, every(121)), e, every(121))  # exponent + 127
        step = builder.bitcast(builder.shl(builder.sub(e, every(3)), every(23)), FLOATS)
        finer = builder.bitcast(builder.shl(builder.sub(every(257), e), every(23)), FLOATS)
        nearest = function(builder, f"rint.v{LANES}f32", FLOATS, FLOATS)
        whole = builder.call(nearest, [builder.fmul(v, finer)])
        value = builder.fmul(builder.fmul(whole, step), splat(builder, args[2]))
        store(builder, value, at, ZERO)
        return context.get_dummy_value()

    f = types.float32
    return types.void(types.int64, f, f), generate


LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(-0.693359375), np.float32(2.12194440e-4)
POLYNOMIAL = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)


def _vector_exp(builder: Any, x: Any) -> Any:
    """As exp32, for a vector."""
    fused = function(builder, f"fma.v{LANES}f32", FLOATS, FLOATS, FLOATS, FLOATS)
    nearest = function(builder, f"rint.v{LANES}f32", FLOATS, FLOATS)
    usual = builder.fcmp_ordered(">", x, every(-87.0))
    clamped = builder.select(usual, x, every(-87.0))
    n = builder.call(nearest, [builder.fmul(clamped, every(float(LOG2_E)))])
    r = builder.call(fused, [n, every(float(LN2_HIGH)), clamped])
    r = builder.call(fused, [n, every(float(LN2_LOW)), r])
    p = every(float(POLYNOMIAL[0]))
    for c in POLYNOMIAL[1:]:
        p = builder.call(fused, [p, r, every(float(c))])
    p = builder.fadd(builder.call(fused, [p, builder.fmul(r, r), r]), every(1.0))
    power = builder.add(builder.fptosi(n, INTS), every(127))
    power = builder.bitcast(builder.shl(power, every(23)), FLOATS)
    return builder.select(usual, builder.fmul(p, power), every(0.0))


@intrinsic
def _softmax_lanes(typingctx: Any, logits: Any, row: Any, count: Any, total: Any) -> Any:
    """Eight columns [count, 8] of logits to exponentials in place; addresses, row in bytes.

    total [8]: the logits of the sinks in, the sums out. The maximum is over the keys alone.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        logits, row, count, total = args

        def at(k: Any) -> Any:
            return pointer(builder, builder.add(logits, builder.mul(k, row)))

        def search(k: Any, values: list[Any]) -> list[Any]:
            value = load(builder, at(k), ZERO, FLOATS)
            higher = builder.fcmp_ordered(">", value, values[0])
            return [builder.select(higher, value, values[0])]

        def add(k: Any, values: list[Any]) -> list[Any]:
            value = builder.fsub(load(builder, at(k), ZERO, FLOATS), high)
            value = _vector_exp(builder, value)
            store(builder, value, at(k), ZERO)
            return [builder.fadd(values[0], value)]

        (high,) = loop(builder, count, [load(builder, at(ZERO), ZERO, FLOATS)], search)
        sums = pointer(builder, total)
        sink = builder.fsub(load(builder, sums, ZERO, FLOATS), high)
        sink = builder.select(builder.fcmp_ordered("<", sink, every(88.0)), sink, every(88.0))
        (all_of_them,) = loop(builder, count, [_vector_exp(builder, sink)], add)
        store(builder, all_of_them, sums, ZERO)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _softmax(logits: int, count: int, lanes: int, total: int) -> None:
    for j in range(0, lanes, LANES):
        _softmax_lanes(logits + 4 * j, 4 * lanes, count, total + 4 * j)


# softmax(logits, count, lanes, total): addresses of [count, lanes], count > 0, and of [lanes]; see
# _softmax_lanes.
softmax = external("fathom_softmax", _softmax, 4)


@inner
def exp32(x: Any) -> Any:
    """e^x in float32 for x <= 88, within 2 units in the last place; 0 below -87."""
    clamped = max(x, np.float32(-87.0))
    n = np.float32(np.rint(clamped * LOG2_E))
    r = fma(n, LN2_LOW, fma(n, LN2_HIGH, clamped))
    p = POLYNOMIAL[0]
    p = fma(p, r, POLYNOMIAL[1])
    p = fma(p, r, POLYNOMIAL[2])
    p = fma(p, r, POLYNOMIAL[3])
    p = fma(p, r, POLYNOMIAL[4])
    p = fma(p, r, POLYNOMIAL[5])
    p = fma(p, r * r, r) + np.float32(1)
    scaled = p * float_of_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return scaled if x > np.float32(-87.0) else np.float32(0)
