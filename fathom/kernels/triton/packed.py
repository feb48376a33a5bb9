"""Products of packed codes with a few tokens' inputs: whole rows, a 32-bit word of codes at a time.

For up to 64 tokens every weight is used once or a few times, and reading it is all the time there
is. So nothing goes through the matrix units: a program loads some whole rows at once, which keeps
many bytes on their way, unpacks a word of 4 FP8 or 8 FP4 codes in registers to pairs of float16 and
multiplies them with pairs of inputs. Inputs were rounded to FP8 beforehand by `_round_inputs` and
lie in pairs in the order in which a word unpacks. A token's sums are formed in the same order
whatever the batch.

Exactness: codes and rounded inputs are exact in float16 (inputs are kept 2**-8 small so that a
product stays finite); two or four products are added in float16, everything else in float32. In
float32 arithmetic, and so in Triton's interpreter, plain code stands in for the assembly.

Instructions for one token: 2.9 a FP4 code, 1.8 a FP8 code; an H100 has about 29e12 a second.

Paper: §3.4 (FP8 by 128 x 128, FP4 by 1 x 32, activations by 1 x 128).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fathom.kernels.triton import formats as f

INPUT_UNIT = tl.constexpr(256.0)  # rounded inputs are stored divided by this, their units times it
PROGRAM_WORDS = 4096  # of one program: 32 registers of each of 128 threads

# A word of 4 FP8 codes, two pairs of float16 inputs: (0, 1) and (2, 3).
_FP8_DOT = tl.constexpr("""{
.reg .b16 c01, c23, lo, hi; .reg .b32 w01, w23, sum; .reg .f32 even, odd;
mov.b32 {c01, c23}, $1;
cvt.rn.f16x2.e4m3x2 w01, c01;
cvt.rn.f16x2.e4m3x2 w23, c23;
mul.rn.f16x2 sum, w01, $2;
fma.rn.f16x2 sum, w23, $3, sum;
mov.b32 {lo, hi}, sum;
cvt.f32.f16 even, lo;
cvt.f32.f16 odd, hi;
add.f32 $0, even, odd;
}""")

# A word of 4 FP8 codes, two pairs of bfloat16 inputs, all in float32.
_FP8_DOT_UNROUNDED = tl.constexpr("""{
.reg .b16 c01, c23, h0, h1, h2, h3; .reg .b32 w01, w23, x; .reg .f32 w, v, sum;
mov.b32 {c01, c23}, $1;
cvt.rn.f16x2.e4m3x2 w01, c01;
cvt.rn.f16x2.e4m3x2 w23, c23;
mov.b32 {h0, h1}, w01;
mov.b32 {h2, h3}, w23;
cvt.f32.f16 w, h0; shl.b32 x, $2, 16; mov.b32 v, x; mul.f32 sum, w, v;
cvt.f32.f16 w, h1; and.b32 x, $2, 0xFFFF0000; mov.b32 v, x; fma.rn.f32 sum, w, v, sum;
cvt.f32.f16 w, h2; shl.b32 x, $3, 16; mov.b32 v, x; fma.rn.f32 sum, w, v, sum;
cvt.f32.f16 w, h3; and.b32 x, $3, 0xFFFF0000; mov.b32 v, x; fma.rn.f32 $0, w, v, sum;
}""")

# A word of 8 FP4 codes, four pairs of float16 inputs: (0, 4), (1, 5), (2, 6), (3, 7). Sign and
# three bits of a code move to where float16 has its sign, lowest exponent bits and highest mantissa
# bit: the code's value times 2**-14.
_FP4_DOT = tl.constexpr("""{
.reg .b32 sign, rest, w, sum; .reg .b16 lo, hi; .reg .f32 even, odd;
shl.b32 sign, $1, 12; shl.b32 rest, $1, 9; and.b32 rest, rest, 0x0E000E00;
lop3.b32 w, sign, 0x80008000, rest, 0xEA;
mul.rn.f16x2 sum, w, $2;
shl.b32 sign, $1, 8; shl.b32 rest, $1, 5; and.b32 rest, rest, 0x0E000E00;
lop3.b32 w, sign, 0x80008000, rest, 0xEA;
fma.rn.f16x2 sum, w, $3, sum;
shl.b32 sign, $1, 4; shl.b32 rest, $1, 1; and.b32 rest, rest, 0x0E000E00;
lop3.b32 w, sign, 0x80008000, rest, 0xEA;
fma.rn.f16x2 sum, w, $4, sum;
shr.b32 rest, $1, 3; and.b32 rest, rest, 0x0E000E00;
lop3.b32 w, $1, 0x80008000, rest, 0xEA;
fma.rn.f16x2 sum, w, $5, sum;
mov.b32 {lo, hi}, sum;
cvt.f32.f16 even, lo;
cvt.f32.f16 odd, hi;
add.f32 $0, even, odd;
}""")
# Inputs meet FP4 codes multiplied by 2**14, so that products are far above the smallest float16.
_FP4_INPUT = tl.constexpr("{ .reg .b32 k; mov.b32 k, 0x74007400; mul.rn.f16x2 $0, $1, k; }")


@triton.jit
def load_words(codes, row, row_words, first, CHUNKS: tl.constexpr):
    """16-byte chunks of rows as words: [ROWS, CHUNKS, 4] uint32, from word `first` of each row."""
    chunk, word = tl.arange(0, CHUNKS), tl.arange(0, 4)
    at = row[:, None, None] * row_words + first + chunk[None, :, None] * 4 + word[None, None, :]
    return tl.load(codes.to(tl.pointer_type(tl.uint32)) + at)


@triton.jit
def _word_index(first, CHUNKS: tl.constexpr):
    return first + tl.arange(0, CHUNKS)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def fp8_row_sums(words, scale, x, unit, cols, first, CHUNKS: tl.constexpr, PACKED: tl.constexpr):
    """Rows times one token's rounded input, over CHUNKS * 16 columns from `first`: [ROWS] float32.

    words: [ROWS, CHUNKS, 4]; scale: the row block's scales; x, unit: the token's, as
    `_round_inputs` leaves them.
    """
    index = _word_index(first // 4, CHUNKS)
    tile = first // 128 + tl.arange(0, CHUNKS) // 8
    factor = f.decode_e8m0(tl.load(scale + tile)) * tl.load(unit + tile)
    if PACKED:
        pairs = x.to(tl.pointer_type(tl.uint32))
        x01, x23 = tl.load(pairs + index), tl.load(pairs + cols // 4 + index)
        part = tl.inline_asm_elementwise(
            _FP8_DOT, "=f,r,r,r", [words, x01[None], x23[None]],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        part = _plain_fp8(words, x, index)
    return tl.sum(tl.sum(part, axis=2) * factor[None, :], axis=1)


@triton.jit
def fp8_row_sums_unrounded(
    words, scale, x, cols, first, CHUNKS: tl.constexpr, PACKED: tl.constexpr
):
    """As fp8_row_sums, of an input in BF16 (or float32) that was not rounded."""
    index = _word_index(first // 4, CHUNKS)
    tile = first // 128 + tl.arange(0, CHUNKS) // 8
    factor = f.decode_e8m0(tl.load(scale + tile))
    if PACKED:
        pairs = x.to(tl.pointer_type(tl.uint32))
        x01, x23 = tl.load(pairs + 2 * index), tl.load(pairs + 2 * index + 1)
        part = tl.inline_asm_elementwise(
            _FP8_DOT_UNROUNDED, "=f,r,r,r", [words, x01[None], x23[None]],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        part = _plain_fp8(words, x, index)
    return tl.sum(tl.sum(part, axis=2) * factor[None, :], axis=1)


@triton.jit
def _plain_fp8(words, x, index):
    part = tl.zeros(words.shape, tl.float32)
    for i in tl.static_range(4):
        code = f.decode_e4m3(words >> (8 * i)).to(tl.float32) * f.E4M3_UNIT
        part += code * tl.load(x + 4 * index + i).to(tl.float32)[None]
    return part


@triton.jit
def fp4_row_sums(words, scale, x, unit, cols, first, CHUNKS: tl.constexpr, PACKED: tl.constexpr):
    """Rows times one token's rounded input, over CHUNKS * 32 columns from `first`: [ROWS] float32.

    words: [ROWS, CHUNKS, 4], a chunk being one scale's 32 codes; scale: [ROWS, CHUNKS] uint8; x,
    unit: the token's, as `_round_inputs` leaves them for words of 8 codes.
    """
    index = _word_index(first // 8, CHUNKS)
    tile = first // 128 + tl.arange(0, CHUNKS) // 4
    factor = f.decode_e8m0(scale) * tl.load(unit + tile)[None, :]
    if PACKED:
        pairs = x.to(tl.pointer_type(tl.uint32))
        plane = cols // 8
        part = tl.inline_asm_elementwise(
            _FP4_DOT, "=f,r,r,r,r,r",
            [
                words,
                _larger(tl.load(pairs + index))[None],
                _larger(tl.load(pairs + plane + index))[None],
                _larger(tl.load(pairs + 2 * plane + index))[None],
                _larger(tl.load(pairs + 3 * plane + index))[None],
            ],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        part = tl.zeros(words.shape, tl.float32)
        for i in tl.static_range(8):
            code = f.decode_e2m1((words >> (4 * i)) & 15).to(tl.float32) * f.E2M1_UNIT
            part += code * tl.load(x + 8 * index + i)[None]
    return tl.sum(tl.sum(part, axis=2) * factor, axis=1)


@triton.jit
def _larger(pairs):
    return tl.inline_asm_elementwise(
        _FP4_INPUT, "=r,r", [pairs], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def plain_row_sums(weights, x):
    """Unquantised rows [ROWS, BLOCK] times one token's columns [BLOCK]: [ROWS] float32."""
    return tl.sum(weights.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)


