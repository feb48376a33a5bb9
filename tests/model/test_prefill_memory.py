"""The memory plan of a prefill: exact where it can be counted, helpful where it does not fit."""

from __future__ import annotations

import re

import pytest
import torch

from fathom.checkpoint.tiny import random_tensors, tiny_config
from fathom.errors import ConfigError
from fathom.model.config import ModelConfig
from fathom.model.prefill_memory import check_memory, plan_prefill
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import StoredCache
from tests.model.test_stored import SIZES


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return tiny_config("instruct", **SIZES)


@pytest.fixture(scope="module")
def layers(config: ModelConfig) -> list[StoredLayer]:
    tensors = random_tensors(config, 3)
    found = []
    for index, ratio in enumerate(config.compress_ratios):
        start = f"layers.{index}."
        own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        found.append(StoredLayer.from_tensors(own, ratio))
    return found


def test_the_cache_is_planned_to_the_byte(config, layers) -> None:
    cache = StoredCache.empty(config, config.compress_ratios, 1, 3, "cpu")
    tensors: list[torch.Tensor] = [cache.pool, cache.table]
    for layer in cache.layers:
        tensors += [t for t in (layer.ring, layer.state, layer.index_state) if t is not None]
    plan = plan_prefill(config, layers, 128, 3 * 256)
    assert plan.cache == sum(t.numel() * t.element_size() for t in tensors)
    assert plan.weights == sum(layer.num_bytes() for layer in layers)
    assert plan.total == plan.weights + plan.cache + plan.working


def test_the_largest_operation_decides(config, layers) -> None:
    plan = plan_prefill(config, layers, 512, 1024)
    name, tensors = plan.largest
    assert plan.working == max(sum(own.values()) for _, own in plan.operations)
    assert all(size >= 0 for _, own in plan.operations for size in own.values())
    printed = plan.lines()
    assert f"{plan.total:,}" in printed[-1]
    assert len(printed) == len(tensors) + 3
    assert name in printed[2]


def test_too_little_memory_says_what_to_change(config, layers) -> None:
    plan = plan_prefill(config, layers, 4096, 8192)
    check_memory(config, layers, plan, plan.total)
    with pytest.raises(ConfigError, match=r"chunks of at most [\d,]+ tokens") as caught:
        check_memory(config, layers, plan, plan.total - 1)
    found = re.search(r"at most ([\d,]+) tokens", str(caught.value))
    assert found is not None
    smaller = int(found[1].replace(",", ""))
    assert plan_prefill(config, layers, smaller, 8192).total <= plan.total - 1
    with pytest.raises(ConfigError, match="fewer layers"):
        check_memory(config, layers, plan, plan.weights)
