"""The picture of GPU figures, drawn from a report as the command writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fathom.errors import ConfigError
from fathom.eval.gpu_plot import plot_roofline

REPORT: dict[str, Any] = {
    "device": "a card",
    "copy_bytes_per_s": 3e12,
    "matmul_flops": 7.8e14,
    "steps": [
        {"kind": "all", "tokens": 1, "context": 4096, "routing": "own router", "median": 0.6,
         "flops": 1.6e9, "num_bytes": 7e8},
        {"kind": "all", "tokens": 64, "context": 4096, "routing": "zipf", "median": 2.7,
         "flops": 1e11, "num_bytes": 8e9},
    ],
    "prompts": [
        {"kind": "all", "tokens": 8192, "chunk": 8192, "routing": "own router", "median": 43.0,
         "flops": 1.5e13, "num_bytes": 1e10},
    ],
}  # fmt: skip


def test_a_picture_of_every_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "gpu.png"
    plot_roofline(REPORT, file)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_only_pictures_are_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ends in"):
        plot_roofline(REPORT, tmp_path / "gpu.txt")
