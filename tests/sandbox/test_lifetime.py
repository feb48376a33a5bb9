"""Beginnings and ends: sandboxes that stop, crash, are killed or lose their owner leave nothing."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import Client, Container, SyncClient, cgroups, state
from fathom.sandbox.substrates.choice import choose

REPOSITORY = Path(__file__).resolve().parents[2]


def locker_of(folder: Path) -> int:
    """The process that holds the lock of a sandbox's folder: its node."""
    inode = (folder / "lock").stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "FLOCK" in fields and fields[-3].endswith(f":{inode}"):
            return int(fields[-4])
    raise AssertionError("nobody holds the lock")


def gone(traces: Callable[[], set[str]], patience: float = 10.0) -> bool:
    deadline = time.monotonic() + patience
    while traces():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_sandbox_has_traces_and_stop_removes_them(client: SyncClient, traces):
    """If this fails the check after every test sees nothing and proves nothing."""
    sandbox = client.create(Container())
    sandbox.exec("sleep 3333 > /dev/null 2>&1 &", timeout=10)
    kinds = {trace.split()[0] for trace in traces()}
    assert {"folder", "process"} <= kinds
    assert ("group" in kinds) == (os.geteuid() == 0)
    sandbox.stop()
    assert traces() == set()


def test_stop_is_quick_even_when_commands_resist(client: SyncClient):
    sandbox = client.create(Container())
    stubborn = "trap '' TERM INT HUP; for i in $(seq 30); do setsid sleep 3333 & done; sleep 3333"
    sandbox.exec(f"({stubborn}) > /dev/null 2>&1 &", timeout=10)
    started = time.monotonic()
    sandbox.stop()
    assert time.monotonic() - started < 3


def test_closing_the_client_stops_all(substrate, options, traces):
    with SyncClient(substrate=substrate, **options) as client:
        made = [client.create() for _ in range(3)]
        assert len({sandbox.id for sandbox in made}) == 3
    assert traces() == set()
    with pytest.raises(SandboxLost):
        made[0].exec("true", timeout=5)
    with pytest.raises(SandboxLost, match="closed"):
        client.create()
    client.close()


def test_a_sandbox_is_a_context_of_its_own(client: SyncClient, traces):
    with client.create() as sandbox:
        assert sandbox.exec("echo hi", timeout=5).stdout == "hi\n"
    assert traces() == set()


def test_async_contexts(substrate, options, traces):
    async def run() -> None:
        async with Client(substrate=substrate, **options) as client:
            async with await client.create() as first:
                assert (await first.exec("echo 1", timeout=5)).stdout == "1\n"
            await client.create(Container())
            assert traces()
        assert traces() == set()

    anyio.run(run)


def test_stopping_while_a_command_runs(substrate, options):
    async def run() -> None:
        async with Client(substrate=substrate, **options) as client:
            sandbox = await client.create()

            async def stop() -> None:
                await anyio.sleep(0.3)
                await sandbox.stop()

            async with anyio.create_task_group() as group:
                group.start_soon(stop)
                with pytest.raises(SandboxLost):
                    await sandbox.exec("sleep 3333", timeout=60)

    started = time.monotonic()
    anyio.run(run)
    assert time.monotonic() - started < 10


def test_a_cancelled_creation_leaves_nothing(substrate, options, traces):
    async def run() -> None:
        async with Client(substrate=substrate, **options) as client:
            for delay in (0.0, 0.01, 0.03, 0.06):
                with anyio.move_on_after(delay):
                    await client.create()

    anyio.run(run)
    assert gone(traces)


def test_a_sandbox_that_nobody_holds_is_still_stopped(substrate, options, traces):
    with SyncClient(substrate=substrate, **options) as client:
        client.create()
        gc.collect()
        assert traces()
    assert traces() == set()


# Ends that nobody asked for ------------------------------------------------------------------

PROGRAM = """
    import os, signal, sys, threading, time
    from fathom.sandbox import Container, SyncClient
    client = SyncClient(substrate={substrate!r}, runtime_dir={runtime!r}, cache_dir={cache!r})
    sandbox = client.create(Container(workdir={workdir!r}))
    sandbox.exec("setsid sleep 3333 > /dev/null 2>&1 &", timeout=10)
    print(sandbox.id, flush=True)
    {end}
"""

ENDS = {
    "falls off the end": "pass",
    "raises": "raise RuntimeError('crash')",
    "exits": "sys.exit(3)",
    "dies at once": "os._exit(1)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "is terminated": "os.kill(os.getpid(), signal.SIGTERM)",
    "is killed while a command runs": (
        "threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start(); "
        "sandbox.exec('sleep 3333', timeout=60)"
    ),
    "is killed while a fork holds its sockets": (
        "p = os.fork(); (os.closerange(0, 3), time.sleep(5), os._exit(0)) if p == 0 else None; "
        "os.kill(os.getpid(), signal.SIGKILL)"
    ),
}


