"""Small models for tests: read from the ground-truth folder, or drawn at random in every part."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fathom.model import ModelConfig, Transformer
from fathom.quant import kv_pack

RANDOM_CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=80,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    index_n_heads=16,
    index_head_dim=32,
    index_topk=3,
    sliding_window=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_hash_layers=1,
    swiglu_limit=1.5,
    max_position_embeddings=1024,
    rope_scaling=ModelConfig().rope_scaling.__class__(original_max_position_embeddings=128),
    compress_ratios=(0, 4, 128, 4),
    quantized=False,
    expert_dtype=None,
)


def random_model(
    seed: int = 0, config: ModelConfig = RANDOM_CONFIG, **options: object
) -> Transformer:
    """A model whose every bias, sink, norm and table is random: a mistake has nowhere to hide."""
    g = torch.Generator().manual_seed(seed)
    model = Transformer(config, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        model.initialize(g)
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.3 * noise)
            elif name.endswith("_scale"):
                p.copy_(0.7 + 0.3 * noise.abs())
            elif re.search(r"(attn_sink|ape|bias|_base)$", name):
                p.add_(0.5 * noise)
            elif name.startswith("embed"):
                p.copy_(noise)
            elif "_fn" in name:
                p.copy_(noise * p.shape[-1] ** -0.5)
            else:
                p.copy_(noise * 1.2 * p.shape[-1] ** -0.5)
    return model.eval()


def as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 arithmetic too, an entry's rotated part is what BF16 keeps of it."""
    simulate = kv_pack.simulate_kv

    def stored(kv: torch.Tensor, rope_dim: int = 64) -> torch.Tensor:
        kv = simulate(kv, rope_dim)
        return torch.cat((kv[..., :-rope_dim], kv[..., -rope_dim:].bfloat16().to(kv.dtype)), -1)

    monkeypatch.setattr(kv_pack, "simulate_kv", stored)


def load_tiny_bf16(folder: Path, **options: object) -> Transformer:
    """The all-BF16 ground-truth model, read without the checkpoint package, tested elsewhere."""
    config = ModelConfig.from_json(folder)
    model = Transformer(config, **options)  # type: ignore[arg-type]
    tensors = load_file(folder / "model.safetensors")
    state: dict[str, torch.Tensor] = {}
    for name in list(dict(model.named_parameters())) + [n for n, _ in model.named_buffers()]:
        stacked = re.fullmatch(r"(.*experts)\.(w[123])", name)
        if stacked:
            rows = [
                tensors.pop(f"{stacked[1]}.{i}.{stacked[2]}.weight")
                for i in range(config.n_routed_experts)
            ]
            state[name] = torch.stack(rows)
        else:
            state[name] = tensors.pop(name)
    assert not tensors
    model.load_state_dict(state)
    return model.eval()


def weights_of(model: Transformer) -> dict[str, np.ndarray]:
    """Every parameter and table by name, for the oracle: float64, or int64 for token tables."""
    return {
        name: t.double().numpy() if t.is_floating_point() else t.numpy()
        for name, t in model.state_dict().items()
    }
