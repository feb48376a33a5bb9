"""FP8 (e4m3) numbers with one scale per group of activations or per square tile of a weight.

A scale is a power of two, 2^ceil(log2(amax / 448)), read off the bits of the float32 quotient: no
logarithm, so every device agrees. Division by a power of two is exact, hence codes do not depend on
how the division is carried out. Base checkpoints keep plain float32 scales; both kinds are read and
written.

Rounding to e4m3 in `simulate` adds and subtracts a constant of the right magnitude instead of
casting to the 8-bit type: the same result (nearest, ties to even), several times faster on a CPU
and open to compilers that have no e4m3 type. Groups or tiles that hold an infinity or a NaN come
out as NaN.

Paper: §3.4 (FP8 computation around FP4 experts); §2.3.4 (FP8 KV entries).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "AMAX_FLOOR",
    "E4M3_MAX",
    "decode_e8m0",
    "dequantize_activations",
    "dequantize_weight",
    "encode_e8m0",
    "quantize_activations",
    "quantize_weight",
    "simulate",
    "simulate_weight",
    "straight_through",
    "weight_codes",
]

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4  # activations only: an all-zero group gets the scale 2^-22
GROUP = 128

# The official kernels multiply by the float32 reciprocal; true division differs in the last bit.
E4M3_RECIPROCAL = torch.tensor(1 / E4M3_MAX, dtype=torch.float32).item()
# A weight tile needs no floor for accuracy, only a scale above zero: 2^-126, the smallest normal.
WEIGHT_AMAX_FLOOR = E4M3_MAX * 2.0**-126

_EXPONENT_MASK = 0x7F800000
_MANTISSA_MASK = 0x007FFFFF
_INVERSE_BITS = 0x7F000000  # bits(2^k) + bits(2^-k) for every normal power of two
_E4M3 = torch.float8_e4m3fn
_E8M0 = torch.float8_e8m0fnu
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def decode_e8m0(scale: Tensor, *, check: bool = True) -> Tensor:
    """Powers of two from their exponent bytes: byte b stands for 2^(b - 127).

    scale: [..., groups] float8_e8m0fnu, or the same bytes as uint8
    returns: [..., groups] float32
    Raises ValueError for another dtype and for byte 255, which means NaN. `check=False` skips that
    look at the values, which makes the host wait for the device, and decodes 255 as NaN.
    """
    if scale.dtype not in (_E8M0, torch.uint8):
        raise ValueError(f"e8m0 scales must be float8_e8m0fnu or uint8 bytes, not {scale.dtype}")
    codes = scale.view(torch.uint8)
    is_nan = codes == 255
    if check and bool(is_nan.any()):
        index = first_index(is_nan)
        raise ValueError(f"e8m0 scale at index {index} is NaN (byte 255): damaged data")
    bits = (codes.to(torch.int32) << 23).clamp_min_(0x00400000)  # byte 0 is the subnormal 2^-127
    return bits.masked_fill_(is_nan, 0x7FC00000).view(torch.float32)


def encode_e8m0(scale: Tensor) -> Tensor:
    """Exponent bytes of powers of two.

    scale: [..., groups] float32, each 2^k with -127 <= k <= 127
    returns: [..., groups] float8_e8m0fnu
    Raises ValueError when a value is not such a power of two.
    """
    bits = scale.to(torch.float32).contiguous().view(torch.int32)
    normal = ((bits & _MANTISSA_MASK) == 0) & (bits > 0) & (bits < _EXPONENT_MASK)
    bad = ~(normal | (bits == 0x00400000))
    if bool(bad.any()):
        index = first_index(bad)
        raise ValueError(
            f"scale {scale[index].item()!r} at index {index} is not a power of two between 2^-127 "
            "and 2^127: keep such scales in float32"
        )
    return power_of_two_bytes(scale)


def simulate(x: Tensor, group: int = GROUP) -> Tensor:
    """Quantise to e4m3 in groups of the last dimension and dequantise again.

    The host never waits for the device. The last group may be partial and `group` may exceed the
    dimension. Values, zeros' signs included, equal those of `quantize_activations` followed by
    `dequantize_activations`. Gradients pass unchanged.

    x: [..., cols] float32 or bfloat16
    returns: [..., cols] in the dtype of x
    Raises ValueError for another dtype or a group below 1.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return straight_through(x, simulate(x.detach(), group))
    groups = split_groups(x, group)
    amax = groups.abs().amax(-1, keepdim=True).float().clamp_min_(AMAX_FLOOR)
    scale, values = scale_down(groups, amax, E4M3_RECIPROCAL)
    rounded = round_to_format(values, mantissa_bits=3, min_exponent=-6)
    return join_groups(rounded.mul_(scale).copysign_(groups), x)


