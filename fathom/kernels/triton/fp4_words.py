"""Words of eight FP4 codes on their way into the matrix units.

Codes become BF16 (or float32) in registers, in an order that suits the operand which may come from
there: of every 128 columns, those of the lowest place in a word of eight codes first. Inputs lie in
the same order. Where a thread of the matrix units takes four neighbours of the operand at a time
(small products), words stay as they are stored, and it holds the four words of one scale
(`stored_factors`); where it takes two (asynchronous products of 64 rows), they come as `ordered`,
and it has one word of each four (`factors_of_words`).

In BF16 a scale may be 2**-67 to 2**63 (bytes 60 to 190): with smaller ones codes become zero, with
larger ones infinity, or NaN where they are zero. In float32 every scale is exact.

Paper: §3.4 (FP4 experts and indexer).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fathom.kernels.triton import formats as f


def _two_places(byte: int) -> str:
    """The codes in one byte of two words: the low one's and the high one's pair of BF16.

    A product puts a code's four bits at 6 to 9 and at 12 to 15 at once: its exponent and mantissa,
    its sign.
    """
    return f"""
prmt.b32 a, $8, $9, 0x{4 + byte}{4 + byte}{byte}{byte};
and.b32 t, a, 0x000F000F;
mul.lo.u32 t, t, 0x1040;
and.b32 t, t, 0x81C081C0;
mul.rn.bf16x2 ${2 * byte}, t, $10;
and.b32 t, a, 0x00F000F0;
mul.lo.u32 t, t, 0x104;
and.b32 t, t, 0x81C081C0;
mul.rn.bf16x2 ${2 * byte + 1}, t, $10;"""


_PLANES = tl.constexpr(
    "{\n.reg .b32 a, t;" + "".join(_two_places(byte) for byte in range(4)) + "\n}"
)


@triton.jit
def _planes_bf16(words, factor):
    """int32 of eight codes and BF16 factors -> the codes at each of the eight places, as BF16.

    They come out as times 2**-126 and the factor: a code's exponent and mantissa, shifted to bits 6
    to 8, are a BF16 number 2**126 too small. Two neighbouring words make a pair of BF16.
    """
    return tl.inline_asm_elementwise(
        _PLANES,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
        [words, factor],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _place(words, factor, place: tl.constexpr):
    return f.decode_e2m1((words >> (4 * place)) & 15).to(tl.float32) * factor


@triton.jit
def places(words, factor):
    """Words of eight codes and float32 factors -> the codes at each of the eight places."""
    return (
        _place(words, factor, 0), _place(words, factor, 1), _place(words, factor, 2),
        _place(words, factor, 3), _place(words, factor, 4), _place(words, factor, 5),
        _place(words, factor, 6), _place(words, factor, 7),
    )  # fmt: skip


@triton.jit
def unpacked(words, factor, BF16: tl.constexpr):
    """Words of eight codes [rows, 16] -> [rows, 128]: all codes of the lowest place first."""
    if BF16:
        p0, p1, p2, p3, p4, p5, p6, p7 = _planes_bf16(words, factor)
    else:
        p0, p1, p2, p3, p4, p5, p6, p7 = places(words, factor)
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
    odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
    planes = tl.reshape(tl.join(even, odd), [words.shape[0], 16, 8])
    return tl.reshape(tl.permute(planes, (0, 2, 1)), [words.shape[0], 128])


@triton.jit
def _factor(byte, BF16: tl.constexpr):
    if BF16:
        # 2**64 too large, against the 2**126 that codes are too small; 2**62 is left for the end.
        return (tl.minimum(byte + 64, 255) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return f.decode_unit(byte) * f.E2M1_UNIT


@triton.jit
def ordered(words):
    """Words [rows, 16] so that a thread of the matrix units' operand has one of each four.

    Every four of a row share a scale; word 8a + 4b + c goes to place 8a + 2c + b.
    """
    words = tl.reshape(words, [words.shape[0], 2, 2, 4])
    return tl.reshape(tl.permute(words, (0, 1, 3, 2)), [words.shape[0], 16])


@triton.jit
def factors_of_words(scales, BF16: tl.constexpr):
    """Four scale bytes of each row -> a factor for each of 16 words as `ordered`: [rows, 16].

    Only operations without an index: the compiler then lets the operand stay in registers.
    """
    first, second = _factor(scales & 0xFF, BF16), _factor((scales >> 8) & 0xFF, BF16)
    third, fourth = _factor((scales >> 16) & 0xFF, BF16), _factor((scales >> 24) & 0xFF, BF16)
    unit = tl.join(tl.join(first, third), tl.join(second, fourth))
    unit = tl.reshape(unit, [scales.shape[0], 2, 1, 2])
    unit = tl.broadcast_to(unit, [scales.shape[0], 2, 4, 2])
    return tl.reshape(unit, [scales.shape[0], 16])


@triton.jit
def byte_shifts(address, none):
    """0, 8, 16, 24. address: any pointer; none: zero, though the compiler cannot know.

    For the compiler these numbers were loaded: it leaves an operand in registers only where all
    that the operand is made of came from memory.
    """
    four = tl.arange(0, 4)
    return tl.load(address + four, mask=four < none, other=8 * four)


@triton.jit
def stored_factors(scales, shifts, BF16: tl.constexpr):
    """Four scale bytes of each row -> a factor for each of 16 words as stored: [rows, 16].

    shifts: as `byte_shifts` gives them.
    """
    factor = _factor((scales[:, None] >> shifts[None, :]) & 0xFF, BF16)
    factor = tl.broadcast_to(factor[:, :, None], [scales.shape[0], 4, 4])
    return tl.reshape(factor, [scales.shape[0], 16])
