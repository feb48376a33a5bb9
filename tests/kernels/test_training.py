"""Operations with gradients: the CUDA versions against their references, forward and backward.

As backends.py describes, Triton's interpreter runs the kernels where there is no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from fathom.kernels import operation, use_backend
from tests.kernels.agreement import Limits, assert_agrees
from tests.kernels.backends import DEVICE, cases_of
from tests.kernels.limits import FLOAT32
from tests.kernels.stored_cases import Draw

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
importlib.import_module("fathom.kernels.triton")


@pytest.mark.parametrize("count", cases_of([1, 63, 64, 65, 1000], [1, 65]))
@pytest.mark.parametrize("rounds", [1, 20])
def test_sinkhorn(count: int, rounds: int) -> None:
    d = Draw(count, torch.float32, DEVICE)
    logits, weights = d.normal(count, 4, 4, scale=2.0), d.normal(count, 4, 4)
    out = []
    for backend in ("reference", "triton"):
        own = logits.clone().requires_grad_()
        with use_backend(backend):
            made = operation("sinkhorn")(own, rounds, 1e-6)
        (made * weights).sum().backward()
        assert own.grad is not None
        out.append((made.detach(), own.grad))
    (expected, gradient), (found, own_gradient) = out
    assert_agrees(found, expected, FLOAT32)
    assert_agrees(own_gradient, gradient, Limits(1e-4, 1e-3, 0.0))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("way", ["random", "one choice"])
def test_experts(tokens: int, way: str) -> None:
    """Some experts have no tokens, and in one case two have all."""
    d = Draw(tokens, torch.bfloat16, DEVICE)
    experts, topk, hidden, cols = 8, 2, 64, 32
    x = d.normal(tokens, hidden)
    w1, w3 = (d.normal(experts, cols, hidden, scale=hidden**-0.5) for _ in range(2))
    w2 = d.normal(experts, hidden, cols, scale=cols**-0.5)
    if way == "one choice":
        indices = torch.tensor([[5, 2]], device=DEVICE).expand(tokens, -1).contiguous()
    else:
        indices = torch.stack([d.permutation(experts)[:topk].long() for _ in range(tokens)])
    weights = d.normal(tokens, topk, dtype=torch.float32).sigmoid()
    out = []
    for backend in ("reference", "triton"):
        own = [t.clone().requires_grad_() for t in (x, w1, w2, w3, weights)]
        with use_backend(backend):
            made = operation("experts")(own[0], *own[1:4], indices, own[4], 10.0)
        made.sum().backward()
        out.append((made.detach(), *(t.grad for t in own)))
    for expected, found in zip(*out, strict=True):
        distance = (found.double() - expected.double()).norm() / expected.double().norm()
        assert distance < 2e-2  # as NaN is not
