"""Names over the whole vocabulary, so that every token is copied in every role.

A tokenizer's vocabulary is made from whole prompts: much of it appears in what a model reads and
hardly ever in the names that it copies, and a name that contains such a token is then copied wrong.
Here names of every kind (files, keys, values, words, phrases) are put together out of the
vocabulary's own letters-only texts.

Paper: none (own curriculum).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fathom.eval.tasks.draw import Draw
from fathom.eval.tasks.words import LISTS, ONSETS, VOWELS, held_out

# Parts of "room/number" are words of their own in a text.
_HELD_OUT = frozenset(
    part
    for pool in LISTS.values()
    for word in pool
    if held_out(word)
    for part in (word, *word.split("/"))
)
_LONGEST = 14
_NEVER = _HELD_OUT | {"yes", "no"}  # as answers these two have rules of their own


def letter_texts(tokenizer: Any) -> tuple[str, ...]:
    """The different letters-only texts of a tokenizer's tokens, in lower case."""
    texts = (tokenizer.decode([i]).strip().lower() for i in range(tokenizer.vocab_size))
    return tuple(dict.fromkeys(t for t in texts if t.isascii() and t.isalpha()))


class WideDraw(Draw):
    """Draws on the training side; a share of all words, set anew for each episode, is made up.

    Made-up words contain one or two of `texts`, or are those of `Draw` where there are none.
    """

    __slots__ = ("_share", "_texts")

    def __init__(self, seed: int | str, texts: Sequence[str] = ()) -> None:
        super().__init__(seed, evaluation=False)
        self._texts = texts
        # A third of the episodes speaks of ordinary things; the others of anything.
        self._share = 0.15 if self.chance(0.33) else 0.3 + 0.7 * self.rng.random()

    def word(self, pool: str) -> str:
        """A word of a list, or a made-up one."""
        if self.rng.random() < self._share:
            return self.pseudo()
        return self.pick(self._pools[pool])

    def distinct(self, pool: str, count: int) -> list[str]:
        """Different words, some of them made up."""
        made: dict[str, None] = {}
        while len(made) < count:
            made[self.word(pool)] = None
        return list(made)

    def pseudo(self) -> str:
        """A made-up word, on the training side of the split."""
        while True:
            roll = self.rng.random() if self._texts else 0.0
            if roll < 0.25:
                return super().pseudo()
            if roll < 0.5:
                word = self._syllables() + self.pick(self._texts) + self._syllables()
            elif roll < 0.8:
                word = self.pick(self._texts) + self.pick(self._texts)
            else:
                word = self.pick(self._texts)
            if 2 < len(word) <= _LONGEST and word not in _NEVER and self.mine(word):
                return word

    def _syllables(self) -> str:
        count = self.below(3)
        return "".join(self.pick(ONSETS) + self.pick(VOWELS) for _ in range(count))
