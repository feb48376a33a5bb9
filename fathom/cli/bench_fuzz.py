"""`fathom bench fuzz`: the long test of the parser.

Paper: none (a test).
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fathom.cli.output import print_json, print_table

if TYPE_CHECKING:
    from fathom.chat.fuzz import FuzzReport

_SECONDS_BETWEEN_LINES = 10.0


def fuzz(
    splits: Annotated[int, typer.Option(min=1, help="Random divisions in all.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Another seed gives other completions.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read random completions in random pieces, as text and by token ids.

    Half of them are canonical, half damaged. Counts markup that leaks into an answer, calls that
    are lost, arguments that are no JSON, results that depend on the division, and words that
    disappear; exit code 1 if there is any.
    """
    from fathom.chat import fuzz as harness

    report = harness.FuzzReport(seed)
    begun = time.perf_counter()
    told = begun
    for report in harness.run(splits, seed):
        now = time.perf_counter()
        if now - told > _SECONDS_BETWEEN_LINES:
            told = now
            sys.stderr.write(f"{report.splits:,} of {splits:,} divisions, {_found(report)}\n")
            sys.stderr.flush()
    seconds = time.perf_counter() - begun
    if as_json:
        print_json(asdict(report) | {"ok": report.ok, "seconds": round(seconds, 1)})
    else:
        _print(report, seconds)
    raise typer.Exit(0 if report.ok else 1)


def _found(report: FuzzReport) -> str:
    return "nothing found" if report.ok else f"{len(report.failures)} or more failures"


def _print(report: FuzzReport, seconds: float) -> None:
    names = ("leaks", "lost_calls", "invalid_json", "differences", "lost_words")
    print(
        f"{report.splits:,} divisions of {report.texts:,} completions in {seconds:.0f} s, "
        f"{report.calls:,} calls read, {report.repaired:,} of them repaired"
    )
    print_table(
        [name.replace("_", " ") for name in names], [[str(getattr(report, name)) for name in names]]
    )
    for failure in report.failures:
        print(failure)
