"""What the probe and `fathom doctor` find out about this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fathom.cli import doctor
from fathom.sandbox import probe
from fathom.sandbox.substrates.choice import SUBSTRATES, program_of, suited


@pytest.fixture(scope="module")
def report(runtime_dir: Path, cache_dir: Path) -> probe.Report:
    return probe.examine(cache_dir, runtime_dir)


def test_every_substrate_is_judged(report: probe.Report):
    assert tuple(finding.name for finding in report.findings) == SUBSTRATES
    for finding in report.findings:
        assert finding.suited == (finding.name in suited())
        assert finding.installed == (program_of(finding.name) is not None)
        if not finding.suited:
            assert not finding.works


def test_what_works_was_run(report: probe.Report):
    installed = {name for name in suited() if program_of(name)}
    assert set(report.usable) == installed, report.findings
    for finding in report.findings:
        if finding.works:
            assert finding.create_ms is not None
            assert finding.exec_ms is not None
            assert 0 < finding.exec_ms < finding.create_ms
            assert {"disk", "pids"} <= set(finding.enforced)


@pytest.mark.parametrize("promise", list(probe._PROMISES))
def test_a_broken_promise_is_found(options, monkeypatch: pytest.MonkeyPatch, promise: str):
    """Each check is replaced by its opposite: only then is its result known to count."""
    if os.geteuid() != 0 and promise == "memory":
        pytest.skip("not promised without root")
    name = next((name for name in suited() if program_of(name)), None)
    if name is None:
        pytest.skip("no substrate is installed")
    monkeypatch.setattr(probe, "_PROMISES", {promise: lambda sandbox: False})
    finding = probe._examine_one(name, options["cache_dir"], options["runtime_dir"])
    assert not finding.works
    assert finding.broken == (promise,)
    assert finding.problem == f"not kept: {promise}"


def test_a_substrate_that_fails_is_reported(options, monkeypatch, tmp_path: Path):
    for program in ("crun", "runc", "bwrap"):
        (tmp_path / program).write_text("#!/bin/sh\necho 'operation not permitted' >&2; exit 1\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setattr("fathom.sandbox.substrates.choice._PATH", str(tmp_path))
    report = probe.examine(options["cache_dir"], options["runtime_dir"])
    assert report.usable == ()
    for finding in report.findings:
        if finding.suited:
            assert finding.installed
            assert "operation not permitted" in (finding.problem or "")


def test_a_cache_that_cannot_be_written_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fathom.sandbox.vm.emulator.need_program", lambda: "/bin/sh")
    monkeypatch.setattr("fathom.sandbox.vm.emulator.program", lambda: "/bin/sh")
    found = probe.examine_machines("/proc/nowhere")
    assert not found.works
    assert "/proc/nowhere/vm (No such file or directory): set XDG_CACHE_HOME" in str(found.problem)


def test_obstacles_have_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "setting").write_text("1\n")
    monkeypatch.setattr(probe, "_OBSTACLES", {str(tmp_path / "setting"): "a.b=0"})
    assert probe._obstacle_fix() == "sudo sysctl -w a.b=0"
    (tmp_path / "setting").write_text("0\n")
    assert probe._obstacle_fix() is None
    monkeypatch.setattr(probe, "_OBSTACLES", {str(tmp_path / "setting"): "a.b=15000"})
    assert probe._obstacle_fix() == "sudo sysctl -w a.b=15000"
    (tmp_path / "setting").write_text("96365\n")
    assert probe._obstacle_fix() is None


# The command ---------------------------------------------------------------------------------


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, report: probe.Report) -> None:
    """Spare the command another examination, and the slow import of torch."""
    monkeypatch.setattr(probe, "examine", lambda: report)
    facts = {"ok": True, "version": "9.9", "cuda": None, "threads": 2, "gpus": []}
    monkeypatch.setattr(doctor, "_torch", lambda: facts)


@pytest.fixture
def nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fathom.sandbox.substrates.choice._PATH", "/nonexistent")
    facts = {"ok": False, "problem": "No module named 'torch'", "gpus": []}
    monkeypatch.setattr(doctor, "_torch", lambda: facts)


@pytest.mark.usefixtures("found")
def test_doctor_in_words(capsys: pytest.CaptureFixture[str], report: probe.Report):
    doctor.doctor(as_json=False)
    shown = capsys.readouterr().out
    for line in ("ok  Python", "ok  torch       9.9", "--  GPU         none"):
        assert line in shown
    for name in report.usable:
        assert f"ok  {name}" in shown
    assert shown.isascii()


@pytest.mark.usefixtures("found")
def test_doctor_in_json(capsys: pytest.CaptureFixture[str], report: probe.Report):
    doctor.doctor(as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is True
    assert shown["sandbox"]["usable"] == list(report.usable)
    assert [entry["name"] for entry in shown["sandbox"]["substrates"]] == list(SUBSTRATES)
    assert shown["missing"] == []


@pytest.mark.usefixtures("nothing_works")
def test_doctor_where_nothing_works(capsys: pytest.CaptureFixture[str]):
    import typer

    with pytest.raises(typer.Exit) as ended:
        doctor.doctor(as_json=False)
    assert ended.value.exit_code == 3
    shown = capsys.readouterr().out
    assert "Nothing on this machine can run a sandbox." in shown
    assert "apt-get install -y" in shown
    assert "pip install torch" in shown
    with pytest.raises(typer.Exit):
        doctor.doctor(as_json=True)
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert all(entry["command"] for entry in missing)
    assert len(missing) >= 2
