"""Of experts with equal scores a prompt and a decode step choose the same: the lower numbers."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fathom.kernels import operation, use_backend
from tests.kernels.backends import DEVICE, GPU
from tests.kernels.stored_cases import FLASH, SMALL, Draw

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.mark.parametrize("op", ["stored_moe", "chunk_moe"])
def test_ties_go_to_the_lower_expert(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fathom.kernels.triton import chunk_experts, few_experts

    monkeypatch.setattr(chunk_experts, "FEW", 0)  # its own kernels, with few tokens
    if not GPU:
        monkeypatch.setattr(chunk_experts, "TOKENS", 16)
        monkeypatch.setattr(few_experts, "ROWS", 128)
    s, d = FLASH if GPU else SMALL, Draw(1, torch.bfloat16 if GPU else torch.float32, DEVICE)
    bias = torch.zeros(s.experts, device=DEVICE)
    bias[[3, 9, 10, 14]] = 1.0  # alike, and above the others, which are alike as well
    gate = d.normal(s.experts, s.hidden) * 0
    up, down = (s.experts, s.inner, s.hidden), (s.experts, s.hidden, s.inner)
    routed = (*d.fp4(*up), *d.fp4(*up), *d.fp4(*down))
    shared = (*d.fp8(2 * s.inner, s.hidden), *d.fp8(s.hidden, s.inner))
    x, ids = d.normal(2, s.hidden), d.integers(s.vocab, 2, dtype=torch.int64)
    with use_backend("triton"):
        _, _, indices = operation(op)(
            x, ids, gate, routed, shared, topk=s.chosen, scaling_factor=1.5, limit=10.0, bias=bias
        )
    best = [3, 9, 10, 14, 0, 1][: s.chosen]
    assert indices.tolist() == [best, best]
