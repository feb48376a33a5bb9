"""The endless stream of tokenized episodes that a training worker consumes.

Paper: §5.2 (agentic training data), §4.1 (limits on truncation).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from fathom.chat import encode_segments
from fathom.errors import TrainError

from .episodes import Episode, episode
from .tokens import batch_tokens
from .wide import letter_texts

MAX_TOKENS = 1600
_BATCH = 32  # one call of the tokenizer's library for so many episodes


class EpisodeStream:
    """Iterates over (ids, weights); element k depends on seed, worker and k alone.

    `stage` from 0 (start of training) to 1 sets the share of plain recall. Episodes longer than
    MAX_TOKENS are left out. An episode that its own oracle fails comes out empty: packing counts it
    as dropped, so that one defect in a million ends no run and yet shows in its log.
    """

    def __init__(
        self, seed: int, worker: int, num_workers: int, tokenizer: Any, stage: float = 0.5
    ) -> None:
        if not 0 <= worker < num_workers:
            raise ValueError(f"worker {worker} of {num_workers}: count workers from 0")
        self.seed, self.worker, self.num_workers = seed, worker, num_workers
        self.tokenizer = tokenizer
        self.stage = min(max(float(stage), 0.0), 1.0)
        self.index = 0
        self._texts = _letter_texts(tokenizer)
        self._ready: list[tuple[list[int], list[float]]] = []

    def __iter__(self) -> Iterator[tuple[list[int], list[float]]]:
        return self

    def episode(self) -> Episode | None:
        """The next episode, not tokenized; None when its oracle failed."""
        number = self.index * self.num_workers + self.worker
        self.index += 1
        try:
            return episode(f"{self.seed}/{number}", self.stage, self._texts)
        except (TrainError, ValueError, RuntimeError):
            return None

    def __next__(self) -> tuple[list[int], list[float]]:
        while True:
            if not self._ready:
                drawn = [self.episode() for _ in range(_BATCH)]
                whole = [one for one in drawn if one is not None]
                self._ready = batch_tokens(whole, self.tokenizer)[::-1]
                self._ready += [([], [])] * (len(drawn) - len(whole))
            ids, weights = self._ready.pop()
            if len(ids) <= MAX_TOKENS:
                return ids, weights


@functools.lru_cache(maxsize=4)
def _letter_texts(tokenizer: Any) -> tuple[str, ...]:
    # A worker makes a new stream for every batch, always with the same tokenizer.
    return letter_texts(tokenizer)


def corpus(seed: int, n: int, stage: float = 0.3) -> Iterator[str]:
    """The texts between the special tokens of `n` episodes, to train a tokenizer on.

    Most names in them are made up, so that the vocabulary holds their pieces instead of the few
    thousand words of the lists: words of every origin then split alike.
    """
    for number in range(n):
        drawn = episode(f"corpus/{seed}/{number}", stage)
        for part in encode_segments(drawn.messages, drawn.tools, thinking=drawn.thinking):
            if not part.special:
                yield part.text
