"""Whether a result is the one that was expected: in every row, and in every element.

A norm over a whole tensor lets a single element, head or column be anything. Here the worst row
decides, a row being the last dimension, and the worst element, in terms of its row's root mean
square. NaN and infinities never pass, and a row of zeros must be zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

BF16_HALF = 2.0**-8  # what one rounding to BF16 may change of a number
BF16_STEP = 2.0**-7  # from one number in BF16 to the next


@dataclass(frozen=True, slots=True)
class Limits:
    """rows: ||found - exact|| of a row at most, in ||exact||. elements: |found - exact| of an
    element at most, in root mean squares of its row, beyond `step` times its own magnitude: what
    the rounding of the result itself may change.
    """

    rows: float
    elements: float
    step: float = BF16_HALF


def widened(value: Any) -> Any:
    """BF16 tensors, also in tuples and dictionaries, as float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    if isinstance(value, dict):
        return {name: widened(part) for name, part in value.items()}
    return value


def assert_agrees(found: torch.Tensor, exact: torch.Tensor, limits: Limits) -> None:
    """found, exact: [..., cols]. Raises AssertionError, which says where they are apart."""
    assert found.shape == exact.shape, f"{tuple(found.shape)} instead of {tuple(exact.shape)}"
    assert found.numel(), "nothing to compare"
    rows, elements = apart(found, exact, limits.step)
    wrong = ~(rows <= limits.rows)  # NaN is wrong
    if wrong.any():
        at = _worst(rows)
        raise AssertionError(
            f"row {at} is off by {rows[at]:.3g} of its norm, more than {limits.rows:.3g}; "
            f"{int(wrong.sum())} of {wrong.numel()} rows are; "
            f"its {_element(found, exact, rows, at)}"
        )
    wrong = ~(elements <= limits.elements)
    if wrong.any():
        at = _worst(elements)
        raise AssertionError(
            f"{_element(found, exact, rows, at)}, off by {elements[at]:.3g} times the root mean "
            f"square of its row, more than {limits.elements:.3g}; {int(wrong.sum())} of "
            f"{wrong.numel()} elements are"
        )


def apart(
    found: torch.Tensor, exact: torch.Tensor, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each row [...] and each element [..., cols] is off, as `Limits` counts it."""
    found, exact = found.double(), exact.double()
    difference, norm = (found - exact).abs(), exact.norm(dim=-1)
    allowed = step * torch.maximum(found.abs(), exact.abs())
    beyond = (difference - allowed).clamp(min=0)
    size = norm[..., None] / math.sqrt(exact.shape[-1])
    return _over(difference.norm(dim=-1), norm), _over(beyond, size)


def _over(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """part / whole, where zero is no part of zero."""
    return torch.where(part == 0, 0.0 * whole, part / whole)


def _worst(values: torch.Tensor) -> tuple[int, ...]:
    flat = values.nan_to_num(nan=math.inf).flatten()
    return tuple(int(i) for i in torch.unravel_index(flat.argmax(), values.shape))


def _element(
    found: torch.Tensor, exact: torch.Tensor, rows: torch.Tensor, at: tuple[int, ...]
) -> str:
    """at: an element, or a row, of which the worst element is shown."""
    if len(at) == rows.dim():
        at = (*at, *_worst((found[at].double() - exact[at].double()).abs()))
    return f"element {at} is {found[at].item():.6g}, expected {exact[at].item():.6g}"
