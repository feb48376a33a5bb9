"""`fathom train`: run a training recipe.

Paper: none (command line).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fathom.cli.output import check_picture, print_json


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file (see recipes/).")],
    out: Annotated[Path, typer.Option("--out", help="Folder for log, states and weights.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest state.")] = False,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0, help="Time budget instead of the recipe's.")
    ] = None,
    leave_after: Annotated[
        float | None,
        typer.Option(
            "--leave-after",
            min=0,
            help="Save and stop after so many minutes of this process; --resume goes on.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", min=1, help="Processes that share a batch, instead of the recipe's."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=0, help="Data processes, instead of the recipe's."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda or cpu; the GPU if there is one.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the curves into this file at the end.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end.")
    ] = False,
) -> None:
    """Train a model by a recipe. SIGTERM saves the state and stops."""
    import dataclasses
    import time

    from fathom.train.pretrain import pretrain
    from fathom.train.recipe import Recipe

    check_picture("--plot", plot)
    plan = Recipe.load(recipe)
    if minutes is not None:
        plan = dataclasses.replace(plan, run=dataclasses.replace(plan.run, minutes=minutes))
    if processes is not None:
        plan = dataclasses.replace(plan, run=dataclasses.replace(plan.run, processes=processes))
    if workers is not None:
        plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, workers=workers))
    deadline = None if leave_after is None else time.monotonic() + leave_after * 60
    summary = pretrain(
        plan,
        out,
        resume=resume,
        device=device,
        show=_show,
        leave_after=lambda: deadline is not None and time.monotonic() > deadline,
    )
    if not summary["first"]:
        return
    if plot is not None:
        from fathom.train.plot import plot_run

        summary["plot"] = str(plot_run(out / "log.jsonl", plot))
    if as_json:
        print_json(summary)
    else:
        state = "finished" if summary["finished"] else "stopped early, --resume goes on"
        print(f"{state}: step {summary['step']}, {summary['tokens']:,} tokens, in {out}")


def _show(row: dict[str, Any]) -> None:
    """One plain line of progress on standard error."""

    def number(name: str, digits: int = 3) -> str:
        value = row.get(name)
        return "-" if value is None else f"{value:.{digits}f}"

    qat = "+qat" if row["qat"] else ""
    sys.stderr.write(
        f"step={row['step']} tokens={row['tokens'] / 1e6:.1f}M progress={row['progress']:.3f} "
        f"attention={row['attention']}{qat} loss={number('loss')} accuracy={number('accuracy')} "
        f"mtp={number('mtp_loss')} kl={number('indexer_kl')} imbalance={number('imbalance', 2)} "
        f"norm={number('norm', 2)} used={number('used', 2)} lr={row['lr']:.2e} "
        f"tokens_per_second={row['tokens_per_second']}\n"
    )
    sys.stderr.flush()
