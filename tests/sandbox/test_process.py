"""A running command used from several tasks or threads: nothing is lost, nobody waits for ever."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import anyio
import pytest

from fathom.errors import ProcessClosed, SandboxError
from fathom.sandbox import Client, Container, SyncSandbox
from fathom.sandbox import process as processes
from fathom.sandbox.process import Process


def test_writing_and_reading_at_once_loses_nothing(options: dict[str, Path]):
    async def echo(process: Process, data: bytes) -> bytes:
        got = bytearray()

        async def write() -> None:
            await process.write(data)
            await process.close_input()

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(write)
                async for _, piece in process:
                    got.extend(piece)
        return bytes(got)

    async def scenario() -> None:
        async with Client("local", **options) as client:
            sandbox = await client.create(Container())
            for _ in range(5):
                data = os.urandom(2 << 20)
                async with await sandbox.run("cat", timeout=30) as process:
                    assert await echo(process, data) == data

    anyio.run(scenario)


def test_several_tasks_write_and_signal_without_mixing_their_frames(options: dict[str, Path]):
    async def scenario() -> None:
        async with Client("local", **options) as client:
            sandbox = await client.create(Container())
            async with await sandbox.run("trap : USR1; cat | wc -c", timeout=30) as process:
                sizes = [100_000, 300_000, 1]
                with anyio.fail_after(20):
                    async with anyio.create_task_group() as group:
                        for size in sizes:
                            group.start_soon(process.write, b"x" * size)
                        for _ in range(20):
                            group.start_soon(process.resize, 3, 3)
                    await process.close_input()
                    pieces = [data async for _, data in process]
                assert int(b"".join(pieces)) == sum(sizes)

    anyio.run(scenario)


def test_a_cancelled_writer_leaves_no_half_of_a_frame(options: dict[str, Path]):
    async def scenario() -> None:
        async with Client("local", **options) as client:
            sandbox = await client.create(Container())
            async with await sandbox.run("sleep 1; wc -c", timeout=30) as process:
                with anyio.move_on_after(0.3):
                    await process.write(b"x" * (4 << 20))
                await process.close_input()
                pieces = [data async for _, data in process]
                assert 0 < int(b"".join(pieces)) < 4 << 20

    anyio.run(scenario)


def test_closing_wakes_a_reader_and_leaves_the_client_whole(options: dict[str, Path]):
    async def scenario() -> None:
        async with Client("local", **options) as client:
            sandbox = await client.create(Container())
            process = await sandbox.run("sleep 30", timeout=40)
            ends: list[str] = []

            async def read() -> None:
                with pytest.raises(ProcessClosed):
                    await process.read()
                ends.append("read")

            async def write() -> None:
                with pytest.raises(ProcessClosed):
                    await process.write(b"x" * (8 << 20))
                ends.append("write")

            with anyio.fail_after(5):
                async with anyio.create_task_group() as group:
                    group.start_soon(read)
                    group.start_soon(read)
                    group.start_soon(write)
                    await anyio.sleep(0.3)
                    await process.close()
                    # The next line gets the same number while the waiters are still on their way.
                    assert (await sandbox.exec("echo 0", timeout=5)).stdout == "0\n"
            assert sorted(ends) == ["read", "read", "write"]
            for number in range(6):
                with anyio.fail_after(8):
                    result = await sandbox.exec(f"echo {number}", timeout=5)
                assert result.stdout == f"{number}\n"
            with pytest.raises(ProcessClosed):
                await process.signal()

    anyio.run(scenario)


@pytest.mark.parametrize("stopped", [False, True], ids=["closed", "sandbox stopped"])
def test_what_ends_a_process_wakes_its_readers(sandbox: SyncSandbox, stopped: bool):
    process = sandbox.run("sleep 30", timeout=40)
    found: list[BaseException] = []

    def read() -> None:
        try:
            list(process)
        except BaseException as error:
            found.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    time.sleep(0.3)
    if stopped:
        sandbox.stop()
    else:
        process.close()
    reader.join(5)
    if stopped:
        assert [getattr(error, "code", None) for error in found] == ["sandbox_lost"]
        process.close()
    else:
        assert [type(error) for error in found] == [ProcessClosed]
        assert [sandbox.exec("echo x", timeout=5).stdout for _ in range(6)] == ["x\n"] * 6


def test_output_that_nobody_reads_does_not_fill_the_writers_memory(
    sandbox: SyncSandbox, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(processes, "_MOST_HELD", 1 << 20)
    with (
        sandbox.run("cat /dev/zero", timeout=30) as process,
        pytest.raises(SandboxError, match="nobody reads"),
    ):
        process.write(b"x" * (1 << 20))
    # With a reader, however slow, the writer waits instead, and all of it arrives.
    got: list[int] = []
    with sandbox.run("cat", timeout=30) as process:

        def read() -> None:
            for _, piece in process:
                time.sleep(0.002)
                got.append(len(piece))

        reader = threading.Thread(target=read)
        reader.start()
        process.write(b"x" * (4 << 20))
        process.close_input()
        reader.join(20)
    assert sum(got) == 4 << 20


@pytest.mark.parametrize("command", [[""], [], 5, b"true", None, {"a": 1}.keys()])
def test_commands_that_are_none(shared: SyncSandbox, command: object):
    with pytest.raises(SandboxError, match="the command is"):
        shared.exec(command, timeout=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [1e30, 1e10, 0, -1, float("nan"), float("inf"), "5"])
def test_timeouts_that_are_none(shared: SyncSandbox, timeout: float):
    with pytest.raises(SandboxError, match="timeout is"):
        shared.exec("true", timeout=timeout)


def test_a_timeout_of_years(shared: SyncSandbox):
    assert shared.exec("echo x", timeout=1e9).stdout == "x\n"
