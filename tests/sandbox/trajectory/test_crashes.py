"""Clients and holders killed at random points around commands that really run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.sandbox.substrates.choice import program_of, suited


def crash(kills: int, holders: int, seed: int) -> dict[str, object]:
    if not any(program_of(name) for name in suited()):
        pytest.skip("no sandbox on this machine")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.sandbox.trajectory.crashes"),
            *("--kills", str(kills), "--holders", str(holders), "--seed", str(seed)),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        check=False,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["duplicates"] == []
    assert report["lost_receipts"] == []
    assert report["made_up"] == []
    return report


def test_killed_clients() -> None:
    """With the journal at hand nothing is unknown."""
    report = crash(kills=20, holders=0, seed=11)
    assert report["unknown"] == []
    assert report["recovered"], "no kill came between a command and its receipt: the test is blunt"


def test_killed_holders() -> None:
    """What ran when the sandbox died is unknown, and nothing else."""
    report = crash(kills=6, holders=4, seed=12)
    assert isinstance(report["unknown"], list)
    assert len(report["unknown"]) <= 4
