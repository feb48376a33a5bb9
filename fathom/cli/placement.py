"""`fathom agent --placement worker`: the loop lives beside its sandbox, and this process looks on.

Paper: §5.2.5 (V4.1: reconnect instead of replay).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.agent.report import REPORT
from fathom.cli.terminal import console
from fathom.cli.trajectory import show_event

if TYPE_CHECKING:
    from fathom.sandbox.types import Kept
    from fathom.sandbox.worker.worker import Loop, OnLost, Worker

PLACEMENTS = ("here", "worker")
_SEEN = "seen"


def loop_of(fields: Mapping[str, Any], url: str, api_key: str | None) -> Loop:
    """What a worker is to do for a command that began with `fields`."""
    from fathom.sandbox.worker.worker import Loop

    known = ("task", "model", "url", "thinking", "sampling", "limits")
    secret = {} if api_key is None else {"api_key": api_key}
    return Loop(model=url, order={name: fields[name] for name in known}, secret=secret)


async def begin(
    fields: Mapping[str, Any], spec: Kept, loop: Loop, *, name: str | None, idle: float
) -> Worker:
    """Start a run with a worker. Raises DaemonLost, SandboxError."""
    from fathom.sandbox.worker.worker import Worker

    return await Worker.begin(fields, spec, loop, name=name, idle=idle)


async def attach(fields: Mapping[str, Any], run: str, loop: Loop, *, on_lost: OnLost) -> Worker:
    """Come back to a run. Raises TrajectoryError, SandboxLost, DaemonLost."""
    from fathom.sandbox.worker.worker import Worker

    return await Worker.attach(run, fields=fields, secret=loop.secret, on_lost=on_lost)


async def watch(worker: Worker, folder: Path) -> dict[str, Any]:
    """Show what the loop does from where this user has seen it; return its report.

    Raises LoopFailed when it stops before its work is done.
    """
    out = console(stderr=True)
    seen = _read_seen(folder)
    out.print(f"run   {worker.id}, in a worker: it goes on without this command", style="dim")
    if seen:
        out.print(f"      records up to {seen} were shown before", style="dim")
    report: dict[str, Any] = {}
    async for event in worker.follow(after=0):
        if event.record.key == REPORT and event.blobs:
            report = json.loads(event.blobs[REPORT])
        elif event.record.node_sequence > seen:
            show_event(out, event)
            (folder / _SEEN).write_text(str(event.record.node_sequence))
    await worker.wait()
    return report


def _read_seen(folder: Path) -> int:
    try:
        return int((folder / _SEEN).read_text())
    except (OSError, ValueError):
        return 0
