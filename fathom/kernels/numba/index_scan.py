"""The lightning indexer over stored keys: the positions of the entries that score best.

Keys lie in slabs, up to 64 a slab and layer. Scores are computed slab by slab, and only what may
still be among the best is kept: a scan of a million tokens writes next to nothing. Between FP4
codes every product of 32 dimensions is a small integer: the fast path multiplies bytes, eight keys
side by side, the general path float32 values. Both give the same bits: exact sums per group of 32,
then groups, then heads in eight sums.

Paper: §2.3.1, eq. 13-17 (lightning indexer); §2.3.4 (FP4 indexer).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from fathom.kernels.numba.compiled import external, inner, once
from fathom.kernels.numba.entries import FP4, FP4_GROUP, fp4_codes, load_key
from fathom.kernels.numba.lanes import fma
from fathom.kernels.numba.llvm import (
    FLOAT,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
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
from fathom.kernels.numba.memory import (
    address,
    prefetch,
    view_float32,
    view_int32,
    view_int64,
    view_uint32,
)
from fathom.kernels.numba.primitives import power_of_two
from fathom.kernels.numba.selection import compiled_capacity, keep_best, offer
from fathom.kernels.numba.vector import product

FEATURES = binding.get_host_cpu_features()
INTEGER = bool(FEATURES.get("avx2"))  # byte products
VNNI = bool(FEATURES.get("avx512vnni") and FEATURES.get("avx512vl"))  # and their sums in one step
OFFSET = 12  # keys are multiplied as unsigned bytes: twice their value plus this
BYTES32, SHORTS = ir.VectorType(I8, 32), ir.VectorType(I16, 16)


@intrinsic
def _unpack_eight(
    typingctx: Any, data: Any, row: Any, scale: Any, scale_row: Any, keys: Any, scales: Any
) -> Any:
    """A group of 32 dimensions of eight FP4 keys, `row` bytes apart, key by key in four lanes.

    keys: bytes 12 + 2 * value, [4, even or odd, 8 keys, 4]: quarters of eight dimensions, of each
    the even ones, then the odd ones. scales: float32 [8 keys].
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, row, scale, scale_row, keys, scales = args
        memory, scale_memory = pointer(builder, data), pointer(builder, scale)
        rows = []
        exponents = ir.Constant(ir.VectorType(I8, LANES), ir.Undefined)
        for e in range(LANES):
            at = builder.mul(row, ir.Constant(I64, e))
            rows.append(load(builder, memory, at, ir.VectorType(I32, 4)))
            at = builder.mul(scale_row, ir.Constant(I64, e))
            exponent = builder.load(builder.gep(scale_memory, [at]))
            exponents = builder.insert_element(exponents, exponent, ir.Constant(I32, e))
        powers = builder.shl(builder.zext(exponents, INTS), every(23))
        store(builder, powers, pointer(builder, scales), ZERO)

        def shuffle(a: Any, b: Any, order: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))

        # Keys e and e + 4 side by side, then the transpose of four by four within each half.
        wide = [shuffle(rows[e], rows[e + 4], list(range(8))) for e in range(4)]
        low = [shuffle(wide[e], wide[e + 1], [0, 8, 1, 9, 4, 12, 5, 13]) for e in (0, 2)]
        high = [shuffle(wide[e], wide[e + 1], [2, 10, 3, 11, 6, 14, 7, 15]) for e in (0, 2)]
        columns = []
        for pair in (low, high):
            columns.append(shuffle(*pair, [0, 1, 8, 9, 4, 5, 12, 13]))
            columns.append(shuffle(*pair, [2, 3, 10, 11, 6, 7, 14, 15]))
        twice = [0, 1, 2, 3, 4, 6, 8, 12]
        table = [OFFSET + v for v in twice] + [OFFSET - v for v in twice]
        lookup = function(builder, "x86.avx2.pshuf.b", BYTES32, BYTES32, BYTES32)
        target = pointer(builder, keys)
        for c, column in enumerate(columns):
            packed = builder.bitcast(column, BYTES32)
            even = builder.and_(packed, ir.Constant(BYTES32, [15] * 32))
            odd = builder.lshr(packed, ir.Constant(BYTES32, [4] * 32))
            for part, codes in enumerate((even, odd)):
                values = builder.call(lookup, [ir.Constant(BYTES32, table * 2), codes])
                store(builder, values, target, ir.Constant(I64, 64 * c + 32 * part))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


