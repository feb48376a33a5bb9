"""What virtual machines cost here: boots, restores, commands, copies, pauses, memory.

Every figure comes with the accelerator, because it means nothing without it.

Paper: none (measurement).
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fathom.sandbox import state
from fathom.sandbox.client import Client
from fathom.sandbox.measure import machine, percentiles
from fathom.sandbox.sandbox import Sandbox
from fathom.sandbox.types import FullVM, MicroVM, Snapshot

_TIMEOUT = 120.0


async def _timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def _first_command(make: Callable[[], Awaitable[Sandbox]], count: int) -> dict[str, Any]:
    """Measure from the request to the end of `true`, each machine stopped before the next one."""
    times: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        sandbox = await make()
        await sandbox.exec(["true"], timeout=_TIMEOUT)
        times.append(time.perf_counter() - began)
        await sandbox.stop()
    return {"count": count, **percentiles(times)}


def _own_memory(runtime: Path, name: str) -> dict[str, int]:
    """Return what a machine's emulator has: resident, and what no other process has too (MiB)."""
    process = state.first_process(runtime / name)
    text = Path(f"/proc/{process}/smaps_rollup").read_text()

    def sum_of(*names: str) -> int:
        return sum(int(n) for name in names for n in re.findall(rf"{name}: +(\d+) kB", text)) >> 10

    return {
        "resident_mib": sum_of("Rss"),
        "proportional_mib": sum_of("Pss"),
        "own_mib": sum_of("Private_Clean", "Private_Dirty"),
    }


async def _snapshots(
    client: Client, sandbox: Sandbox, spec: MicroVM | FullVM, cache: Path
) -> dict[str, Any]:
    """Measure five snapshots, and what goes on from the last one; none of them is left."""
    times: list[float] = []
    kept: list[Snapshot] = []
    try:
        for _ in range(5):
            began = time.perf_counter()
            kept.append(await sandbox.snapshot())
            times.append(time.perf_counter() - began)
        again = await _first_command(lambda: client.restore(kept[-1], spec), 5)
    finally:
        for one in kept:
            shutil.rmtree(cache / "snapshots" / one.id)
    return {
        "snapshot": {"mib": kept[-1].size >> 20, **percentiles(times)},
        "snapshot's file to the end of a first command": again,
    }


async def everything(
    client: Client, runtime: Path, cache: Path, kind: type[MicroVM] | type[FullVM], count: int
) -> dict[str, Any]:
    """Measure all of it; `runtime`, `cache`: the client's folders of live sandboxes and images."""
    report: dict[str, Any] = {"machine": machine()}
    # A kind that nobody has: it must be booted and saved before the first one can go on.
    odd = 1 + time.time_ns() // 1000 % 4000
    base = kind()
    fresh = kind(disk=base.disk_bytes - odd * 4096) if kind is MicroVM else None
    if fresh is not None:
        began = time.perf_counter()
        async with await client.create(fresh) as first:
            await first.exec(["true"], timeout=_TIMEOUT)
            report["boot, save, restore, first command"] = {
                "seconds": round(time.perf_counter() - began, 2)
            }
    async with await client.create(base) as sandbox:
        report["accelerator"] = sandbox.caps.accelerator
        report["memory of the guest"] = {"mib": base.memory_bytes >> 20}

        async def command() -> None:
            await sandbox.exec(["true"], timeout=_TIMEOUT)

        for _ in range(5):
            await command()
        times = [await _timed(command) for _ in range(count)]
        report["command"] = {"count": count, **percentiles(times)}
        report["template to the end of a first command"] = await _first_command(
            lambda: client.create(base), count
        )

        async def copy() -> Sandbox:
            return (await sandbox.fork())[0]

        report["copy to the end of its first command"] = await _first_command(copy, count)
        report |= await _snapshots(client, sandbox, base, cache)
        pauses = [await _timed(sandbox.pause)]
        resumes = [await _timed(sandbox.resume)]
        for _ in range(count - 1):
            pauses.append(await _timed(sandbox.pause))
            resumes.append(await _timed(sandbox.resume))
        report["pause"] = percentiles(pauses)
        report["resume"] = percentiles(resumes)
        copies = await sandbox.fork(4)
        for one in copies:
            await one.exec(["true"], timeout=_TIMEOUT)
        report["memory of one of 4 copies"] = _own_memory(runtime, copies[0].id)
        for one in copies:
            await one.stop()
    return report
