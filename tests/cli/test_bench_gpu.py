"""`fathom bench gpu` where there is no GPU; with one, docs/gpu.md holds what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fathom.cli import bench_gpu, bench_gpu_engine, bench_gpu_layers, bench_gpu_prefill
from fathom.cli.main import app
from fathom.errors import ConfigError, MissingDependency
from fathom.eval import gpu_goals
from tests.cli import pretended_gpu
from tests.engine.helpers import stored_model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("arguments", [[], ["--prefill"]])
def test_without_a_gpu_it_says_so(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "gpu", *arguments])
    assert result.exit_code != 0
    assert "CUDA" in result.output + str(result.exception)


def test_only_transformers_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="'transformers' only"):
        bench_gpu_prefill.measure_prefill(3, False, "other", None, True)


def test_one_table_shows_decode_and_prefill_beside_transformers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = {"kind": "all", "tokens": 1, "context": 4096, "routing": "own router", "keys": "fp4",
            "median": 0.6, "least": 0.55, "floor": 0.24, "launches": 70}  # fmt: skip
    prompt = step | {"tokens": 8192, "chunk": 8192, "median": 40.0, "floor": 20.0,
                     "tokens_per_s": 2e5, "peak": 3 * 2**29}  # fmt: skip
    report = {
        "device": "a card", "torch": "2", "copy_bytes_per_s": 3e12, "matmul_flops": 7.8e14,
        "errors": ["one row failed"], "seconds": {"prompts": 3.2},
        "steps": [
            step, step | {"tokens": 64, "routing": "zipf"}, step | {"kind": "CSA", "keys": "fp8"},
        ],
        "prompts": [prompt, prompt | {"routing": "zipf"}],
        "transformers": {"version": "5", "tokens": 8192, "context": 4096, "seconds": 0.4,
                         "seconds_a_token": 0.018},
    }  # fmt: skip
    bench_gpu._print(report)
    printed = capsys.readouterr().out.splitlines()
    assert "seconds: prompts 3" in printed
    assert "error: one row failed" in printed
    assert sum("FP8 keys" in line for line in printed) == 1
    assert any("prefill of 8K beside transformers" in line and "pass" in line for line in printed)
    assert sum("not measured" in line for line in printed) > 5
    lines = [line.split() for line in printed if " all " in line]
    # The ratio stands where transformers did the same, and nowhere else.
    assert [line[-1] for line in lines] == ["30.0", "-", "10.0", "-"]
    assert [line[-3] for line in lines] == ["70"] * 4
    assert "40%" in lines[0]
    assert "50%" in lines[2]


def test_the_whole_way_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With tiny layers on a pretended card: what it measures, judges and writes."""
    for name, value in {
        "FIRST_STEPS": ((gpu_goals.WHOLE, 1, 20), ("all", 2, 20)), "STEPS": (("SWA", 1, 20),),
        "FP8_KEYS": (("CSA", 1, 20),), "BATCH": (2, 20), "PROMPT": (9, 9), "PROMPTS": ((9, 5),),
        "TOPK_SCORES": 64, "SHORT": 20, "MILLION": 24,
    }.items():  # fmt: skip
        monkeypatch.setattr(bench_gpu_layers, name, value)
    for name, value in {"TOPK_SCORES": 64, "SHORT": 20, "MILLION": 24}.items():
        monkeypatch.setattr(gpu_goals, name, value)
    out = tmp_path / "gpu.json"

    def other(*_: int) -> None:
        raise MissingDependency("transformers is not here")

    monkeypatch.setattr(bench_gpu, "measure_other", other)
    with pretended_gpu.pretended(monkeypatch):
        arguments = ["bench", "gpu", "--kernels", "--against", "transformers", "--out", str(out)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0  # but not before the figures were shown
    assert "not here" in result.output + str(result.exception)
    assert "prefill experts" in result.output
    report = json.loads(out.read_text())
    assert report["errors"] == []
    kinds = [(row["kind"], row["keys"]) for row in report["steps"]]
    assert kinds[:4] == [
        (gpu_goals.WHOLE, "fp4"), ("all", "fp4"), ("SWA", "fp4"), ("CSA", "fp8")
    ]  # fmt: skip
    assert [row["routing"] for row in report["steps"][4:]] == ["uniform", "log-normal", "zipf"]
    assert len(report["prompts"]) == 4
    assert all(0 < row["floor"] < row["median"] for row in report["prompts"])
    assert {"weights", "steps of goals", "prompts", "kernels"} <= set(report["seconds"])
    told = [line for line in result.stderr.splitlines() if " s  " in line]
    assert sum("% of floor" in line for line in told) == 11
    assert "seconds: " in result.stdout
    found = {goal["name"]: goal for goal in report["goals"]}
    verdicts = {name: goal["verdict"] for name, goal in found.items()}
    assert verdicts["decode, a layer at 4K"] == "pass"
    assert verdicts["choice among 64"].startswith("short by")
    # 16 MiB in 20 microseconds are 28% of 3 TB/s; a gibibyte is more than there can be.
    assert verdicts["CSA low, plain, 16.8 MB (fp8_linear), of the copy rate"] == "short by 53%"
    assert verdicts["SWA low, 8.4 MB (fp8_linear), of the copy rate"] == "short by 77%"
    assert verdicts["head, 1073.7 MB (head_products), of the copy rate"] == "pass"
    assert verdicts["index keys, of the copy rate"] == "not measured"
    assert found["one mHC boundary"]["found"] == pytest.approx(20 / 6)  # six of them


def test_a_row_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = bench_gpu_layers.Report(tmp_path / "gpu.json")
    report.figures |= {"copy_bytes_per_s": 3e12, "matmul_flops": 8e14}
    with report.part("steps"):
        raise ValueError("no memory left")
    with report.part("steps"):
        report.row("steps", {"kind": "all", "tokens": 2, "context": 9, "routing": "own router",
                             "keys": "fp4", "median": 1.0}, 1.07)  # fmt: skip
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert len(written["steps"]) == 1
    first, second = written["errors"]
    assert "no memory left" in first
    assert "107% of floor" in second
    assert "nothing is quicker" in second


def test_no_other_routing() -> None:
    result = CliRunner().invoke(app, ["bench", "gpu", "--routing", "some"])
    assert result.exit_code != 0
    assert "with, without, alone" in result.output + str(result.exception)


def test_the_whole_way_of_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """But for the compilation, which tests/kernels/test_ahead.py knows."""
    for name, value in {
        "CONTEXT": 9, "BATCHES": (2,), "SAMPLED": 3, "PROMPTS": (9,),
        "compile_ahead": lambda tell: tell("kernels: none here"),
    }.items():  # fmt: skip
        monkeypatch.setattr(bench_gpu_engine, name, value)
    drafting = stored_model(num_nextn_predict_layers=1)
    monkeypatch.setattr("fathom.checkpoint.load_model", lambda *_, **__: drafting)
    out = tmp_path / "engine.json"
    with pretended_gpu.pretended(monkeypatch):
        arguments = ["bench", "gpu", "--engine", "--repeat", "3", "--out", str(out)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    rows = [(row["batch"], row["temperature"], row["drafts"]) for row in report["decode"]]
    assert rows == [(2, 0.0, 0), (3, 1.0, 0), (2, 0.0, 0), (3, 1.0, 0), (1, 0.0, 1)]
    told = [line for line in result.stderr.splitlines() if " s  " in line]
    assert "none here" in told[1]
    assert sum(" a step " in line or " one chunk " in line for line in told) == 6
    assert [row["rows"] for row in report["prompts"]] == [8, 64, 0] * 2
