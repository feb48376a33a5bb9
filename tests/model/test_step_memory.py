"""The memory plan of decode steps and chunks is what the operations allocate, at V4-Flash's size.

Counted on tensors without memory, while kernels are not launched: every allocation is there.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from fathom.model.config import ModelConfig
from fathom.model.prefill_memory import MATRIX_WORKSPACE, plan_prefill
from fathom.model.step_memory import FAR, NEAR, plan_step
from fathom.model.stored_cache import StoredCache
from fathom.model.stored_forward import Choices, run_layers
from fathom.model.stored_work import Chunk, Step
from tests.launchless import meta_model, needs_triton, no_launches
from tests.live_memory import Live

needs_triton()

FLASH = ModelConfig.preset("flash")
KINDS = {
    "SWA": (0, 0), "CSA": (4, 4), "HCA": (128, 128), "all": (0, 4, 128, 4),
}  # fmt: skip


def config_of(kind: str) -> ModelConfig:
    ratios = KINDS[kind]
    return replace(
        FLASH, num_hidden_layers=len(ratios), compress_ratios=ratios, num_hash_layers=1,
        num_nextn_predict_layers=0,
    )  # fmt: skip


def counted_step(config: ModelConfig, rows: int, bound: int, monkeypatch) -> tuple[int, int]:
    """(peak, left) bytes of one step."""
    model = meta_model(config, monkeypatch)
    slabs = -(-bound // 256)
    cache = StoredCache.empty(config, config.compress_ratios, 1, slabs, "meta")
    make = {"device": "meta"}
    with no_launches(monkeypatch), Live() as memory:
        streams = torch.empty(rows, 4, config.hidden_size, dtype=torch.bfloat16, **make)
        step = Step(
            rows=torch.empty(4, rows, dtype=torch.int32, **make)[:],
            token_ids=torch.empty(rows, dtype=torch.int64, **make),
            rotations=torch.empty(4, rows, 2, config.qk_rope_head_dim // 2, **make),
            most_positions=bound,
        )
        choices = Choices()
        pending = run_layers(config, model.layers, cache, step, streams, choices)
        peak = memory.peak
        del pending, streams, step
        return peak, memory.now


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "bound"), [(64, 2**20 + 256), (64, 4096), (1, 65536), (8, 512)])
def test_a_step_takes_what_was_planned(kind: str, rows: int, bound: int, monkeypatch) -> None:
    config = config_of(kind)
    peak, left = counted_step(config, rows, bound, monkeypatch)
    plan = plan_step(config, rows, bound)
    assert plan.results == left
    assert peak <= plan.working <= 1.02 * peak + 2**16, (plan.largest, peak)


def test_the_largest_operation_of_a_long_step_is_attention() -> None:
    plan = plan_step(FLASH, 64, 2**20 + 256)
    name, tensors = plan.largest
    assert name == "attention 128"
    assert tensors["partial results"] == 64 * (2 + 129) * 64 * (512 + 2) * 4


def test_tiles_are_those_of_attention() -> None:
    attention = importlib.import_module("fathom.kernels.triton.attention")
    assert {ratio: tiles.far for ratio, tiles in attention.TILES.items()} == FAR
    assert {ratio: tiles.near for ratio, tiles in attention.TILES.items()} == NEAR


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "context"), [(8192, 8192), (1024, 131072), (128, 4096)])
def test_a_chunk_takes_what_was_planned(kind: str, tokens: int, context: int, monkeypatch) -> None:
    config = config_of(kind)
    model = meta_model(config, monkeypatch)
    cache = StoredCache.empty(config, config.compress_ratios, 1, context // 256, "meta")
    plan = plan_prefill(config, model.layers, tokens, context)
    with no_launches(monkeypatch), Live() as memory:
        ids = torch.empty(tokens, dtype=torch.int64, device="meta")
        streams = torch.empty(tokens, 4, config.hidden_size, dtype=torch.bfloat16, device="meta")
        chunk = Chunk.create(config, cache, 0, context - tokens, ids)
        run_layers(config, model.layers, cache, chunk, streams)
    assert memory.peak <= plan.working - MATRIX_WORKSPACE <= 1.02 * memory.peak + 2**16, (
        plan.largest
    )
