"""Clients, daemons with their processes, and agents killed around commands that really run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.sandbox.substrates.choice import program_of, suited

# With more agents among the victims than chance would give so few kills.
RUN = """
import json, sys
from pathlib import Path
from fathom.sandbox import crashes
shares = {"client": 0.55, "daemon": 0.15, "api": 0.15, "node": 0.1, "agent": 0.05}
for report in crashes.run(int(sys.argv[3]), Path(sys.argv[1]), Path(sys.argv[2]), 5, shares):
    pass
names = ("kills", "recovered", "duplicates", "lost", "made_up", "unknown")
print(json.dumps({name: getattr(report, name) for name in names}))
"""


def test_nothing_runs_twice_and_no_receipt_is_lost(runtime_dir: Path, cache_dir: Path):
    if not any(program_of(name) for name in suited()):
        pytest.skip("no sandbox on this machine")
    runtime_dir.mkdir(mode=0o711, exist_ok=True)
    folder = runtime_dir / "crashes"
    folder.mkdir(mode=0o711)
    try:
        # The processes are forks of one that has no other threads.
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(folder), str(cache_dir), "40"],
            capture_output=True,
            text=True,
            timeout=100,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=False,
        )
        left = list((folder / "run").glob("sb-*"))
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["duplicates"] == report["lost"] == report["made_up"] == []
    assert len(report["unknown"]) <= report["kills"].get("agent", 0)
    assert report["recovered"], "no kill came between a command and its receipt: the test is blunt"
    assert set(report["kills"]) == {"client", "daemon", "api", "node", "agent"}
    assert left == []
