"""The synthetic checkpoint is a checkpoint: official names, readable files, the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fathom.checkpoint import load_model
from fathom.checkpoint.manifest import manifest
from fathom.checkpoint.synthetic import synthetic_checkpoint, synthetic_layer, unstacked
from fathom.checkpoint.tiny import tiny_config
from fathom.model.config import ModelConfig
from fathom.model.stored import StoredModel
from fathom.quant import fp4, fp8

TYPES = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8", torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    sizes = {"hidden_size": 256, "head_dim": 128, "q_lora_rank": 128, "o_lora_rank": 128}
    return tiny_config("instruct", **sizes, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    return synthetic_checkpoint(config, seed=3, device="cpu")


def test_names_shapes_and_types_are_the_official_ones(config, tensors) -> None:
    found = {n: (tuple(t.shape), TYPES[t.dtype]) for n, t in unstacked(tensors)}
    assert found == {s.name: (tuple(s.shape), s.dtype) for s in manifest(config)}


def test_it_is_seeded_and_its_layers_are_those_made_alone(config, tensors) -> None:
    again = synthetic_checkpoint(config, seed=3, device="cpu")
    other = synthetic_checkpoint(config, seed=4, device="cpu")
    same = [torch.equal(_bits(tensors[n]), _bits(again[n])) for n in tensors]
    assert all(same)
    assert not torch.equal(_bits(tensors["head.weight"]), _bits(other["head.weight"]))
    for name, tensor in synthetic_layer(config, 1, seed=3, device="cpu").items():
        assert torch.equal(_bits(tensor), _bits(tensors[f"layers.1.{name}"]))


def test_written_to_a_file_it_is_the_model_that_is_made_of_it(config, tensors, tmp_path: Path):
    save_file({n: t.contiguous() for n, t in unstacked(tensors)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    model = load_model(tmp_path, dtype=torch.bfloat16, quantized=True)
    read, made = StoredModel.of(model), StoredModel.from_tensors(config, tensors)
    assert torch.equal(read.head, made.head)
    for a, b in zip(
        [*read.layers, read.mtp[0].layer], [*made.layers, made.mtp[0].layer], strict=True
    ):
        for one, two in ((a.routed, b.routed), (a.low, b.low), (a.shared, b.shared)):
            for i in range(0, len(one), 2):
                assert torch.equal(_values(*one[i : i + 2]), _values(*two[i : i + 2]))


def _values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What is stored, whatever codes of zero and scales say it: experts have three dimensions."""
    scale = scale.view(torch.float8_e8m0fnu)
    if codes.ndim == 3:
        return fp4.dequantize(codes, scale)
    return fp8.dequantize_weight(codes.view(torch.float8_e4m3fn), scale)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
