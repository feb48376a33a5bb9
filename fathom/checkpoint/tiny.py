"""Random checkpoints of a few megabytes, for tests and for trying things without a download.

They are made of random codes and scales, written by the safetensors library and not by `writer`,
so that reading them back proves something. Nothing is at rest: biases, sinks, norms and tables are
random.

Paper: none (test material).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from fathom.checkpoint.manifest import TensorSpec, manifest
from fathom.errors import ConfigError
from fathom.model.config import ModelConfig, RopeScaling

KINDS = ("instruct", "base", "bf16")


def tiny_config(kind: str = "instruct", **changes: object) -> ModelConfig:
    """A small configuration of one variant with every kind of layer; `changes` override fields.

    Its sizes are no multiples of the 128-wide tiles on purpose. Raises ConfigError for an unknown
    kind or unusable changes.
    """
    if kind not in KINDS:
        raise ConfigError(f"no variant named {kind!r}: choose one of {', '.join(KINDS)}")
    fields: dict[str, object] = dict(
        vocab_size=64,
        hidden_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=80,
        qk_rope_head_dim=16,
        q_lora_rank=96,
        o_groups=2,
        o_lora_rank=24,
        index_n_heads=16,
        index_head_dim=32,
        index_topk=8,
        sliding_window=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        num_hash_layers=1,
        max_position_embeddings=2048,
        rope_scaling=RopeScaling(original_max_position_embeddings=128),
        compress_ratios=(0, 4, 128),
        quantized=kind != "bf16",
        expert_dtype={"instruct": "fp4", "base": "fp8", "bf16": None}[kind],
    )
    return ModelConfig(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def random_tensors(
    config: ModelConfig, seed: int = 0, scale_dtype: str | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor of `manifest(config, scale_dtype)`, in its shape, with random contents."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    weight = TensorSpec("", (), "")
    for spec in manifest(config, scale_dtype):
        if spec.name.endswith(".scale"):  # always right behind its weight
            tensors[spec.name] = random_scale(spec, weight, generator)
        else:
            tensors[spec.name] = random_values(spec, config, generator)
            weight = spec
    return tensors


def write_tiny(
    folder: str | os.PathLike[str],
    kind: str = "instruct",
    *,
    config: ModelConfig | None = None,
    seed: int = 0,
    files: int = 1,
    scale_dtype: str | None = None,
) -> Path:
    """Write a random checkpoint in the official form; returns the folder.

    With several `files` there is an index. `config` replaces the one of `tiny_config(kind)`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config or tiny_config(kind)
    tensors = random_tensors(config, seed, scale_dtype)
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=1))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    share = -(-len(names) // files)
    weight_map: dict[str, str] = {}
    for index in range(files):
        file = f"model-{index + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name] for name in names[index * share : (index + 1) * share]}
        weight_map.update(dict.fromkeys(part, file))
        save_file(part, folder / file)
    total = sum(t.nbytes for t in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return folder


def random_values(
    spec: TensorSpec, config: ModelConfig, generator: torch.Generator
) -> torch.Tensor:
    """One tensor of a manifest in its shape and dtype, drawn on the generator's device."""
    device = generator.device
    noise = torch.randn(spec.shape, generator=generator, device=device)
    if spec.dtype == "I64":
        shape = (spec.shape[0], config.n_routed_experts)
        draws = torch.rand(shape, generator=generator, device=device)
        return draws.argsort(dim=-1)[:, : spec.shape[1]].contiguous()
    if spec.dtype == "I8":
        make = {"dtype": torch.int8, "device": device}
        return torch.randint(-128, 128, spec.shape, generator=generator, **make)
    if spec.dtype == "F8_E4M3":
        return (noise * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    dtype = torch.bfloat16 if spec.dtype == "BF16" else torch.float32
    if spec.name.endswith("norm.weight"):
        return (1 + 0.3 * noise).to(dtype)
    if spec.name.endswith("_scale"):
        return (0.7 + 0.3 * noise.abs()).to(dtype)
    if len(spec.shape) == 1 or spec.name.endswith(".ape"):
        return (0.5 * noise).to(dtype)
    if spec.name == "embed.weight":
        return noise.to(dtype)
    return (noise * 1.2 * spec.shape[-1] ** -0.5).to(dtype)


def random_scale(spec: TensorSpec, weight: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    """Scales in the shape of `spec`, a few binades apart, for weights around cols ** -0.5."""
    packed = weight.dtype == "I8"
    cols = weight.shape[-1] * (2 if packed else 1)
    middle = -math.log2(cols) / 2 - math.log2(2.7 if packed else 100)
    if spec.dtype == "F32":
        noise = torch.rand(spec.shape, generator=generator, device=generator.device)
        return 2 ** (middle + noise - 0.5)
    jitter = torch.randint(-1, 2, spec.shape, generator=generator, device=generator.device)
    return (127 + round(middle) + jitter).to(torch.uint8).view(torch.float8_e8m0fnu)
