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
from fathom.kernels.triton.fp4_words import places


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
    """A query [heads, 128] as the operand [128, heads] that meets what `operand` gives."""
    HEADS: tl.constexpr = query.shape[0]
    if FP8:
        query = tl.permute(tl.reshape(query, [HEADS, 4, 16, 2]), (0, 2, 1, 3))
    else:
        query = tl.permute(tl.reshape(query, [HEADS, 4, 4, 2, 4]), (0, 2, 4, 1, 3))
    return tl.trans(tl.reshape(query, [HEADS, 128]))


@triton.jit
def fetched(
    keys, first, live, ROWS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Codes and scales of ROWS keys of the page at `keys`, from its `first` on, as they are stored,
    for `operand`; 0 beyond the first `live` of them.

    A warp of the matrix units holds 16 rows, a warp that loads 8 of every 32. The codes' rows are
    in an order, undone by `operand`, in which keys are loaded by the warps that multiply them.
    Codes are words: FP4 [rows, 16], FP8 [rows, 16, 2], the first and the last four of every eight.
    """
    row, word = tl.arange(0, ROWS), tl.arange(0, 16)
    own = (row & -64) + ((row >> 3) & 3) * 16 + ((row >> 5) & 1) * 8 + (row & 7)
    words = keys.to(tl.pointer_type(tl.int32))
    if FP8:
        word = word // 4 * 8 + word % 4
        words += ((first + own) * (DIM // 4))[:, None] + word[None, :]
        mask = (own < live)[:, None] & (word < DIM // 4)[None, :]
        codes = tl.join(tl.load(words, mask=mask, other=0), tl.load(words + 4, mask=mask, other=0))
        units = (keys + PAGE * DIM).to(tl.pointer_type(tl.float32))
        scale = tl.load(units + first + row, mask=row < live, other=0.0)
    else:
        words += ((first + own) * (DIM // 8))[:, None] + word[None, :]
        mask = (own < live)[:, None] & (word < DIM // 8)[None, :]
        codes = tl.load(words, mask=mask, other=0)
        scales = keys + PAGE * (DIM // 2) + (first + own) * (DIM // 32)
        if DIM == 128:
            scale = tl.load(scales.to(tl.pointer_type(tl.int32)), mask=own < live, other=0)
        else:
            scale = tl.zeros([ROWS], tl.int32)
            for i in tl.static_range(DIM // 32):
                byte = tl.load(scales + i, mask=own < live, other=0)
                scale |= byte.to(tl.int32) << (8 * i)
    return codes, scale


@triton.jit
def operand(codes, scale, FP8: tl.constexpr, BF16: tl.constexpr):
    """What `fetched` returned as keys for the matrix units, [rows, 128], rows in the order of
    entries, columns from DIM on zero. An FP8 key's products still lack its scale; in BF16 an FP4
    key's lack 2**62.

    A thread of the matrix units takes two columns of every eight. They are ordered so that all it
    takes of a key lay together, and in FP4 have one scale: four words of FP4, eight of FP8.
    """
    if FP8:
        key = _of_bytes(codes, BF16)
    else:
        group = tl.arange(0, 16) // 4
        byte = (scale[:, None] >> (8 * group)[None, :]) & 0xFF
        key = _of_nibbles(codes, byte, BF16)
    ROWS: tl.constexpr = codes.shape[0]
    key = tl.reshape(key, [ROWS // 64, 2, 4, 8, 128])
    return tl.reshape(tl.permute(key, (0, 2, 1, 3, 4)), [ROWS, 128])


# Eight codes of e2m1 as BF16, each place of a word's lower half with that of its upper: a code's
# sign and its other three bits come to where BF16 has its sign, its lowest two exponent bits and
# its first bit of mantissa, both by one multiplication. That is 2**126 too small.
_NIBBLES = tl.constexpr("""{
.reg .b32 w, a, b, c, d;
shr.u32 w, $8, 8;
and.b32 a, $8, 0x000F000F;
and.b32 b, $8, 0x00F000F0;
and.b32 c, w, 0x000F000F;
and.b32 d, w, 0x00F000F0;
mul.lo.u32 a, a, 0x1040;
mul.lo.u32 b, b, 0x0104;
mul.lo.u32 c, c, 0x1040;
mul.lo.u32 d, d, 0x0104;
and.b32 a, a, 0x81C081C0;
and.b32 b, b, 0x81C081C0;
and.b32 c, c, 0x81C081C0;
and.b32 d, d, 0x81C081C0;
mul.rn.bf16x2 a, a, $9;
mul.rn.bf16x2 b, b, $9;
mul.rn.bf16x2 c, c, $9;
mul.rn.bf16x2 d, d, $9;
mov.b32 {$0, $4}, a;
mov.b32 {$1, $5}, b;
mov.b32 {$2, $6}, c;
mov.b32 {$3, $7}, d;
}""")
# Four codes of e4m3 as BF16, which holds each exactly.
_BYTES = tl.constexpr("""{
.reg .b16 l, h, a, b, c, d;
.reg .b32 x, y;
.reg .f32 p, q, r, s;
mov.b32 {l, h}, $4;
cvt.rn.f16x2.e4m3x2 x, l;
cvt.rn.f16x2.e4m3x2 y, h;
mov.b32 {a, b}, x;
mov.b32 {c, d}, y;
cvt.f32.f16 p, a;
cvt.f32.f16 q, b;
cvt.f32.f16 r, c;
cvt.f32.f16 s, d;
cvt.rn.bf16x2.f32 x, q, p;
cvt.rn.bf16x2.f32 y, s, r;
mov.b32 {$0, $1}, x;
mov.b32 {$2, $3}, y;
}""")


@triton.jit
def _of_nibbles(words, byte, BF16: tl.constexpr):
    """Words of eight codes and their scale bytes, [rows, 16] each, as [rows, 128]."""
    if BF16:
        # 2**64 too large, against the 2**126 that codes are too small; 2**62 is left for the end.
        factor = tl.minimum(byte + 64, 255) * 0x00800080
        p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
            _NIBBLES, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, factor], dtype=(tl.bfloat16,) * 8,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        unit = f.decode_unit(byte) * f.E2M1_UNIT
        p0, p1, p2, p3, p4, p5, p6, p7 = places(words, unit)
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
    odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
    codes = tl.reshape(tl.join(even, odd), [words.shape[0], 4, 4, 2, 4])
    return tl.reshape(tl.permute(codes, (0, 2, 4, 1, 3)), [words.shape[0], 128])


@triton.jit
def _of_bytes(words, BF16: tl.constexpr):
    """Words of four codes [rows, 16, 2] as [rows, 128]."""
    if BF16:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            _BYTES, "=h,=h,=h,=h,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=1
        )
    else:
        p0, p1 = _byte(words, 0), _byte(words, 1)
        p2, p3 = _byte(words, 2), _byte(words, 3)
    codes = tl.join(tl.join(p0, p2), tl.join(p1, p3))
    codes = tl.reshape(codes, [words.shape[0], 4, 4, 2, 2, 2])
    return tl.reshape(tl.permute(codes, (0, 3, 2, 4, 1, 5)), [words.shape[0], 128])


@triton.jit
def _byte(words, place: tl.constexpr):
    return f.decode_e4m3_exactly(((words >> (8 * place)) & 0xFF).to(tl.uint8), False)
