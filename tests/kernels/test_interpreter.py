"""Reductions in the interpreter: from the first to the last, and not a number in another place."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.backends import GPU

if GPU:
    pytest.skip("for Triton's interpreter", allow_module_level=True)
import triton
import triton.language as tl


@triton.jit
def _apart(a, b):
    return a - 2 * b


@triton.jit
def _best(value, at, other, other_at):
    take = other > value
    return tl.where(take, other, value), tl.where(take, other_at, at)


@triton.jit
def _reduce(x, rows, columns, whole, values, places, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    tile = tl.load(x + row[:, None] * COLS + col[None, :])
    tl.store(rows + row[:, None], tl.reduce(tile, 1, _apart, keep_dims=True))
    tl.store(columns + col, tl.reduce(tile, 0, _apart))
    tl.store(whole, tl.reduce(tile, None, _apart))
    at = tl.zeros([ROWS, COLS], tl.int32) + col[None, :]
    value, place = tl.reduce((tile, at), 1, _best)
    tl.store(values + row, value)
    tl.store(places + row, place)


def test_reductions() -> None:
    x = torch.randint(-9, 9, (4, 8), generator=torch.Generator().manual_seed(1)).float()
    rows, columns, whole, values = (torch.full((n,), torch.nan) for n in (4, 8, 1, 4))
    places = torch.full((4,), -1, dtype=torch.int32)
    _reduce[(1,)](x, rows, columns, whole, values, places, ROWS=4, COLS=8)

    def apart(numbers: torch.Tensor) -> torch.Tensor:
        return numbers[0] - 2 * numbers[1:].sum(0)

    assert torch.equal(rows, apart(x.T))
    assert torch.equal(columns, apart(x))
    assert torch.equal(whole[0], apart(x.flatten()))
    assert torch.equal(values, x.max(1).values)
    firsts = [row.index(max(row)) for row in x.tolist()]  # of equal ones
    assert places.tolist() == firsts
