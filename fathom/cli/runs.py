"""Which recorded run an agent's command means, what an ended one said, and runs that go on alone.

Paper: §5.2.5 (resuming after preemption).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fathom.agent.report import REPORT
from fathom.errors import AgentError

LATEST = "last"
_POLL = 0.05


def find_run(
    fields: Mapping[str, Any], resume: str | None, name: str | None, *, in_worker: bool
) -> str | None:
    """The run that --resume means, ended or not; None where one is to begin.

    With a name, --resume without an ID means the run of that name. Without one it means the latest
    that began with this command: where the killed one left no trace, that is an earlier one.
    """
    from fathom.sandbox.trajectory.store import Store
    from fathom.sandbox.worker.worker import PLAN, Worker

    store = Store()
    if resume != LATEST:
        return resume
    if name is not None:
        path = store.path(name)
        return name if (path / PLAN if in_worker else path).exists() else None
    return Worker.last(fields, store) if in_worker else store.last(fields)


def ended_report(run: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a run that has ended, None where it has not.

    What is left of its sandbox ends. Raises TrajectoryError where it began with another command.
    """
    import anyio

    from fathom.sandbox.trajectory.record import Kind
    from fathom.sandbox.trajectory.store import Store, check_same

    store = Store()
    if (ending := store.ending(run)) is None:
        return None
    known = store.known(run)
    check_same(run, known.fields, fields)
    at = datetime.fromtimestamp(known.last_wall_ns / 1e9).strftime("%Y-%m-%d %H:%M:%S")
    sys.stderr.write(f"run   {run} ended at {at}: this is its answer, and nothing was run\n")
    anyio.run(store.release, run)
    # Runs of earlier versions have no report beside their last words.
    answer = ending.get("answer") if ending.get("status") == "answered" else None
    told = {**ending, "answer": answer}
    with store.read(run) as log:
        for record in log.records(run):
            if record.kind is Kind.VALUE and record.key == REPORT:
                kept = log.blob(log.body(record).blobs[REPORT])
                told = told if kept is None else json.loads(kept)
    return told


def work_alone(task: str, arguments: Sequence[str], name: str, *, again: bool) -> None:
    """Start the same command in a session of its own, on the run `name`; wait until it works.

    `again`: the run was begun before. Whoever follows its log is connected to a live run, so
    nothing has to be replayed when the one who started it is gone. Raises AgentError when it ends
    before it has begun.
    """
    from fathom.sandbox.trajectory.errors import TrajectoryError
    from fathom.sandbox.trajectory.record import Kind
    from fathom.sandbox.trajectory.store import Store

    store = Store()

    def sandboxes() -> int:
        try:
            with store.read(name) as log:
                return sum(record.kind is Kind.ATTACH for record in log.records(name))
        except TrajectoryError:
            return 0

    before = sandboxes()
    command = [sys.executable, "-m", "fathom", *(a for a in arguments if a != "--detach")]
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as given:
        given.write(task.encode())
        given.seek(0)
        pid = os.posix_spawn(
            sys.executable,
            [*command, "--resume" if again else "--name", name],  # the last word counts
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, given.fileno(), 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, said.fileno(), 2),
            ],
            setsid=True,
        )
        while sandboxes() == before:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                time.sleep(_POLL)
                continue
            if sandboxes() != before:
                return  # it was quick
            said.seek(0)
            reason = said.read().decode(errors="replace").strip()[-800:]
            raise AgentError(f"the run ended before it had begun: {reason}")
