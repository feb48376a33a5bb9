"""What bytes a stored model may hold, so that no operation computes something else from them.

Operations view weights as bytes: a tensor of another type or shape would give numbers, and wrong
ones. Codes and scales that they cannot represent are found here too, once, when a model is made.

Paper: §3.4 (FP4 experts, FP8 matrices with scales of 128 x 128).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fathom.errors import CheckpointError
from fathom.quant import fp4

Tensor = torch.Tensor

TILE = 128  # rows and columns of an FP8 matrix that share one scale
NAN_SCALE = 255
# Scale bytes with which every code is an exact BF16 number. FP4 codes become BF16 times 2 ** -62
# (fathom/kernels/triton/fp4_words.py): below 57 the code of 0.5 is less than the smallest, above
# 190 the factor is more than the largest. An FP8 code times its scale is a BF16 number itself.
FP4_SCALES = (57, 190)
FP8_SCALES = (3, 246)
AT_ONCE = 2**13  # rows of FP4 codes that are looked at together

_NAMES = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def get(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """The tensor called `name`. Raises CheckpointError where there is none.

    tensors: of any shape [...], by name.
    """
    try:
        return tensors[name]
    except KeyError:
        raise CheckpointError(f"tensor {where + name!a} is missing") from None


def check_fp8(name: str, codes: Tensor, scale: Tensor) -> None:
    """Raise CheckpointError unless these are an FP8 matrix and its scales.

    codes: [rows, cols] float8_e4m3fn; scale: [ceil(rows / 128), ceil(cols / 128)] float8_e8m0fnu.
    """
    hint = ": FP8 matrices with scales in powers of two are what can be served as stored"
    _check_type(f"{name}.weight", codes, torch.float8_e4m3fn, codes.shape[:2], hint)
    tiles = tuple(-(-size // TILE) for size in codes.shape)
    _check_type(f"{name}.scale", scale, torch.float8_e8m0fnu, tiles, hint)
    bytes_ = codes.view(torch.uint8)
    nan = (bytes_ & 0x7F) == 0x7F
    if bool(nan.any()):
        raise CheckpointError(
            f"tensor {name + '.weight'!a} has at {_first(nan)} the code "
            f"{int(bytes_[tuple(_first(nan))])}, which is NaN: damaged data"
        )
    odd = _odd(f"{name}.scale", scale, FP8_SCALES)
    for row, col in odd.nonzero().tolist() if odd is not None else ():
        tile = bytes_[row * TILE : (row + 1) * TILE, col * TILE : (col + 1) * TILE]
        if bool((tile & 0x7F).any()):  # with nothing but zeros any scale will do
            raise _unfit(f"{name}.scale", [row, col], scale, FP8_SCALES)


def check_fp4(name: str, codes: Tensor, scale: Tensor) -> None:
    """Raise CheckpointError unless these are FP4 matrices and their scales.

    codes: [experts, rows, cols / 2] int8; scale: [experts, rows, cols / 32] float8_e8m0fnu, or
    both of one expert.
    """
    hint = ": FP4 experts, as in the instruct checkpoints, are what can be served as stored"
    _check_type(f"{name}.weight", codes, torch.int8, codes.shape[:3], hint)
    groups = (*codes.shape[:-1], codes.shape[-1] * 2 // fp4.GROUP)
    _check_type(f"{name}.scale", scale, torch.float8_e8m0fnu, groups, hint)
    odd = _odd(f"{name}.scale", scale, FP4_SCALES)
    if odd is None:
        return
    rows, codes = odd.flatten(0, -2), codes.view(torch.uint8).flatten(0, -2)
    for first in range(0, len(rows), AT_ONCE):  # damaged or hostile where there are many
        own = slice(first, first + AT_ONCE)
        used = (codes[own].unflatten(-1, (-1, fp4.GROUP // 2)) & 0x77).any(dim=-1) & rows[own]
        if bool(used.any()):
            row, col = _first(used)
            place = torch.unravel_index(torch.tensor(first + row), scale.shape[:-1])
            raise _unfit(f"{name}.scale", [*map(int, place), col], scale, FP4_SCALES)


def check_table(name: str, table: Tensor, experts: int) -> None:
    """Raise CheckpointError unless table [vocab, topk] int64 names experts that exist.

    A token may name an expert twice.
    """
    _check_type(name, table, torch.int64, table.shape[:2], "")
    bad = (table < 0) | (table >= experts)
    if bool(bad.any()):
        place = _first(bad)
        raise CheckpointError(
            f"tensor {name!a} has at {place} expert {int(table[tuple(place)])}, but there are "
            f"{experts}"
        )


def _check_type(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], hint: str
) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        found = _NAMES.get(tensor.dtype, str(tensor.dtype))
        raise CheckpointError(
            f"tensor {name!a} is {found} {list(tensor.shape)}; wanted {_NAMES[dtype]} "
            f"{list(shape)}{hint}"
        )


def _odd(name: str, scale: Tensor, known: tuple[int, int]) -> Tensor | None:
    """Which scales lie outside of a range: bool like scale [rows, cols], or None where none does.

    Raises CheckpointError for NaN.
    """
    codes = scale.view(torch.uint8)
    odd = (codes < known[0]) | (codes > known[1])
    if not bool(odd.any()):
        return None
    nan = codes == NAN_SCALE
    if bool(nan.any()):
        raise CheckpointError(
            f"tensor {name!a} has at {_first(nan)} the scale byte {NAN_SCALE}, which is NaN: "
            "damaged data"
        )
    return odd


def _unfit(name: str, place: list[int], scale: Tensor, known: tuple[int, int]) -> CheckpointError:
    found = int(scale.view(torch.uint8)[tuple(place)])
    return CheckpointError(
        f"tensor {name!a} has at {place} the scale byte {found}, which BF16 cannot follow: wanted "
        f"{known[0]} to {known[1]}"
    )


def _first(found: Tensor) -> list[int]:
    return [int(i) for i in found.nonzero()[0]]
