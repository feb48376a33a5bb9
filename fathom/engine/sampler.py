"""Choosing the next token from logits.

Order: what a mask forbids, biases, penalties, temperature, top_k, min_p, top_p, one draw. The draw
of token n needs nothing but (seed, n): a request that is interrupted and continued, on this machine
or after a restart, draws the same tokens.

Paper: §5.3.1 (evaluation samples at temperature 1.0).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fathom.chat.generation import TokenMask
from fathom.errors import GenerationError

MOST_TOP_LOGPROBS = 1000
NOT_FINITE = "the model's logits are not finite: the weights are damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; top_p keeps the smallest set of that mass.

    top_k keeps that many of the most probable tokens (0: all), min_p those at least that fraction
    as probable as the best one. repetition_penalty divides the logits of tokens that occurred,
    prompt included; frequency_penalty (per occurrence) and presence_penalty (once) are subtracted
    for those in the output. logit_bias is added per token id. top_logprobs: how many alternatives
    are told with every token. Raises GenerationError for values outside their range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    max_tokens: int = 512
    top_logprobs: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        numbers = {
            "temperature": "0 .. 100", "top_p": "(0, 1]", "min_p": "0 .. 1",
            "repetition_penalty": "0.01 .. 100", "frequency_penalty": "-100 .. 100",
            "presence_penalty": "-100 .. 100",
        }  # fmt: skip
        for name, bounds in numbers.items():
            value = getattr(self, name)
            if not _is_number(value) or not _within(value, bounds):
                raise GenerationError(f"{name} must lie in {bounds}, not {value!r}")
        whole = {"top_k": 2**63, "top_logprobs": MOST_TOP_LOGPROBS + 1, "max_tokens": 2**63}
        if self.seed is not None:
            whole["seed"] = 2**64
        for name, end in whole.items():
            value = getattr(self, name)
            if not _is_whole(value) or not 0 <= value < end:
                raise GenerationError(
                    f"{name} must be a whole number in 0 .. {end - 1}, not {value!r}"
                )
        for token, bias in self.logit_bias.items():
            there = _is_whole(token) and 0 <= token < 2**63
            if not (there and _is_number(bias) and abs(bias) <= 1000):
                raise GenerationError(
                    "logit_bias must give token ids a number in -1000 .. 1000, not "
                    f"{token!r}: {bias!r}"
                )
        if not all(_is_whole(token) for token in self.stop_token_ids):
            raise GenerationError(f"stop_token_ids must be ids, not {self.stop_token_ids!r}")


def _within(value: float, bounds: str) -> bool:
    """Whether a number lies in "low .. high" or "(low, high]"; NaN never does."""
    low, high = (float(part) for part in bounds.strip("(]").replace(" .. ", ", ").split(", "))
    return low <= value <= high and not (bounds[0] == "(" and value == low)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


SURE = 1e-9  # see `Wanted`


class Wanted(NamedTuple):
    """What a draw needs of a row: all its logits, or a summary in which they are drawn from with
    temperature (0: the best one) and number, which lies in [0, 1); and whether the row's final
    hidden state is wanted.

    A device adds shares up in another order than `Sampler`. Over a vocabulary of a million both
    sums are right to 3e-10 of the whole, so both end at the same token unless the number falls
    closer to one of its two ends. Where `SURE` of the whole does not lie between, whoever made the
    summary hands over the row as well, and the token is the one that the sampler finds.
    """

    whole: bool
    temperature: float = 0.0
    number: float = 0.0
    hidden: bool = False


class Drawn(NamedTuple):
    """A token, its log-probability by the model alone, and the most probable (id, logprob)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws tokens for one request; `seed` is the one that was given or chosen, `drawn` counts."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self.params = params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        biases = params.logit_bias
        self._biased = np.fromiter(biases.keys(), np.int64, len(biases))
        self._biases = np.fromiter(biases.values(), np.float32, len(biases))
        repetition = params.repetition_penalty != 1.0
        self._penalised = bool(repetition or params.frequency_penalty or params.presence_penalty)
        self._seen = _Occurrences(prompt if repetition else ())
        self.drawn = 0

    def wanted(self, masked: bool, ahead: int = 0, *, hidden: bool = False) -> Wanted:
        """What the draw `ahead` draws after the next one needs; masked: there is a mask."""
        params, number = self.params, uniform(self.seed, self.drawn + ahead)
        narrowed = params.top_k > 0 or params.min_p > 0 or params.top_p < 1.0
        shaped = masked or len(params.logit_bias) > 0 or self._penalised
        whole = shaped or params.top_logprobs > 0 or (narrowed and params.temperature > 0)
        return Wanted(whole, params.temperature, number, hidden)

    def pick(
        self,
        logits: np.ndarray | None,
        mask: TokenMask | None = None,
        summary: np.ndarray | None = None,
    ) -> Drawn:
        """Draw the next token and take note of it; logits: [vocab] float32.

        summary: [6], the operation `logit_summary` of these logits and of what `wanted` says, where
        it is known already. The logits may be missing where that does not ask for them.

        Raises GenerationError when the logits are not finite or the mask allows nothing.
        """
        drawn = self.propose(logits, mask, summary)
        if mask is not None:
            mask.accept(drawn.token)
        self.accept(drawn.token)
        return drawn

    def accept(self, token: int) -> None:
        """Take note of a token without drawing it, as when a request continues after a restart."""
        self.drawn += 1
        if self._penalised:
            self._seen.add(token)

    def propose(
        self,
        logits: np.ndarray | None,
        mask: TokenMask | None = None,
        summary: np.ndarray | None = None,
    ) -> Drawn:
        """As `pick`, but nothing takes note of the token."""
        if logits is None:
            assert summary is not None
            return self._told(summary)
        params = self.params
        high = float(logits.max() if summary is None else summary[0])
        if not np.isfinite(high):  # a NaN anywhere makes the maximum one
            raise GenerationError(NOT_FINITE)
        if summary is None:
            normal = high + float(np.log(np.exp(logits - np.float32(high)).sum(dtype=np.float64)))
        else:
            normal = float(summary[2])
        shaped = self._shaped(logits, mask)
        if summary is not None and shaped is logits and params.temperature == 0:
            token = int(summary[1])
        else:
            token = self._choose(shaped)
        top: tuple[tuple[int, float], ...] = ()
        if params.top_logprobs:
            best = np.argsort(-logits, kind="stable")[: params.top_logprobs]
            top = tuple((int(i), float(logits[i]) - normal) for i in best)
        return Drawn(token=token, logprob=float(logits[token]) - normal, top=top)

    def _told(self, summary: np.ndarray) -> Drawn:
        """What a summary says; summary: [6]."""
        high, best, normal, drawn, logit, _ = summary.tolist()
        if not math.isfinite(high):
            raise GenerationError(NOT_FINITE)
        if self.params.temperature == 0:
            drawn, logit = best, high
        return Drawn(token=int(drawn), logprob=logit - normal)

    def guess(
        self, logits: np.ndarray | None, ahead: int, summary: np.ndarray | None = None
    ) -> int:
        """The token that these logits [vocab] would give `ahead` draws after the next one.

        summary: [6], as for `pick`.
        """
        if logits is None:
            assert summary is not None
            return int(summary[1] if self.params.temperature == 0 else summary[3])
        return self._choose(self._shaped(logits, None), ahead)

    def _shaped(self, logits: np.ndarray, mask: TokenMask | None) -> np.ndarray:
        """Mask, biases and penalties; a copy where any of them applies."""
        params = self.params
        bits = mask.allowed() if mask is not None else None
        if bits is not None:
            logits = _masked(logits, bits)
        if params.logit_bias or self._penalised:
            logits = logits.copy()
            there = self._biased < len(logits)
            logits[self._biased[there]] += self._biases[there]
            seen, counts = self._seen.below(len(logits))
            if params.repetition_penalty != 1.0:
                value, penalty = logits[seen], np.float32(params.repetition_penalty)
                logits[seen] = np.where(value > 0, value / penalty, value * penalty)
            if params.frequency_penalty or params.presence_penalty:
                amounts = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
                logits[seen] -= amounts.astype(np.float32)
        return logits

    def _choose(self, logits: np.ndarray, ahead: int = 0) -> int:
        params, high = self.params, logits.max()
        if high == -np.inf:
            raise GenerationError("the model gives no token that is allowed any probability")
        if params.temperature == 0:
            return int(logits.argmax())
        # From the maximum, so that a tiny temperature overflows to -inf, whose share is 0.
        with np.errstate(over="ignore"):
            p = np.exp((logits - high).astype(np.float64) / params.temperature)
        if (params.top_k and params.top_k < len(p)) or params.min_p or params.top_p < 1.0:
            order = _kept(p, params)
            p = p[order]
        else:
            order = None
        mass = p.cumsum()
        target = uniform(self.seed, self.drawn + ahead) * mass[-1]
        place = int(np.searchsorted(mass, target, side="right"))
        place = min(place, len(p) - 1)
        return int(place if order is None else order[place])


