"""`fathom sandbox logs`, `replay` and `forget`: what happened in a sandbox, shown or done again.

Paper: §5.2.5 (replay of historical sessions, provenance of changes).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer
from rich.console import Console
from rich.text import Text

from fathom.cli.output import print_json, print_table
from fathom.cli.sandboxes import KINDS, check_kind, spec_of, substrate_of
from fathom.cli.terminal import TASK_FAILED, console, shortened, visible

if TYPE_CHECKING:
    from fathom.sandbox.trajectory.replay import Event, Repeat
    from fathom.sandbox.trajectory.store import Known


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(help="A run, as `fathom sandbox logs` lists it.")]
_POLL = 0.3


def logs(
    run: Annotated[str | None, typer.Argument(help="One run; without it, all are listed.")] = None,
    files: Annotated[
        bool, typer.Option("--files", help="Show which operation changed which file.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it and check every digest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List recorded runs, or show the operations of one.

    Runs that were killed before their first record are listed as "never begun", and those whose log
    cannot be read as "damaged"; `forget` removes either.

    Exit code 1: the log is damaged, or there is no such run.
    """
    from fathom.sandbox.trajectory.store import Store

    store = Store()
    if run is None:
        known, others = store.list(), store.unlisted()
        if as_json:
            rest = [{"run": name, "state": state} for name, state in others.items()]
            print_json([*(known_to_json(k) for k in known), *rest])
        elif known or others:
            header = ["run", "begun", "operations", "state", "task"]
            rows = [[name, "", "", state, ""] for name, state in others.items()]
            print_table(header, [*(_row(k) for k in known), *rows])
        return
    if verify:
        _verify(store, run, as_json)
    elif files:
        _show_files(store, run, as_json)
    else:
        _show_operations(store, run, as_json)


def replay(
    run: Id,
    follow: Annotated[
        bool, typer.Option("--follow", help="Stay until the run ends, and show it live.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Do it again in a fresh sandbox and compare.")
    ] = False,
    workdir: Annotated[
        Path | None, typer.Option(help="With --again: folder that is /work, read and write.")
    ] = None,
    sandbox: Annotated[str, typer.Option(help=f"Kind of sandbox: {', '.join(KINDS)}.")] = KINDS[0],
    as_json: AsJson = False,
) -> None:
    """Show what happened in a run, byte for byte, or do it again.

    With --json one object per line. With --again exit code 1 says that something came out
    differently.
    """
    from fathom.sandbox.trajectory.store import Store

    store = Store()
    if again:
        check_kind(sandbox, KINDS)
        folder = None if workdir is None else str(workdir.resolve())
        repeats = anyio.run(partial(_again, store, run, sandbox, folder, as_json))
        if any(repeat.verdict == "different" for repeat in repeats):
            raise typer.Exit(TASK_FAILED)
        return
    out = console()
    for event in _events(store, run, follow):
        if as_json:
            print(json.dumps(event.to_json()), flush=True)
        else:
            show_event(out, event)


def forget(run: Id) -> None:
    """End what is left of a run, its sandboxes and its loop, and remove the log."""
    from fathom.sandbox.trajectory.store import Store
    from fathom.sandbox.worker.worker import PLAN, Worker

    store = Store()
    if (store.path(run) / PLAN).exists():
        anyio.run(Worker(run, store).stop)
    anyio.run(store.forget, run)


def _row(known: Known) -> list[str]:
    begun = datetime.fromtimestamp(known.first_wall_ns / 1e9).strftime("%Y-%m-%d %H:%M:%S")
    task = shortened(str(known.fields.get("task", "")).replace("\n", " "), columns=60)[0]
    return [known.id, begun, str(known.operations), _state(known), task]


def _state(known: Known) -> str:
    return "ended" if known.ended else "running" if known.running else "stopped early"


def known_to_json(known: Known) -> dict[str, Any]:
    """Return what is known of a run, for programs."""
    return {
        "run": known.id,
        "begun_ns": known.first_wall_ns,
        "last_ns": known.last_wall_ns,
        "operations": known.operations,
        "state": _state(known),
        **known.fields,
    }


def _verify(store: Any, run: str, as_json: bool) -> None:
    from fathom.sandbox.trajectory.replay import check_whole

    with store.read(run) as log:
        count = check_whole(log, run)
    if as_json:
        print_json({"run": run, "records": count, "whole": True})
    else:
        print(f"{run}: {count} records, all whole")


def _show_files(store: Any, run: str, as_json: bool) -> None:
    from fathom.sandbox.trajectory.replay import provenance

    with store.read(run) as log:
        origins = provenance(log, run)
    if as_json:
        print_json(
            [
                {
                    "path": o.change.path,
                    "what": o.change.what,
                    "size": o.change.size,
                    "key": o.key,
                    "command": o.command,
                    "background": o.background,
                    "certain": o.certain,
                }
                for o in origins
            ]
        )
        return
    for o in origins:
        by = f"in the background, before {o.key}" if o.background else f"{o.key}  {o.command}"
        doubt = "" if o.certain else "  (or another operation at that time)"
        line = f"{o.change.what:8}{o.change.size:>10}  {o.change.path}  {by}{doubt}"
        print(shortened(line.replace("\n", " "), columns=200)[0])


