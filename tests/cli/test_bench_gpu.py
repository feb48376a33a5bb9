"""`fathom bench gpu` where there is no GPU; with one, docs/gpu.md holds what it prints."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from fathom.cli import bench_gpu_prefill
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
