"""Loading: every value against a slow dequantisation, formats, and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fathom.checkpoint import load, load_model, open_checkpoint
from fathom.checkpoint.tiny import KINDS, tiny_config, write_tiny
from fathom.quant import fp8

from .forms import (
    as_transformers,
    assert_same_state,
    edit_config,
    expected_state,
    read_tensors,
)

FORMATS = {"instruct": ("fp8", "fp4"), "base": ("fp8", "fp8"), "bf16": ("bf16", "bf16")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny-bf16", "tiny-instruct", "tiny-base"])
def test_ground_truth_weights(vectors: Path, name: str, dtype: torch.dtype) -> None:
    folder = vectors / "model" / "e2e" / name
    model = load_model(folder, dtype)
    assert_same_state(model, expected_state(read_tensors(folder)))
    assert model.dtype == dtype
    assert model.quantized == (name != "tiny-bf16")
    assert not model.training


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_formats_and_forward(tmp_path: Path, kind: str) -> None:
    folder = write_tiny(tmp_path / kind, kind, files=2)
    model = load_model(folder)
    assert_same_state(model, expected_state(read_tensors(folder)))
    linear, expert = FORMATS[kind]
    modules = dict(model.named_modules())
    for name in ("layers.1.attn.indexer.wq_b", "mtp.0.h_proj", "layers.2.ffn.shared_experts.w2"):
        assert modules[name].weight_format == linear
        assert modules[name].quantize_input == (kind != "bf16")
    assert modules["layers.0.attn.wo_a"].weight_format == linear
    assert modules["layers.0.attn.wo_a"].quantize_input is False
    assert modules["layers.2.ffn.experts"].weight_format == expert
    assert model.layers[0].ffn.gate.tid2eid.dtype == torch.int64
    assert model.layers[1].ffn.gate.bias.requires_grad is False
    assert model.layers[1].attn.wq_a.weight.requires_grad is True
    with torch.no_grad():
        logits = model(torch.arange(40)[None])
    assert logits.shape == (1, 40, 64)
    assert logits.isfinite().all()


@pytest.mark.parametrize("quantized", [False, True])
def test_quantisation_can_be_chosen(tmp_path: Path, quantized: bool) -> None:
    folder = write_tiny(tmp_path / "t", "instruct")
    model = load_model(open_checkpoint(folder), quantized=quantized)
    assert model.quantized is quantized
    assert model.layers[0].attn.wq_a.quantize_input is quantized
    assert model.layers[0].attn.wq_a.weight_format == "fp8"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stacked", [False, True])
def test_transformers_files_load_the_same(tmp_path: Path, kind: str, stacked: bool) -> None:
    folder = write_tiny(tmp_path / kind, kind)
    expected = load_model(folder).state_dict()
    as_transformers(folder, stacked=stacked)
    model = load_model(folder)
    assert len(model.mtp) == 0
    assert_same_state(model, {n: t for n, t in expected.items() if not n.startswith("mtp.")})


def test_e8m0_scales_in_a_base_model(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", "base", scale_dtype="F8_E8M0")
    edit_config(folder, expert_dtype=None)
    model = load_model(folder)
    assert model.config.expert_dtype == "fp8"
    assert_same_state(model, expected_state(read_tensors(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_scales_are_applied_after_the_product(tmp_path: Path, dtype: torch.dtype) -> None:
    """As the official kernel does: BF16 would round each dequantised weight by up to 2^-9."""
    folder = write_tiny(tmp_path / "t", "base")
    stored = read_tensors(folder)
    model = load_model(folder, dtype)
    g = torch.Generator().manual_seed(0)
    for name in ("layers.0.attn.wkv", "layers.1.ffn.shared_experts.w2"):
        linear = model.get_submodule(name)
        x = torch.randn(5, linear.weight.shape[1], generator=g).to(dtype)
        expected = slow_product(x, stored[f"{name}.weight"], stored[f"{name}.scale"])
        with torch.no_grad():
            found = linear(x)
        assert found.dtype == dtype
        assert float((found.double() - expected).abs().max() / expected.abs().mean()) < (
            2e-6 if dtype == torch.float32 else 2**-6
        )
        if dtype == torch.bfloat16:  # one rounding, at the end
            wrong = found != expected.to(dtype)
            assert float(wrong.float().mean()) < 0.01
    experts = model.layers[2].ffn.experts
    name = "layers.2.ffn.experts.3.w1"
    assert torch.equal(experts.w1_tile_scale[3], stored[f"{name}.scale"])
    assert torch.equal(
        fp8.weight_codes(experts.w1[3], experts.w1_tile_scale[3]), stored[f"{name}.weight"].float()
    )
    assert model.layers[0].attn.wo_a.tile_scale is None  # expanded: its input is not quantised
    plain = load_model(folder, dtype, quantized=False)
    assert not [name for name, _ in plain.named_buffers() if name.endswith("tile_scale")]


def slow_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """In float64, tile by tile."""
    x = fp8.dequantize_activations(*fp8.quantize_activations(x)).double()
    out = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    for row in range(codes.shape[0]):
        for tile in range(scale.shape[1]):
            cols = slice(128 * tile, 128 * tile + 128)
            partial = x[:, cols] @ codes[row, cols].double()
            out[:, row] += partial * scale[row // 128, tile].double()
    return out


def test_slices_of_large_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path / "t", "base")
    expected = expected_state(read_tensors(folder))
    monkeypatch.setattr(load, "SLICE_ELEMENTS", 1)  # a row of plain tensors, a tile row of matrices
    assert_same_state(load_model(folder), expected)


MEASURE = """
import sys, torch
from fathom.checkpoint import load_model

def kilobytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

small, large = sys.argv[1:]
load_model(small)  # imports, caches, thread pools
before = kilobytes("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of importing
model = load_model(large)
peak = kilobytes("VmHWM:") - before
size = sum(t.nbytes for t in model.state_dict().values())
print(size, 1024 * peak)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    small = write_tiny(tmp_path / "small", "instruct")
    config = tiny_config(
        "instruct",
        vocab_size=1024,
        hidden_size=1024,
        moe_intermediate_size=1024,
        n_routed_experts=2,
        num_hidden_layers=1,
        compress_ratios=(4,),
    )
    large = write_tiny(tmp_path / "large", config=config)
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    size, peak = map(int, result.stdout.split())
    largest = max(t.nbytes for t in open_checkpoint(large).tensors.values())
    assert size > 80e6
    # Slices that are dequantised have a fixed size; a second copy of the model would not pass.
    assert peak < size + largest + 32e6
