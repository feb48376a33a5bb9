"""`fathom agent`: give a task to a model with a sandbox and watch it work.

The trace goes to standard error and the answer to standard output, so the answer can be piped.
Every turn of the model and every operation is in a log before it counts, so a run that was killed
goes on with --resume where it was.

Paper: §5.3.1 (code agents), §5.2.5 (resuming after preemption).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer
from typer.core import TyperCommand

from fathom.agent import (
    Agent,
    Episode,
    Limits,
    Model,
    RecordedModel,
    api_key_from_environment,
)
from fathom.agent.report import keep_report, report
from fathom.chat.reply import Sampling
from fathom.cli.engine_options import Device, DiskCache
from fathom.cli.models import check_local, check_thinking, default_sampling, open_model
from fathom.cli.placement import PLACEMENTS, attach, begin, loop_of, watch
from fathom.cli.runs import LATEST, ended_report, find_run, work_alone
from fathom.cli.sandboxes import KINDS, check_kind, spec_of, substrate_of
from fathom.cli.terminal import TASK_FAILED, console, visible
from fathom.cli.trace import Trace

if TYPE_CHECKING:
    from fathom.sandbox.types import Kept
    from fathom.sandbox.worker.worker import Loop

ON_LOST = ("fail", "continue", "rebuild")


class AgentCommand(TyperCommand):
    """The command, with --resume before another option or at the end meaning the latest run."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Give a bare --resume its value."""
        for at, text in reversed(list(enumerate(args))):
            if text == "--resume" and (at + 1 == len(args) or args[at + 1].startswith("--")):
                args = [*args[: at + 1], LATEST, *args[at + 1 :]]
        return super().parse_args(ctx, args)


def agent(
    task: Annotated[str, typer.Argument(help="What to do; - reads it from standard input.")],
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint or preset; with --url the server's name for the model."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Any OpenAI-compatible server.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key for --url (default: FATHOM_API_KEY).")
    ] = None,
    sandbox: Annotated[str, typer.Option(help=f"Kind of sandbox: {', '.join(KINDS)}.")] = KINDS[0],
    workdir: Annotated[
        Path | None, typer.Option(help="Folder that is /work in the sandbox, read and write.")
    ] = None,
    thinking: Annotated[str, typer.Option(help="off, high or max.")] = "high",
    max_steps: Annotated[int, typer.Option(min=1, help="Most turns of the model.")] = 50,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens in one reply.")] = None,
    max_total_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens in all replies together.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of prompt and reply together.")
    ] = None,
    command_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that one command may take.")
    ] = 60.0,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    device: Device = None,
    disk_cache: DiskCache = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[ID]",
            help="Go on with a run that ended early, or tell the answer of one that is over; "
            "without an ID that of --name, else the latest of this command, else a new one.",
        ),
    ] = None,
    on_lost: Annotated[
        str | None,
        typer.Option(
            help="When the sandbox of that run is gone: fail, continue in a fresh one, or rebuild "
            "it by running its commands again. Default: continue with --workdir, else fail."
        ),
    ] = None,
    keep: Annotated[
        float, typer.Option(min=1.0, help="Seconds that a sandbox waits for a killed run.")
    ] = 1800.0,
    placement: Annotated[
        str,
        typer.Option(
            help="Where the loop lives: here, or in a worker, a sandbox of its own with the daemon "
            "(see `fathom sandbox edge`), which goes on whatever becomes of this command."
        ),
    ] = PLACEMENTS[0],
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Work in the background and print the run's ID; `fathom sandbox replay ID "
            "--follow` watches it.",
        ),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            help="What to call a new run. With --resume: begin it or go on with it, as it is."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object to standard output.")
    ] = False,
) -> None:
    """Run the agent on a task.

    A run that was killed goes on when the same command is given again with --resume: no command
    that was begun is run a second time. A run that is over tells its answer again, with the exit
    code that it had; where none began, one begins. Standard error says which. Give both --name and
    --resume every time where the same command may be asked for more than once.

    Exit code 0: it answered; 1: it ended without an answer; 2: wrong usage; 3: this machine lacks
    something, such as a sandbox or a model server that can be reached.
    """
    check_thinking(thinking)
    check_kind(sandbox, KINDS)
    check_local(url, disk_cache, device)
    spec = spec_of(sandbox, workdir if workdir is None else workdir.resolve())
    task = sys.stdin.read() if task == "-" else task
    if not task.strip():
        raise typer.BadParameter("the task is empty")
    if workdir is not None and not workdir.is_dir():
        raise typer.BadParameter(f"--workdir {workdir} is not a folder; create it first")
    if on_lost not in (None, *ON_LOST):
        raise typer.BadParameter(f"--on-lost is {on_lost!r}; choose {', '.join(ON_LOST)}")
    if placement not in PLACEMENTS:
        raise typer.BadParameter(f"--placement is {placement!r}; choose {', '.join(PLACEMENTS)}")
    if placement == "worker" and url is None:
        raise typer.BadParameter(
            "a worker reaches a model by its --url only: `fathom serve` gives the shipped one a URL"
        )
    if placement == "worker" and on_lost == "rebuild":
        raise typer.BadParameter("a worker has --on-lost fail and continue only")
    limits = Limits(
        max_steps=max_steps,
        reply_tokens=max_tokens,
        total_tokens=max_total_tokens,
        context_tokens=max_context,
        command_seconds=command_timeout,
    )
    sampling = default_sampling(model, url, Sampling(temperature=temperature, seed=seed))
    fields: dict[str, Any] = {
        "task": task,
        "model": model,
        "url": url,
        "thinking": thinking,
        "sandbox": sandbox,
        "workdir": None if workdir is None else str(workdir.resolve()),
        "sampling": asdict(sampling),
        "limits": asdict(limits),
    }
    choice = on_lost or ("fail" if workdir is None else "continue")
    if placement == "worker":
        fields["placement"] = placement
    run = find_run(fields, resume, name, in_worker=placement == "worker")
    if resume is not None and run is None:
        sys.stderr.write("run   none began with this command: a new one begins\n")
    if placement == "worker" and url is not None:
        loop = loop_of(fields, url, api_key or api_key_from_environment())
        job = partial(_work_beside, fields, spec, loop, resume=run, name=name, on_lost=choice)
        _end_beside(anyio.run(partial(job, idle=keep, detach=detach)), as_json)
        return
    if run is not None and (told := ended_report(run, fields)) is not None:
        _end_beside(run if detach else told, as_json)
        return
    if detach:
        from fathom.sandbox.trajectory.store import new_name

        chosen = run or name or new_name()
        work_alone(task, sys.argv[1:], chosen, again=run is not None)
        print(chosen)
        return
    opened = open_model(model, url, api_key, disk_cache, device)
    worker = Agent(model=opened, thinking=thinking, sampling=sampling, limits=limits)
    trace = Trace(console(stderr=True))
    job = partial(
        _work,
        worker,
        fields,
        spec,
        trace,
        resume=run,
        name=name,
        on_lost=choice,  # type: ignore[arg-type]
        idle=keep,
    )
    episode = anyio.run(job)
    _show(episode, opened, thinking, as_json)
    if not episode.answered:
        raise typer.Exit(TASK_FAILED)