def _kept(p: np.ndarray, params: SamplingParams) -> np.ndarray:
    """p: [vocab] float64. Returns the ids that top_k, min_p and top_p leave, the best one first.

    Sorting a large vocabulary takes ten times as long as everything else about a draw, so what
    cannot be kept is left out before.
    """
    least = params.min_p * p.max()
    if 0 < params.top_k < len(p):
        least = max(least, np.partition(p, -params.top_k)[-params.top_k])
    ids = np.flatnonzero(p >= least)
    if params.top_k:  # the last of them may have equals that go
        ids = _descending(p, ids)[: params.top_k]
    mass = p[ids].sum()
    if params.top_p < 1.0:
        # All that have less than this have together less than half of what top_p leaves out.
        ids = ids[p[ids] >= 0.5 * (1.0 - params.top_p) * mass / len(ids)]
    ids = _descending(p, ids)
    if params.top_p < 1.0:
        ids = ids[: int(np.searchsorted(p[ids].cumsum(), params.top_p * mass)) + 1]
    return ids


def _descending(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """ids: [tokens] int64. Returns them by falling share, those of equal share as they were."""
    return ids[np.argsort(-p[ids], kind="stable")]


class _Occurrences:
    """How often tokens occurred, kept as arrays: a draw must not look at each of them in turn."""

    def __init__(self, prompt: Sequence[int]) -> None:
        """Tokens of the prompt are there with a count of 0: only those of the output count."""
        self._ids = np.array(sorted(set(prompt)), np.int64)
        self._counts = np.zeros(len(self._ids), np.int64)
        self._places = {token: place for place, token in enumerate(self._ids.tolist())}

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):  # full: twice the room, so that this is seldom
            room = np.zeros(max(64, place), np.int64)
            self._ids = np.concatenate([self._ids, room])
            self._counts = np.concatenate([self._counts, room])
        self._ids[place] = token
        self._counts[place] += 1

    def below(self, vocab: int) -> tuple[np.ndarray, np.ndarray]:
        """Those that are ids below `vocab`: ids [tokens] int64, counts [tokens] int64."""
        ids, counts = self._ids[: len(self._places)], self._counts[: len(self._places)]
        there = ids < vocab
        return (ids, counts) if there.all() else (ids[there], counts[there])


def uniform(seed: int, number: int) -> float:
    """The `number`-th random float in [0, 1) of a seed (SplitMix64, which jumps to any place)."""
    z = (seed + 0x9E3779B97F4A7C15 * (number + 1)) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def _masked(logits: np.ndarray, bits: bytes) -> np.ndarray:
    """logits: [vocab]. Returns [vocab], -inf where the bit of a token is not set."""
    packed = np.frombuffer(bits, dtype=np.uint8)
    allowed = np.unpackbits(packed, count=min(len(logits), 8 * len(packed)), bitorder="little")
    if not allowed.any():
        raise GenerationError("the mask of this request allows no token at all")
    out: Any = np.full_like(logits, -np.inf)
    out[: len(allowed)] = np.where(allowed != 0, logits[: len(allowed)], np.float32(-np.inf))
    return out
