"""Names over the whole vocabulary: nothing of the evaluation, and nearly every token is copied."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from fathom.chat import Tokenizer
from fathom.eval.tasks.words import LISTS, held_out, split_pool
from fathom.train.curriculum import episode
from fathom.train.curriculum.tokens import batch_tokens
from fathom.train.curriculum.wide import WideDraw, letter_texts


@pytest.fixture(scope="module")
def tokenizer(repository) -> Tokenizer:
    return Tokenizer.load(repository / "recipes" / "nano")


@pytest.fixture(scope="module")
def drawn(tokenizer):
    texts = letter_texts(tokenizer)
    return [episode(f"wide/{number}", 0.5, texts) for number in range(700)]


def test_the_texts_are_those_of_the_vocabulary(tokenizer):
    texts = letter_texts(tokenizer)
    assert len(texts) > 1000
    assert len(set(texts)) == len(texts)
    assert all(re.fullmatch("[a-z]+", text) for text in texts)
    assert {"file", "line", "the"} <= set(texts)  # what prompts say, names may contain


def test_made_up_words_are_never_held_out(tokenizer):
    evaluation = {word for name in LISTS for word in split_pool(name, True)}
    # The whole list as texts: each would be a held-out word if nothing prevented it.
    d = WideDraw("x", [*letter_texts(tokenizer), *evaluation])
    words = [d.pseudo() for _ in range(4000)]
    assert not {w.lower() for w in words} & evaluation
    assert not any(held_out(word, 8) for word in words)
    assert len(set(words)) > 3000


def test_nearly_every_token_with_letters_is_copied(tokenizer, drawn):
    counts: Counter[int] = Counter()
    for ids, weights in batch_tokens(drawn, tokenizer):
        counts.update(i for i, weight in zip(ids, weights, strict=True) if weight == 1.0)
    letters = [
        i
        for i in range(tokenizer.vocab_size)
        if tokenizer.decode([i]).strip().isascii() and tokenizer.decode([i]).strip().isalpha()
    ]
    assert len(letters) > 1200
    # A run has a thousand times as many episodes.
    assert sum(counts[i] > 0 for i in letters) > 0.8 * len(letters)


def test_held_out_words_split_like_those_of_training(tokenizer):
    def pieces(evaluation: bool) -> float:
        words = [w for name in ("noun", "thing", "city") for w in split_pool(name, evaluation)]
        return sum(len(tokenizer.encode(f" {word}")) for word in words) / len(words)

    assert pieces(True) < 1.15 * pieces(False)


def test_episodes_differ_in_how_much_is_made_up():
    ordinary = {word for name in LISTS for word in split_pool(name, False)}

    def share(number: int) -> float:
        d = WideDraw(f"s/{number}")
        return sum(d.word("noun") not in ordinary for _ in range(200)) / 200

    shares = [share(number) for number in range(60)]
    assert min(shares) < 0.3
    assert max(shares) > 0.8