def _show_operations(store: Any, run: str, as_json: bool) -> None:
    operations: list[dict[str, Any]] = []
    begun: dict[int, dict[str, Any]] = {}
    for event in _events(store, run, follow=False):
        record = event.record
        if event.request is not None:
            made = {"key": record.key, "request": event.request.describe(), "state": "open"}
            begun[record.node_sequence] = made
            operations.append(made)
        elif record.parent in begun:
            made = begun[record.parent]
            if event.outcome is not None:
                made |= {"state": "done", "exit_code": event.outcome.fields.get("exit_code")}
                made["seconds"] = event.outcome.fields.get("duration")
                if event.outcome.error is not None:
                    made["error"] = event.outcome.error[0]
            elif "reason" in event.fields:
                made |= {"state": "unknown", "reason": event.fields["reason"]}
    if as_json:
        print_json(operations)
        return
    for made in operations:
        code = made.get("exit_code")
        end = made.get("error") or (made["state"] if code is None else f"exit {code}")
        print(shortened(f"{made['key']:8}{end:>10}  {made['request']}".split("\n")[0])[0])


def _events(store: Any, run: str, follow: bool) -> Iterator[Event]:
    from fathom.sandbox.trajectory.record import Kind
    from fathom.sandbox.trajectory.replay import events

    after = 0
    while True:
        # Asked before reading: what is written after the last look must not be missed.
        alive = follow and store.known(run).running
        ended = False
        with store.read(run) as log:
            for event in events(log, run, after):
                after, ended = event.record.node_sequence, event.record.kind is Kind.END
                yield event
        if ended or not alive:
            return
        time.sleep(_POLL)


def show_event(out: Console, event: Event) -> None:
    """Print one record for a person."""
    record = event.record
    at = datetime.fromtimestamp(record.wall_ns / 1e9).strftime("%H:%M:%S.%f")[:-3]
    head = f"{at} {record.kind.name.lower():8} {record.key}".rstrip()
    if event.request is not None:
        out.print(Text(f"{head}  {visible(event.request.describe())}", "bold cyan"), soft_wrap=True)
        return
    out.print(Text(head, "dim"), soft_wrap=True)
    for line in _said(event):
        out.print(Text(f"    {visible(line)}"), soft_wrap=True)


def _said(event: Event) -> Iterator[str]:
    if event.outcome is not None:
        outcome = event.outcome
        for name in ("stdout", "stderr"):
            if text := outcome.blobs.get(name, b"").decode(errors="replace"):
                yield from text.removesuffix("\n").split("\n")
        if outcome.error is not None:
            yield f"[{outcome.error[0]}: {outcome.error[1]}]"
        if outcome.fields.get("exit_code"):
            yield f"[exit code {outcome.fields['exit_code']}]"
        for change in outcome.changes or ():
            yield f"[{change.what} {change.path}, {change.size} bytes]"
    elif event.blobs and "reply" in event.blobs:
        message = json.loads(event.blobs["reply"])["message"]
        for text in (message["reasoning"], message["content"]):
            if text:
                yield from str(text).split("\n")
        for call in message["tool_calls"]:
            yield f"{call['name']} {call['arguments']}"
    elif event.fields:
        yield json.dumps(event.fields)


async def _again(
    store: Any, run: str, kind: str, workdir: str | None, as_json: bool
) -> list[Repeat]:
    from fathom.sandbox import paths
    from fathom.sandbox.trajectory.held import hold
    from fathom.sandbox.trajectory.replay import outcome_to_json, reexecute

    repeats: list[Repeat] = []
    with store.read(run) as log, tempfile.TemporaryDirectory(prefix="fathom-") as name:
        executor = await hold(
            Path(name) / "holder-1",
            spec_of(kind, workdir),
            substrate=substrate_of(kind),
            cache_dir=paths.cache_folder(),
            runtime_dir=paths.runtime_folder(),
            idle=60,
        )
        try:
            async for repeat in reexecute(log, run, executor):
                repeats.append(repeat)
                if as_json:
                    told = {"key": repeat.key, "command": repeat.command}
                    told |= {"verdict": repeat.verdict, "differences": repeat.differences}
                    print(json.dumps(told | {"now": outcome_to_json(repeat.now)}), flush=True)
                    continue
                print(f"{repeat.verdict:13}{repeat.key:8}{shortened(repeat.command)[0]}")
                for line in repeat.differences:
                    print(f"    {visible(line)}")
        finally:
            await executor.stop()
    return repeats