class _Sums:
    """Byte products of unsigned keys and signed codes, added up: four to a 32-bit lane.

    With `vnni` one instruction does it; otherwise pairs add up in 16 bits, which eight times
    2 * 24 * 12 do not exceed.
    """

    def __init__(self, builder: Any, vnni: bool) -> None:
        self._builder, self._vnni = builder, vnni
        if vnni:
            self._multiply = function(builder, "x86.avx512.vpdpbusd.256", INTS, INTS, INTS, INTS)
        else:
            self._multiply = function(builder, "x86.avx2.pmadd.ub.sw", SHORTS, BYTES32, BYTES32)
            self._widen = function(builder, "x86.avx2.pmadd.wd", INTS, SHORTS, SHORTS)

    def start(self) -> Any:
        """Nothing yet."""
        return ir.Constant(INTS if self._vnni else SHORTS, None)

    def add(self, sums: Any, keys: Any, codes: Any) -> Any:
        """sums + keys * codes; both int32 [8 keys]."""
        b = self._builder
        if self._vnni:
            return b.call(self._multiply, [sums, keys, codes])
        pairs = b.call(self._multiply, [b.bitcast(keys, BYTES32), b.bitcast(codes, BYTES32)])
        return b.add(sums, pairs)

    def finish(self, sums: Any) -> Any:
        """The sums as int32 [8 keys]."""
        if self._vnni:
            return sums
        return self._builder.call(self._widen, [sums, ir.Constant(SHORTS, [1] * 16)])


def _make_score_eight(vnni: bool) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        keys, key_scales, groups, codes, excess, factors, weights, blocks, out = args
        kp, xp, cp, ep, fp, wp, op = (
            pointer(builder, value)
            for value in (keys, key_scales, codes, excess, factors, weights, out)
        )
        sums = _Sums(builder, vnni)
        fused = function(builder, "fma.v8f32", FLOATS, FLOATS, FLOATS, FLOATS)

        def at(base: Any, scale: int, offset: int = 0) -> Any:
            scaled = builder.mul(base, ir.Constant(I64, scale))
            return builder.add(scaled, ir.Constant(I64, offset))

        def lane(source: Any, offset: Any, kind: Any) -> Any:
            return splat(builder, load(builder, source, offset, kind))

        def heads(block: Any, totals: list[Any]) -> list[Any]:  # eight heads at a time
            def group(g: Any, scores: list[Any]) -> list[Any]:  # of 32 dimensions
                place = builder.add(builder.mul(block, groups), g)
                whole = [sums.start() for _ in range(LANES)]
                for v in range(8):
                    key = load(builder, kp, at(g, 256, 32 * v), INTS)
                    for h in range(LANES):
                        code = lane(cp, at(place, 256, 32 * v + 4 * h), I32)
                        whole[h] = sums.add(whole[h], key, code)
                scale = load(builder, xp, at(g, 32), FLOATS)
                grown = []
                for h in range(LANES):
                    excess = lane(ep, at(place, 32, 4 * h), I32)
                    exact = builder.sitofp(builder.sub(sums.finish(whole[h]), excess), FLOATS)
                    factor = builder.fmul(lane(fp, at(place, 32, 4 * h), FLOAT), scale)
                    grown.append(builder.call(fused, [exact, factor, scores[h]]))
                return grown

            scores = loop(builder, groups, [every(0.0)] * LANES, group)
            added = []
            for h in range(LANES):
                positive = builder.fcmp_ordered(">", scores[h], every(0.0))
                positive = builder.select(positive, scores[h], every(0.0))
                weight = lane(wp, at(block, 32, 4 * h), FLOAT)
                added.append(builder.call(fused, [positive, weight, totals[h]]))
            return added

        added = loop(builder, blocks, [every(0.0)] * LANES, heads)
        fours = [builder.fadd(added[h], added[h + 4]) for h in range(4)]
        even, odd = builder.fadd(fours[0], fours[2]), builder.fadd(fours[1], fours[3])
        store(builder, builder.fadd(even, odd), op, ZERO)
        return context.get_dummy_value()

    @intrinsic
    def score_eight(
        typingctx: Any, keys: Any, key_scales: Any, groups: Any, codes: Any, excess: Any,
        factors: Any, weights: Any, blocks: Any, out: Any,
    ) -> Any:  # fmt: skip
        """out [8] = sum over heads of weight * relu(query head . key), for eight unpacked keys.

        All addresses. codes: int8 [blocks, groups, 8, 8 heads, 4], as keys are laid out; excess:
        int32, factors: float32, [blocks, groups, 8 heads]: 12 * the sum of codes, their scales;
        weights: [blocks, 8 heads].
        """
        return types.void(*[types.int64] * 9), generate

    return score_eight


