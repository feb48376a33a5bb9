"""Callers that give up: what they had asked for is there for nobody, and is ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import pytest

from fathom.sandbox import Client, Container, Sandbox

Options = dict[str, Path]
DELAYS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03)


def folders(options: Options) -> set[str]:
    return {path.name for path in options["runtime_dir"].iterdir()}


async def by_scope(work: Callable[[], Coroutine[Any, Any, Any]], delay: float) -> None:
    with anyio.move_on_after(delay):
        await work()


async def by_task(work: Callable[[], Coroutine[Any, Any, Any]], delay: float) -> None:
    task = asyncio.ensure_future(work())
    await asyncio.sleep(delay)
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("how", [by_scope, by_task])
def test_a_cancelled_creation_or_copy_is_ended(substrate: str, options: Options, how: Any):
    async def run() -> None:
        async with Client(substrate=substrate, **options) as client:  # pyright: ignore
            kept = await client.create(Container())
            given: list[Sandbox] = []

            async def create() -> None:
                given.append(await client.create(Container()))

            async def copy() -> None:
                given.extend(await kept.fork(2))

            for delay in DELAYS:
                await how(create, delay)
                if kept.caps.fork:
                    await how(copy, delay)
            names = {kept.id} | {sandbox.id for sandbox in given}
            assert folders(options) == names
            assert (await kept.exec("echo on", timeout=10)).stdout == "on\n"

    asyncio.run(run())


def test_a_failure_is_told_and_a_result_is_given(substrate: str, options: Options):
    async def run() -> None:
        async with Client(substrate=substrate, **options) as client:  # pyright: ignore
            with pytest.raises(Exception, match="no image"):
                await client.create(Container(image="test/none"))
            await client.create(Container())
            assert len(folders(options)) == 1

    asyncio.run(run())
