"""Products of matrices in compiled code, by tiles of eight lanes.

A tile multiplies a few rows with a few columns and keeps the sums in registers. Every sum runs over
the inner dimension in order, one fused multiply-add after another, so a result has the same bits
whatever tile computed it: a row alone, or a row among hundreds. Batch invariance rests on this.

Paper: §3.4 (bitwise batch-invariant kernels).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fathom.kernels.numba.compiled import external
from fathom.kernels.numba.lanes import widen_lanes
from fathom.kernels.numba.llvm import (
    FLOAT,
    FLOATS,
    I16,
    I64,
    INTS,
    LANES,
    ZERO,
    either,
    every,
    function,
    load,
    loop,
    pointer,
    splat,
    store,
)

PANEL = 32  # columns that stored weights keep together


def _make_tile(rows: int, vectors: int, half: bool = False) -> Any:
    """An intrinsic for `rows` x (8 * vectors) sums; `half`: weights are bfloat16."""
    sums = [(t, v) for t in range(rows) for v in range(vectors)]

    def weights(builder: Any, at: Any, offset: Any) -> Any:
        if not half:
            return load(builder, at, offset, FLOATS)
        bits = builder.zext(load(builder, at, offset, ir.VectorType(I16, LANES)), INTS)
        return builder.bitcast(builder.shl(bits, every(16)), FLOATS)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_row, x_col, w, w_row, count, out, out_row, add = args
        xp, op = (pointer(builder, value, FLOAT) for value in (x, out))
        wp = pointer(builder, w, I16 if half else FLOAT)
        fma = function(builder, f"fma.v{LANES}f32", FLOATS, FLOATS, FLOATS, FLOATS)
        lanes = [ir.Constant(I64, v * LANES) for v in range(vectors)]
        row = [builder.mul(x_row, ir.Constant(I64, t)) for t in range(rows)]
        to = [builder.mul(out_row, ir.Constant(I64, t)) for t in range(rows)]
        place = [builder.add(to[t], lanes[v]) for t, v in sums]

        def body(k: Any, values: list[Any]) -> list[Any]:
            base, column = builder.mul(k, w_row), builder.mul(k, x_col)
            ws = [weights(builder, wp, builder.add(base, lane)) for lane in lanes]
            grown = []
            for t in range(rows):
                value = builder.load(builder.gep(xp, [builder.add(row[t], column)]))
                value = splat(builder, value)
                grown += [
                    builder.call(fma, [ws[v], value, values[t * vectors + v]])
                    for v in range(vectors)
                ]
            return grown

        continued = builder.icmp_signed("!=", add, ir.Constant(add.type, 0))
        nothing = [every(0.0) for _ in sums]
        begin = either(
            builder, continued, nothing, lambda: [load(builder, op, at, FLOATS) for at in place]
        )
        some = builder.icmp_signed(">", count, ZERO)
        final = either(builder, some, begin, lambda: loop(builder, count, begin, body))
        for value, at in zip(final, place, strict=True):
            store(builder, value, op, at)
        return context.get_dummy_value()

    @intrinsic
    def tile(
        typingctx: Any, x: Any, x_row: Any, x_col: Any, w: Any, w_row: Any, count: Any, out: Any,
        out_row: Any, add: Any,
    ) -> Any:  # fmt: skip
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
