"""The report, and the two commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fathom.checkpoint import inspect_checkpoint
from fathom.checkpoint.tiny import KINDS, tiny_config, write_tiny
from fathom.cli.main import app
from fathom.model import Transformer

from .forms import as_transformers, edit_config, read_tensors, rewrite


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint(tmp_path: Path, kind: str) -> None:
    folder = write_tiny(tmp_path / kind, kind, files=2)
    report = inspect_checkpoint(folder)
    tensors = read_tensors(folder)
    assert (report.whole, report.kind, report.form, report.problems) == (True, kind, "official", [])
    assert (report.tensors, report.files) == (len(tensors), 2)
    assert report.bytes == sum(t.nbytes for t in tensors.values())
    assert sum(report.bytes_by_dtype.values()) == report.bytes
    assert report.layers_by_ratio == {"0": 1, "4": 1, "128": 1}
    with torch.device("meta"):
        model = Transformer(tiny_config(kind))
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert json.loads(json.dumps(report.to_json()))["config"]["hidden_size"] == 160


def test_all_problems_are_listed(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", "instruct")
    rewrite(folder, lambda t: [t.pop("norm.weight"), t.update({"odd": torch.zeros(1)})])
    report = inspect_checkpoint(folder)
    assert not report.whole
    assert [p.split("'")[1] for p in report.problems] == ["norm.weight", "odd"]
    assert "not checked" in report.notes[0]


def test_damaged_scales_are_found(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", "base")
    rewrite(folder, lambda t: [t[f"mtp.0.{x}_proj.scale"].fill_(torch.nan) for x in "eh"])
    report = inspect_checkpoint(folder)
    assert len(report.problems) == 2
    assert not report.whole


def test_command_on_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", "instruct")
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 0, result.output
    for words in ("whole", "FP4 experts", "243", "1 CSA", "F8_E8M0"):
        assert words in result.output
    result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["whole"] is True
    assert report["tensors"] == 243


def test_command_on_a_damaged_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", "instruct", files=2)
    next(iter(folder.glob("*-00002-*"))).unlink()
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 1
    assert "damaged" in result.output
    assert "model-00002-of-00002.safetensors is missing" in result.output
    result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["whole"] is False


def test_command_on_something_else(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["inspect", str(tmp_path)]).exit_code == 2
    folder = write_tiny(tmp_path / "t", "bf16")
    edit_config(folder, dspark_block_size=5)
    result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert result.exit_code == 2
    assert "DSpark" in result.stdout


def test_convert_command(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "t", "instruct")
    as_transformers(folder, stacked=True)
    out = tmp_path / "out"
    command = ["convert", str(folder), str(out), "--expert-dtype", "fp8"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "base" in result.output
    report = inspect_checkpoint(out)
    assert (report.whole, report.kind, report.form) == (True, "base", "official")
    before = (out / "config.json").read_bytes()
    refused = CliRunner().invoke(app, [*command[:-1], "bf16"])
    assert refused.exit_code != 0
    assert "already" in str(refused.exception) + refused.output
    assert (out / "config.json").read_bytes() == before
    assert CliRunner().invoke(app, [*command[:-1], "bf16", "--overwrite"]).exit_code == 0
    assert inspect_checkpoint(out).kind == "bf16"
    assert CliRunner().invoke(app, ["convert", str(tmp_path), str(out)]).exit_code == 2
    assert CliRunner().invoke(app, [*command[:-1], "int4"]).exit_code == 2
