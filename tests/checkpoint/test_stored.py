"""A checkpoint's files become a StoredModel as they are, or a sentence says why they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fathom.checkpoint import load_model, load_stored, open_checkpoint
from fathom.checkpoint.stored import stored_bytes, unstorable_checkpoint
from fathom.checkpoint.synthetic import synthetic_checkpoint, unstacked
from fathom.checkpoint.tiny import random_tensors, tiny_config, write_tiny
from fathom.errors import CheckpointError, ConfigError
from fathom.model.config import ModelConfig
from fathom.model.stored import StoredLayer, StoredModel
from fathom.model.stored_checks import FP4_SCALES, FP8_SCALES
from fathom.quant import fp4, fp8
from tests.live_memory import Live

SIZES = {"hidden_size": 256, "head_dim": 128, "q_lora_rank": 128, "o_lora_rank": 128}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return tiny_config("instruct", **SIZES, num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def tensors(config: ModelConfig) -> Tensors:
    stacked = synthetic_checkpoint(config, seed=3, device="cpu")
    return {n: t.contiguous() for n, t in unstacked(stacked)}


def written(folder: Path, config: ModelConfig, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    return folder


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same(found: StoredModel, expected: StoredModel) -> bool:
    a, b = found.state_dict(), expected.state_dict()
    return a.keys() == b.keys() and all(torch.equal(bits(a[n]), bits(b[n])) for n in a)


def test_what_is_loaded_is_what_the_file_holds(config, tensors, tmp_path: Path) -> None:
    found = load_stored(written(tmp_path, config, tensors), device="cpu")
    assert same(found, StoredModel.from_tensors(config, tensors))
    assert found.config == config
    assert found.dtype == torch.bfloat16
    assert found.layers[0].table is not None
    assert found.layers[0].bias is None
    assert len(found.mtp) == 1


def test_several_files_and_the_names_of_transformers(config, tmp_path: Path) -> None:
    write_tiny(tmp_path / "one", config=config, seed=4)
    write_tiny(tmp_path / "five", config=config, seed=4, files=5)
    one, five = (load_stored(tmp_path / name, device="cpu") for name in ("one", "five"))
    assert same(one, five)


def test_it_is_the_model_that_a_transformer_would_become(config, tensors, tmp_path: Path) -> None:
    written(tmp_path, config, tensors)
    found = load_stored(tmp_path, device="cpu", dtype=torch.bfloat16)
    other = StoredModel.of(load_model(tmp_path, dtype=torch.bfloat16))
    for a, b in zip(
        [*found.layers, found.mtp[0].layer], [*other.layers, other.mtp[0].layer], strict=True
    ):
        for one, two in ((a.routed, b.routed), (a.low, b.low), (a.high, b.high), (a.wo_a, b.wo_a)):
            for i in range(0, len(one), 2):
                assert torch.equal(_values(*one[i : i + 2]), _values(*two[i : i + 2]))
        for name in ("q_norm", "sink", "gate", "bias", "table", "plain"):
            one, two = getattr(a, name), getattr(b, name)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)


def _values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = scale.view(torch.float8_e8m0fnu)
    if codes.ndim == 3:
        return fp4.dequantize(codes, scale)
    return fp8.dequantize_weight(codes.view(torch.float8_e4m3fn), scale)


def test_some_layers_alone(config, tensors, tmp_path: Path) -> None:
    whole = load_stored(written(tmp_path, config, tensors), device="cpu")
    some = load_stored(tmp_path, device="cpu", layers=[0, 2])
    assert some.config.compress_ratios == (0, 128)
    assert some.config.num_hash_layers == 1
    assert torch.equal(some.layers[1].gate, whole.layers[2].gate)
    assert load_stored(tmp_path, device="cpu", layers=[1]).config.num_hash_layers == 0
    for wrong in ([], [1, 0], [0, 0], [3], [-1]):
        with pytest.raises(ConfigError, match=r"ascending numbers of 0 \.\. 2"):
            load_stored(tmp_path, device="cpu", layers=wrong)


def test_no_more_memory_than_the_model_and_a_tensor(tmp_path: Path) -> None:
    config = tiny_config("instruct", **SIZES, n_routed_experts=48, num_nextn_predict_layers=1)
    write_tiny(tmp_path, config=config, files=3)
    checkpoint = open_checkpoint(tmp_path)
    with Live() as memory:
        model = load_stored(checkpoint, device="cpu")
    held = sum(t.nbytes for t in model.state_dict().values())
    assert held == stored_bytes(checkpoint) == memory.now
    largest = max(t.nbytes for t in checkpoint.tensors.values())
    assert memory.peak <= held + 4 * largest
    assert 4 * largest < held / 20  # a second copy of any layer's experts would be far more
    with Live() as memory:
        StoredModel.of(load_model(checkpoint))
    assert memory.peak > 4 * held


Change = Callable[[Tensors], None]


def _set(name: str, place: tuple[int, ...], value: int) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.uint8)[place] = value

    return change


def _expert(number: int) -> Change:
    def change(tensors: Tensors) -> None:
        tensors["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].clone()
        tensors["layers.0.ffn.gate.tid2eid"][5, 1] = number

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            _set("layers.1.attn.wkv.weight", (3, 4), 0x7F),
            r"layers.1.attn.wkv.*\[3, 4\].*NaN",
        ),
        (_set("mtp.0.h_proj.weight", (0, 9), 0xFF), r"mtp.0.h_proj.weight' has at \[0, 9\].*255"),
        (_set("layers.2.attn.wo_a.scale", (1, 0), 255), r"wo_a.scale.*\[1, 0\].*byte 255.*NaN"),
        (_set("layers.0.ffn.experts.2.w2.scale", (7, 1), 255), r"w2.scale.*7, 1\].*255.*NaN"),
        (
            _set("layers.0.ffn.experts.2.w2.scale", (7, 1), 56),
            r"\[2, 7, 1\].* 56.*wanted 57 to 19",
        ),
        (_set("layers.1.ffn.experts.0.w3.scale", (0, 0), 191), r"w3.scale.*191.*wanted 57 to 190"),
        (_set("layers.1.attn.wq_b.scale", (0, 0), 250), r"wq_b.scale.*250.*wanted 3 to 246"),
        (_expert(4), r"tid2eid.*\[5, 1\] expert 4, but there are 4"),
        (_expert(-1), r"tid2eid.*\[5, 1\] expert -1"),
    ],
)
def test_values_that_no_kernel_follows(
    config, tensors, tmp_path: Path, change: Change, said: str, monkeypatch
) -> None:
    damaged = dict(tensors)
    change(damaged)
    monkeypatch.setattr("fathom.checkpoint.reader.CHECKED_WHEN_OPENED", -1)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_stored(written(tmp_path, config, damaged), device="cpu")
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("part", ["scale", "weight"])
def test_nan_is_refused_in_every_tensor_that_kernels_decode(config, tensors, part: str) -> None:
    """They would make infinity of the scale byte 255, and a number of a NaN code."""
    names = [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]
    fp8 = [n for n in names if tensors[f"{n}.weight"].dtype == torch.float8_e4m3fn]
    coded = names if part == "scale" else fp8  # FP4 has no NaN
    kinds = {n.split(".")[0] + "." + n.rpartition(".")[2] for n in coded}
    assert len(kinds) >= (10 if part == "scale" else 8), kinds
    for name in coded:
        damaged = dict(tensors)
        last = tuple(size - 1 for size in tensors[f"{name}.{part}"].shape)
        _set(f"{name}.{part}", last, 255)(damaged)
        if part == "scale":  # also where nothing but zeros has it
            codes = tensors[f"{name}.weight"]
            damaged[f"{name}.weight"] = torch.zeros_like(codes.view(torch.int8)).view(codes.dtype)
        with pytest.raises(CheckpointError, match=r"255, which is NaN: damaged data"):
            StoredModel.from_tensors(config, damaged)


def test_zeros_may_have_any_scale_and_an_expert_be_named_twice(config, tensors, tmp_path: Path):
    allowed = dict(tensors)
    name = "layers.0.ffn.experts.1.w1"
    allowed[f"{name}.weight"] = tensors[f"{name}.weight"].clone()
    allowed[f"{name}.weight"][6, 16:32] = -120  # 0x88: two times minus zero
    _set(f"{name}.scale", (6, 1), 1)(allowed)
    tile = allowed["layers.0.attn.wkv.weight"] = tensors["layers.0.attn.wkv.weight"].clone()
    tile[:128, 128:256] = 0
    _set("layers.0.attn.wkv.scale", (0, 1), 254)(allowed)
    table = allowed["layers.0.ffn.gate.tid2eid"] = tensors["layers.0.ffn.gate.tid2eid"].clone()
    table[9] = 3
    load_stored(written(tmp_path, config, allowed), device="cpu")


def test_scales_are_refused_where_bf16_cannot_follow() -> None:
    """All codes with all scales, as the kernels widen them: exact within the ranges, not beyond."""
    code = torch.arange(1, 8)
    value = torch.tensor(fp4.FP4_VALUES[1:], dtype=torch.float64)
    small = (code << 6).to(torch.int16).view(torch.bfloat16)  # fp4_words.py, _planes_bf16
    exact = []
    for byte in range(255):
        factor = torch.tensor(min(byte + 64, 254) << 7).to(torch.int16).view(torch.bfloat16)
        if torch.equal((small * factor).double(), value * 2.0 ** (byte - 127 - 62)):
            exact.append(byte)
    assert exact == list(range(FP4_SCALES[0], FP4_SCALES[1] + 1))
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    exact = [b for b in range(255) if _kept(codes * 2.0 ** (b - 127))]
    assert exact == list(range(FP8_SCALES[0], FP8_SCALES[1] + 1))


def _kept(values: torch.Tensor) -> bool:
    return torch.equal(values.bfloat16().double(), values)


@pytest.mark.parametrize("kind", ["base", "bf16"])
def test_other_variants_are_refused_with_a_sentence(tmp_path: Path, kind: str) -> None:
    write_tiny(tmp_path, kind)
    with pytest.raises(CheckpointError, match=r"tensor .*wanted .*: what is served as stored has"):
        load_stored(tmp_path, device="cpu")
    assert unstorable_checkpoint(open_checkpoint(tmp_path)) is not None


def test_an_expanded_wo_a_is_refused(config, tensors, tmp_path: Path) -> None:
    changed = dict(tensors)
    changed["layers.0.attn.wo_a.weight"] = changed["layers.0.attn.wo_a.weight"].float().bfloat16()
    del changed["layers.0.attn.wo_a.scale"]
    with pytest.raises(CheckpointError, match=r"wo_a.weight' is BF16 .*wanted F8_E4M3"):
        load_stored(written(tmp_path, config, changed), device="cpu")


def test_a_file_that_becomes_shorter_is_an_error(config, tensors, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(written(tmp_path, config, tensors))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="ends early: the file became shorter"):
        load_stored(checkpoint, device="cpu")


def block(tensors: Tensors, name: str) -> Tensors:
    return {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}


def test_a_base_block_is_refused_by_the_layer_itself() -> None:
    base = random_tensors(tiny_config("base", **SIZES))
    own = block(base, "layers.1.")
    with pytest.raises(CheckpointError, match=r"wq_a.scale' is F32 .*; wanted F8_E8M0 .*stored"):
        StoredLayer.from_tensors(own, 4)
    for name in list(own):  # with scales in powers of two its experts still are FP8
        if name.endswith(".scale"):
            own[name] = torch.full(own[name].shape, 120, dtype=torch.uint8).view(
                torch.float8_e8m0fnu
            )
    with pytest.raises(CheckpointError, match=r"experts.w1.weight' is F8_E4M3 .*wanted I8"):
        StoredLayer.from_tensors(own, 4)


def test_a_layer_says_which_tensor_is_missing_or_misshapen(config, tensors) -> None:
    for name in ("attn.wo_b.scale", "ffn.experts.3.w2.weight", "hc_ffn_fn", "attn.compressor.ape"):
        own = block(tensors, "layers.2.")
        del own[name]
        with pytest.raises(CheckpointError, match=f"layers.2.{name}' is missing"):
            StoredLayer.from_tensors(own, 128, "layers.2.")
    own = block(tensors, "layers.2.")
    own["attn.wo_b.scale"] = own["attn.wo_b.scale"][:1]
    with pytest.raises(CheckpointError, match=r"wo_b.scale' is .*\[1, 2\]; wanted .*\[2, 2\]"):
        StoredLayer.from_tensors(own, 128)
