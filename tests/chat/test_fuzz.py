"""The long-run test in short: it finds nothing, and it does find planted mistakes."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from fathom.chat import calls, stream
from fathom.chat.fuzz import SPLITS_PER_TEXT, FuzzReport, run
from fathom.cli.main import app


def last(splits: int, splits_per_text: int = SPLITS_PER_TEXT) -> FuzzReport:
    return list(run(splits, 7, splits_per_text))[-1]


def test_a_short_run_finds_nothing() -> None:
    report = last(2_000)
    assert report.ok, report.failures
    assert report.splits == 2_000
    assert report.texts == 50
    assert report.calls > 1_000
    assert report.repaired > 100  # damaged calls are read too


@pytest.mark.parametrize(
    ("owner", "name", "broken", "found"),
    [
        (stream, "_length_of_hold", lambda text: 0, "differences"),
        (calls, "is_json", lambda text: True, "invalid_json"),
        (calls.CallReader, "_is_call", lambda *_: False, "lost_calls"),
        (calls.CallReader, "_flush_junk", lambda self: bool(self._junk.clear()), "lost_words"),
        (stream.StreamParser, "_begins_tag", lambda *_: False, "leaks"),
    ],
)
def test_planted_mistakes_are_found(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, broken: Any, found: str
) -> None:
    monkeypatch.setattr(owner, name, broken)
    report = last(800, splits_per_text=2)
    assert not report.ok
    assert getattr(report, found) > 0
    assert any(line.startswith(found) for line in report.failures)


def test_the_command_reports_and_exits_with_the_result() -> None:
    result = CliRunner().invoke(app, ["bench", "fuzz", "--splits", "200", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "200 divisions of 5 completions" in result.output