async def _work(
    worker: Agent,
    fields: dict[str, Any],
    spec: Kept,
    trace: Trace,
    **options: Any,
) -> Episode:
    from fathom.sandbox.trajectory.recorded import RecordedSandbox
    from fathom.sandbox.trajectory.store import Store

    substrate = substrate_of(fields["sandbox"])
    async with Store().work(fields, spec, substrate=substrate, **options) as opened:
        trace.begins(opened.id, opened.resumed, replaced=opened.replaced)
        recorded = replace(worker, model=RecordedModel(worker.model, opened.session))
        # The model can look for itself whether a command took effect that nobody knows about.
        box = RecordedSandbox(opened.session, tell=True)
        episode = await recorded.run(fields["task"], box, trace)
        await keep_report(report(episode, worker.model.name, worker.thinking), opened.session)
        opened.ending.update(status=episode.status, answer=episode.answer)
        return episode


async def _work_beside(
    fields: dict[str, Any],
    spec: Kept,
    loop: Loop,
    *,
    resume: str | None,
    name: str | None,
    on_lost: Any,
    idle: float,
    detach: bool,
) -> dict[str, Any] | str:
    """Begin or come back to a run in a worker; return its report, or with `detach` its name."""
    from fathom.sandbox.trajectory.store import Store

    if resume is None:
        worker = await begin(fields, spec, loop, name=name, idle=idle)
    else:
        worker = await attach(fields, resume, loop, on_lost=on_lost)
    return worker.id if detach else await watch(worker, Store().path(worker.id))


def _end_beside(found: dict[str, Any] | str, as_json: bool) -> None:
    if isinstance(found, str):
        print(found)
        return
    if as_json:
        print(json.dumps(found))
    elif found["answer"] is not None:
        print(visible(found["answer"]) if sys.stdout.isatty() else found["answer"])
    if found["answer"] is None:
        raise typer.Exit(TASK_FAILED)


def _show(episode: Episode, model: Model, thinking: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report(episode, model.name, thinking)))
    elif episode.answered and not (sys.stdout.isatty() and sys.stderr.isatty()):
        # On one terminal for both, the trace has shown the answer already.
        print(visible(episode.answer) if sys.stdout.isatty() else episode.answer)
