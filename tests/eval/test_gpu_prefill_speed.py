"""What a prefill must compute, counted without a GPU."""

from __future__ import annotations

import pytest

from fathom.checkpoint.tiny import random_tensors, tiny_config
from fathom.eval.gpu_speed import layer_flops, layer_operations
from fathom.model.stored import StoredLayer


@pytest.mark.parametrize("index", [0, 1, 2])
def test_operations_add_up_over_chunks_and_grow_with_the_context(index: int) -> None:
    config = tiny_config("instruct")
    start = f"layers.{index}."
    tensors = random_tensors(config, 3).items()
    own = {n.removeprefix(start): t for n, t in tensors if n.startswith(start)}
    layer = StoredLayer.from_tensors(own, config.compress_ratios[index])
    whole = layer_flops(config, layer, 0, 300)
    assert whole == layer_flops(config, layer, 0, 77) + layer_flops(config, layer, 77, 223)
    # One more token at position 299 against one at 0: keys alone make the difference.
    keys = {0: 16, 4: 16 + 8, 128: 16 + 2}[layer.ratio] - 1
    late, early = layer_flops(config, layer, 299, 1), layer_flops(config, layer, 0, 1)
    scores = 2.0 * 75 * config.index_n_heads * config.index_head_dim if layer.ratio == 4 else 0.0
    assert late - early == 4.0 * keys * config.num_attention_heads * config.head_dim + scores
    # Each at its own rate: with FP8 twice as quick, what is not FP8 still takes its time.
    found = layer_operations(config, layer, 0, 300)
    assert found.fp8 + found.others == whole
    assert 0 < found.others < whole
    assert found.seconds((2e12, 1e12)) == found.fp8 / 2e12 + found.others / 1e12
    assert whole / 2e12 < found.seconds((2e12, 1e12)) < whole / 1e12