def quantize_activations(
    x: Tensor, group: int = GROUP, round_scale: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations, one scale per `group` values of the last dimension.

    `round_scale=False` keeps the scale amax / 448 itself instead of the next power of two.

    x: [..., cols] float32 or bfloat16
    returns: codes [..., cols] float8_e4m3fn, scale [..., ceil(cols / group)] float32
    Raises ValueError for another dtype or a group below 1.
    """
    groups = split_groups(x, group)
    amax = groups.abs().amax(-1, keepdim=True).float().clamp_min_(AMAX_FLOOR)
    scale, codes = _encode(groups, amax, round_scale)
    return join_groups(codes, x, _E4M3), scale.squeeze(-1)


def dequantize_activations(codes: Tensor, scale: Tensor, group: int = GROUP) -> Tensor:
    """Undo `quantize_activations`.

    codes: [..., cols] float8_e4m3fn
    scale: [..., groups] float32 or float8_e8m0fnu
    returns: [..., cols] float32
    Raises ValueError when dtypes or shapes do not fit, and for a NaN e8m0 scale.
    """
    if codes.dtype != _E4M3:
        raise ValueError(f"FP8 codes must be float8_e4m3fn, not {codes.dtype}")
    values = codes.float()
    groups = split_groups(values, group)
    if scale.dtype == _E8M0:
        scale = decode_e8m0(scale)
    if scale.shape != groups.shape[:-1]:
        raise ValueError(
            f"scales of shape {tuple(scale.shape)} do not fit codes of shape {tuple(codes.shape)} "
            f"in groups of {group}: expected {tuple(groups.shape[:-1])}"
        )
    return join_groups(groups.mul_(scale.unsqueeze(-1)), values)


def quantize_weight(
    w: Tensor, block: int = 128, scale_dtype: torch.dtype = _E8M0
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight, one scale per block x block tile; edge tiles may be partial.

    The scale of a tile follows its largest value down to 2^-126 (activations stop at 2^-22), so
    that writing a dequantised weight back with e8m0 scales loses nothing, however small the weights
    are.

    w: [..., rows, cols] float32 or bfloat16
    returns: codes [..., rows, cols] float8_e4m3fn,
        scale [..., ceil(rows / block), ceil(cols / block)] float8_e8m0fnu or float32
    Raises ValueError for another dtype of w or scale.
    """
    tiles = split_tiles(w, block)
    scale, codes = _encode(tiles, _tile_amax(tiles), _rounds(scale_dtype))
    scale = scale.squeeze(-1).squeeze(-2)
    return join_tiles(codes, w), power_of_two_bytes(scale) if scale_dtype == _E8M0 else scale


def dequantize_weight(q: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    """Undo `quantize_weight`.

    q: [..., rows, cols] float8_e4m3fn
    scale: [..., ceil(rows / block), ceil(cols / block)] float8_e8m0fnu or float32
    returns: [..., rows, cols] float32
    Raises ValueError when dtypes or shapes do not fit, and for a NaN scale.
    """
    if q.dtype != _E4M3:
        raise ValueError(f"FP8 weight codes must be float8_e4m3fn, not {q.dtype}")
    factor = decode_weight_scale(scale)
    tiles = split_tiles(q.float(), block)
    expected = (*q.shape[:-2], tiles.shape[-4], tiles.shape[-2])
    if tuple(factor.shape) != expected:
        raise ValueError(
            f"scales of shape {tuple(factor.shape)} do not fit a weight of shape {tuple(q.shape)} "
            f"in tiles of {block}: expected {expected}"
        )
    return join_tiles(tiles.mul_(factor[..., :, None, :, None]), q)


def weight_codes(w: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    """The codes that a weight was dequantised from, given the scales of its tiles.

    Exact: float32 or bfloat16 moved each product of code and scale by less than half the distance
    between codes (but for products below the smallest normal number). Gradients pass as if nothing
    were rounded.

    w: [..., rows, cols] float32 or bfloat16
    scale: [..., ceil(rows / block), ceil(cols / block)] float32
    returns: [..., rows, cols] float32, values of e4m3
    Raises ValueError when a dtype does not fit.
    """
    tiles = split_tiles(w, block).float()
    divisor = torch.where(scale == 0, 1.0, scale)[..., :, None, :, None]
    values = join_tiles(tiles / divisor, w)
    codes = values.detach().clamp(-E4M3_MAX, E4M3_MAX).to(_E4M3).float()
    if w.requires_grad and torch.is_grad_enabled():
        return straight_through(values, codes)
    return codes


def simulate_weight(w: Tensor, block: int = 128, scale_dtype: torch.dtype = _E8M0) -> Tensor:
    """Quantise a weight in tiles and dequantise it; gradients pass unchanged.

    w: [..., rows, cols] float32 or bfloat16
    returns: [..., rows, cols] in the dtype of w
    Raises ValueError for another dtype of w or scale.
    """
    if w.requires_grad and torch.is_grad_enabled():
        return straight_through(w, simulate_weight(w.detach(), block, scale_dtype))
    tiles = split_tiles(w, block)
    scale, values = scale_down(tiles, _tile_amax(tiles), E4M3_RECIPROCAL, _rounds(scale_dtype))
    rounded = round_to_format(values, mantissa_bits=3, min_exponent=-6)
    return join_tiles(rounded.mul_(scale).copysign_(tiles).to(w.dtype), w)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` in the forward pass, the gradient of `x` unchanged in the backward pass.

    x: [..., cols] float32 or bfloat16
    value: [..., cols] in the dtype of x, computed without a graph
    returns: [..., cols] in the dtype of x
    """
    return _StraightThrough.apply(x, value)  # pyright: ignore[reportReturnType]


# From here on: shared with fp4 and kv_pack, not meant for callers outside this package.


def ceil_power_of_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest power of two not below each value, and its inverse.

    x: [...] float32, positive normal numbers below 2^126; infinity or NaN gives (infinity, 0)
    returns: power [...] float32, inverse [...] float32
    """
    bits = x.view(torch.int32).clamp_max(_EXPONENT_MASK)
    bits = bits.add_(_MANTISSA_MASK).bitwise_and_(_EXPONENT_MASK)
    inverse = (_INVERSE_BITS - bits).clamp_min_(0)
    return bits.view(torch.float32), inverse.view(torch.float32)


def power_of_two_bytes(scale: Tensor) -> Tensor:
    """Exponent bytes of values known to be powers of two; infinity and NaN become byte 255 (NaN).

    scale: [..., groups] float32
    returns: [..., groups] float8_e8m0fnu
    """
    bits = scale.to(torch.float32).contiguous().view(torch.int32)
    return (bits >> 23).to(torch.uint8).view(_E8M0)


def round_to_format(v: Tensor, mantissa_bits: int, min_exponent: int) -> Tensor:
    """Round in place to a narrow floating-point grid: nearest, ties to even.

    Values beyond the format's largest are the caller's concern. Adding 1.5 * 2^(23 - mantissa_bits
    + e) pushes everything below the last kept bit of a value with exponent e out of the float32
    mantissa; subtracting it leaves the rounded value.

    v: [..., cols] float32, overwritten
    returns: v itself
    """
    exponent = (v.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)
    shift = exponent.clamp_min_(2.0**min_exponent).mul_(1.5 * 2.0 ** (23 - mantissa_bits))
    return v.add_(shift).sub_(shift)


def split_groups(x: Tensor, group: int) -> Tensor:
    """Cut the last dimension into groups, the last one padded with zeros.

    x: [..., cols] float32, bfloat16 or float16
    returns: [..., groups, group]
    Raises ValueError for another dtype, a scalar, no columns or a group below 1.
    """
    _check(x, 1, group)
    cols = x.shape[-1]
    group = min(group, cols)
    if cols % group:
        x = F.pad(x, (0, -cols % group))
    return x.unflatten(-1, (x.shape[-1] // group, group))


def join_groups(groups: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Undo `split_groups`: the shape of `like`, and its dtype unless one is given.

    groups: [..., groups, group]
    like: [..., cols]
    returns: [..., cols]
    """
    flat = groups.flatten(-2)
    cols = like.shape[-1]
    flat = flat if flat.shape[-1] == cols else flat[..., :cols].contiguous()
    return flat.to(like.dtype if dtype is None else dtype)


def split_tiles(w: Tensor, block: int) -> Tensor:
    """Cut the last two dimensions into square tiles, edge tiles padded with zeros.

    w: [..., rows, cols] float32, bfloat16 or float16
    returns: [..., ceil(rows / block), block, ceil(cols / block), block]
    Raises ValueError for another dtype, fewer than two dimensions or a block below 1.
    """
    _check(w, 2, block)
    rows, cols = w.shape[-2:]
    if rows % block or cols % block:
        w = F.pad(w, (0, -cols % block, 0, -rows % block))
    tile_cols, tile_rows = w.shape[-1] // block, w.shape[-2] // block
    return w.unflatten(-1, (tile_cols, block)).unflatten(-3, (tile_rows, block))


def join_tiles(tiles: Tensor, like: Tensor) -> Tensor:
    """Undo `split_tiles`: the shape of `like`, the dtype of the tiles.

    tiles: [..., ceil(rows / block), block, ceil(cols / block), block]
    like: [..., rows, cols]
    returns: [..., rows, cols]
    """
    flat = tiles.flatten(-2).flatten(-3, -2)
    return flat[..., : like.shape[-2], : like.shape[-1]].contiguous()


def decode_weight_scale(scale: Tensor) -> Tensor:
    """Weight scales of either kind as numbers.

    scale: [..., rows, cols] float8_e8m0fnu or float32
    returns: [..., rows, cols] float32
    Raises ValueError for a NaN or infinite scale, and for other dtypes: e8m0 bytes that were loaded
    as integers would silently be used as numbers.
    """
    if scale.dtype == _E8M0:
        return decode_e8m0(scale)
    if scale.dtype != torch.float32:
        raise ValueError(
            f"weight scales must be float8_e8m0fnu or float32, not {scale.dtype}: view raw "
            "exponent bytes as float8_e8m0fnu first"
        )
    bad = ~torch.isfinite(scale)
    if bool(bad.any()):
        raise ValueError(f"weight scale at index {first_index(bad)} is not finite: damaged data")
    return scale


def first_index(mask: Tensor) -> tuple[int, ...]:
    """Index of the first true element; waits for the device, so for error messages only.

    mask: [...] bool
    """
    return tuple(int(i) for i in mask.nonzero()[0])


def scale_down(
    values: Tensor, amax: Tensor, reciprocal: float, round_scale: bool = True
) -> tuple[Tensor, Tensor]:
    """Scales amax * reciprocal, by default rounded up to powers of two, and values / scale.

    values: [..., groups, group] float32 or bfloat16
    amax: [..., groups, 1] float32, overwritten; any shape that broadcasts against the values
    returns: scale in the shape of amax, values / scale in the shape of the values, both float32
    """
    scale = amax.mul_(reciprocal)
    if not round_scale:
        return scale, values / scale
    scale, inverse = ceil_power_of_two(scale)
    return scale, values * inverse


def _encode(values: Tensor, amax: Tensor, round_scale: bool) -> tuple[Tensor, Tensor]:
    scale, values = scale_down(values, amax, E4M3_RECIPROCAL, round_scale)
    return scale, values.clamp_(-E4M3_MAX, E4M3_MAX).to(_E4M3)


def _tile_amax(tiles: Tensor) -> Tensor:
    return tiles.abs().amax((-3, -1), keepdim=True).float().clamp_min_(WEIGHT_AMAX_FLOOR)


def _rounds(scale_dtype: torch.dtype) -> bool:
    if scale_dtype not in (_E8M0, torch.float32):
        raise ValueError(f"weight scales are float8_e8m0fnu or float32, not {scale_dtype}")
    return scale_dtype == _E8M0


def _check(x: Tensor, dims: int, size: int) -> None:
    if x.dtype not in _INPUTS:
        raise ValueError(f"cannot quantise {x.dtype}: expected float32, bfloat16 or float16")
    if size < 1:
        raise ValueError(f"groups and tiles need at least one value, not {size}")
    if x.dim() < dims or 0 in x.shape[-dims:]:
        raise ValueError(f"cannot quantise a tensor of shape {tuple(x.shape)}: nothing to group")
