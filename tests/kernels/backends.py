"""Where kernels are compared with their references, and the versions that are compared.

On a GPU the kernels run in BF16 and are held against the reference in float32, given the same BF16
numbers and the same bytes; and against the reference in BF16, which rounds where they round. Where
there is no GPU they run in Triton's interpreter, in float32 (it computes BF16 products wrongly):
the logic is tested there, the arithmetic on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from fathom.kernels import operation, use_backend
from tests.kernels.agreement import assert_agrees, widened
from tests.kernels.interpreter import interpret
from tests.kernels.limits import Pair
from tests.kernels.stored_cases import FLASH, ODD, PRO, SMALL

GPU = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not GPU:
    interpret()
importlib.import_module("fathom.kernels.triton")

DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16] if GPU else [torch.float32]
SIZES = [FLASH, ODD, PRO] if GPU else [SMALL]


def cases_of(every: list, few: list) -> list:
    """All cases on a GPU, a few in the interpreter, which is thousands of times slower."""
    return every if GPU else few


def both(op: str, *args: object, **kwargs: object):
    """(the reference's result, the kernel's), which are to be equal."""
    with use_backend("reference"):
        expected = operation(op)(*args, **kwargs)
    with use_backend("triton"):
        found = operation(op)(*args, **kwargs)
    return expected, found


class Versions(NamedTuple):
    """Results of the kernel, of the reference on the same inputs, and of it in float32."""

    found: Any
    expected: Any
    exact: Any

    def each(self, part: Callable[[Any], Any]) -> Versions:
        """A part of every result."""
        return Versions(*map(part, self))

    def assert_agree(self, dtype: torch.dtype, limits: Pair) -> None:
        """dtype: the kernel's arithmetic, which decides about the limits."""
        if dtype == torch.float32:
            assert_agrees(self.found, self.exact, limits.float32)
            return
        assert_agrees(self.found, self.exact, limits.exact)
        assert_agrees(self.found, self.expected, limits.expected)


def versions(call: Callable[[Callable[[Any], Any]], Any], dtype: torch.dtype) -> Versions:
    """call: computes with the inputs that it is handed a conversion for: none, or to float32."""
    with use_backend("triton"):
        found = call(lambda x: x)
    with use_backend("reference"):
        expected = call(lambda x: x)
        exact = call(widened) if dtype != torch.float32 else expected
    return Versions(found, expected, exact)


def versions_of(op: str, dtype: torch.dtype, *args: object, **kwargs: object) -> Versions:
    """As `versions`, of one operation that leaves its inputs alone."""
    return versions(lambda of: operation(op)(*of(args), **of(kwargs)), dtype)
