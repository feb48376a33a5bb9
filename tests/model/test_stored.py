"""Decoding on stored bytes equals the dequantised model, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fathom.checkpoint import load_model
from fathom.checkpoint.tiny import random_tensors, tiny_config, write_tiny
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
            step = Step.create(
                config, torch.tensor([position], dtype=torch.int32), token[0], TOKENS
            )
            streams = model.embed(token)[0].unsqueeze(1).repeat(1, config.hc_mult, 1)
            found = run_layers(config, layers, cache, step, streams).streams_now()
            error = (found - expected[0].float()).norm() / expected.norm()
            errors.append(error.item())
    # Once in a while a sum in another order rounds one code the other way, and all after it shift.
    assert sum(error < 1e-5 for error in errors) > 0.9 * TOKENS, errors


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
