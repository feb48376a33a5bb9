"""The lightning indexer over stored keys: a score per entry, and the positions of the best.

Keys lie in slabs, up to 64 a slab and layer. Between FP4 codes every product of 32 dimensions is a
small integer, so the fast path multiplies bytes and the general path float32 values, and both give
the same bits: exact sums per group of 32, then groups, then heads in eight lanes.

Paper: §2.3.1, eq. 13-17 (lightning indexer); §2.3.4 (FP4 indexer).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fathom.kernels.numba.entries import FP4, FP4_GROUP, fp4_codes, load_key
from fathom.kernels.numba.primitives import power_of_two
from fathom.kernels.numba.vector import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    LANES,
    _data,
    _load,
    _splat,
    _store,
    bits_of_float,
    fma,
    has_integer_products,
    inner,
    peek_byte,
    product,
)

INTEGER = has_integer_products()
OFFSET = 12  # keys are multiplied as unsigned bytes: twice their value plus this


@intrinsic
def _unpack_group(typingctx: Any, memory: Any, data: Any, out: Any, to: Any) -> Any:
    """16 bytes of FP4 codes at `data` -> 16 even, then 16 odd, bytes 12 + 2 * value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(I8, 16)
        twice = [0, 1, 2, 3, 4, 6, 8, 12]
        table = ir.Constant(vector, [OFFSET + v for v in twice] + [OFFSET - v for v in twice])
        lookup = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 2), "llvm.x86.ssse3.pshuf.b.128"
        )
        packed = _load(
            builder, _data(context, builder, signature.args[0], args[0]), args[1], vector
        )
        out = _data(context, builder, signature.args[2], args[2])
        low = builder.and_(packed, ir.Constant(vector, [15] * 16))
        high = builder.lshr(packed, ir.Constant(vector, [4] * 16))
        for part, codes in enumerate((low, high)):
            place = builder.add(args[3], ir.Constant(I64, 16 * part))
            _store(builder, builder.call(lookup, [table, codes]), out, place)
        return context.get_dummy_value()

    return types.void(memory, types.int64, out, types.int64), generate


