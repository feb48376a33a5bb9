"""What V4-Pro's sizes ask of the kernels beyond V4-Flash's: more experts, columns in other parts.

That its kernels compile and fit is in test_sass.py, whole blocks in tests/model.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.backends import DEVICE


def test_columns_are_walked_in_a_power_of_two_of_equal_parts() -> None:
    from fathom.kernels.triton.few_linear import column_parts

    for tiles in range(1, 129):
        parts = column_parts(128 * tiles)
        assert parts in (1, 2, 4)
        assert tiles % parts == 0
        assert parts == 1 or tiles // parts >= 8
    sizes = (1024, 1536, 2048, 3072, 4096, 7168, 8192, 16384)
    assert [column_parts(cols) for cols in sizes] == [1, 1, 2, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("tokens", [2, 9, 64])
@pytest.mark.parametrize("way", ["scores", "an expert twice", "one expert"])
def test_experts_in_blocks_are_ordered_as_all_at_once(
    way: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fathom.kernels.triton import route

    experts, topk = 24, 4
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, experts, generator=generator).to(DEVICE)
    table = torch.randint(experts, (5, topk), generator=generator)
    table[:, 2] = table[:, 0]
    if way == "one expert":
        table[:] = 17
    ids = torch.arange(tokens) % 5
    found = []
    for block in (256, 8, 16):  # 24 experts in one block, in three, in one and a half
        monkeypatch.setattr(route, "EXPERTS", block)
        r = route.routing(
            logits, ids.to(DEVICE), topk=topk, scaling_factor=1.0,
            table=None if way == "scores" else table.to(DEVICE),
        )  # fmt: skip
        tiles = int(r.tiles)  # beyond them nothing is written
        lists = (r.tile_expert, r.tile_first, r.tile_last)
        found.append([r.indices, r.weights, r.pairs, *(own[:tiles] for own in lists), r.tiles])
    order = found[0][2].tolist()
    assert sorted(order) == list(range(tokens * topk))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)
