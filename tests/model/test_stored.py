"""Decoding on stored bytes equals the dequantised model, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fathom.checkpoint import load_model
from fathom.checkpoint.tiny import random_tensors, tiny_config, write_tiny
from fathom.errors import ConfigError
from fathom.kernels import use_backend
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import SlabLayout, StoredCache
from fathom.model.stored_forward import run_layers
from fathom.model.stored_work import Step
from fathom.quant import kv_pack
from tests.model.tiny import as_stored

SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 16,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "index_head_dim": 128,
    "index_n_heads": 16,
    "index_topk": 8,
    "sliding_window": 128,
    "n_routed_experts": 4,
}
TOKENS = 134  # past a window of 128, with far more entries than the indexer picks


def test_stored_decode_equals_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_stored(monkeypatch)
    config = tiny_config("instruct", **SIZES)
    write_tiny(tmp_path, config=config, seed=3)
    model = load_model(tmp_path, dtype=torch.float32, quantized=True)
    tensors = random_tensors(config, 3)
    layers = []
    for index, ratio in enumerate(config.compress_ratios):
        start = f"layers.{index}."
        own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        layers.append(StoredLayer.from_tensors(own, ratio))
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    cache = StoredCache.empty(config, config.compress_ratios, 1, 1, "cpu")
    reference = model.new_cache()
    errors = []
    with torch.inference_mode(), use_backend("reference"):
        for position in range(TOKENS):
            token = ids[:, position : position + 1]
            expected = model.streams(token, reference)
            step = Step.create(config, cache, [position], token[0], TOKENS)
            streams = model.embed(token)[0].unsqueeze(1).repeat(1, config.hc_mult, 1)
            found = run_layers(config, layers, cache, step, streams).streams_now()
            error = (found - expected[0].float()).norm() / expected.norm()
            errors.append(error.item())
    # Once in a while a sum in another order rounds one code the other way, and all after it shift.
    assert sum(error < 1e-5 for error in errors) > 0.9 * TOKENS, errors


@pytest.mark.parametrize(
    ("positions", "bound", "said"),
    [
        ([256 + 127, 0], 512, r"tokens 383 to 384 .* its 1 slabs of 256: give the cache 2 slabs"),
        ([0, 256], 512, r"tokens 256 to 257 of a sequence do not fit"),
        ([-1, 0], 256, r"from position 0 on, not 1 from -1"),
        ([0, 200], 200, r"position 200 is not below the bound of 200 positions"),
        ([0, 1, 2], 256, r"the cache has 2 sequences: there is no number 2"),
        ([0] * 65, 256, r"at most 64 sequences, not 65"),
    ],
)
def test_a_step_must_fit_the_cache(positions: list[int], bound: int, said: str) -> None:
    """Position 383 of a sequence with one slab would be stored in its neighbour's."""
    config = tiny_config("instruct", **SIZES)
    cache = StoredCache.empty(config, config.compress_ratios, 2, 1, "cpu")
    with pytest.raises(ConfigError, match=said):
        Step.create(config, cache, positions, torch.zeros(len(positions)).long(), bound)


def test_a_step_has_a_position_for_every_token() -> None:
    config = tiny_config("instruct", **SIZES)
    cache = StoredCache.empty(config, config.compress_ratios, 2, 1, "cpu")
    with pytest.raises(ConfigError, match="1 positions for 2 tokens"):
        Step.create(config, cache, [3], torch.zeros(2).long(), 256)
    step = Step.create(config, cache, [255, 7], torch.zeros(2).long(), 256)
    assert step.rows.tolist() == [[255, 7], [0, 1], [0, 1], [0, 0]]
    assert step.rows.dtype == torch.int32


def test_a_slab_of_v4_flash_has_the_documented_bytes() -> None:
    from fathom.model import ModelConfig

    config = ModelConfig.preset("flash")
    layout = SlabLayout.of(config, config.compress_ratios)
    # 21 CSA layers of 64 entries and keys, 20 HCA layers of 2 entries.
    assert layout.num_bytes == 21 * 64 * (584 + 68) + 20 * 2 * 584


@pytest.mark.parametrize("keys", ["fp4", "fp8"])
@pytest.mark.parametrize("preset", ["flash", "pro", "nano"])
def test_the_engines_slabs_are_laid_out_alike(preset: str, keys: kv_pack.IndexerFormat) -> None:
    from fathom.engine import kv_cache
    from fathom.model import ModelConfig

    config = ModelConfig.preset(preset)
    own = SlabLayout.of(config, config.compress_ratios, keys)
    served = kv_cache.SlabLayout.of(config, True, torch.bfloat16, keys)
    for ratio, offsets, place in zip(
        config.compress_ratios, own.offsets, served.layers, strict=True
    ):
        if ratio:
            assert offsets[0] == place.kv_data
        if ratio == 4:
            assert offsets[1] == place.key_data
    assert served.slab_bytes == -(-own.num_bytes // 8) * 8
