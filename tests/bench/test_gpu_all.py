"""One command that measures and tests the GPU path: parts that fail or hang leave others alone."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

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
                assert (gpu_all.CHECKOUT / word).is_file()
    with pytest.raises(SystemExit):
        gpu_all.main(["somewhere", "--only", "nothing"])


def test_the_limits_of_all_parts_fit() -> None:
    alone = sum(part.limit for part in gpu_all.PARTS if part.alone)
    together = max(part.limit for part in gpu_all.PARTS if not part.alone)
    assert alone + together + gpu_all.END <= gpu_all.SECONDS
