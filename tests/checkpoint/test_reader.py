"""Opening: every form that is accepted, one clear error for everything that is not."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fathom.checkpoint import load_model, manifest, open_checkpoint
from fathom.checkpoint import reader as reader_module
from fathom.checkpoint.manifest import DTYPE_BYTES
from fathom.checkpoint.reader import scan
from fathom.checkpoint.tiny import KINDS, tiny_config, write_tiny
from fathom.errors import CheckpointError, ConfigError, UnsupportedModelError
from fathom.model import ModelConfig

from .forms import Tensors, as_transformers, edit_config, read_raw, read_tensors, rewrite, write_raw

E8M0 = torch.float8_e8m0fnu


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "instruct", "instruct")


@pytest.mark.parametrize("name", ["tiny-bf16", "tiny-instruct", "tiny-base"])
def test_the_ground_truth_is_whole(vectors: Path, name: str) -> None:
    folder = vectors / "model" / "e2e" / name
    checkpoint = open_checkpoint(folder)
    checkpoint.validate()
    assert checkpoint.form == "official"
    assert checkpoint.kind == name.removeprefix("tiny-")
    assert checkpoint.config == ModelConfig.from_json(folder)
    for key, tensor in read_tensors(folder).items():
        stored = checkpoint.read(key)
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored.view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("files", [1, 3])
def test_random_checkpoints_are_whole(tmp_path: Path, kind: str, files: int) -> None:
    folder = write_tiny(tmp_path / kind, kind, files=files)
    checkpoint = open_checkpoint(folder)
    checkpoint.validate()
    assert (checkpoint.kind, checkpoint.form) == (kind, "official")
    assert checkpoint.config == tiny_config(kind)
    assert len(checkpoint.files) == files
    tensors = read_tensors(folder)
    assert checkpoint.names == sorted(tensors)
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    part = checkpoint.read("layers.0.attn.wq_b.weight", 130, 200)
    whole = tensors["layers.0.attn.wq_b.weight"]
    assert torch.equal(part.view(torch.uint8), whole[130:200].view(torch.uint8))


def test_a_single_file_can_be_named(instruct: Path) -> None:
    named = open_checkpoint(instruct / "model.safetensors")
    assert named.tensors == open_checkpoint(instruct).tensors


def test_asking_for_an_absent_tensor(instruct: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        open_checkpoint(instruct).read("nothing")


def corrupt(name: str, values: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = values(tensors[name])

    return change


def with_byte(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    raw = tensor.view(torch.uint8).clone()
    raw[-1, -1] = byte
    return raw.view(tensor.dtype)


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[-1, -1] = value
    return tensor


DAMAGE = {
    "missing": (
        lambda t: t.pop("layers.1.attn.compressor.ape"),
        "'layers.1.attn.compressor.ape' in model.safetensors is missing: expected F32 .4, 160.",
    ),
    "missing scale": (
        lambda t: t.pop("layers.1.attn.wkv.scale"),
        "'layers.1.attn.wkv.scale' in model.safetensors is missing",
    ),
    "missing expert": (
        lambda t: t.pop("layers.2.ffn.experts.3.w2.weight"),
        "'layers.2.ffn.experts.3.w2.weight' in model.safetensors is missing",
    ),
    "missing mtp": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")],
        "'mtp.0.e_proj.weight' in .* missing.* set num_nextn_predict_layers to 0 .*more",
    ),
    "unexpected": (
        lambda t: t.update({"layers.7.attn_norm.weight": torch.zeros(3)}),
        "'layers.7.attn_norm.weight' in model.safetensors is unexpected",
    ),
    "unexpected expert": (
        lambda t: t.update({"layers.0.ffn.experts.4.w1.weight": torch.zeros(3)}),
        "'layers.0.ffn.experts.4.w1.weight' in model.safetensors is unexpected",
    ),
    "misshaped": (
        corrupt("head.weight", lambda t: t.T.contiguous()),
        r"'head.weight' in model.safetensors has shape \[160, 64\]; expected \[64, 160\]",
    ),
    "misshaped scale": (
        corrupt("layers.0.attn.wq_b.scale", lambda t: t[:2].contiguous()),
        r"'layers.0.attn.wq_b.scale' in .* has shape \[2, 1\]; expected \[3, 1\]",
    ),
    "unpacked experts": (
        corrupt("mtp.0.ffn.experts.0.w1.weight", lambda t: t.repeat(1, 2)),
        r"'mtp.0.ffn.experts.0.w1.weight' in .* has shape \[128, 160\]; expected \[128, 80\]",
    ),
    "BF16 sink": (
        corrupt("layers.0.attn.attn_sink", lambda t: t.bfloat16()),
        "'layers.0.attn.attn_sink' in .* has dtype BF16; expected F32",
    ),
    "F32 embedding": (
        corrupt("embed.weight", lambda t: t.float()),
        "'embed.weight' in .* has dtype F32; expected BF16",
    ),
    "F16 norm": (
        corrupt("norm.weight", lambda t: t.half()),
        "'norm.weight' in .* has dtype F16; expected BF16",
    ),
    "I32 table": (
        corrupt("layers.0.ffn.gate.tid2eid", lambda t: t.int()),
        "'layers.0.ffn.gate.tid2eid' in .* has dtype I32; expected I64",
    ),
    "BF16 matrix": (
        corrupt("layers.0.attn.wq_a.weight", lambda t: t.bfloat16()),
        "'layers.0.attn.wq_a.weight' in .* has dtype BF16; expected F8_E4M3 .*quantization_config",
    ),
    "BF16 wo_a with a scale": (
        corrupt("layers.0.attn.wo_a.weight", lambda t: t.bfloat16()),
        "'layers.0.attn.wo_a.weight' in .* has dtype BF16; expected F8_E4M3",
    ),
    "U8 scale": (
        corrupt("layers.0.attn.wq_a.scale", lambda t: t.view(torch.uint8)),
        "'layers.0.attn.wq_a.scale' in .* has dtype U8; expected F8_E8M0 or F32",
    ),
    "F32 scale of FP4": (
        corrupt("layers.0.ffn.experts.0.w1.scale", lambda t: t.float()),
        "'layers.0.ffn.experts.0.w1.scale' in .* has dtype F32; expected F8_E8M0",
    ),
    "FP8 expert among FP4": (
        corrupt("layers.0.ffn.experts.0.w1.weight", lambda t: t.view(torch.float8_e4m3fn)),
        "'layers.0.ffn.experts.0.w1.weight' in .* has dtype F8_E4M3; expected I8 .*expert_dtype",
    ),
    "NaN byte": (
        corrupt("layers.1.ffn.experts.2.w3.scale", lambda t: with_byte(t, 255)),
        r"'layers.1.ffn.experts.2.w3.scale' in model.safetensors has at \[127, 4\] .* 255.* NaN",
    ),
    "expert out of range": (
        corrupt("layers.0.ffn.gate.tid2eid", lambda t: with_value(t, 4)),
        r"'layers.0.ffn.gate.tid2eid' in .* has at \[63, 1\] expert 4, but there are 4",
    ),
    "negative expert": (
        corrupt("layers.0.ffn.gate.tid2eid", lambda t: with_value(t, -1)),
        "'layers.0.ffn.gate.tid2eid' in .* expert -1",
    ),
    "stored twice": (
        lambda t: t.update({"model.embed_tokens.weight": t["embed.weight"].clone()}),
        "'(embed.weight|model.embed_tokens.weight)' in .* stored twice",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tensors(instruct: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = DAMAGE[kind]
    rewrite(instruct, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(instruct)
    assert str(instruct) in str(caught.value)
    assert "\n" not in str(caught.value)
    # The same before any memory is spent on weights, even when opening did not look at values.
    monkeypatch.setattr(reader_module, "CHECKED_WHEN_OPENED", 0)
    monkeypatch.setattr("fathom.checkpoint.load._materialise", None)
    with pytest.raises(CheckpointError, match=message):
        load_model(instruct)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_unusable_float_scales(tmp_path: Path, value: float) -> None:
    folder = write_tiny(tmp_path / "base", "base")
    rewrite(folder, corrupt("mtp.0.h_proj.scale", lambda t: with_value(t, value)))
    with pytest.raises(CheckpointError, match=r"'mtp.0.h_proj.scale' in .* has at \[1, 1\]"):
        open_checkpoint(folder)


def test_many_problems_are_one_error_with_a_count(instruct: Path) -> None:
    rewrite(instruct, lambda t: [t.pop(name) for name in list(t) if ".experts.1." in name])
    with pytest.raises(CheckpointError, match=r"experts\.1\.w1\.weight.*\(23 more: "):
        open_checkpoint(instruct)


@pytest.mark.parametrize("files", [1, 2])
def test_truncated_files(tmp_path: Path, files: int) -> None:
    folder = write_tiny(tmp_path / "t", files=files)
    last = sorted(folder.glob("*.safetensors"))[-1]
    header, data = read_raw(last)
    write_raw(last, header, data[:-1])
    with pytest.raises(CheckpointError, match=r"tensor '.*' in model.*\.safetensors ends outside"):
        open_checkpoint(folder)
    write_raw(last, b"{", length=50)
    with pytest.raises(CheckpointError, match=r"model.*\.safetensors is truncated") as caught:
        open_checkpoint(folder)
    assert "missing" not in str(caught.value)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = r"model-00002-of-00003\.safetensors is missing \(81 tensors should be in it\)$"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / reader_module.INDEX
    raw = json.loads(file.read_text())
    change(raw["weight_map"])
    file.write_text(json.dumps(raw))


def test_an_index_that_does_not_match_its_shards(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", files=2)
    name, first, second = "embed.weight", *sorted(p.name for p in folder.glob("*.safetensors"))
    edit_index(folder, lambda m: m.update({name: second}))
    with pytest.raises(CheckpointError, match=f"'{name}' in {first} is listed for {second}"):
        open_checkpoint(folder)
    edit_index(folder, lambda m: m.pop(name))
    with pytest.raises(CheckpointError, match=f"'{name}' in {first} is not listed"):
        open_checkpoint(folder)
    edit_index(folder, lambda m: m.update({name: first, "extra": first}))
    with pytest.raises(CheckpointError, match=f"'extra' in {first} is missing, although"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", files=2)
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = read_tensors(folder)
    header, _ = read_raw(second)
    both = {name: tensors[name] for name in header if name != "__metadata__"}
    save_file({**both, "embed.weight": tensors["embed.weight"]}, second)
    message = f"'embed.weight' in {second.name} is stored twice: also .* in {first.name}"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_an_index_cannot_reach_outside(tmp_path: Path) -> None:
    write_tiny(tmp_path / "secret")
    folder = write_tiny(tmp_path / "t", files=2)
    edit_index(folder, lambda m: m.update({"embed.weight": "../secret/model.safetensors"}))
    with pytest.raises(CheckpointError, match=r"'embed.weight' in .* only a file name"):
        open_checkpoint(folder)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickled file was opened",))

    folder = write_tiny(tmp_path / "t")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled"):
        open_checkpoint(folder)


def test_things_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "file")
    folder = write_tiny(tmp_path / "t")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError):
        open_checkpoint(folder)


def test_a_hostile_configuration_is_not_walked_to_its_end(instruct: Path) -> None:
    edit_config(instruct, n_routed_experts=2**15)
    with pytest.raises(CheckpointError, match=r"has shape \[4, 160\]; expected .32768"):
        open_checkpoint(instruct)
    (instruct / "model.safetensors").write_bytes(bytes(8))
    with pytest.raises(CheckpointError):
        open_checkpoint(instruct)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mtp.1.attn_norm.weight", "DSpark"),
        ("mtp.0.markov_head.markov_w1.weight", "DSpark"),
        ("layers.0.engram.table", r"V4\.1"),
    ],
)
def test_other_models_by_their_tensors(instruct: Path, name: str, message: str) -> None:
    rewrite(instruct, lambda t: t.update({name: torch.zeros(1)}))
    with pytest.raises(UnsupportedModelError, match=f"'{name}' in model.safetensors .*{message}"):
        open_checkpoint(instruct)


def test_v41_by_its_scales(instruct: Path) -> None:
    small = torch.full((320 // 32, 96 // 32), 120, dtype=torch.uint8).view(E8M0)
    rewrite(instruct, lambda t: t.update({"layers.0.attn.wq_b.scale": small}))
    with pytest.raises(UnsupportedModelError, match=r"wq_b\.scale' .*32x32"):
        open_checkpoint(instruct)


def test_other_models_by_their_configuration(instruct: Path) -> None:
    edit_config(instruct, dspark_block_size=5)
    with pytest.raises(UnsupportedModelError, match="DSpark"):
        open_checkpoint(instruct)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_decide_what_the_configuration_leaves_open(tmp_path: Path, kind: str) -> None:
    folder = write_tiny(tmp_path / kind, kind)
    edit_config(folder, expert_dtype=None, quantization_config=None)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.kind == kind
    assert checkpoint.config == tiny_config(kind)


def test_a_configuration_that_contradicts_the_tensors(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "base", "base")
    edit_config(folder, expert_dtype="fp4")
    with pytest.raises(CheckpointError, match=r"has dtype F8_E4M3; expected I8 .*expert_dtype"):
        open_checkpoint(folder)


def test_scale_types_may_differ_per_tensor(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "base", "base")
    power = torch.full((1, 2), 118, dtype=torch.uint8).view(E8M0)
    rewrite(folder, lambda t: t.update({"layers.0.attn.wkv.scale": power}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.find("layers.0.attn.wkv.scale").dtype == "F8_E8M0"
    assert checkpoint.find("layers.1.attn.wkv.scale").dtype == "F32"


def test_the_official_converter_expands_wo_a(instruct: Path) -> None:
    def expand(tensors: Tensors) -> None:
        tensors["layers.0.attn.wo_a.weight"] = tensors["layers.0.attn.wo_a.weight"].bfloat16()
        del tensors["layers.0.attn.wo_a.scale"]

    rewrite(instruct, expand)
    assert open_checkpoint(instruct).weight_format("layers.0.attn.wo_a") == "bf16"


def test_official_names_in_float32_throughout(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "wide", "bf16")
    rewrite(
        folder, lambda t: t.update({n: x.float() for n, x in t.items() if x.is_floating_point()})
    )
    assert open_checkpoint(folder).kind == "bf16"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stacked", [False, True])
def test_transformers_names(tmp_path: Path, kind: str, stacked: bool) -> None:
    folder = write_tiny(tmp_path / kind, kind)
    official = open_checkpoint(folder)
    expected = {n: official.read(n) for n in official.names if not n.startswith("mtp.")}
    as_transformers(folder, stacked=stacked)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.form == "transformers"
    assert checkpoint.config == replace(official.config, num_nextn_predict_layers=0)
    assert "no MTP block" in checkpoint.notes[0]
    assert checkpoint.names == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name).view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_stack_of_more_experts_than_any_model_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty ones take no bytes of a file: opening a header of 10 kB took all memory."""
    monkeypatch.setattr(reader_module, "MAX_TENSORS", 5000)
    folder = write_tiny(tmp_path / "t", "bf16")
    edit_config(folder, n_routed_experts=1000)
    empty = {"dtype": "BF16", "shape": [1000, 2, 0], "data_offsets": [0, 0]}
    names = (f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(100))
    write_raw(folder / "model.safetensors", dict.fromkeys(names, empty), b"")
    checkpoint = scan(folder)
    assert len(checkpoint.tensors) == 4000
    assert any("would be cut into 2,000 tensors" in str(p) for p in checkpoint.problems)


