from __future__ import annotations

import json

import pytest
import torch

from fathom.errors import TrainError
from fathom.train.metrics import MetricLog, read_log
from fathom.train.plot import plot_run, smoothed


def test_every_step_is_written_and_groups_are_shown(tmp_path):
    shown = []
    with MetricLog(tmp_path / "run" / "log.jsonl", every=3, show=shown.append) as log:
        for step in range(1, 8):
            log.add({"step": step}, ("loss", "norm"), torch.tensor([1.0 / step, float(step)]))
            assert len(read_log(tmp_path / "run" / "log.jsonl")) == step // 3 * 3
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert rows[3] == {"step": 4, "loss": 0.25, "norm": 4.0}
    assert [row["step"] for row in shown] == [3, 6, 7]


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with MetricLog(tmp_path / "log.jsonl", every=1) as log:
        log.add({"step": 1}, ("loss",), torch.tensor([float("nan")]))
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": None}


def test_reading_prefers_the_repeated_step_and_skips_a_torn_line(tmp_path):
    lines = ['{"step": 1, "x": 1}', '{"step": 2, "x": 1}', '{"step": 2, "x": 2}', '{"step": 3, "x"']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "x": 1}, {"step": 2, "x": 2}]


def test_a_resumed_run_does_not_write_into_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x"')
    for step in (2, 3):
        with MetricLog(path, every=1) as log:
            log.add({"step": step}, (), torch.empty(0))
    assert [row["step"] for row in read_log(path)] == [1, 2, 3]
    assert path.read_text().count("\n") == 4


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {
            "step": step,
            "tokens": step * 1000,
            "loss": 3 / step,
            "mtp_loss": 4 / step,
            "indexer_kl": 0.0 if step < 20 else 0.1,
            "accuracy": step / 50,
            "tokens_per_second": 1e5,
            "attention": "dense" if step < 20 else "sparse",
            "qat": step > 40,
        }
        for step in range(1, 50)
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps(row) for row in rows))
    picture = plot_run(log, tmp_path / "plots" / "run.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    log.write_text("")
    with pytest.raises(TrainError, match="no finished step"):
        plot_run(log, picture)
    with pytest.raises(TrainError, match="cannot read"):
        plot_run(tmp_path / "absent", picture)


def test_smoothing_is_a_running_mean():
    assert smoothed([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
