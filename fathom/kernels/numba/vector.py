"""Vector code that numba does not write by itself: tiles of products, and bytes as numbers.

A tile multiplies a few rows with a few columns and keeps the sums in registers. Every sum runs over
the inner dimension in order, one fused multiply-add after another, so a result has the same bits
whatever tile computed it: a row alone, or a row among hundreds. Batch invariance rests on this.

Paper: §3.4 (bitwise batch-invariant kernels).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from fathom.kernels.numba.compiled import external, inner

LANES = 8  # columns of one vector
PANEL = 32  # columns that stored weights keep together
FLOAT, I8, I16, I32, I64 = (ir.FloatType(), *(ir.IntType(n) for n in (8, 16, 32, 64)))


def _load(builder: Any, pointer: Any, offset: Any, kind: Any) -> Any:
    address = builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())
    return builder.load(address, align=1)


def _store(builder: Any, value: Any, pointer: Any, offset: Any) -> None:
    address = builder.bitcast(builder.gep(pointer, [offset]), value.type.as_pointer())
    builder.store(value, address, align=1)


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    kind = ir.VectorType(scalar.type, lanes)
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        first, nothing, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    )


def _make_tile(rows: int, vectors: int, half: bool = False) -> Any:
    """An intrinsic for `rows` x (8 * vectors) sums; `half`: weights are bfloat16."""
    vector = ir.VectorType(FLOAT, LANES)
    narrow, wide = ir.VectorType(I16, LANES), ir.VectorType(I32, LANES)
    sums = [(t, v) for t in range(rows) for v in range(vectors)]

    def weights(builder: Any, pointer: Any, offset: Any) -> Any:
        if not half:
            return _load(builder, pointer, offset, vector)
        bits = builder.zext(_load(builder, pointer, offset, narrow), wide)
        return builder.bitcast(builder.shl(bits, ir.Constant(wide, [16] * LANES)), vector)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_row, x_col, w, w_row, count, out, out_row, add = args
        xp, op = (builder.inttoptr(value, FLOAT.as_pointer()) for value in (x, out))
        wp = builder.inttoptr(w, (I16 if half else FLOAT).as_pointer())
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
        )
        place = {
            (t, v): builder.add(
                builder.mul(out_row, ir.Constant(I64, t)), ir.Constant(I64, v * LANES)
            )
            for t, v in sums
        }
        row = [builder.mul(x_row, ir.Constant(I64, t)) for t in range(rows)]
        entry = builder.basic_block
        before, start = builder.append_basic_block(), builder.append_basic_block()
        loop, done = builder.append_basic_block(), builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("!=", add, ir.Constant(add.type, 0)), before, start)

        builder.position_at_end(before)
        held = {s: _load(builder, op, place[s], vector) for s in sums}
        builder.branch(start)

        builder.position_at_end(start)
        first = {}
        for s in sums:
            first[s] = builder.phi(vector)
            first[s].add_incoming(ir.Constant(vector, None), entry)
            first[s].add_incoming(held[s], before)
        builder.cbranch(builder.icmp_signed(">", count, ir.Constant(I64, 0)), loop, done)

        builder.position_at_end(loop)
        k = builder.phi(I64)
        k.add_incoming(ir.Constant(I64, 0), start)
        total = {s: builder.phi(vector) for s in sums}
        base = builder.mul(k, w_row)
        ws = [
            weights(builder, wp, builder.add(base, ir.Constant(I64, v * LANES)))
            for v in range(vectors)
        ]
        column = builder.mul(k, x_col)
        grown = {}
        for t in range(rows):
            value = builder.load(builder.gep(xp, [builder.add(row[t], column)]))
            value = _splat(builder, value, LANES)
            for v in range(vectors):
                grown[t, v] = builder.call(fma, [ws[v], value, total[t, v]])
        following = builder.add(k, ir.Constant(I64, 1))
        k.add_incoming(following, loop)
        for s in sums:
            total[s].add_incoming(first[s], start)
            total[s].add_incoming(grown[s], loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)

        builder.position_at_end(done)
        final = {}
        for s in sums:
            final[s] = builder.phi(vector)
            final[s].add_incoming(first[s], start)
            final[s].add_incoming(grown[s], loop)
        for s in sums:
            _store(builder, final[s], op, place[s])
        return context.get_dummy_value()

    @intrinsic
    def tile(
        typingctx: Any,
        x: Any,
        x_row: Any,
        x_col: Any,
        w: Any,
        w_row: Any,
        count: Any,
        out: Any,
        out_row: Any,
        add: Any,
    ) -> Any:
        """out[t, j] (+)= sum_k x[t, k] * w[k, j], all three given as address and strides."""
        return types.void(*[types.int64] * 9), generate

    return tile


_tile_6x2, _tile_4x2, _tile_1x2 = (_make_tile(*shape) for shape in ((6, 2), (4, 2), (1, 2)))
_tile_12x1, _tile_4x1, _tile_1x1 = (_make_tile(*shape) for shape in ((12, 1), (4, 1), (1, 1)))
_tile_1x4, _tile_2x4 = _make_tile(1, 4), _make_tile(2, 4)
_tile_1x4_half, _tile_2x4_half = _make_tile(1, 4, True), _make_tile(2, 4, True)


def _product(
    rows: int, cols: int, count: int, x: int, x_row: int, x_col: int, w: int, w_row: int,
    out: int, out_row: int, add: int,
) -> None:  # fmt: skip
    sixes = rows // 6 * 6
    if rows % 6 == 2 and rows > 6:
        sixes -= 6  # eight are better two fours than a six and two
    few = rows - (rows - sixes) % 4
    pairs = cols // 16 * 16
    for j in range(0, pairs, 16):
        for t in range(0, sixes, 6):
            _tile_6x2(x + 4 * t * x_row, x_row, x_col, w + 4 * j, w_row, count,
                      out + 4 * (t * out_row + j), out_row, add)  # fmt: skip
        for t in range(sixes, few, 4):
            _tile_4x2(x + 4 * t * x_row, x_row, x_col, w + 4 * j, w_row, count,
                      out + 4 * (t * out_row + j), out_row, add)  # fmt: skip
    for t in range(few, rows):  # wide tiles hide what a single row's sums wait for
        at, to = x + 4 * t * x_row, out + 4 * t * out_row
        j = 0
        while j + 32 <= pairs:
            _tile_1x4(at, x_row, x_col, w + 4 * j, w_row, count, to + 4 * j, out_row, add)
            j += 32
        if j < pairs:
            _tile_1x2(at, x_row, x_col, w + 4 * j, w_row, count, to + 4 * j, out_row, add)
    if pairs < cols:
        w, out, t = w + 4 * pairs, out + 4 * pairs, 0
        while t + 12 <= rows:
            _tile_12x1(x + 4 * t * x_row, x_row, x_col, w, w_row, count,
                       out + 4 * t * out_row, out_row, add)  # fmt: skip
            t += 12
        while t + 4 <= rows:
            _tile_4x1(x + 4 * t * x_row, x_row, x_col, w, w_row, count,
                      out + 4 * t * out_row, out_row, add)  # fmt: skip
            t += 4
        while t < rows:
            _tile_1x1(x + 4 * t * x_row, x_row, x_col, w, w_row, count,
                      out + 4 * t * out_row, out_row, add)  # fmt: skip
            t += 1


# product(rows, cols, count, x, x_row, x_col, w, w_row, out, out_row, add):
# out[t, j] = sum_k x[t, k] * w[k, j] over `count`, with addresses and strides in numbers; columns
# of w and out lie side by side, `cols` is a multiple of 8. add = 1 continues the sums in `out`.
product = external("fathom_product", _product, 11)


@intrinsic
def widen_lanes(typingctx: Any, source: Any, target: Any) -> Any:
    """Eight bfloat16 numbers at one address to eight float32 numbers at another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.VectorType(I32, LANES)
        pointer = builder.inttoptr(args[0], I16.as_pointer())
        bits = builder.zext(
            _load(builder, pointer, ir.Constant(I64, 0), ir.VectorType(I16, LANES)), wide
        )
        bits = builder.shl(bits, ir.Constant(wide, [16] * LANES))
        out = builder.inttoptr(args[1], I32.as_pointer())
        _store(builder, bits, out, ir.Constant(I64, 0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def decode_lanes(typingctx: Any, source: Any, target: Any, scale: Any) -> Any:
    """Eight e4m3 codes at one address to their values times `scale`, float32, at another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ints, zero = ir.VectorType(I32, LANES), ir.Constant(I64, 0)

        def every(value: int) -> Any:
            return ir.Constant(ints, [value] * LANES)

        codes = _load(builder, builder.inttoptr(args[0], I8.as_pointer()), zero,
                      ir.VectorType(I8, LANES))  # fmt: skip
        codes = builder.zext(codes, ints)
        size = builder.shl(builder.and_(codes, every(0x7F)), every(20))
        sign = builder.shl(builder.and_(codes, every(0x80)), every(24))
        floats = ir.VectorType(FLOAT, LANES)
        value = builder.bitcast(builder.or_(size, sign), floats)
        value = builder.fmul(value, ir.Constant(floats, [2.0**120] * LANES))
        value = builder.fmul(value, _splat(builder, args[2], LANES))
        _store(builder, value, builder.inttoptr(args[1], FLOAT.as_pointer()), zero)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def greatest(typingctx: Any, x: Any, count: Any) -> Any:
    """The greatest magnitude among `count` float32 numbers at an address, a multiple of 8."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, count = args
        ints, zero = ir.VectorType(I32, LANES), ir.Constant(I64, 0)
        pointer = builder.inttoptr(x, I32.as_pointer())
        before = builder.basic_block
        loop, done = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        j, high = builder.phi(I64), builder.phi(ints)
        bits = builder.and_(_load(builder, pointer, j, ints), ir.Constant(ints, [2**31 - 1] * 8))
        higher = builder.select(builder.icmp_unsigned(">", bits, high), bits, high)
        following = builder.add(j, ir.Constant(I64, LANES))
        for phi, start, then in ((j, zero, following), (high, ir.Constant(ints, None), higher)):
            phi.add_incoming(start, before)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
        builder.position_at_end(done)
        parts = [builder.extract_element(higher, ir.Constant(I32, n)) for n in range(LANES)]
        while len(parts) > 1:
            a, b = parts[:2]
            parts = [*parts[2:], builder.select(builder.icmp_unsigned(">", a, b), a, b)]
        return builder.bitcast(parts[0], FLOAT)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def round_lanes(typingctx: Any, x: Any, inverse: Any, scale: Any) -> Any:
    """Eight float32 numbers at an address, rounded to e4m3 in units of `scale`, a power of two.

    Three mantissa bits down to 2^-6, then a fixed step of 2^-9.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        floats, ints = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)
        pointer, zero = builder.inttoptr(args[0], FLOAT.as_pointer()), ir.Constant(I64, 0)

        def every(value: int) -> Any:
            return ir.Constant(ints, [value] * LANES)

        nearest = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(floats, [floats]), f"llvm.rint.v{LANES}f32"
        )
        v = builder.fmul(_load(builder, pointer, zero, floats), _splat(builder, args[1], LANES))
        e = builder.and_(builder.lshr(builder.bitcast(v, ints), every(23)), every(255))
        e = builder.select(builder.icmp_signed(">", e, every(121)), e, every(121))  # exponent + 127
        step = builder.bitcast(builder.shl(builder.sub(e, every(3)), every(23)), floats)
        finer = builder.bitcast(builder.shl(builder.sub(every(257), e), every(23)), floats)
        whole = builder.call(nearest, [builder.fmul(v, finer)])
        value = builder.fmul(builder.fmul(whole, step), _splat(builder, args[2], LANES))
        _store(builder, value, pointer, zero)
        return context.get_dummy_value()

    f = types.float32
    return types.void(types.int64, f, f), generate


def _panels(
    half: int, rows: int, count: int, cols: int, x: int, x_row: int, w: int, scratch: int, out: int,
    out_row: int,
) -> None:  # fmt: skip
    for p in range(count):
        base, left = w + p * cols * PANEL * (2 if half else 4), out + 4 * p * PANEL
        if rows >= 4:
            if half:
                for j in range(0, cols * PANEL, LANES):
                    widen_lanes(base + 2 * j, scratch + 4 * j)
                base = scratch
            product(rows, PANEL, cols, x, x_row, 1, base, PANEL, left, out_row, 0)
            continue
        t = 0
        while t + 2 <= rows:
            at, to = x + 4 * t * x_row, left + 4 * t * out_row
            if half:
                _tile_2x4_half(at, x_row, 1, base, PANEL, cols, to, out_row, 0)
            else:
                _tile_2x4(at, x_row, 1, base, PANEL, cols, to, out_row, 0)
            t += 2
        if t < rows:
            at, to = x + 4 * t * x_row, left + 4 * t * out_row
            if half:
                _tile_1x4_half(at, x_row, 1, base, PANEL, cols, to, out_row, 0)
            else:
                _tile_1x4(at, x_row, 1, base, PANEL, cols, to, out_row, 0)


# panels(half, rows, panels, cols, x, x_row, w, scratch, out, out_row): x times stored weights,
# panels [panels, cols, 32] of bfloat16 if `half`; scratch has room for one panel as float32.
panels = external("fathom_panels", _panels, 10)


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def bits_of_float(typingctx: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), generate


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once; float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(FLOAT, [FLOAT] * 3), "llvm.fma.f32"
        )
        return builder.call(function, list(args))

    f = types.float32
    return f(f, f, f), generate


def _make_peek(kind: Any, number: Any) -> Any:
    @intrinsic
    def peek(typingctx: Any, address: Any) -> Any:
        """The number at an address."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], I8.as_pointer())
            return _load(builder, pointer, ir.Constant(I64, 0), kind)

        return number(types.int64), generate

    return peek


def _make_poke(number: Any) -> Any:
    @intrinsic
    def poke(typingctx: Any, address: Any, value: Any) -> Any:
        """Write a number at an address."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], I8.as_pointer())
            _store(builder, args[1], pointer, ir.Constant(I64, 0))
            return context.get_dummy_value()

        return types.void(types.int64, number), generate

    return poke


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer, for carray."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], I8.as_pointer())

    return types.voidptr(types.int64), generate


@inner
def address(array: Any) -> Any:
    """Where an array lies, as int64: numba's own number is unsigned, and made float by a sum."""
    return np.int64(array.ctypes.data)


def _make_view(dtype: Any) -> Any:
    @inner
    def view(address: int, count: int) -> Any:
        """The array [count] that lies at an address."""
        return carray(pointer(address), (count,), dtype)

    return view


view_float32, view_int16 = _make_view(np.float32), _make_view(np.int16)
view_int32, view_int64 = _make_view(np.int32), _make_view(np.int64)
view_uint32 = _make_view(np.uint32)


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address; any address will do."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32]),
            "llvm.prefetch.p0",
        )
        builder.call(function, [pointer, *(ir.Constant(I32, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), generate


peek_byte, poke_byte = _make_peek(I8, types.uint8), _make_poke(types.uint8)
peek_float, poke_float = _make_peek(FLOAT, types.float32), _make_poke(types.float32)
peek_half, poke_half = _make_peek(I16, types.uint16), _make_poke(types.uint16)


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
    kind, ints = x.type, ir.VectorType(I32, LANES)

    def function(name: str, arguments: int) -> Any:
        return cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind] * arguments), f"llvm.{name}.v{LANES}f32"
        )

    def constant(value: Any) -> Any:
        return ir.Constant(kind, [float(value)] * LANES)

    fused, nearest = function("fma", 3), function("rint", 1)
    usual = builder.fcmp_ordered(">", x, constant(-87.0))
    clamped = builder.select(usual, x, constant(-87.0))
    n = builder.call(nearest, [builder.fmul(clamped, constant(LOG2_E))])
    r = builder.call(fused, [n, constant(LN2_HIGH), clamped])
    r = builder.call(fused, [n, constant(LN2_LOW), r])
    p = constant(POLYNOMIAL[0])
    for c in POLYNOMIAL[1:]:
        p = builder.call(fused, [p, r, constant(c)])
    p = builder.fadd(builder.call(fused, [p, builder.fmul(r, r), r]), constant(1.0))
    power = builder.add(builder.fptosi(n, ints), ir.Constant(ints, [127] * LANES))
    power = builder.bitcast(builder.shl(power, ir.Constant(ints, [23] * LANES)), kind)
    return builder.select(usual, builder.fmul(p, power), constant(0.0))


@intrinsic
def _softmax_lanes(typingctx: Any, logits: Any, row: Any, count: Any, total: Any) -> Any:
    """Eight columns [count, 8] of logits to exponentials in place; addresses, row in bytes.

    total [8]: the logits of the sinks in, the sums out. The maximum is over the keys alone.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        logits, row, count, total = args
        vector, zero = ir.VectorType(FLOAT, LANES), ir.Constant(I64, 0)

        def at(k: Any) -> Any:
            return builder.inttoptr(builder.add(logits, builder.mul(k, row)), FLOAT.as_pointer())

        before = builder.basic_block
        search, middle = builder.append_basic_block(), builder.append_basic_block()
        loop, done = builder.append_basic_block(), builder.append_basic_block()
        first = _load(builder, at(zero), zero, vector)
        builder.branch(search)
        builder.position_at_end(search)
        k, high = builder.phi(I64), builder.phi(vector)
        value = _load(builder, at(k), zero, vector)
        higher = builder.select(builder.fcmp_ordered(">", value, high), value, high)
        following = builder.add(k, ir.Constant(I64, 1))
        for phi, start, then in ((k, zero, following), (high, first, higher)):
            phi.add_incoming(start, before)
            phi.add_incoming(then, search)
        builder.cbranch(builder.icmp_signed("<", following, count), search, middle)

        builder.position_at_end(middle)
        pointer = builder.inttoptr(total, FLOAT.as_pointer())
        most = ir.Constant(vector, [88.0] * LANES)
        sink = builder.fsub(_load(builder, pointer, zero, vector), higher)
        sink = builder.select(builder.fcmp_ordered("<", sink, most), sink, most)
        begin = _vector_exp(builder, sink)
        builder.branch(loop)
        builder.position_at_end(loop)
        k, running = builder.phi(I64), builder.phi(vector)
        value = builder.fsub(_load(builder, at(k), zero, vector), higher)
        value = _vector_exp(builder, value)
        _store(builder, value, at(k), zero)
        grown = builder.fadd(running, value)
        following = builder.add(k, ir.Constant(I64, 1))
        for phi, start, then in ((k, zero, following), (running, begin, grown)):
            phi.add_incoming(start, middle)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
        builder.position_at_end(done)
        _store(builder, grown, pointer, zero)
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
