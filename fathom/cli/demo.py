"""`fathom demo`: the shipped model solves tasks it has never seen, each in a fresh sandbox.

Paper: §5.3.1 (code agents; here the smallest one that works).
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer
from rich.table import Table
from rich.text import Text

from fathom.agent import Agent, Limits
from fathom.agent.trace import OnEvent, ignore
from fathom.chat.reply import Sampling
from fathom.cli.models import SHIPPED_MODEL, check_thinking, default_sampling, open_model
from fathom.cli.output import print_json
from fathom.cli.sandboxes import CONTAINERS, check_kind, open_sandbox
from fathom.cli.terminal import TASK_FAILED, console
from fathom.cli.trace import Trace

if TYPE_CHECKING:
    from fathom.eval.tasks import Task

LIMITS = Limits(max_steps=8, reply_tokens=512, command_seconds=20)

# The demonstration counts as shown when four of five tasks are solved.
SOLVED_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one task went. `solved` is the verdict of its checker, not the model's opinion."""

    task: str
    family: str
    solved: bool
    status: str
    answer: str
    steps: int
    seconds: float


def demo(
    model: Annotated[str, typer.Option(help="Checkpoint folder or shipped model.")] = SHIPPED_MODEL,
    seed: Annotated[int, typer.Option(help="Which tasks are drawn.")] = 1,
    per_family: Annotated[int, typer.Option(min=1, help="Tasks of each family.")] = 1,
    thinking: Annotated[str, typer.Option(help="off, high or max.")] = "high",
    sandbox: Annotated[
        str, typer.Option(help=f"Kind of sandbox: {', '.join(CONTAINERS)}.")
    ] = CONTAINERS[0],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Let the shipped model solve held-out tasks of every family in sandboxes.

    Exit code 0 when at least four of five tasks are solved.
    """
    from fathom.eval.tasks import sample_tasks

    check_thinking(thinking)
    check_kind(sandbox)
    started = time.perf_counter()
    opened = open_model(model, None)
    agent = Agent(
        model=opened,
        thinking=thinking,
        sampling=default_sampling(model, None, Sampling()),
        limits=LIMITS,
    )
    trace = Trace(console(stderr=True))
    tasks = sample_tasks(seed, per_family)
    outcomes = [anyio.run(play, task, agent, sandbox, trace) for task in tasks]
    seconds = time.perf_counter() - started
    solved = sum(outcome.solved for outcome in outcomes)
    if as_json:
        rows = [asdict(outcome) for outcome in outcomes]
        print_json({"tasks": rows, "solved": solved, "of": len(rows), "seconds": round(seconds, 2)})
    else:
        _print_table(outcomes, seconds)
    if solved < SOLVED_SHARE * len(outcomes):
        raise typer.Exit(TASK_FAILED)


async def play(
    task: Task, agent: Agent, kind: str = CONTAINERS[0], on_event: OnEvent = ignore
) -> Outcome:
    """Let `agent` work on `task` in a sandbox of its own and judge what it left behind.

    Raises FathomError when the sandbox or the model fails.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fathom-") as name:
        folder = Path(name)
        for path, text in task.files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="")
        async with open_sandbox(kind, folder) as box:
            episode = await agent.run(task.prompt, box, on_event)
        files = collect(folder)
    return Outcome(
        task=task.name,
        family=task.family,
        solved=episode.answered and task.check(episode.answer, files),
        status=episode.status,
        answer=episode.answer,
        steps=len(episode.steps),
        seconds=round(time.perf_counter() - started, 2),
    )


def collect(folder: Path) -> dict[str, str]:
    """The plain files below `folder` as text, by their path in it.

    Links are left alone: what ran in the sandbox may have pointed them at files of this machine.
    """
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().decode("utf-8", "replace")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _print_table(outcomes: list[Outcome], seconds: float) -> None:
    out = console()
    table = Table(box=None, pad_edge=False)
    for title, side in (("task", "left"), ("solved", "left"), ("steps", "right"), ("s", "right")):
        table.add_column(title, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for outcome in outcomes:
        verdict = Text("yes", "green") if outcome.solved else Text("no", "red")
        table.add_row(outcome.task, verdict, str(outcome.steps), f"{outcome.seconds:.1f}")
    solved = sum(outcome.solved for outcome in outcomes)
    out.print()
    out.print(table)
    out.print(f"\n{solved} of {len(outcomes)} solved in {seconds:.1f} s", style="bold")
