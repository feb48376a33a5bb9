"""`fathom bench trajectory`: what a durable log costs a call, and how fast it is read back.

Paper: none (measurement).
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import anyio

from fathom.cli.output import print_table
from fathom.cli.sandboxes import spec_of, substrate_of

RECEIPTS = 500
RECORD = 640  # bytes, about what an intent or a receipt takes
DURABILITIES: tuple[Literal["process", "power"], ...] = ("process", "power")
_PARTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def measure(kind: str, count: int) -> dict[str, Any]:
    """All figures as one object; times in milliseconds."""
    return anyio.run(_measure, kind, count)


async def _measure(kind: str, count: int) -> dict[str, Any]:
    from fathom.sandbox import paths
    from fathom.sandbox.trajectory.held import hold

    with tempfile.TemporaryDirectory(prefix="fathom-", dir=paths.cache_folder()) as name:
        folder = Path(name)
        executor = await hold(
            folder / "holder-1",
            spec_of(kind),
            substrate=substrate_of(kind),
            cache_dir=paths.cache_folder(),
            runtime_dir=paths.runtime_folder(),
            idle=60,
        )
        try:
            report: dict[str, Any] = {
                "count": count,
                "substrate": executor.substrate,
                "machine": _machine(),
                **await _calls(executor, folder, count),
                "log": {d: await _log_cost(folder / d, d, count) for d in DURABILITIES},
                "disk": _disk(folder / "disk", count),
            }
        finally:
            await executor.stop()
        report["fast_forward_ms"] = await _fast_forward(folder / "forward")
    call = report["call"]["p50"]
    report["share_of_a_call"] = {d: t["p50"] / call - 1 for d, t in report["logged"].items()}
    return report


async def _calls(executor: Any, folder: Path, count: int) -> dict[str, Any]:
    """A warm call of `true` by key, journal included: without the log, and through it.

    The three take turns, so that whatever else the machine does meets them alike.
    """
    from fathom.sandbox.trajectory.log import Log
    from fathom.sandbox.trajectory.operation import Operation, exec_request
    from fathom.sandbox.trajectory.session import Session

    request = exec_request(["true"], timeout=60)
    times: dict[str, list[float]] = {"call": [], **{d: [] for d in DURABILITIES}}
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Any] = {}
        for kind in DURABILITIES:
            log = stack.enter_context(Log(folder / f"calls-{kind}", durability=kind))
            sessions[kind] = await Session.begin(log, "bench", executor)
        for number in range(count + 3):
            begun = time.perf_counter()
            await executor.dispatch(f"call/{number}", bytes(32), request, lambda: None)
            times["call"].append(time.perf_counter() - begun)
            for kind, session in sessions.items():
                begun = time.perf_counter()
                await session.run(Operation(key=f"{kind}/{number}", request=request))
                times[kind].append(time.perf_counter() - begun)
    found = {name: _spread(taken[3:]) for name, taken in times.items()}
    return {"call": found.pop("call"), "logged": found}


class _Instant:
    """An executor that takes no time, so that what is left is the log."""

    epoch = "instant"
    generation = None

    async def dispatch(
        self, key: str, digest: bytes, request: Any, on_started: Any, commit: Any = None
    ) -> Any:
        from fathom.sandbox.trajectory.operation import Outcome

        await commit()
        on_started()
        return Outcome(fields={"exit_code": 0, "duration": 0.0}, blobs={"stdout": b"x" * 200})

    async def query(self, key: str, request: Any) -> Any:
        from fathom.sandbox.trajectory.executor import NeverSeen

        return NeverSeen()

    async def wait(self, key: str, request: Any) -> Any:
        raise AssertionError("nothing runs here")

    async def acknowledge(self, key: str) -> None:
        pass


async def _log_cost(folder: Path, durability: Any, count: int) -> dict[str, float]:
    """Intent, start and receipt of one operation: everything but the sandbox."""
    from fathom.sandbox.trajectory.log import Log
    from fathom.sandbox.trajectory.operation import Operation, exec_request
    from fathom.sandbox.trajectory.session import Session

    times: list[float] = []
    with Log(folder, durability=durability) as log:
        session = await Session.begin(log, "bench", _Instant())
        for number in range(count + 3):
            request = exec_request("true", timeout=60)
            begun = time.perf_counter()
            await session.run(Operation(key=f"op/{number}", request=request))
            times.append(time.perf_counter() - begun)
    return _spread(times[3:])


def _disk(path: Path, count: int) -> dict[str, float]:
    """The part of a durable log that no program can save: two syncs, of a record each."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    times: list[float] = []
    try:
        os.posix_fallocate(file, 0, 4 << 20)
        os.fsync(file)
        for number in range(2 * (count + 3)):
            begun = time.perf_counter()
            os.pwrite(file, b"r" * RECORD, number * RECORD)
            os.fdatasync(file)
            times.append(time.perf_counter() - begun)
            # As in a log, something else happens between a record and the next.
            time.sleep(0.0005)
    finally:
        os.close(file)
    return _spread([one + other for one, other in zip(times[6::2], times[7::2], strict=True)])


async def _fast_forward(folder: Path) -> dict[str, float]:
    """From opening a log of 500 operations to having all their outcomes again."""
    from fathom.sandbox.trajectory.log import Log
    from fathom.sandbox.trajectory.operation import Operation, exec_request
    from fathom.sandbox.trajectory.session import Session

    operations = [
        Operation(key=f"op/{n}", request=exec_request(f"step {n}", timeout=60))
        for n in range(RECEIPTS)
    ]
    with Log(folder, durability="process") as log:
        session = await Session.begin(log, "bench", _Instant())
        for operation in operations:
            await session.run(operation)
    times: list[float] = []
    worked: list[float] = []
    for _ in range(7):
        begun, worked_before = time.perf_counter(), time.process_time()
        with Log(folder, durability="process") as log:
            session = await Session.attach(log, "bench", _Instant())
            for operation in operations:
                assert (await session.run(operation)).cached
            times.append(time.perf_counter() - begun)
        worked.append(time.process_time() - worked_before)
    return {"receipts": RECEIPTS, "processor_p50": _spread(worked)["p50"], **_spread(times)}


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    parts = {name: 1e3 * ordered[min(last, int(len(ordered) * p))] for name, p in _PARTS.items()}
    return {"min": 1e3 * ordered[0], **parts, "max": 1e3 * ordered[-1]}


def _machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def show(report: dict[str, Any]) -> None:
    """Print a report as a table."""
    machine = report["machine"]
    print(
        f"{report['substrate']}, kernel {machine['kernel']}, {machine['cores']} cores, "
        f"load average {machine['load_average'][0]}; {report['count']} times, in ms"
    )
    whole = report["fast_forward_ms"]
    forward = {k: v for k, v in whole.items() if k not in ("receipts", "processor_p50")}
    lines = {
        "warm call by key": report["call"],
        "with the log, survives any process": report["logged"]["process"],
        "with the log, survives a power cut": report["logged"]["power"],
        "the log alone, survives any process": report["log"]["process"],
        "the log alone, survives a power cut": report["log"]["power"],
        "of which the disk": report["disk"],
        f"fast-forward of {RECEIPTS}": forward,
    }
    rows = [[name, *(f"{value:.3f}" for value in times.values())] for name, times in lines.items()]
    print_table(["", *forward], rows)
    share = report["share_of_a_call"]
    print(f"fast-forward takes {whole['processor_p50']:.0f} ms of a processor")
    print(f"more than a call at p50: {share['process']:.1%}; with a sync {share['power']:.1%}")
