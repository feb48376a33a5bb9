"""`fathom doctor`: what this machine can do, and the command to get what is missing.

Paper: none (machine facts).
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathom.cli.output import print_json
from fathom.cli.terminal import MACHINE_LACKS, visible

if TYPE_CHECKING:
    from fathom.sandbox.probe import Finding, Machines, Report

_OLDEST_PYTHON = (3, 11)


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object to standard output.")
    ] = False,
) -> None:
    """Say what this machine can do; sandboxes are tried by running them.

    Exit code 0: sandboxes work; 3: nothing here can run a sandbox.
    """
    from fathom.sandbox.probe import examine, examine_machines

    report = examine()
    machines = examine_machines()
    python = _python()
    torch = _torch()
    if as_json:
        print_json(
            {
                "ok": bool(report.usable),
                "python": python,
                "torch": torch,
                "sandbox": {
                    "usable": list(report.usable),
                    "user": report.user,
                    "kernel": report.kernel,
                    "substrates": [asdict(finding) for finding in report.findings],
                    "machines": asdict(machines),
                },
                "missing": [
                    {"what": what, "command": command} for what, command in _missing(report, torch)
                ],
            }
        )
    else:
        _print_report(report, machines, python, torch)
    if not report.usable:
        raise typer.Exit(MACHINE_LACKS)


def _python() -> dict[str, Any]:
    return {
        "version": platform.python_version(),
        "ok": sys.version_info >= _OLDEST_PYTHON,
        "executable": sys.executable,
    }


def _torch() -> dict[str, Any]:
    """What torch is, and the GPUs that it can really compute on."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return {"ok": False, "problem": str(error), "gpus": []}
    gpus: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            try:
                works = float(torch.ones(8, device=f"cuda:{index}").sum()) == 8.0
            except RuntimeError:
                works = False
            gpus.append(
                {
                    "name": facts.name,
                    "memory_gib": round(facts.total_memory / 2**30, 1),
                    "capability": f"{facts.major}.{facts.minor}",
                    "works": works,
                }
            )
    return {
        "ok": True,
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _missing(report: Report, torch: dict[str, Any]) -> list[tuple[str, str]]:
    missing: list[tuple[str, str]] = []
    if not torch["ok"]:
        missing.append(("torch", f"{sys.executable} -m pip install torch"))
    if not report.usable:
        for finding in report.findings:
            if finding.suited and finding.fix:
                missing.append((f"a sandbox by {finding.name}", finding.fix))
    return missing


def _print_report(
    report: Report, machines: Machines, python: dict[str, Any], torch: dict[str, Any]
) -> None:
    note = "" if python["ok"] else "; 3.11 or newer is needed"
    _line(python["ok"], "Python", python["version"] + note)
    if torch["ok"]:
        _line(True, "torch", f"{torch['version']}, {torch['threads']} CPU threads")
    else:
        _line(False, "torch", torch["problem"])
    for gpu in torch["gpus"]:
        text = f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"
        _line(gpu["works"], "GPU", text if gpu["works"] else f"{text}: a sum on it failed")
    if not torch["gpus"]:
        _line(None, "GPU", "none that torch can use; the CPU is used")
    _line(None, "sandbox", f"as {report.user} on Linux {report.kernel}, {os.cpu_count()} cores")
    for finding in report.findings:
        _line(finding.works if finding.suited else None, finding.name, _describe(finding))
    _line(machines.works if machines.installed else None, "microvm", _describe_machines(machines))
    for what, command in _missing(report, torch):
        print(f"To get {what}: {visible(command)}")
    if not report.usable:
        print("Nothing on this machine can run a sandbox.")


def _describe(finding: Finding) -> str:
    if not finding.suited:
        return (
            "not tried: for users other than root" if os.geteuid() == 0 else "not tried: for root"
        )
    if finding.works:
        limits = ", ".join(finding.enforced)
        return (
            f"works: starts in {finding.create_ms:g} ms, a command takes {finding.exec_ms:g} ms, "
            f"limits held: {limits}"
        )
    return finding.problem or "does not work"


def _describe_machines(found: Machines) -> str:
    if not found.installed:
        return f"not tried: {found.problem}; `{found.fix}`"
    if not found.works:
        return found.problem or "does not work"
    return (
        f"works by {found.accelerator} ({found.reason}): {found.create_ms:g} ms to the end of a "
        f"first command, {found.exec_ms:g} ms for a later one"
    )


def _line(good: bool | None, what: str, text: str) -> None:
    mark = {True: "ok", False: "no", None: "--"}[good]
    print(f"{mark}  {what:<11} {visible(text)}")