@intrinsic
def _add_lanes(
    typingctx: Any,
    keys: Any,
    codes: Any,
    code0: Any,
    excess: Any,
    scales: Any,
    lane0: Any,
    key_scales: Any,
    groups: Any,
    weights: Any,
    total: Any,
) -> Any:
    """total[8] += weight * relu(query head . key) for eight heads and one unpacked key.

    codes: int8 [groups, 8 quads, 8 heads, 4] from code0; excess, scales: [groups, 8] from lane0,
    int32 12 * sum of codes and float32; weights: float32, from the same head.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        keys, codes, code0, excess, scales, lane0, key_scales, groups, weights, total = args
        kinds = signature.args
        bytes32, shorts, ints = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 8)
        floats = ir.VectorType(FLOAT, LANES)
        multiply = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(shorts, [bytes32] * 2),
            "llvm.x86.avx2.pmadd.ub.sw",
        )
        widen = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ints, [shorts] * 2), "llvm.x86.avx2.pmadd.wd"
        )
        fused = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(floats, [floats] * 3), "llvm.fma.v8f32"
        )
        kp, cp = _data(context, builder, kinds[0], keys), _data(context, builder, kinds[1], codes)
        ep, sp = (
            _data(context, builder, kinds[3], excess),
            _data(context, builder, kinds[4], scales),
        )
        xp = _data(context, builder, kinds[6], key_scales)
        wp, tp = (
            _data(context, builder, kinds[8], weights),
            _data(context, builder, kinds[9], total),
        )

        before = builder.basic_block
        loop, done = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        g = builder.phi(I64)
        g.add_incoming(ir.Constant(I64, 0), before)
        score = builder.phi(floats)
        score.add_incoming(ir.Constant(floats, None), before)
        sums = ir.Constant(shorts, None)
        for quad in range(8):
            at = builder.add(builder.mul(g, ir.Constant(I64, 32)), ir.Constant(I64, 4 * quad))
            four = _splat(builder, _load(builder, kp, at, I32), 8)
            place = builder.add(
                code0,
                builder.add(builder.mul(g, ir.Constant(I64, 256)), ir.Constant(I64, 32 * quad)),
            )
            query = _load(builder, cp, place, bytes32)
            pairs = builder.call(multiply, [builder.bitcast(four, bytes32), query])
            sums = builder.add(sums, pairs)
        whole = builder.call(widen, [sums, ir.Constant(shorts, [1] * 16)])
        lane = builder.add(lane0, builder.mul(g, ir.Constant(I64, 8)))
        whole = builder.sub(whole, _load(builder, ep, lane, ints))
        factor = builder.fmul(
            _load(builder, sp, lane, floats),
            _splat(builder, builder.load(builder.gep(xp, [g])), LANES),
        )
        grown = builder.call(fused, [builder.sitofp(whole, floats), factor, score])
        following = builder.add(g, ir.Constant(I64, 1))
        g.add_incoming(following, loop)
        score.add_incoming(grown, loop)
        builder.cbranch(builder.icmp_signed("<", following, groups), loop, done)
        builder.position_at_end(done)
        zero = ir.Constant(floats, None)
        positive = builder.select(builder.fcmp_ordered(">", grown, zero), grown, zero)
        zero_place = ir.Constant(I64, 0)
        weight = _load(builder, wp, zero_place, floats)
        old = _load(builder, tp, zero_place, floats)
        _store(builder, builder.call(fused, [positive, weight, old]), tp, zero_place)
        return context.get_dummy_value()

    i = types.int64
    return (
        types.void(keys, codes, i, excess, scales, i, key_scales, i, weights, total),
        generate,
    )


@inner
def _across(total: Any) -> Any:
    return ((total[0] + total[4]) + (total[2] + total[6])) + (
        (total[1] + total[5]) + (total[3] + total[7])
    )


@inner
def scan(
    query: Any,
    weights: Any,
    factor: Any,
    memory: Any,
    table: Any,
    slab_bytes: int,
    data0: int,
    scale0: int,
    data_bytes: int,
    scale_bytes: int,
    form: int,
    per_slab: int,
    first: int,
    last: int,
    scores: Any,
) -> None:
    """scores[first:last] = sum over heads of weight * relu(query . key), for those entries.

    query: [heads * index_dim] float32, already rounded to FP4 where keys are; weights: [heads];
    table: slab numbers of the sequence; `first` is a multiple of per_slab.
    """
    heads = weights.shape[0]
    dim = query.shape[0] // heads
    blocks = (heads + LANES - 1) // LANES
    scaled = np.zeros(blocks * LANES, np.float32)
    for h in range(heads):
        scaled[h] = weights[h] * factor
    if form == FP4 and INTEGER:
        _scan_integers(
            query, scaled, memory, table, slab_bytes, data0, scale0, data_bytes, scale_bytes,
            per_slab, first, last, scores, heads, dim, blocks,
        )  # fmt: skip
    else:
        _scan_floats(
            query, scaled, memory, table, slab_bytes, data0, scale0, data_bytes, scale_bytes,
            form, per_slab, first, last, scores, heads, dim, blocks,
        )  # fmt: skip


@inner
def _scan_integers(
    query: Any,
    weights: Any,
    memory: Any,
    table: Any,
    slab_bytes: int,
    data0: int,
    scale0: int,
    data_bytes: int,
    scale_bytes: int,
    per_slab: int,
    first: int,
    last: int,
    scores: Any,
    heads: int,
    dim: int,
    blocks: int,
) -> None:
    groups = dim // FP4_GROUP
    lanes = groups * LANES
    codes = np.zeros(blocks * groups * 256, np.int8)
    excess = np.zeros(blocks * lanes, np.int32)
    scales = np.zeros(blocks * lanes, np.float32)
    own = np.empty(FP4_GROUP, np.int8)
    for h in range(heads):
        block, lane = h // LANES, h % LANES
        for g in range(groups):
            exponent = fp4_codes(query, h * dim + g * FP4_GROUP, own, 0)
            total = np.int32(0)
            for j in range(FP4_GROUP):
                place = (j % 2) * 16 + j // 2  # even dimensions first, as unpacked keys
                codes[((block * groups + g) * 8 + place // 4) * 32 + lane * 4 + place % 4] = own[j]
                total += np.int32(own[j])
            excess[block * lanes + g * LANES + lane] = np.int32(OFFSET) * total
            scales[block * lanes + g * LANES + lane] = power_of_two(exponent) * np.float32(0.25)
    keys = np.empty(groups * 32, np.uint8)
    key_scales = np.empty(groups, np.float32)
    total = np.empty(LANES, np.float32)
    entry = first
    while entry < last:
        base = np.int64(table[entry // per_slab]) * slab_bytes
        for e in range(min(per_slab, last - entry)):
            for g in range(groups):
                _unpack_group(memory, base + data0 + e * data_bytes + 16 * g, keys, 32 * g)
                byte = peek_byte(memory, base + scale0 + e * scale_bytes + g)
                key_scales[g] = power_of_two(np.int32(byte) - np.int32(127))
            for i in range(LANES):
                total[i] = np.float32(0)
            for block in range(blocks):
                _add_lanes(
                    keys, codes, block * groups * 256, excess, scales, block * lanes,
                    key_scales, groups, weights[block * LANES : (block + 1) * LANES], total,
                )  # fmt: skip
            scores[entry + e] = _across(total)
        entry += per_slab


@inner
def _scan_floats(
    query: Any,
    weights: Any,
    memory: Any,
    table: Any,
    slab_bytes: int,
    data0: int,
    scale0: int,
    data_bytes: int,
    scale_bytes: int,
    form: int,
    per_slab: int,
    first: int,
    last: int,
    scores: Any,
    heads: int,
    dim: int,
    blocks: int,
) -> None:
    lanes = blocks * LANES
    group = FP4_GROUP if form == FP4 else dim
    turned = np.zeros(dim * lanes, np.float32)
    for h in range(heads):
        for j in range(dim):
            turned[j * lanes + h] = query[h * dim + j]
    keys = np.empty(per_slab * dim, np.float32)
    sums, part = np.empty(per_slab * lanes, np.float32), np.empty(per_slab * lanes, np.float32)
    total = np.empty(LANES, np.float32)
    entry = first
    while entry < last:
        base = np.int64(table[entry // per_slab]) * slab_bytes
        count = min(per_slab, last - entry)
        for e in range(count):
            load_key(
                memory, base + data0 + e * data_bytes, base + scale0 + e * scale_bytes,
                dim, form, keys, e * dim,
            )  # fmt: skip
        product(
            count, lanes, group, keys.ctypes.data, dim, 1, turned.ctypes.data, lanes,
            sums.ctypes.data, lanes, 0,
        )  # fmt: skip
        for g in range(1, dim // group):
            product(
                count, lanes, group, keys.ctypes.data + 4 * g * group, dim, 1,
                turned.ctypes.data + 4 * g * group * lanes, lanes, part.ctypes.data, lanes, 0,
            )  # fmt: skip
            for i in range(count * lanes):
                sums[i] += part[i]
        for e in range(count):
            for i in range(LANES):
                total[i] = np.float32(0)
            for block in range(blocks):
                for i in range(LANES):
                    value = max(sums[e * lanes + block * LANES + i], np.float32(0))
                    total[i] = fma(value, weights[block * LANES + i], total[i])
            scores[entry + e] = _across(total)
        entry += per_slab


@inner
def _ordered(value: Any) -> Any:
    """Bits that compare as the floats do; both zeros are equal."""
    bits = bits_of_float(value + np.float32(0))
    if bits >> np.uint32(31):
        return ~bits
    return bits | np.uint32(0x80000000)


@inner
def best(scores: Any, count: int, k: int, picks: Any) -> int:
    """picks[:k] = the k best of scores[:count] in ascending position, ties to the lower one.

    Eleven bits of the score at a time decide where the k-th best lies.
    """
    if count <= k:
        for i in range(count):
            picks[i] = i
        return count
    prefix, known, left = np.uint32(0), 0, k
    histogram = np.empty(2048, np.int64)
    for width, shift in ((11, 21), (11, 10), (10, 0)):
        for i in range(2048):
            histogram[i] = 0
        mask = np.uint32((1 << width) - 1)
        for e in range(count):
            bits = _ordered(scores[e])
            if known == 0 or (bits >> np.uint32(32 - known)) == prefix:
                histogram[(bits >> np.uint32(shift)) & mask] += 1
        digit = np.int64(mask)
        while histogram[digit] < left:
            left -= histogram[digit]
            digit -= 1
        prefix = (prefix << np.uint32(width)) | np.uint32(digit)
        known += width
    found = 0
    for e in range(count):
        bits = _ordered(scores[e])
        if bits > prefix:
            picks[found] = e
            found += 1
        elif bits == prefix and left > 0:
            picks[found] = e
            found += 1
            left -= 1
    return found
