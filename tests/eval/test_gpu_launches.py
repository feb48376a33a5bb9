"""Which part of a layer a launch is for, and that all parts together are what a step must read."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fathom.eval.gpu_launches import REPEAT, Launched, _matched

ONE = [
    Launched("fp8_linear", "CSA low, plain", 4), Launched("fp8_linear", "CSA wo b", 8),
    Launched("mhc_read", "", 0),
]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_launches_together_read_what_a_step_must(repository: Any) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.eval.gpu_launches_case"], cwd=repository, env=environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    launches = [Launched(**one) for one in found["launches"]]
    names = {(one.kernel, one.part) for one in launches}
    for kind in ("SWA", "CSA", "HCA"):
        for part in ("high", "wo a", "wo b", "shared up, gate", "experts up", "entries"):
            assert sum(own == f"{kind} {part}" for _, own in names) == 1, (kind, part)
    assert ("fp8_linear", "SWA low") in names
    assert ("fp8_linear", "CSA low, plain") in names
    assert ("index_scores", "CSA index keys") in names
    assert [one.num_bytes for one in launches if one.part == "head"] == [found["head"]]
    total, expected = sum(one.num_bytes for one in launches), sum(found["bytes"]) + found["head"]
    assert total == pytest.approx(expected, rel=0.01)


def events(order: list[Launched], us: float = 4.0) -> list[tuple[float, float, str]]:
    return [(10.0 * i, 10.0 * i + us, one.kernel) for i, one in enumerate(order)]


def test_calls_of_one_kernel_are_told_apart_by_their_order() -> None:
    order = ONE * REPEAT
    times = events(order)
    times = [(s, s + 9.0, n) if order[i].part == "CSA wo b" else (s, e, n)
             for i, (s, e, n) in enumerate(times)]  # fmt: skip
    found = _matched(order, sorted([*times, (1.0, 2.0, "Memcpy")]), boundaries=2)
    rows = {row.part: row for row in found.kernels}
    assert next(iter(rows)) == "CSA wo b"
    assert (rows["CSA wo b"].us, rows["CSA low, plain"].us) == (9.0, 4.0)
    assert [rows[part].kernel for part in ("CSA wo b", "")] == ["fp8_linear", "mhc_read"]
    assert all(row.calls == 1 for row in found.kernels)
    assert found.boundary == 2.0


@pytest.mark.parametrize("lost", [0, 2])
def test_a_profile_of_something_else_is_refused(lost: int) -> None:
    order = ONE * REPEAT
    times = events(order)
    del times[lost]
    with pytest.raises(RuntimeError, match="cannot be told apart"):
        _matched(order, times, boundaries=2)
