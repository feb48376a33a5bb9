"""The host does not wait for the device while a prompt's chunk goes through stored layers."""

from __future__ import annotations

import pytest
import torch

from fathom.checkpoint.tiny import tiny_config
from fathom.model.config import ModelConfig
from fathom.model.rope import RotaryTable
from fathom.model.stored_cache import StoredCache
from fathom.model.stored_work import Chunk, frequencies
from tests.model.test_stored import SIZES


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return tiny_config("instruct", **SIZES)


@pytest.mark.parametrize("start", [0, 125])
def test_rotations_are_those_of_the_tables(config: ModelConfig, start: int) -> None:
    cache = StoredCache.empty(config, config.compress_ratios, 1, 2, "cpu")
    ids = torch.arange(9)
    made = Chunk.create(config, cache, 0, start, ids)
    given = Chunk.create(config, cache, 0, start, ids, turns=frequencies(config, "cpu"))
    at = torch.arange(start, start + 9)
    for own, compressed in ((0, False), (1, True)):
        expected = torch.stack(RotaryTable(config, compressed).at(at), dim=1)
        assert torch.equal(made.rotations[own], expected)
    assert all(torch.equal(a, b) for a, b in zip(made.rotations, given.rotations, strict=True))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("tokens", [9, 130])
def test_nothing_waits_in_a_chunk(config: ModelConfig, tokens: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from fathom.checkpoint.synthetic import synthetic_checkpoint
    from fathom.model.stored import StoredModel
    from fathom.model.stored_forward import run_layers

    model = StoredModel.from_tensors(config, synthetic_checkpoint(config, seed=1, device="cuda"))
    cache = StoredCache.empty(config, config.compress_ratios, 1, 2, "cuda")
    turns, ids = frequencies(config, "cuda"), torch.arange(tokens, device="cuda") % 64
    streams = torch.randn(tokens, 4, config.hidden_size, device="cuda").bfloat16()

    def feed() -> None:
        chunk = Chunk.create(config, cache, 0, 0, ids, turns=turns)
        run_layers(config, model.layers, cache, chunk, streams).streams_now()

    with torch.inference_mode():
        feed()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            feed()
        finally:
            torch.cuda.set_sync_debug_mode("default")
