"""Routing profiles of the synthetic checkpoint."""

from __future__ import annotations

import pytest
import torch

from fathom.checkpoint.synthetic import PROFILES, routing_table
from fathom.model import ModelConfig

CONFIG = ModelConfig.preset("flash")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_token_has_different_experts_and_a_seed_gives_the_same(profile: str) -> None:
    table = routing_table(CONFIG, profile, seed=3, device="cpu")
    assert table.shape == (CONFIG.vocab_size, CONFIG.num_experts_per_tok)
    assert int(table.min()) >= 0
    assert int(table.max()) < CONFIG.n_routed_experts
    assert (table.sort(dim=1).values.diff(dim=1) > 0).all()
    assert torch.equal(table, routing_table(CONFIG, profile, seed=3, device="cpu"))
    assert not torch.equal(table, routing_table(CONFIG, profile, seed=4, device="cpu"))


def test_the_profiles_are_as_uneven_as_they_say() -> None:
    """The most popular expert's share of all choices, against an even share of 1/256."""
    share = {}
    for profile in PROFILES:
        counts = routing_table(CONFIG, profile, seed=1, device="cpu").flatten().bincount()
        share[profile] = float(counts.max() / counts.sum()) * CONFIG.n_routed_experts
    assert share["uniform"] < 1.1
    # The first of 256 Zipf ranks has 1 / sum(rank ** -0.87) of single draws: 24 even shares,
    # somewhat less where a token may have it once only.
    assert 14 < share["zipf"] < 26
    assert 5 < share["log-normal"] < 43  # at most once a token


def test_another_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="name one of uniform"):
        routing_table(CONFIG, "normal", seed=1, device="cpu")
