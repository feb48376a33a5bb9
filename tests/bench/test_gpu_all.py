"""One command that measures and tests the GPU path: parts that fail or hang leave others alone."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_all
from bench.gpu_all import Part


def part(name: str, code: str, limit: int = 20, alone: bool = True, proof: str = "") -> Part:
    return Part(
        name=name, says=f"what {name} does", command=(sys.executable, "-c", code, "{folder}"),
        limit=limit, alone=alone, proof=proof,
    )  # fmt: skip


FIGURES = """
import json, pathlib, sys
goal = {"name": "speed", "found": 2.0, "limit": 1.0, "unit": "ms", "at_most": True}
goal["verdict"] = "short by 100%"
(pathlib.Path(sys.argv[1]) / "layers.json").write_text(json.dumps({"goals": [goal]}))
print("a table")
"""


def test_each_part_for_itself(tmp_path: Path) -> None:
    parts = [
        part("layers", FIGURES),
        part("broken", "print('why it broke'); raise SystemExit(3)"),
        part("skipped", "print('8 skipped in 0.1s')", alone=False, proof=" passed"),
        part("tested", "print('8 passed in 0.1s')", alone=False, proof=" passed"),
    ]
    found = {o.name: o for o in gpu_all.run_all(parts, tmp_path, 60)}
    states = {name: o.state for name, o in found.items()}
    assert states == {
        "layers": "ok", "broken": "failed", "skipped": "failed", "tested": "ok"
    }  # fmt: skip
    report = (tmp_path / "report.md").read_text()
    assert "| speed | at most 1 ms | 2 | short by 100% |" in report
    assert "why it broke" in report
    assert "| broken | what broken does | failed |" in report
    whole = json.loads((tmp_path / "report.json").read_text())
    assert whole["figures"]["layers"]["goals"][0]["found"] == 2.0
    assert {own["name"]: own["state"] for own in whole["parts"]} == states
    assert {"commit", "torch", "device"} <= set(whole["versions"])


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; print('begun', flush=True)\n"
        "subprocess.Popen([sys.executable, '-c', \"import time, pathlib; time.sleep(1.6);"
        "pathlib.Path(r'%s').write_text('')\"])\ntime.sleep(60)" % (tmp_path / "later")
    )
    started = time.monotonic()
    outcome = gpu_all.run(part("hangs", code), tmp_path, 0.8)
    assert outcome.state == "ran past its limit"
    assert "begun" in outcome.last
    assert time.monotonic() - started < 1.6
    time.sleep(max(0.0, started + 2.5 - time.monotonic()))
    assert not (tmp_path / "later").exists()


def test_when_time_is_up_the_rest_is_left_out(tmp_path: Path) -> None:
    outcomes = gpu_all.run_all([part("late", "print(1)")], tmp_path, gpu_all.END)
    assert [o.state for o in outcomes] == ["left out"]
    assert "left out" in (tmp_path / "report.md").read_text()


def test_its_own_parts() -> None:
    names = [own.name for own in gpu_all.PARTS]
    assert len(set(names)) == len(names)
    for own in gpu_all.PARTS:
        for word in own.command:
            if word.startswith("tests/"):
                assert (gpu_all.CHECKOUT / word.split("::")[0]).is_file()
    with pytest.raises(SystemExit):
        gpu_all.main(["somewhere", "--only", "nothing"])


def test_the_least_of_all_parts_fits() -> None:
    least = sum(max(part.least for part in stage) for stage in gpu_all.stages(gpu_all.PARTS))
    assert least + gpu_all.END <= 300
    assert all(part.least <= part.limit for part in gpu_all.PARTS)


def test_a_part_leaves_those_after_it_what_they_need(tmp_path: Path) -> None:
    sleeps = "import time; print('begun', flush=True); time.sleep(30)"
    parts = [
        replace(part("greedy", sleeps), limit=30, least=1),
        replace(part("needed", "print(1)"), limit=20, least=4),
        replace(part("beside", "print(1)", alone=False), limit=20, least=2),
        replace(part("too", "print(1)", alone=False), limit=20, least=3),
    ]
    assert [[own.name for own in stage] for stage in gpu_all.stages(parts)] == [
        ["greedy"], ["needed"], ["beside", "too"]
    ]  # fmt: skip
    found = gpu_all.run_all(parts, tmp_path, gpu_all.END + 9)
    assert [o.state for o in found] == ["ran past its limit", "ok", "ok", "ok"]
    assert 1.5 < found[0].seconds < 4  # 9 without 4 and the larger of 2 and 3


def test_both_ratios_to_transformers_stand_in_the_report() -> None:
    own = {"tokens": 1, "routing": "own router"}
    layers = {
        "steps": [own | {"kind": "all", "context": 4096, "median": 0.5}],
        "prompts": [own | {"kind": "all", "tokens": 8192, "chunk": 8192, "median": 40.0,
                           "tokens_per_s": 2e5, "peak": 2**30}],
    }  # fmt: skip
    model = {"model": "three V4-Flash layers"}
    figures: dict[str, Any] = {
        "layers": layers,
        "engine": {
            "decode": [model | {"batch": 1, "drafts": 0, "context": 4096, "engine": 1.5}],
            "prompts": [model | {"tokens": 8192, "rows": 0, "seconds": 0.05}],
        },
        "transformers": {"version": "5", "tokens": 8192, "context": 4096, "seconds": 0.4,
                         "seconds_a_token": 0.018, "experts": "grouped_mm"},
    }  # fmt: skip
    gpu_all.judged(figures)
    verdicts = {goal["name"]: goal["verdict"] for goal in figures["layers"]["goals"]}
    assert verdicts["prefill of 8K beside transformers"] == "pass"
    text = gpu_all.beside(figures)
    assert "grouped_mm experts" in text[0]
    assert [line.split("|")[-2].strip() for line in text[4:]] == ["36.0", "12.0", "10.0", "8.0"]
    del figures["engine"]
    assert [line.split("|")[-2].strip() for line in gpu_all.beside(figures)[4:]] == ["36.0", "10.0"]
    del figures["transformers"]
    assert gpu_all.beside(figures) == ["Not measured."]
