"""Memory that kernels allocate begins as poison, so that an element they forget shows.

A pytest plugin: tests/kernels/conftest.py loads it; without conftest files, `-p
tests.kernels.poison` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

INTEGER = 1 << 30  # no index of anything


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same allocation, filled: NaN, all bits of a byte, or an index far out of range."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        if made.device.type == "meta" or kwargs.get("pin_memory"):
            return made
        if made.is_floating_point():
            return made.fill_(torch.nan) if made.element_size() > 1 else made
        if made.dtype == torch.uint8:
            return made.fill_(255)
        return made.fill_(INTEGER) if made.dtype in (torch.int32, torch.int64) else made

    return call


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
