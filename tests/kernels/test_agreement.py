"""The check itself: what kernels get wrong is planted into results of the references, at V4-Flash's
sizes, and must be refused; the results as they are must pass.

A norm over everything is below 1e-2 for each of them when tokens are as many as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fathom.kernels import operation, use_backend
from tests.kernels import limits
from tests.kernels.agreement import Limits, assert_agrees, widened
from tests.kernels.limits import Pair
from tests.kernels.stored_cases import FLASH, Draw

BF16 = torch.bfloat16


def product(of: Callable, norm: bool = False) -> torch.Tensor:
    """A layer's output for a prompt of 257 tokens: [tokens, rows]."""
    d = Draw(257, BF16, "cpu")
    codes, scale = d.fp8(224, FLASH.hidden)
    x, weight = d.normal(257, FLASH.hidden), 1 + d.normal(FLASH.hidden, scale=0.2)
    own = of(weight) if norm else None
    return operation("stored_linear")(of(x), codes, scale, norm=own)[0]


def normed_product(of: Callable) -> torch.Tensor:
    return product(of, norm=True)


def attention(of: Callable) -> torch.Tensor:
    """A prompt's attention to its window: [tokens, heads, head_dim]."""
    s, tokens, d = FLASH, 70, Draw(70, BF16, "cpu")
    recent, query = d.normal(s.window + tokens, s.head_dim), d.normal(tokens, s.heads * s.head_dim)
    rotation, sink = d.rotation(tokens, s.rope_dim), d.normal(s.heads, dtype=torch.float32)
    return operation("chunk_attention")(
        of(query), 700, rotation, of(recent), sink, kind=0, head_dim=s.head_dim, window=s.window,
        norm_eps=1e-6,
    ).unflatten(1, (s.heads, -1))  # fmt: skip


def experts(of: Callable) -> torch.Tensor:
    """One routed expert for two tokens: [tokens, choices, hidden]."""
    s, d = replace(FLASH, experts=1, chosen=1), Draw(2, BF16, "cpu")
    up, down = (s.experts, s.inner, s.hidden), (s.experts, s.hidden, s.inner)
    routed = (*d.fp4(*up), *d.fp4(*up), *d.fp4(*down))
    shared = (*d.fp8(256, s.hidden), *d.fp8(s.hidden, 128))
    x, ids = d.normal(2, s.hidden), d.integers(s.vocab, 2, dtype=torch.int64)
    gate = d.normal(s.experts, s.hidden, scale=0.01)
    return operation("stored_moe")(
        of(x), ids, of(gate), routed, shared, topk=s.chosen, scaling_factor=1.5, limit=10.0
    )[0]


def zero_element(out: torch.Tensor) -> None:
    """As of a mask that is one too short."""
    out[256, 223] = 0


def weight_row(out: torch.Tensor) -> None:
    """Of a weight, 10% too large."""
    out[:, 223] *= 1.1


def halved_head(out: torch.Tensor) -> None:
    """Of one token."""
    out[69, 63] *= 0.5


def zero_columns(out: torch.Tensor) -> None:
    """Forty of one pair's."""
    out[1, 0, :40] = 0


@pytest.mark.parametrize(
    ("computed", "limit", "mistakes"),
    [
        (product, limits.PRODUCT, (zero_element, weight_row)),
        (normed_product, limits.NORMED, (zero_element, weight_row)),
        (attention, limits.ATTENTION, (halved_head,)),
        (experts, limits.EXPERTS, (zero_columns,)),
    ],
)
def test_planted_mistakes_are_refused(
    computed: Callable, limit: Pair, mistakes: tuple[Callable, ...]
) -> None:
    with use_backend("reference"):
        honest, exact = computed(lambda x: x), computed(widened)
    assert honest.dtype == BF16
    assert exact.dtype == torch.float32
    assert_agrees(honest, exact, limit.exact)
    for mistake in mistakes:
        found = honest.clone()
        mistake(found)
        with pytest.raises(AssertionError, match=r"(row|element) \("):
            assert_agrees(found, exact, limit.exact)
        with pytest.raises(AssertionError, match=r"(row|element) \("):
            assert_agrees(found, honest, limit.expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    exact = torch.ones(3, 4)
    found = exact.clone()
    found[1, 2] = value
    loose = Limits(1e30, 1e30)
    for a, b in ((found, exact), (exact, found), (found, found)):
        with pytest.raises(AssertionError):
            assert_agrees(a, b, loose)


def test_shapes_and_rows_of_zeros() -> None:
    exact = torch.ones(2, 3)
    exact[1] = 0
    limit = Limits(0.5, 0.5)
    assert_agrees(exact.clone(), exact, limit)
    found = exact.clone()
    found[1, 2] = 1e-30
    with pytest.raises(AssertionError, match=r"row \(1,\) is off by inf"):
        assert_agrees(found, exact, limit)
    with pytest.raises(AssertionError, match="instead of"):
        assert_agrees(exact[:, :1], exact, limit)  # which would broadcast
    with pytest.raises(AssertionError, match="nothing"):
        assert_agrees(exact[:0], exact[:0], limit)


def test_a_failure_says_where() -> None:
    exact = torch.ones(2, 3, 100)
    found = exact.clone()
    found[1, 2, 40] = 1.5
    with pytest.raises(AssertionError, match=r"element \(1, 2, 40\) is 1.5, expected 1, off by"):
        assert_agrees(found, exact, Limits(0.1, 0.1))
    with pytest.raises(AssertionError, match=r"row \(1, 2\) is off by 0.05 .*\(1, 2, 40\)"):
        assert_agrees(found, exact, Limits(0.01, 0.1))
