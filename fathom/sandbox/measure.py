"""What sandboxes cost on this machine: times with percentiles, rates, memory.

Every figure comes with the host, the kernel and the load, because it means nothing without them.

Paper: none (measurement).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import anyio

from fathom.sandbox.client import Client
from fathom.sandbox.sandbox import Sandbox
from fathom.sandbox.types import Container, Fn

_TIMEOUT = 60.0
_GAP = 0.006
_CALL = "def main(x):\n    return x"
SMALL = Container(memory="16MiB", pids=16)


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Return p50, p95, p99 and the greatest, in milliseconds."""
    values = sorted(seconds)
    last = len(values) - 1

    def at(part: float) -> float:
        return round(values[min(last, int(part * len(values)))] * 1000, 3)

    return {"p50_ms": at(0.5), "p95_ms": at(0.95), "p99_ms": at(0.99), "max_ms": at(1.0)}


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 2),
    }


async def _times(count: int, work: Callable[[], Awaitable[object]]) -> list[float]:
    found: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await work()
        found.append(time.perf_counter() - began)
    return found


async def warm_command(client: Client, count: int) -> dict[str, Any]:
    """Measure `true` in a sandbox that runs."""
    async with await client.create() as sandbox:
        run = lambda: sandbox.exec(["true"], timeout=_TIMEOUT)  # noqa: E731
        await _times(5, run)
        return {"count": count, **percentiles(await _times(count, run))}


async def function_call(client: Client, count: int, gap: float) -> dict[str, Any]:
    """Measure calls of a function that returns its argument, one at a time.

    `gap`: seconds between two calls, in which interpreters are made ready again. Without one they
    are while calls are made, on the same processors.
    """
    async with await client.functions(Fn(workers=4)) as functions:

        async def call(gap: float) -> float:
            began = time.perf_counter()
            await functions.call(_CALL, 1, timeout=_TIMEOUT)
            seconds = time.perf_counter() - began
            await anyio.sleep(gap)
            return seconds

        for _ in range(8):
            await call(_GAP)
        return {"count": count, **percentiles([await call(gap) for _ in range(count)])}


async def cold_start(client: Client, count: int) -> dict[str, Any]:
    """Measure from the request for a sandbox to the end of its first command."""
    times: list[float] = []
    for _ in range(count + 1):
        began = time.perf_counter()
        sandbox = await client.create()
        ready = time.perf_counter()
        await sandbox.exec(["true"], timeout=_TIMEOUT)
        times.append(time.perf_counter() - began)
        await sandbox.stop()
        del ready
    return {"count": count, **percentiles(times[1:])}


async def claim(client: Client, count: int) -> dict[str, Any]:
    """Measure the same where sandboxes wait to be taken; each is replaced while the clock runs."""
    spec = Container(hostname="pooled")
    times: list[float] = []
    taken: list[Sandbox] = []
    for _ in range(count):
        await client.prewarm(spec, 2)
        began = time.perf_counter()
        sandbox = await client.create(spec)
        await sandbox.exec(["true"], timeout=_TIMEOUT)
        times.append(time.perf_counter() - began)
        taken.append(sandbox)
    await client.prewarm(spec, 0)
    for sandbox in taken:
        await sandbox.stop()
    return {"count": count, **percentiles(times)}


async def creations(client: Client, count: int, workers: int = 8) -> dict[str, Any]:
    """Measure how many sandboxes with limits are made, used once and removed in a second."""
    left = count

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            sandbox = await client.create(Container(memory="64MiB", pids=32, cpu=1.0))
            await sandbox.exec(["true"], timeout=_TIMEOUT)
            await sandbox.stop()

    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(workers):
            group.start_soon(work)
    rate = count / (time.perf_counter() - began)
    return {
        "count": count,
        "workers": workers,
        "per_second": round(rate, 1),
        "per_second_and_core": round(rate / (os.cpu_count() or 1), 1),
    }


async def forks(client: Client, count: int) -> dict[str, Any]:
    """Measure copies of a sandbox with 200 files, up to the end of the copy's first command."""
    async with await client.create() as sandbox:
        fill = "for i in $(seq 200); do head -c 4096 /dev/urandom > f$i; done"
        await sandbox.exec(fill, timeout=_TIMEOUT)
        times: list[float] = []
        for _ in range(count):
            began = time.perf_counter()
            (copy,) = await sandbox.fork()
            await copy.exec(["true"], timeout=_TIMEOUT)
            times.append(time.perf_counter() - began)
            await copy.stop()
        return {"count": count, **percentiles(times)}


# What sandboxes alone change; the memory of other programs does not count in.
_KERNEL = ("SUnreclaim", "KernelStack", "PageTables", "Percpu")


def _memory(*names: str) -> int:
    """Return the sum of some lines of /proc/meminfo, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = {name: int(rest.split()[0]) << 10 for name, rest in (x.split(":") for x in lines)}
    return sum(found.get(name, 0) for name in names)


async def held(client: Client, count: int) -> dict[str, Any]:
    """Hold idle sandboxes, then pause and resume all of them as one group."""
    await client.create(SMALL)
    before, kernel = _memory("MemAvailable"), _memory(*_KERNEL)
    began = time.perf_counter()
    limiter = anyio.CapacityLimiter(8)

    async def make() -> None:
        async with limiter:
            await client.create(SMALL, group="held")

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(make)
    seconds = time.perf_counter() - began
    each = (before - _memory("MemAvailable")) / count
    kernel = (_memory(*_KERNEL) - kernel) / count
    group = client.group("held")
    members = group.members()
    charged = [(await sandbox.stats()).memory or 0 for sandbox in members[:20]]
    began = time.perf_counter()
    await group.pause()
    paused = time.perf_counter()
    await group.resume()
    resumed = time.perf_counter()
    answers = [
        await sandbox.exec(["true"], timeout=_TIMEOUT) for sandbox in members[:: count // 10]
    ]
    assert all(answer.exit_code == 0 for answer in answers)
    stopping = time.perf_counter()
    await group.stop()
    return {
        "count": count,
        "started_per_second": round(count / seconds, 1),
        "kib_each_by_available": round(each / 1024),
        "kib_each_in_the_kernel": round(kernel / 1024),
        "kib_each_by_group": round(sum(charged) / len(charged) / 1024),
        "pause_ms": round((paused - began) * 1000, 1),
        "resume_ms": round((resumed - paused) * 1000, 1),
        "stopped_per_second": round(count / (time.perf_counter() - stopping), 1),
    }


async def everything(client: Client, count: int, hold: int) -> dict[str, Any]:
    """Measure all of it; `hold`: idle sandboxes held at once."""
    report: dict[str, Any] = {"machine": machine()}
    async with await client.create() as sandbox:
        caps = sandbox.caps
    report["substrate"] = caps.substrate
    report["warm command"] = await warm_command(client, count)
    report["function call"] = await function_call(client, count, _GAP)
    report["function calls one after the other"] = await function_call(client, count, 0)
    report["cold start"] = await cold_start(client, max(5, count // 10))
    report["claim"] = await claim(client, max(5, count // 10))
    report["creations"] = await creations(client, max(16, count // 4))
    if caps.fork:
        report["fork"] = await forks(client, max(5, count // 10))
    if caps.pause:
        report["held"] = await held(client, hold)
    return report
