"""What the name of a model's weights depends on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fathom.checkpoint.tiny import tiny_config
from fathom.model import Transformer, fingerprint
from fathom.model.fingerprint import SAMPLES, WHOLE


@pytest.fixture
def net() -> Transformer:
    made = Transformer(replace(tiny_config("instruct"), vocab_size=4096))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.state_dict().values():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return made


def test_every_weight_counts(net: Transformer) -> None:
    before = fingerprint.fingerprint(net, "kind")
    assert fingerprint.fingerprint(net, "kind") == before
    assert fingerprint.fingerprint(net, "other kind") != before
    large = net.embed.weight
    assert large.nbytes > 2 * WHOLE
    between = WHOLE // large.element_size() // SAMPLES + 1  # behind the first sample
    for weight, place in ((large, between), (net.norm.weight, 3)):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[place] += 1
        assert fingerprint.fingerprint(net, "kind") != before
        with torch.no_grad():
            weight.copy_(kept)
    assert fingerprint.fingerprint(net, "kind") == before


def test_a_large_weight_is_added_up_in_parts(
    net: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device converts what it adds up, and a whole tensor would take eight bytes an element."""
    sizes, added_up = [], torch.Tensor.sum

    def watched(tensor: torch.Tensor, **settings: object) -> torch.Tensor:
        sizes.append(tensor.numel())
        return added_up(tensor, **settings)

    monkeypatch.setattr(fingerprint, "AT_ONCE", 1000)
    monkeypatch.setattr(torch.Tensor, "sum", watched)
    fingerprint.fingerprint(net, "kind")
    assert max(sizes) == 1000
    assert sum(sizes) >= net.embed.weight.numel()