@triton.jit
def added(total, sums, t: tl.constexpr):
    """total [TOKENS, ROWS] with sums [ROWS] added to row t."""
    token = tl.arange(0, total.shape[0])
    return tl.where((token == t)[:, None], total + sums[None, :], total)


@triton.jit
def _round_row(
    own, norm, out, unit, group, cols, r, NORM: tl.constexpr, WORD: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Round some groups of a row and store them for words of WORD codes."""
    word, plane = tl.arange(0, 128 // WORD), tl.arange(0, WORD // 2)
    # The pairs of a word of 4 codes are (0, 1), (2, 3); of 8 codes (0, 4), (1, 5), (2, 6), (3, 7).
    STEP: tl.constexpr = 2 if WORD == 4 else 1
    APART: tl.constexpr = 1 if WORD == 4 else 4
    at = group[:, None, None] * 128 + word[None, :, None] * WORD + plane[None, None, :] * STEP
    live = (group < cols // 128)[:, None, None]
    a = tl.load(own + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(own + at + APART, mask=live, other=0.0).to(tl.float32)
    if NORM:
        dtype: tl.constexpr = own.dtype.element_ty
        a *= r * tl.load(norm + at, mask=live, other=0.0).to(tl.float32)
        b *= r * tl.load(norm + at + APART, mask=live, other=0.0).to(tl.float32)
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    amax = tl.max(tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=2), axis=1)
    own_unit, inverse = f.power_of_two_scale(tl.maximum(amax, f.FP8_FLOOR), f.E4M3_RECIPROCAL)
    a = f.round_e4m3(a * inverse[:, None, None]) / INPUT_UNIT
    b = f.round_e4m3(b * inverse[:, None, None]) / INPUT_UNIT
    tl.store(unit + group, own_unit * INPUT_UNIT, mask=group < cols // 128)
    if PACKED:
        low = a.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = b.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        index = group[:, None, None] * (128 // WORD) + word[None, :, None]
        pairs = out.to(tl.pointer_type(tl.uint32)) + plane[None, None, :] * (cols // WORD)
        tl.store(pairs + index, low | (high << 16), mask=live)
    else:
        tl.store(out + at, a, mask=live)
        tl.store(out + at + APART, b, mask=live)


@triton.jit
def _round_inputs(
    x, stride, norm, for_fp8, for_fp4, unit, cols, eps, fp8_from, fp4_below,
    NORM: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    own = x + row * stride
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    r = 1.0
    if NORM:
        col = tl.arange(0, WHOLE)
        every = tl.load(own + col, mask=col < cols, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(every * every, axis=0) / cols + eps)
    own_unit = unit + row * (cols // 128)
    if row >= fp8_from:
        _round_row(own, norm, for_fp8 + row * cols, own_unit, group, cols, r, NORM, 4, PACKED)
    if row < fp4_below:
        _round_row(own, norm, for_fp4 + row * cols, own_unit, group, cols, r, NORM, 8, PACKED)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rows rounded to FP8 by groups of 128, in the order in which words of codes unpack.

    for_fp8, for_fp4: [rows, cols], float16 in pairs or float32 in order; unit: [rows, cols / 128]
    float32.
    """

    for_fp8: torch.Tensor
    for_fp4: torch.Tensor
    unit: torch.Tensor


def round_inputs(
    x: torch.Tensor,
    *,
    fp8_from: int = 0,
    fp4_below: int = 0,
    norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
) -> Rounded:
    """Round inputs: rows from `fp8_from` on for FP8 codes, rows below `fp4_below` for FP4 codes.

    x: [rows, cols]; norm: [cols], which normalises them first.
    """
    rows, cols = x.shape
    packed = x.dtype != torch.float32
    make = {"dtype": torch.float16 if packed else torch.float32, "device": x.device}
    for_fp8 = torch.empty(rows, cols, **make)
    for_fp4 = torch.empty(rows, cols, **make) if fp4_below else for_fp8
    unit = torch.empty(rows, cols // 128, dtype=torch.float32, device=x.device)
    groups = min(8, triton.next_power_of_2(cols // 128))
    _round_inputs[(triton.cdiv(cols // 128, groups), rows)](
        x, x.stride(0), norm if norm is not None else x, for_fp8, for_fp4, unit, cols, norm_eps,
        fp8_from, fp4_below, NORM=norm is not None, GROUPS=groups,
        WHOLE=triton.next_power_of_2(cols), PACKED=packed, num_warps=4,
    )  # fmt: skip
    return Rounded(for_fp8, for_fp4, unit)


def block_columns(cols: int, word: int) -> int:
    """Columns of a row that a program holds at once: the largest power of two that divides them."""
    return min(cols & -cols, PROGRAM_WORDS * word)


def program_rows(block: int, word: int, most: int = 64) -> int:
    """Rows of one program, each of `block` columns of a matrix of words of so many codes."""
    return max(1, min(most, PROGRAM_WORDS * word // block))


def token_tile(tokens: int) -> int:
    """Tokens of one program."""
    return min(4, triton.next_power_of_2(tokens))