def test_transformers_files_in_either_float_type(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", "bf16")
    as_transformers(folder, stacked=True)
    for dtype in (torch.float32, torch.bfloat16):
        rewrite(folder, lambda t, d=dtype: t.update({
            n: x.to(d) for n, x in t.items() if x.is_floating_point()
        }))  # fmt: skip
        assert open_checkpoint(folder).kind == "bf16"
    rewrite(folder, corrupt("lm_head.weight", lambda t: t.half()))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' in .* has dtype F16"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:3].clone(), r"has shape \[3, 256, 160\]; expected 4 experts"),
        (lambda t: t[:, :255].clone(), "do not split into 2 matrices"),
        (lambda t: t[0].clone(), "expected 4 experts in front"),
        (lambda t: t[:, :254].clone(), r"has shape \[127, 160\]; expected \[128, 160\]"),
    ],
)
def test_damaged_stacks(tmp_path: Path, change: Any, message: str) -> None:
    folder = write_tiny(tmp_path / "t", "bf16")
    as_transformers(folder, stacked=True)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rewrite(folder, corrupt(name, change))
    with pytest.raises(CheckpointError, match=f"'{name}' in model.safetensors .*{message}"):
        open_checkpoint(folder)


def test_stacked_fp8_experts_need_whole_tiles(tmp_path: Path) -> None:
    config = tiny_config("base", moe_intermediate_size=96)
    folder = write_tiny(tmp_path / "t", config=config)
    as_transformers(folder, stacked=True)
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scale_inv' in .* cannot be split"):
        open_checkpoint(folder)


