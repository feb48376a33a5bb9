"""The two formats of index keys, FP4 and FP8, and what each makes of a query.

FP4: codes of e2m1, two a byte, with a scale byte for 32 columns. FP8: codes of e4m3 with one
float32 scale a key. A page holds all keys' codes, then all their scales. A query is rounded as the
keys are that it meets. Everything else about keys is the same and does not ask for their format.

Paper: §2.3.4 (FP4 indexer); §3.4 (FP4 indexer).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fathom.kernels.triton import formats as f
from fathom.kernels.triton.fp4_words import factors_of_words, ordered, unpacked


@triton.jit
def rounded(values, FP8: tl.constexpr):
    """Vectors [heads, cols] float32 as a key's format would give them back."""
    HEADS: tl.constexpr = values.shape[0]
    COLS: tl.constexpr = values.shape[1]
    if FP8:
        amax = f.largest_magnitude(values, 1, f.FP8_FLOOR)
        unit, inverse = f.power_of_two_scale(amax, f.E4M3_RECIPROCAL)
        return f.round_e4m3(values * inverse[:, None]) * unit[:, None]
    groups = tl.reshape(values, [HEADS, COLS // 32, 32])
    amax = f.largest_magnitude(groups, 2, f.FP4_FLOOR)
    unit, inverse = f.power_of_two_scale(amax, f.E2M1_RECIPROCAL)
    return tl.reshape(f.round_e2m1(groups * inverse[:, :, None]) * unit[:, :, None], [HEADS, COLS])


@triton.jit
def store(value, keys, place, PAGE: tl.constexpr, COLS: tl.constexpr, FP8: tl.constexpr):
    """Pack one key [COLS] float32 as the `place`-th of a page's at `keys`."""
    if FP8:
        amax = f.largest_magnitude(value, 0, f.FP8_FLOOR)
        unit, inverse = f.power_of_two_scale(amax, f.E4M3_RECIPROCAL)
        codes = f.encode_e4m3(f.round_e4m3(value * inverse), value)
        tl.store(keys + place * COLS + tl.arange(0, COLS), codes)
        tl.store((keys + PAGE * COLS).to(tl.pointer_type(tl.float32)) + place, unit)
    else:
        groups = tl.reshape(value, [COLS // 32, 32])
        amax = f.largest_magnitude(groups, 1, f.FP4_FLOOR)
        unit, inverse = f.power_of_two_scale(amax, f.E2M1_RECIPROCAL)
        codes = f.encode_e2m1(f.round_e2m1(groups * inverse[:, None]), groups)
        even, odd = tl.split(tl.reshape(codes, [COLS // 2, 2]))
        at = place * (COLS // 2) + tl.arange(0, COLS // 2)
        tl.store(keys + at, (even | (odd << 4)).to(tl.uint8))
        at = PAGE * (COLS // 2) + place * (COLS // 32)
        tl.store(keys + at + tl.arange(0, COLS // 32), f.exponent_byte(unit))


@triton.jit
def load(
    keys, place, live, PAGE: tl.constexpr, DIM: tl.constexpr, FP8: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Keys [rows, DIM] float32, each the `place`-th of the page at its pointer in keys [rows, 1];
    zeros where not `live`. NATIVE: by the device's own conversion of e4m3.
    """
    if FP8:
        codes = tl.load(
            keys + (place * DIM)[:, None] + tl.arange(0, DIM)[None, :], mask=live[:, None], other=0
        )
        units = (keys + PAGE * DIM).to(tl.pointer_type(tl.float32)) + place[:, None]
        unit = tl.load(units, mask=live[:, None], other=0.0)
        return f.decode_e4m3_exactly(codes, NATIVE) * unit
    byte = tl.arange(0, DIM // 2)
    packed = tl.load(
        keys + (place * (DIM // 2))[:, None] + byte[None, :], mask=live[:, None], other=0
    )
    unit = tl.load(
        keys + PAGE * (DIM // 2) + (place * (DIM // 32))[:, None] + byte[None, :] // 16,
        mask=live[:, None], other=0,
    )  # fmt: skip
    unit = f.decode_unit(unit) * f.E2M1_UNIT
    low = f.decode_e2m1(packed & 15).to(tl.float32) * unit
    high = f.decode_e2m1(packed >> 4).to(tl.float32) * unit
    return tl.reshape(tl.join(low, high), [place.shape[0], DIM])


@triton.jit
def turned_query(query, FP8: tl.constexpr):
    """A query [heads, 128] as the operand [128, heads] that meets what `operand` gives: an FP4
    key's columns come in the order in which its words of codes are unpacked (fp4_words.py).
    """
    HEADS: tl.constexpr = query.shape[0]
    if not FP8:
        query = tl.permute(tl.reshape(query, [HEADS, 2, 2, 4, 8]), (0, 4, 1, 3, 2))
    return tl.trans(tl.reshape(query, [HEADS, 128]))


@triton.jit
def operand(
    keys, place, live, col, word, PAGE: tl.constexpr, DIM: tl.constexpr, FP8: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """Keys for the matrix units, [rows, 128], columns from DIM on zero, and a factor that an FP8
    key's products still lack, [rows] float32. In BF16 an FP4 key's lack 2**62 (fp4_words.py).

    keys: pointers [rows] to pages; col, word: 0 .. 127 and 0 .. 15.
    """
    ROWS: tl.constexpr = place.shape[0]
    if FP8:
        codes = tl.load(
            keys[:, None] + (place * DIM)[:, None] + col[None, :],
            mask=live[:, None] & (col < DIM)[None, :], other=0,
        )  # fmt: skip
        units = (keys + PAGE * DIM).to(tl.pointer_type(tl.float32))
        unit = tl.load(units + place, mask=live, other=0.0)
        key = f.decode_e4m3_exactly(codes, BF16)
        if BF16:
            key = key.to(tl.bfloat16)  # exact: e4m3 has fewer bits
        return key, unit
    words = tl.load(
        keys.to(tl.pointer_type(tl.int32))[:, None] + (place * (DIM // 8))[:, None]
        + word[None, :], mask=live[:, None] & (word < DIM // 8)[None, :], other=0,
    )  # fmt: skip
    scales = keys + PAGE * (DIM // 2)
    if DIM == 128:
        scale = tl.load(scales.to(tl.pointer_type(tl.int32)) + place, mask=live, other=0)
    else:
        scale = tl.zeros([ROWS], tl.int32)
        for i in tl.static_range(DIM // 32):
            byte = tl.load(scales + place * (DIM // 32) + i, mask=live, other=0)
            scale |= byte.to(tl.int32) << (8 * i)
    key = unpacked(ordered(words), factors_of_words(scale, BF16), BF16)
    return key, tl.full([ROWS], 1.0, tl.float32)
