"""`fathom bench gpu` where there is no GPU; with one, docs/gpu.md holds what it prints."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from fathom.cli import bench_gpu, bench_gpu_prefill
from fathom.cli.main import app
from fathom.errors import ConfigError


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
    step = {"kind": "all", "tokens": 1, "context": 4096, "routing": "own router", "median": 0.6,
            "least": 0.55, "floor": 0.24, "launches": 70}  # fmt: skip
    prompt = step | {"tokens": 8192, "chunk": 8192, "median": 40.0, "floor": 20.0}
    report = {
        "device": "a card", "torch": "2", "copy_bytes_per_s": 3e12, "matmul_flops": 7.8e14,
        "steps": [step, step | {"tokens": 64, "routing": "zipf"}],
        "prompts": [prompt, prompt | {"routing": "zipf"}],
        "transformers": {"version": "5", "tokens": 8192, "context": 4096, "seconds": 0.4,
                         "seconds_a_token": 0.018},
    }  # fmt: skip
    bench_gpu._print(report)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " all " in line]
    # The ratio stands where transformers did the same, and nowhere else.
    assert [line[-1] for line in lines] == ["30.0", "-", "10.0", "-"]
    assert [line[-3] for line in lines] == ["70"] * 4
    assert "40%" in lines[0]
    assert "50%" in lines[2]