def run_program(end: str, substrate: str, options: dict[str, Path], workdir: Path) -> str:
    code = textwrap.dedent(PROGRAM).format(
        substrate=substrate,
        runtime=str(options["runtime_dir"]),
        cache=str(options["cache_dir"]),
        workdir=str(workdir),
        end=end,
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert done.stdout.startswith("sb-"), done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
def test_a_client_that_ends_in_any_way(end, substrate, options, traces, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    name = run_program(end, substrate, options, tmp_path)
    assert gone(traces, patience=2.0)
    assert not [path for path in Path("/sys/fs/cgroup").glob("*/fathom/*") if path.name == name]
    assert (precious / "file").read_text() == "kept"


def test_a_killed_node_takes_its_sandbox_with_it(client: SyncClient, options, traces, tmp_path):
    """The next client, or the stop of this one, removes what a dead node could not."""
    (tmp_path / "file").write_text("kept")
    sandbox = client.create(Container(workdir=tmp_path))
    sandbox.exec("sleep 3333 > /dev/null 2>&1 &", timeout=10)
    os.kill(locker_of(options["runtime_dir"] / sandbox.id), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(trace.startswith("process") for trace in traces()):
        assert time.monotonic() < deadline, "a process outlived its node"
        time.sleep(0.02)
    with pytest.raises(SandboxLost):
        sandbox.exec("true", timeout=5)
    assert traces()
    with SyncClient(substrate=sandbox.caps.substrate, **options) as other:
        other.create().stop()
    assert traces() == set()
    assert (tmp_path / "file").read_text() == "kept"
    sandbox.stop()


def test_stop_cleans_up_after_a_killed_node(client: SyncClient, options, traces):
    sandbox = client.create()
    os.kill(locker_of(options["runtime_dir"] / sandbox.id), signal.SIGKILL)
    sandbox.stop()
    assert traces() == set()


def test_a_node_killed_while_a_command_runs(substrate, options):
    async def run() -> None:
        async with Client(substrate=substrate, **options) as client:
            sandbox = await client.create()

            async def kill() -> None:
                await anyio.sleep(0.3)
                os.kill(locker_of(options["runtime_dir"] / sandbox.id), signal.SIGKILL)

            async with anyio.create_task_group() as group:
                group.start_soon(kill)
                with pytest.raises(SandboxLost, match="lost while a command ran"):
                    await sandbox.exec("sleep 3333", timeout=60)

    anyio.run(run)


def first_of(folder: Path) -> int:
    """The host's number of a sandbox's agent."""
    return int((folder / "first").read_text().split()[0])


def test_a_killed_monitor_costs_one_command_at_most(client: SyncClient, options):
    """Nobody knows any more what that command started, so all that runs is ended."""
    sandbox = client.create()
    agent = first_of(options["runtime_dir"] / sandbox.id)
    children = Path(f"/proc/{agent}/task/{agent}/children")

    def kill() -> None:
        time.sleep(0.3)
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = sandbox.exec("setsid sleep 3333 & sleep 3333", timeout=30)
    killer.join()
    assert (result.exit_code, result.timed_out) == (137, False)
    assert sandbox.exec("pgrep -c sleep", timeout=5).stdout == "0\n"


def test_the_death_of_the_first_process_is_noticed(client: SyncClient, options, traces):
    sandbox = client.create()
    os.kill(first_of(options["runtime_dir"] / sandbox.id), signal.SIGKILL)
    assert gone(traces)
    with pytest.raises(SandboxLost, match="ended on its own"):
        sandbox.exec("true", timeout=5)


def test_a_fork_cannot_use_or_end_what_is_not_its_own(client: SyncClient):
    sandbox = client.create()
    child = os.fork()
    if child == 0:
        try:
            sandbox.exec("true", timeout=5)
        except SandboxError as error:
            client.close()
            client._client._host.close_at_exit()
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert sandbox.exec("echo fine", timeout=5).stdout == "fine\n"


@pytest.mark.usefixtures("need_root")
def test_a_frozen_group_ends_under_v2():
    """On a real v2 tree, beside which v1 may be in use: what is frozen does not die by itself."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    trees = [Path(line.split()[1]) for line in mounts if line.split()[2] == "cgroup2"]
    if not trees:
        pytest.skip("no cgroup2 is mounted")
    home = trees[0] / "fathom" / f"sb-{os.getpid()}-test"
    home.mkdir(parents=True)
    layout = cgroups.Layout(version=2, roots=dict.fromkeys(cgroups.CONTROLLERS, trees[0]))
    group = cgroups.Group(layout, home.name)
    child = subprocess.Popen(["bash", "-c", "trap '' TERM; setsid sleep 99 & sleep 99"])
    try:
        group.enter(child.pid)
        group.freeze()
        assert group.frozen
        group.thaw()
        assert not group.frozen
        group.freeze()
    finally:
        reaper = threading.Thread(target=child.wait)
        reaper.start()
        assert cgroups.destroy_folders([home])
        reaper.join()


def test_stale_folders_are_reaped_and_others_left_alone(tmp_path: Path):
    for name in ("stale", "live", "starting", "abandoned"):
        (tmp_path / name).mkdir()
    for name in ("stale", "live"):
        (tmp_path / name / "lock").touch()
    for mounted in ("rootfs", "work"):
        (tmp_path / "stale" / mounted).mkdir()
    # The number of a process that lives, but that is not the one written down.
    (tmp_path / "stale" / "first").write_text(f"{os.getpid()} 1")
    (tmp_path / "stale" / "groups.json").write_text('["/etc", "/nonexistent/fathom/x"]')
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "file").touch()
    os.utime(tmp_path / "abandoned", (0, 0))
    held = state.claim(tmp_path / "live")
    assert state.reap(tmp_path) == ["abandoned", "stale"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "live", "starting"]
    assert Path("/etc/passwd").exists()
    with pytest.raises(SandboxError, match="another sandbox"):
        state.claim(tmp_path / "live")
    os.close(held)
    assert state.reap(tmp_path / "missing") == []


def test_removal_never_goes_below_what_may_be_mounted(tmp_path: Path):
    folder = tmp_path / "sandbox"
    for name in ("rootfs", "work", "unknown", "runtime"):
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "file").write_text("precious")
    assert not state.remove(folder)
    for name in ("rootfs", "work", "unknown"):
        assert (folder / name / "deep" / "file").read_text() == "precious"
    assert not (folder / "runtime").exists()


# Starts that fail ----------------------------------------------------------------------------


def test_where_must_be_a_place():
    with pytest.raises(Unsupported, match="HOST:PORT"):
        Client("ssh://example.org")
    with pytest.raises(SandboxError, match="token"):
        Client("https://example.org")


def test_unknown_substrates():
    with pytest.raises(SandboxError, match="choose auto, crun, runc, bubblewrap"):
        Client(substrate="docker")  # type: ignore[arg-type]


@pytest.mark.usefixtures("need_root")
def test_a_substrate_for_other_users(options):
    with (
        SyncClient(substrate="bubblewrap", **options) as client,
        pytest.raises(Unsupported, match="bubblewrap is not for root: use crun or runc"),
    ):
        client.create()


def test_what_to_install_is_said(options, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fathom.sandbox.substrates.choice._PATH", "/nonexistent")
    with (
        SyncClient(**options) as client,
        pytest.raises(Unsupported, match=r"apt-get install -y (crun|bubblewrap)"),
    ):
        client.create()


@pytest.mark.usefixtures("need_root")
def test_a_runtime_that_fails_says_why_and_leaves_nothing(
    options, traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = tmp_path / "crun"
    broken.write_text("#!/bin/sh\necho 'no such kernel feature' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("fathom.sandbox.substrates.choice._PATH", str(tmp_path))
    with (
        SyncClient(substrate="crun", **options) as client,
        pytest.raises(SandboxError, match=r"no such kernel feature; run `fathom doctor`"),
    ):
        client.create()
    assert traces() == set()


@pytest.mark.usefixtures("need_root")
def test_auto_takes_the_next_runtime_when_the_first_fails(
    options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runc = [program for name, program in choose("auto") if name == "runc"]
    if not runc:
        pytest.skip("runc is not installed")
    (tmp_path / "crun").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "crun").chmod(0o755)
    (tmp_path / "runc").symlink_to(runc[0])
    monkeypatch.setattr("fathom.sandbox.substrates.choice._PATH", str(tmp_path))
    with SyncClient(**options) as client:
        assert client.create().caps.substrate == "runc"


def test_a_runtime_folder_of_somebody_else(tmp_path: Path, options):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with (
        SyncClient(runtime_dir=folder, cache_dir=options["cache_dir"]) as client,
        pytest.raises(SandboxError, match="others may write"),
    ):
        client.create()


@pytest.mark.usefixtures("need_root")
def test_a_runtime_folder_that_tenants_cannot_pass(tmp_path: Path, options):
    tmp_path.chmod(0o700)
    with (
        SyncClient(runtime_dir=tmp_path / "r", cache_dir=options["cache_dir"]) as client,
        pytest.raises(SandboxError, match="cannot pass"),
    ):
        client.create()


@pytest.mark.usefixtures("need_root")
def test_all_copies_show_one_moment(client: SyncClient):
    sandbox = client.create()
    count = "i=0; while :; do i=$((i+1)); echo $i > a; echo $i > b; done"
    sandbox.exec(f"({count}) > /dev/null 2>&1 &", timeout=10)
    copies = sandbox.fork(4)
    seen = {copy.exec("cat a b", timeout=10).stdout for copy in copies}
    assert len(seen) == 1
    assert len({copy.exec("hostname", timeout=10).stdout for copy in copies}) == 4
    before = sandbox.exec("cat a", timeout=10).stdout
    time.sleep(0.05)
    assert sandbox.exec("cat a", timeout=10).stdout != before, "it goes on"