def test_copies_shared_with_mtp_are_dropped(instruct: Path) -> None:
    before = open_checkpoint(instruct).names
    rewrite(instruct, lambda t: t.update({
        "mtp.0.embed.weight": t["embed.weight"].clone(), "mtp.0.head.weight": torch.zeros(1)
    }))  # fmt: skip
    assert open_checkpoint(instruct).names == before


def test_a_model_without_mtp_block(tmp_path: Path) -> None:
    config = tiny_config("base", num_nextn_predict_layers=0)
    folder = write_tiny(tmp_path / "t", config=config)
    assert open_checkpoint(folder).config == config
    edit_config(folder, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match="set num_nextn_predict_layers to 0"):
        open_checkpoint(folder)


def resident(key: str) -> int:
    """Bytes of this process: now ("VmRSS") or at their highest ("VmHWM")."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def write_sparse(folder: Path, config: ModelConfig) -> int:
    """A checkpoint with real headers and an index, but holes for data; returns its bytes."""
    folder.mkdir()
    shards: dict[str, list[Any]] = {}
    for spec in manifest(config):
        parts = spec[0].split(".")
        key = ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else "rest"
        shards.setdefault(key, []).append(spec)
    weight_map, total = {}, 0
    for index, specs in enumerate(shards.values()):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, shape, dtype in specs:
            start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        write_raw(folder / file, header)
        with open(folder / file, "r+b") as f:
            f.truncate((folder / file).stat().st_size + end)
        total += end
    (folder / reader_module.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    return total


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_opening_flash_costs_megabytes(tmp_path: Path) -> None:
    folder = tmp_path / "flash"
    assert write_sparse(folder, ModelConfig.preset("flash")) == 159_609_485_896
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = resident("VmRSS")
    checkpoint = open_checkpoint(folder)
    assert resident("VmHWM") - before < 100e6
    assert (len(checkpoint.tensors), len(checkpoint.files)) == (69_187, 45)
    assert checkpoint.nbytes == 159_609_485_896
    rows = checkpoint.read("layers.42.ffn.experts.255.w2.weight", 100, 102)  # lazily, from a hole
    assert rows.shape == (2, 1024)
    shutil.rmtree(folder)


def test_damage_is_collected_on_request(instruct: Path) -> None:
    rewrite(instruct, lambda t: [t.pop("norm.weight"), t.pop("embed.weight")])
    messages = [str(problem) for problem in scan(instruct).problems]
    assert len(messages) == 2
    assert all(re.search(r"'(norm|embed)\.weight' in .* is missing", m) for m in messages)
