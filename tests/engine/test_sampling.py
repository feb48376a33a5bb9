"""Sampling: each setting against its definition, and draws that depend on seed and place alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fathom.engine.sampler import SURE, Sampler, SamplingParams, Wanted, _kept, uniform
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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_over_tokens_that_cannot_come(temperature: float) -> None:
    """The last token of the vocabulary came, whatever the mask said."""
    impossible = LOGITS.copy()
    impossible[2] = -math.inf
    with pytest.raises(GenerationError, match="gives no token that is allowed"):
        Sampler(SamplingParams(temperature=temperature)).pick(impossible, Mask(bytes([0b100])))


def summaries(logits: torch.Tensor, wanted: list[Wanted]) -> np.ndarray:
    """logits: [rows, vocab]. Returns [rows, 6], as a device would make them."""
    draws = torch.tensor([[w.temperature, w.number] for w in wanted], dtype=torch.float64)
    return operation("logit_summary")(logits, draws.T.contiguous()).numpy()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"seed": 3}, {"seed": 3, "top_k": 5}])
def test_a_summary_made_elsewhere_changes_nothing(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20, 700, generator=generator) * 3
    logits[3, 100] = logits[3, 600] = 50.0
    samplers = [Sampler(SamplingParams(**settings, top_logprobs=2)) for _ in range(2)]
    for row in logits:
        wanted = samplers[1].wanted(masked=False)
        assert wanted.whole
        summary = summaries(row[None], [wanted])[0]
        plain, told = samplers[0].pick(row.numpy()), samplers[1].pick(row.numpy(), None, summary)
        assert plain.token == told.token
        assert plain.logprob == pytest.approx(told.logprob, rel=1e-6)
    logits[0, 0] = torch.nan
    found = summaries(logits, [Wanted(whole=True)] * len(logits))
    with pytest.raises(GenerationError, match="not finite"):
        samplers[1].pick(logits[0].numpy(), None, found[0])
    biased = Sampler(SamplingParams(temperature=0.0, logit_bias={7: 100.0}))
    assert biased.pick(logits[1].numpy(), None, found[1]).token == 7


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("spread", [0.0, 3.0, 40.0])
def test_a_draw_made_elsewhere_is_the_sampler_s(temperature: float, spread: float) -> None:
    """Without its row, for as many numbers as there are tokens."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 3000, generator=generator) * spread
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=1)
    plain, far = Sampler(params), Sampler(params)
    unsure = 0
    for _ in range(200):
        wanted = far.wanted(masked=False)
        assert not wanted.whole
        summary = summaries(logits, [wanted])[0]
        unsure += temperature > 0 and not summary[5] > SURE
        expected, told = plain.pick(logits[0].numpy()), far.pick(None, None, summary)
        assert told.token == expected.token
        assert told.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert unsure <= 1
    # A draft's draw is the one that will be made there.
    assert far.wanted(False, ahead=2).number == uniform(5, 202)


def test_where_two_tokens_meet_a_draw_is_not_sure() -> None:
    """The number falls on the edge between two shares, or a rounding away from it."""
    logits = torch.zeros(1, 1000)
    edges = np.arange(1000) / 1000
    for number in (edges[7], np.nextafter(edges[7], 1), edges[999] - 1e-12, 0.0):
        assert not summaries(logits, [Wanted(False, 1.0, float(number))])[0, 5] > SURE
    middle = summaries(logits, [Wanted(False, 1.0, 0.4125)])[0]
    assert middle[3] == 412
    assert middle[5] == pytest.approx(0.0005)
    nothing = summaries(logits, [Wanted(False, 0.0, 0.5)])[0]
    assert nothing[3:].tolist() == [-1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "masked", "whole"),
    [
        ({}, False, False),
        ({"temperature": 0.0}, False, False),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1}, False, False),
        ({}, True, True),
        ({"top_p": 0.9}, False, True),
        ({"top_k": 3}, False, True),
        ({"min_p": 0.1}, False, True),
        ({"temperature": 0.0, "top_logprobs": 1}, False, True),
        ({"temperature": 0.0, "logit_bias": {3: 1.0}}, False, True),
        ({"temperature": 0.0, "frequency_penalty": 0.1}, False, True),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, False, True),
    ],
)
def test_which_draws_need_all_logits(settings: dict[str, Any], masked: bool, whole: bool) -> None:
    assert Sampler(SamplingParams(**settings)).wanted(masked).whole == whole


def test_damaged_logits_are_noticed_without_them() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 3] = torch.nan
    sampler = Sampler(SamplingParams(seed=1))
    summary = summaries(logits, [sampler.wanted(False)])[0]
    with pytest.raises(GenerationError, match="not finite"):
        sampler.pick(None, None, summary)
