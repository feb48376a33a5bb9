"""`fathom bench trajectory`: its figures are there and make sense."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fathom.cli.main import app


def test_the_figures() -> None:
    found = CliRunner().invoke(app, ["bench", "trajectory", "--count", "10", "--json"])
    if found.exit_code == 3:
        pytest.skip("no sandbox on this machine")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    logged = told["logged"].values()
    for times in (told["call"], *logged, *told["log"].values(), told["fast_forward_ms"]):
        assert 0 < times["min"] <= times["p50"] <= times["p99"] <= times["max"]
    assert told["fast_forward_ms"]["receipts"] == 500
    assert told["share_of_a_call"]["process"] == pytest.approx(
        told["logged"]["process"]["p50"] / told["call"]["p50"] - 1
    )
