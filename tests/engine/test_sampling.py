"""Sampling: each setting against its definition, and draws that depend on seed and place alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fathom.engine.sampler import Sampler, SamplingParams, _kept, uniform
from fathom.errors import GenerationError
from fathom.kernels import operation

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)
DRAWS = 6000


def shares(**settings: object) -> np.ndarray:
    sampler = Sampler(SamplingParams(seed=11, **settings))  # type: ignore[arg-type]
    found = [sampler.propose(LOGITS).token for _ in range(DRAWS) if not sampler.accept(0)]
    return np.bincount(found, minlength=len(LOGITS)) / DRAWS


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


def kept(p: np.ndarray, which: list[int]) -> np.ndarray:
    out = np.zeros_like(p)
    out[which] = p[which]
    return out / out.sum()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, softmax(LOGITS)),
        ({"temperature": 2.0}, softmax(LOGITS / 2)),
        ({"top_k": 2}, kept(softmax(LOGITS), [0, 1])),
        ({"top_k": 99}, softmax(LOGITS)),
        ({"min_p": 0.2}, kept(softmax(LOGITS), [0, 1, 2])),
        ({"min_p": 1.0}, kept(softmax(LOGITS), [0])),
        ({"top_p": 0.8}, kept(softmax(LOGITS), [0, 1, 2])),
        ({"top_k": 3, "top_p": 0.7}, kept(softmax(LOGITS), [0, 1])),
        ({"logit_bias": {5: 4.0, 0: -100.0}}, softmax(LOGITS + np.float32([-100, 0, 0, 0, 0, 4]))),
    ],
)
def test_draws_follow_the_definition(settings: dict[str, object], expected: np.ndarray) -> None:
    assert np.abs(shares(**settings) - expected).max() < 0.025


@pytest.mark.parametrize(
    ("settings", "history", "expected"),
    [
        ({"presence_penalty": 1.5}, [0, 0], [0.5, 1, 0.5, 0, -1, -3]),
        ({"frequency_penalty": 0.7}, [0, 0], [0.6, 1, 0.5, 0, -1, -3]),
        ({"frequency_penalty": -1.0, "presence_penalty": 1.0}, [5, 5, 5], [2, 1, 0.5, 0, -1, -1]),
        ({"repetition_penalty": 2.0}, [0, 5], [1, 0.5, 0.5, 0, -1, -6]),  # 1 is in the prompt
    ],
)
def test_penalties(settings: dict[str, float], history: list[int], expected: list[float]) -> None:
    sampler = Sampler(SamplingParams(**settings), prompt=[1])  # type: ignore[arg-type]
    for token in history:
        sampler.accept(token)
    assert sampler._shaped(LOGITS, None).tolist() == pytest.approx(expected, abs=1e-6)
    assert LOGITS[0] == 2.0  # the caller's logits stay as they are


def test_penalties_of_a_long_reply() -> None:
    """Against the definition, token by token, also for ids that the model does not have."""
    random, vocab = np.random.default_rng(4), 300
    params = SamplingParams(
        repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.7, logit_bias={3: 2.0}
    )
    prompt = random.integers(0, vocab + 9, 50).tolist()
    sampler, output = Sampler(params, prompt), list[int]()
    for _ in range(500):
        logits = random.normal(size=vocab).astype(np.float32)
        expected = logits.copy()
        expected[3] += 2
        for token in {token for token in (*prompt, *output) if token < vocab}:
            value, count = expected[token], output.count(token)
            expected[token] = value / np.float32(1.3) if value > 0 else value * np.float32(1.3)
            expected[token] -= np.float32(0.4 * count - 0.7 * (count > 0))
        assert np.array_equal(sampler._shaped(logits, None), expected)
        output.append(int(random.integers(0, vocab)))
        sampler.accept(output[-1])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0], ids=["equal", "flat", "sharp"])
def test_what_is_kept_of_a_large_vocabulary(spread: float, ties: bool) -> None:
    """As if all tokens were sorted, also where many have the same share."""
    random = np.random.default_rng(3)
    logits = (spread * random.normal(size=5000)).astype(np.float32)
    p = np.exp(np.round(logits, 1) if ties else logits).astype(np.float64)
    order = np.argsort(-p, kind="stable")
    for top_k in (0, 1, 7, 1023, 2000, 5000, 9000):
        for min_p in (0.0, 0.02, 0.9):
            for top_p in (1.0, 0.999, 0.9, 0.3, 1e-9):
                params = SamplingParams(top_k=top_k, min_p=min_p, top_p=top_p)
                kept = order[: top_k or None]
                kept = kept[p[kept] >= min_p * p.max()]
                if top_p < 1:
                    short = p[kept].cumsum() < top_p * p[kept].sum()
                    kept = kept[: int(short.sum()) + 1]
                assert np.array_equal(_kept(p, params), kept), params


class Mask:
    def __init__(self, bits: bytes | None) -> None:
        self.bits = bits
        self.told: list[int] = []

    def allowed(self) -> bytes | None:
        return self.bits

    def accept(self, token: int) -> None:
        self.told.append(token)


def test_masks() -> None:
    mask = Mask(bytes([0b111000]))
    sampler = Sampler(SamplingParams(seed=1, logit_bias={0: 100.0}))
    drawn = [sampler.pick(LOGITS, mask) for _ in range(300)]
    assert {d.token for d in drawn} == {3, 4, 5}
    assert mask.told == [d.token for d in drawn]
    exact = LOGITS - np.log(np.exp(LOGITS).sum())
    assert all(d.logprob == pytest.approx(exact[d.token], abs=1e-6) for d in drawn)
    free = Sampler(SamplingParams(temperature=0.0))
    assert free.pick(LOGITS, Mask(None)).token == 0
    assert free.pick(LOGITS, Mask(bytes([0b100]))).token == 2
    with pytest.raises(GenerationError, match="allows no token"):
        free.pick(LOGITS, Mask(b"\0"))


def test_top_logprobs_are_the_models_own() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, top_logprobs=3, logit_bias={4: 50.0}))
    drawn = sampler.pick(LOGITS)
    exact = LOGITS - np.log(np.exp(LOGITS).sum())
    assert drawn.token == 4
    assert [i for i, _ in drawn.top] == [0, 1, 2]
    assert [p for _, p in drawn.top] == pytest.approx(exact[:3].tolist(), abs=1e-6)


def test_draws_depend_on_seed_and_place_alone() -> None:
    first = Sampler(SamplingParams(seed=5))
    tokens = [first.pick(LOGITS).token for _ in range(50)]
    second = Sampler(SamplingParams(seed=5))
    for token in tokens[:20]:
        second.accept(token)
    assert [second.pick(LOGITS).token for _ in range(30)] == tokens[20:]
    assert second.guess(LOGITS, 3) == Sampler.guess(second, LOGITS, 3)
    chosen = Sampler(SamplingParams())
    again = Sampler(SamplingParams(seed=chosen.seed))
    assert [chosen.pick(LOGITS).token for _ in range(9)] == [
        again.pick(LOGITS).token for _ in range(9)
    ]


def test_random_numbers_are_even() -> None:
    for seed in (0, 1, 2**64 - 1):
        numbers = np.array([uniform(seed, n) for n in range(20_000)])
        assert abs(numbers.mean() - 0.5) < 0.01
        assert abs(numbers.var() - 1 / 12) < 0.002
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
        assert numbers.min() >= 0
        assert numbers.max() < 1
    neighbours = np.array([[uniform(s, n) for n in range(200)] for s in range(200)])
    assert abs(np.corrcoef(neighbours[:-1].ravel(), neighbours[1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 5000}, "top_logprobs"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty"),  # of no use in float32
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias"),
        ({"logit_bias": {2**63: 0.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
    ],
)
def test_impossible_values(settings: dict[str, object], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        SamplingParams(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    bad = LOGITS.copy()
    bad[2] = value
    with pytest.raises(GenerationError, match="not finite"):
        Sampler(SamplingParams(seed=1)).pick(bad)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"seed": 3}, {"seed": 3, "top_k": 5}])
def test_a_summary_made_elsewhere_changes_nothing(settings: dict[str, Any]) -> None:
    summarise = operation("logit_summary")
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20, 700, generator=generator) * 3
    logits[3, 100] = logits[3, 600] = 50.0
    samplers = [Sampler(SamplingParams(**settings, top_logprobs=2)) for _ in range(2)]
    for row, summary in zip(logits.numpy(), summarise(logits).numpy(), strict=True):
        plain, told = samplers[0].pick(row), samplers[1].pick(row, None, summary)
        assert plain.token == told.token
        assert plain.logprob == pytest.approx(told.logprob, rel=1e-6)
    logits[0, 0] = torch.nan
    with pytest.raises(GenerationError, match="not finite"):
        samplers[1].pick(logits[0].numpy(), None, summarise(logits)[0].numpy())
    biased = Sampler(SamplingParams(temperature=0.0, logit_bias={7: 100.0}))
    assert biased.pick(logits[1].numpy(), None, summarise(logits)[1].numpy()).token == 7
