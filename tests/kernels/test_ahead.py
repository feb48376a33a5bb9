"""What was compiled ahead is what is launched later, to the last specialisation."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


def test_launches_find_what_was_compiled_ahead(repository: Any, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead_case"], cwd=repository, capture_output=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["kernels"]) == {
        "head_products", "logits_maxima", "logits_sums", "logits_choice", "chunk_experts_grouped",
    }  # fmt: skip
    assert found["sketches"] < found["launches"]
    assert found["compiled"] >= found["sketches"]
    assert found["missed"] == 0
    assert found["zeroed"]
    assert found["unnamed"] == []  # before anything was launched
