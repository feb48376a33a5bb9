"""Kill clients, and at times the holder of their sandbox, at random points around real commands.

    python -m tests.sandbox.trajectory.crashes --kills 500 --holders 25

Each command adds a line to a file of its own in a folder of the host, so what ran twice shows there
whatever the logs say. A client begins operations one after another until it is killed; the next one
resumes. At the end every operation must have a receipt or be UNKNOWN, and no file two lines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from fathom.errors import SandboxError
from fathom.sandbox import Container
from fathom.sandbox.trajectory.recorded import UNKNOWN_TEXT, RecordedSandbox
from fathom.sandbox.trajectory.store import Store
from fathom.sandbox.trajectory.tape import read_outcome, read_tape

FIELDS = {"task": "count"}


async def client(folder: Path, id_: str | None, until: int | None) -> None:
    """Run operations until killed, or until operation `until` is done."""
    store = Store(folder / "state", durability="process")
    spec = Container(workdir=str(folder / "work"))
    work = store.work(FIELDS, spec, resume=id_, on_lost="continue", idle=60)
    async with work as opened:
        box = RecordedSandbox(opened.session, tell=True)
        number = 0
        while until is None or number < until:
            number += 1
            # The effect comes in the middle, so that a kill falls before, into and after it.
            command = f"echo $$ >> {number}; echo out {number}"
            try:
                result = await box.exec(command, timeout=20)
                assert result.output == f"out {number}\n", result
            except SandboxError as error:
                if str(error) != UNKNOWN_TEXT:
                    raise
            if number >= (opened.resumed or 0):
                # Live from here on: kills shall fall there, not into what is only read back.
                (folder / "progress.new").write_text(str(number))
                (folder / "progress.new").rename(folder / "progress")


def in_child(work: Callable[[], None]) -> int:
    """A child process that does `work`; a fork, so that it starts at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def holder_pid(folder: Path) -> int | None:
    """The process that holds the sandbox now."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                words = (path / "cmdline").read_bytes()
                inside = os.readlink(path / "cwd")
            except OSError:
                continue
            if b"trajectory.holder" in words and inside.startswith(str(folder)):
                return int(path.name)
    return None


def run(kills: int, holders: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill and resume; return what was found at the end."""
    chance = random.Random(seed)
    (folder / "work").mkdir()
    (folder / "work").chmod(0o777)
    state = folder / "state"
    with_holder = set(chance.sample(range(kills), holders))
    begun = time.monotonic()
    done = 0
    while done < kills:
        names = sorted(p.name for p in state.glob("[!.]*"))
        id_ = names[0] if names else None
        before = (folder / "progress").read_text() if (folder / "progress").exists() else ""
        pid = in_child(lambda id_=id_: anyio.run(client, folder, id_, None))
        if done == 0:
            # The first kills may also fall into the making of the sandbox.
            time.sleep(chance.uniform(0.0, 0.6))
        else:
            _await_progress(folder, before, pid)
            time.sleep(chance.uniform(0.0, 0.08))
        if done in with_holder and (holder := holder_pid(folder)) is not None:
            os.kill(holder, signal.SIGKILL)
            if chance.random() < 0.5:
                time.sleep(chance.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        # One that ended by itself before its kill must have met a dead holder.
        assert os.WIFSIGNALED(status) or done in with_holder, status
        done += 1
    id_ = min(p.name for p in state.glob("[!.]*"))
    with Store(state).read(id_) as log:
        recorded = len(read_tape(log, id_).entries) + 5
    pid = in_child(lambda: anyio.run(client, folder, id_, recorded))
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the last client failed"
    report = judge(folder, id_, recorded)
    return report | {
        "kills": kills,
        "holder_kills": holders,
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _await_progress(folder: Path, before: str, pid: int, patience: float = 20.0) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if (folder / "progress").exists() and (folder / "progress").read_text() not in ("", before):
            return
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)


def judge(folder: Path, id_: str, operations: int) -> dict[str, Any]:
    """Compare the log with what really happened."""
    lines = {int(path.name): len(path.read_text().split()) for path in (folder / "work").iterdir()}
    lost: list[int] = []
    unknown: list[int] = []
    made_up: list[int] = []
    recovered = 0
    with Store(folder / "state").read(id_) as log:
        tape = read_tape(log, id_)
        assert len(tape.entries) == operations, (len(tape.entries), operations)
        for entry in tape.entries:
            number = int(entry.key.partition("/")[2])
            if entry.end is None:
                (lost if entry.unknown is None else unknown).append(number)
                continue
            recovered += bool(log.body(entry.end).fields.get("recovered"))
            said = read_outcome(log, entry.end).blobs["stdout"]
            if said != b"out %d\n" % number or lines.get(number) != 1:
                made_up.append(number)
    return {
        "operations": operations,
        "duplicates": sorted(number for number, count in lines.items() if count > 1),
        "lost_receipts": lost,
        "made_up": made_up,
        "unknown": unknown,
        "recovered": recovered,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--holders", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fathom-crashes-") as name:
        # The tenant of a sandbox is another user and must reach its folder.
        Path(name).chmod(0o711)
        try:
            report = run(chosen.kills, chosen.holders, chosen.seed, Path(name))
        finally:
            while (pid := holder_pid(Path(name))) is not None:
                os.kill(pid, signal.SIGTERM)
                time.sleep(0.2)
    sys.stdout.write(json.dumps(report) + "\n")
    bad = report["duplicates"] or report["lost_receipts"] or report["made_up"]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
