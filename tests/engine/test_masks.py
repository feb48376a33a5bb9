"""Masks, top_k and alternatives in drawing a token."""

from __future__ import annotations

import numpy as np
import pytest

from fathom.engine.sampler import Sampler, SamplingParams
from fathom.errors import GenerationError


class Mask:
    """Allows the given tokens and notes what was drawn."""

    def __init__(self, *allowed: int) -> None:
        bits = bytearray(2)
        for token in allowed:
            bits[token // 8] |= 1 << token % 8
        self._bits = bytes(bits)
        self.drawn: list[int] = []

    def allowed(self) -> bytes | None:
        return self._bits

    def accept(self, token: int) -> None:
        self.drawn.append(token)


LOGITS = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_drawn_with_the_models_own_logprob(temperature: float):
    mask = Mask(1, 9)
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0))
    drawn = {sampler.pick(LOGITS, mask)[:2] for _ in range(200)}
    assert {token for token, _ in drawn} <= {1, 9}
    if temperature == 0:
        assert {token for token, _ in drawn} == {9}
    for token, logprob in drawn:
        assert logprob == pytest.approx(float((LOGITS - np.log(np.exp(LOGITS).sum()))[token]))
    assert len(mask.drawn) == 200


def test_tokens_beyond_the_mask_are_forbidden():
    logits = np.arange(40, dtype=np.float32)  # the mask knows 16
    token, _, _ = Sampler(SamplingParams(temperature=0)).pick(logits, Mask(3, 15))
    assert token == 15


def test_a_mask_that_allows_nothing_is_an_error():
    with pytest.raises(GenerationError, match="allows no token"):
        Sampler(SamplingParams(temperature=0)).pick(LOGITS, Mask())


def test_top_k_keeps_the_most_probable():
    sampler = Sampler(SamplingParams(temperature=50.0, top_k=3, seed=0))
    assert {sampler.pick(LOGITS)[0] for _ in range(300)} == {9, 10, 11}


def test_alternatives_are_ordered_and_are_those_of_the_model():
    _, _, top = Sampler(SamplingParams(temperature=0, top_logprobs=3)).pick(LOGITS, Mask(0))
    expected = LOGITS - np.log(np.exp(LOGITS).sum())
    assert [token for token, _ in top] == [11, 10, 9]
    assert [logprob for _, logprob in top] == pytest.approx(
        [float(expected[t]) for t in (11, 10, 9)]
    )


@pytest.mark.parametrize("wrong", [{"top_k": -1}, {"top_logprobs": -1}])
def test_negative_counts_are_refused(wrong: dict[str, int]):
    with pytest.raises(GenerationError, match="whole number"):
        SamplingParams(**wrong)
