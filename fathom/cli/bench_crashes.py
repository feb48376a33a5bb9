"""`fathom bench crashes`: processes killed at random points around commands that really run.

Paper: none (a test).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fathom.cli.output import print_json, print_table


def crashes(
    kills: Annotated[int, typer.Option(min=1, help="How many processes are killed.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Another seed kills at other points.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="End after so long, whatever the count.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Kill clients, the daemon, its API process and node, and agents; compare log and effects.

    Counts commands that ran twice, receipts that are lost or made up, and outcomes that stay
    unknown; exit code 1 if there is any of the former, or more than 1% of the latter.
    """
    from fathom.sandbox import crashes as harness
    from fathom.sandbox import paths

    begun = time.monotonic()
    report = harness.Report()
    # Tenants of root's sandboxes are other users, who must be able to pass through to their folder.
    place = "/run" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="fathom-crashes-", dir=place) as name:
        Path(name).chmod(0o711)
        for report in harness.run(kills, Path(name), paths.cache_folder(), seed):
            seconds = time.monotonic() - begun
            sys.stderr.write(f"{_sentence(report)} in {seconds:.0f} s\n")
            sys.stderr.flush()
            if minutes is not None and seconds > 60 * minutes:
                break
    result = _plain(report) | {"seed": seed, "seconds": round(time.monotonic() - begun, 1)}
    if as_json:
        print_json(result)
    else:
        print_table(
            ("killed", "times"), [[name, str(n)] for name, n in sorted(report.kills.items())]
        )
        print(_sentence(report))
    raise typer.Exit(0 if report.ok else 1)


def _plain(report: Any) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "kills": dict(report.kills),
        "operations": report.operations,
        "recovered": report.recovered,
        "duplicates": report.duplicates,
        "lost_receipts": report.lost,
        "made_up": report.made_up,
        "unknown": report.unknown,
    }


def _sentence(report: Any) -> str:
    share = len(report.unknown) / max(1, report.operations)
    return (
        f"{report.kills.total():,} kills around {report.operations:,} commands: "
        f"{len(report.duplicates)} ran twice, {len(report.lost)} receipts lost, "
        f"{len(report.made_up)} made up, {len(report.unknown)} unknown ({share:.2%}), "
        f"{report.recovered:,} recovered"
    )