@once
def encode_query(query: Any, heads: int, dim: int, codes: Any, excess: Any, factors: Any) -> None:
    """The rounded query [heads * dim] as _score_eight takes it; the outputs begin as zeros."""
    groups = dim // FP4_GROUP
    own = np.empty(FP4_GROUP, np.int8)
    for h in range(heads):
        block, lane = h // LANES, h % LANES
        for g in range(groups):
            exponent = fp4_codes(query, h * dim + g * FP4_GROUP, own, 0)
            total = np.int32(0)
            at = block * groups + g
            for j in range(FP4_GROUP):
                vector = 2 * (j // 8) + j % 2
                codes[(at * 8 + vector) * 32 + lane * 4 + j % 8 // 2] = own[j]
                total += np.int32(own[j])
            excess[at * LANES + lane] = np.int32(OFFSET) * total
            factors[at * LANES + lane] = power_of_two(exponent) * np.float32(0.25)


def make_score_integers(vnni: bool) -> Any:
    """The fast path, with one kind of byte products or the other; x86 processors only."""
    score_eight = _make_score_eight(vnni)

    @inner
    def score_integers(
        data: int, data_bytes: int, scale: int, scale_bytes: int, count: int, ahead: int,
        groups: int, blocks: int, codes: Any, excess: Any, factors: Any, weights: Any, keys: Any,
        key_scales: Any, scores: Any,
    ) -> None:  # fmt: skip
        """scores[:count] of the FP4 keys at an address; `ahead`: where the next slab's keys lie."""
        for e in range(0, count, LANES):
            for line in range(0, LANES * data_bytes, 64):
                prefetch(ahead + e * data_bytes + line)
            prefetch(ahead + scale - data + e * scale_bytes)
            for g in range(groups):
                _unpack_eight(
                    data + e * data_bytes + 16 * g, data_bytes, scale + e * scale_bytes + g,
                    scale_bytes, address(keys) + 256 * g, address(key_scales) + 32 * g,
                )  # fmt: skip
            score_eight(
                address(keys), address(key_scales), groups, address(codes),
                address(excess), address(factors), address(weights), blocks,
                address(scores) + 4 * e,
            )  # fmt: skip

    return score_integers


@inner
def _no_integers(
    data: int, data_bytes: int, scale: int, scale_bytes: int, count: int, ahead: int, groups: int,
    blocks: int, codes: Any, excess: Any, factors: Any, weights: Any, keys: Any, key_scales: Any,
    scores: Any,
) -> None:  # fmt: skip
    pass


score_integers = make_score_integers(VNNI) if INTEGER else _no_integers


@once
def turn_query(query: Any, heads: int, dim: int, turned: Any) -> None:
    """turned [dim, lanes] = query [heads, dim], for score_floats; it begins as zeros."""
    lanes = turned.shape[0] // dim
    for h in range(heads):
        for j in range(dim):
            turned[j * lanes + h] = query[h * dim + j]


@once
def score_floats(
    data: int, data_bytes: int, scale: int, scale_bytes: int, count: int, form: int,
    dim: int, turned: Any, weights: Any, keys: Any, sums: Any, part: Any, scores: Any,
) -> None:  # fmt: skip
    """scores[:count] of keys of any format at an address, by float32 products."""
    lanes, blocks = weights.shape[0], weights.shape[0] // LANES
    group = FP4_GROUP if form == FP4 else dim
    total = np.empty(LANES, np.float32)
    for e in range(count):
        load_key(data + e * data_bytes, scale + e * scale_bytes, dim, form, keys, e * dim)
    for g in range(dim // group):
        product(
            count, lanes, group, address(keys) + 4 * g * group, dim, 1,
            address(turned) + 4 * g * group * lanes, lanes,
            address(part) if g else address(sums), lanes, 0,
        )  # fmt: skip
        if g:
            for i in range(count * lanes):
                sums[i] += part[i]
    for e in range(count):
        for i in range(LANES):
            total[i] = np.float32(0)
        for block in range(blocks):
            for i in range(LANES):
                value = max(sums[e * lanes + block * LANES + i], np.float32(0))
                total[i] = fma(value, weights[block * LANES + i], total[i])
        scores[e] = ((total[0] + total[4]) + (total[2] + total[6])) + (
            (total[1] + total[5]) + (total[3] + total[7])
        )


def _search(
    query_at: int, weights_at: int, heads: int, dim: int, slabs: int,
    table_at: int, slab_bytes: int, data0: int, scale0: int, data_bytes: int, scale_bytes: int,
    form: int, per_slab: int, first: int, last: int, k: int, values_at: int, places_at: int,
    held_at: int,
) -> int:  # fmt: skip
    query, given = view_float32(query_at, heads * dim), view_float32(weights_at, heads)
    table = view_int32(table_at, (last + per_slab - 1) // per_slab)
    room = compiled_capacity(k)
    values, places = view_uint32(values_at, room), view_int64(places_at, room)
    blocks = (heads + LANES - 1) // LANES
    lanes, groups = blocks * LANES, max(1, dim // FP4_GROUP)
    factor = np.float32(float(dim) ** -0.5 * float(heads) ** -0.5)
    weights = np.zeros(lanes, np.float32)
    for h in range(heads):
        weights[h] = given[h] * factor
    scores = np.empty(per_slab, np.float32)
    integers = form == FP4 and INTEGER
    size = blocks * groups if integers else 1
    codes, excess = np.zeros(size * 256, np.int8), np.zeros(size * LANES, np.int32)
    factors, unpacked = np.zeros(size * LANES, np.float32), np.empty(groups * 256, np.uint8)
    key_scales = np.empty(groups * LANES, np.float32)
    size = 0 if integers else 1
    turned = np.zeros(size * dim * lanes, np.float32)
    keys = np.empty(size * per_slab * dim, np.float32)
    sums = np.empty(size * per_slab * lanes, np.float32)
    part = np.empty(size * per_slab * lanes, np.float32)
    if integers:
        encode_query(query, heads, dim, codes, excess, factors)
    else:
        turn_query(query, heads, dim, turned)
    held, least = np.int64(0), np.uint32(0)
    for entry in range(first, last, per_slab):
        base = slabs + np.int64(table[entry // per_slab]) * slab_bytes
        count = min(per_slab, last - entry)
        if integers:
            following = np.int64(table[min(entry + per_slab, last - 1) // per_slab]) * slab_bytes
            score_integers(
                base + data0, data_bytes, base + scale0, scale_bytes,
                count, slabs + following + data0, groups, blocks, codes, excess, factors,
                weights, unpacked, key_scales, scores,
            )  # fmt: skip
        else:
            score_floats(
                base + data0, data_bytes, base + scale0, scale_bytes, count, form, dim,
                turned, weights, keys, sums, part, scores,
            )  # fmt: skip
        held, least = offer(scores, count, entry, k, values, places, held, least)
    view_int64(held_at, 1)[0] = keep_best(values, places, held, k)
    return 1


# search(query, weights, heads, dim, slabs, table, slab_bytes, data0, scale0, data_bytes,
# scale_bytes, form, per_slab, first, last, k, values, places, held): the k best of the entries
# first .. last - 1, ascending, and their number. query: [heads, dim] float32, already rounded to
# FP4 where keys are; weights: [heads]; table: slab numbers of the sequence; `first` is a multiple
# of per_slab; values, places: uint32 and int64 [capacity(k)]; held: int64.
search = external("fathom_search", _search, 19, fails=True)
