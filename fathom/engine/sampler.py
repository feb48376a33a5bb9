"""Choosing the next token from logits.

Paper: §5.3.1 (evaluation samples at temperature 1.0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fathom.chat.generation import TokenMask
from fathom.errors import GenerationError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; top_p keeps the smallest set of that mass.

    top_k keeps that many of the most probable tokens, 0 all. top_logprobs: how many alternatives
    are told with every token.

    Raises GenerationError for values outside their range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 512
    top_logprobs: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise GenerationError(f"temperature must lie in 0 .. 100, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0 or self.top_logprobs < 0:
            raise GenerationError(
                f"top_k and top_logprobs must not be negative: {self.top_k}, {self.top_logprobs}"
            )
        if self.max_tokens < 0:
            raise GenerationError(f"max_tokens must not be negative, but is {self.max_tokens}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise GenerationError(f"seed must lie in 0 .. 2**64 - 1, not {self.seed}")


class Sampler:
    """Draws tokens for one request from its own random generator."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def draw(self, logits: torch.Tensor) -> tuple[int, float]:
        """logits: [vocab] float32 of one position. Returns (token id, its log-probability).

        The log-probability is the model's own: before temperature and top_p. Raises GenerationError
        when the logits are not finite.
        """
        token, logprob, _ = self.pick(logits)
        return token, logprob

    def pick(
        self, logits: torch.Tensor, mask: TokenMask | None = None
    ) -> tuple[int, float, tuple[tuple[int, float], ...]]:
        """As `draw`, among the tokens that `mask` allows; third the most probable ones.

        logits: [vocab] float32. The log-probabilities are the model's own, from before the mask.
        Raises GenerationError as `draw` does, and when the mask allows nothing.
        """
        logits = logits.detach().to("cpu", torch.float32)
        normal = logits.logsumexp(-1)
        bits = mask.allowed() if mask is not None else None
        choice = self._choose(logits if bits is None else _masked(logits, bits))
        if mask is not None:
            mask.accept(choice)
        logprob = float(logits[choice] - normal)
        if logprob != logprob:
            raise GenerationError("the model's logits are not finite: the weights are damaged")
        if not self.params.top_logprobs:
            return choice, logprob, ()
        best = logits.topk(min(self.params.top_logprobs, len(logits)))
        values = (best.values - normal).tolist()
        return choice, logprob, tuple(zip(best.indices.tolist(), values, strict=True))

    def _choose(self, logits: torch.Tensor) -> int:
        if self.params.temperature == 0:
            return int(logits.argmax())
        if 0 < self.params.top_k < len(logits):
            kept = logits.topk(self.params.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter_(0, kept.indices, kept.values)
        # From the maximum, so that a tiny temperature overflows to -inf, whose share is 0.
        p = ((logits - logits.max()) / self.params.temperature).softmax(-1)
        if self.params.top_p < 1.0:
            p = nucleus(p, self.params.top_p)
        if not bool(torch.isfinite(p).all()):
            raise GenerationError("the model's logits are not finite: the weights are damaged")
        return int(torch.multinomial(p, 1, generator=self.generator))


def _masked(logits: torch.Tensor, bits: bytes) -> torch.Tensor:
    """logits: [vocab]. Returns [vocab], -inf where the bit of a token is not set."""
    packed = np.frombuffer(bits, dtype=np.uint8)
    allowed = np.unpackbits(packed, count=min(len(logits), 8 * len(packed)), bitorder="little")
    if not allowed.any():
        raise GenerationError("the mask of this request allows no token at all")
    out = torch.full_like(logits, -torch.inf)
    chosen = torch.from_numpy(allowed.astype(bool))
    out[: len(chosen)][chosen] = logits[: len(chosen)][chosen]
    return out


def nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the most probable tokens whose mass first reaches top_p (at least one).

    p: [vocab] float32, sums to 1. Returns [vocab], not normalised again.
    """
    ordered, order = p.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    return torch.zeros_like(p).scatter_(0, order, ordered.masked_fill(before >= top_p, 0.0))
