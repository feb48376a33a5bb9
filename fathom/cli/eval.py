"""`fathom eval`: measurements of a model. `fathom eval tasks` lets the agent solve held-out tasks.

Paper: §5.3.1 (evaluation of agents with tools).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathom.cli.models import check_thinking, open_model
from fathom.cli.output import check_writable, print_json, print_table, write_file

if TYPE_CHECKING:
    from fathom.eval.agent_tasks import Outcome

app = typer.Typer(no_args_is_help=True, help="Measure what a model can do.")


@app.callback()
def _group() -> None:
    """Measure what a model can do."""


@app.command()
def tasks(
    model: Annotated[str | None, typer.Option(help="Checkpoint or preset.")] = "nano",
    url: Annotated[str | None, typer.Option(help="Any OpenAI-compatible server.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key for --url (default: FATHOM_API_KEY).")
    ] = None,
    per_family: Annotated[int, typer.Option(min=1, help="Tasks of each family.")] = 40,
    family: Annotated[
        list[str] | None, typer.Option(help="Only this family; give it again for more.")
    ] = None,
    thinking: Annotated[str, typer.Option(help="off, high or max.")] = "high",
    failures: Annotated[
        Path | None, typer.Option(help="Write the failed conversations as JSON.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Let the agent solve the held-out tasks in a sandbox, greedily, and print its scores."""
    import json

    import anyio

    from fathom.eval.agent_tasks import run_tasks, summarize
    from fathom.eval.tasks import FAMILIES, heldout_tasks

    check_thinking(thinking)
    check_writable("--failures", failures)
    unknown = set(family or ()) - set(FAMILIES)
    if unknown:
        raise typer.BadParameter(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    chosen = [t for t in heldout_tasks(per_family) if not family or t.family in family]
    opened = open_model(None if url and model == "nano" else model, url, api_key)
    show = partial(_progress, len(chosen), [0, 0])
    outcomes = anyio.run(partial(run_tasks, opened, chosen, thinking=thinking, on_outcome=show))
    summary = {"model": opened.name, "thinking": thinking, **summarize(outcomes)}
    if as_json:
        print_json(summary)
    else:
        _print_scores(summary)
    if failures is not None:
        write_file(failures, json.dumps(summary["failures"], indent=1, ensure_ascii=False))


def _progress(total: int, counts: list[int], outcome: Outcome) -> None:
    counts[0] += 1
    counts[1] += outcome.solved
    mark = "solved" if outcome.solved else f"failed ({outcome.status})"
    line = f"{counts[0]}/{total} {outcome.task.name} {outcome.task.kind}: {mark}"
    sys.stderr.write(f"{line}, {counts[1]} solved so far\n")


def _print_scores(summary: dict[str, Any]) -> None:
    rows = [
        [name, str(part["solved"]), str(part["tasks"]), f"{part['score']:.1%}"]
        for name, part in [*summary["families"].items(), ("total", summary)]
    ]
    print_table(["family", "solved", "tasks", "score"], rows)
