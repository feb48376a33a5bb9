"""MicroVMs: the conformance suite, copies with their processes, snapshots, layers, ends."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import anyio
import pytest

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import (
    Client,
    Container,
    FullVM,
    MicroVM,
    SyncClient,
    SyncSandbox,
    conformance,
    state,
)
from fathom.sandbox.vm import emulator
from tests.sandbox.test_lifetime import locker_of
from tests.sandbox.vm.conftest import SPEC

TIMEOUT = 30.0


@pytest.mark.usefixtures("need_machines")
@pytest.mark.timeout(300)
def test_conformance(options: dict[str, Path]):
    async def run() -> conformance.Report:
        async with Client(**options) as client:
            return await conformance.run(lambda: client.create(SPEC))

    report = anyio.run(run)
    assert report.passed, str(report)
    assert {outcome.name for outcome in report.outcomes} == set(conformance.CHECKS)


def test_caps_say_how_it_is_run(shared_machine: SyncSandbox):
    caps = shared_machine.caps
    assert caps.substrate == "microvm"
    assert caps.accelerator in ("kvm", "tcg")
    assert caps.hardware_isolation == (caps.accelerator == "kvm")
    assert (caps.fork, caps.snapshot) == ("memory", "memory")
    with pytest.raises(Unsupported, match="screenshot"):
        shared_machine.screenshot()


def test_the_kernel_is_its_own(shared_machine: SyncSandbox):
    result = shared_machine.exec(
        "uname -r; nproc; free -m | awk '/Mem/ {print $2}'", timeout=TIMEOUT
    )
    release, processors, memory = result.stdout.split()
    assert release != os.uname().release
    assert "cloud" in release
    assert processors == "1"
    assert 100 < int(memory) < 160
    clock = float(shared_machine.exec("date +%s.%N", timeout=TIMEOUT).stdout)
    assert abs(clock - time.time()) < 5


def test_copies_go_on_with_their_processes(machine: SyncSandbox):
    counting = "i=0; while :; do i=$((i+1)); echo $i > /tmp/n; sleep 0.2; done"
    # One that was left in the background, and one that somebody waits for.
    machine.exec(f"echo mine > /tmp/id; ({counting}) > /dev/null 2>&1 &", timeout=TIMEOUT)
    begun = "until pgrep -f '^sleep 432[5]'; do sleep 0.1; done"
    with machine.run(["sleep", "4325"], timeout=60):
        machine.exec(begun, timeout=TIMEOUT)
        with machine.fork()[0] as copy:
            look = (
                'a=$(cat /tmp/n); b=$a; until [ -n "$b" ] && [ "$b" != "$a" ]; do sleep 0.2; '
                "b=$(cat /tmp/n); done; echo $b; pgrep -fc '^sleep 432[5]'"
            )
            for one in (machine, copy):
                counted, running = one.exec(look, timeout=TIMEOUT).stdout.split()
                assert (int(counted) > 0, running) == (True, "1")
            copy.exec("echo only here > /work/f", timeout=TIMEOUT)
            assert machine.exec("test -e /work/f", timeout=TIMEOUT).exit_code == 1
            # A copy of a copy has what both wrote.
            with copy.fork()[0] as grandchild:
                shown = grandchild.exec("cat /work/f /tmp/id", timeout=TIMEOUT).stdout
                assert shown == "only here\nmine\n"


def test_a_copy_made_while_commands_run_disturbs_none(machine: SyncSandbox):
    with machine.run("for i in $(seq 400); do echo line $i; done; cat", timeout=60) as process:
        (copy,) = machine.fork()
        with copy:
            assert copy.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"
        process.write("last\n")
        process.close_input()
        output = b"".join(data for _, data in process)
    assert output.decode().splitlines() == [*(f"line {i}" for i in range(1, 401)), "last"]


def test_a_snapshot_outlives_its_machine_and_its_node(
    machines: SyncClient, options: dict[str, Path]
):
    with machines.create(SPEC) as sandbox:
        sandbox.exec("echo kept > f; (sleep 4324 > /dev/null 2>&1 &)", timeout=TIMEOUT)
        sandbox.pause()
        kept = sandbox.snapshot()
        sandbox.exec("echo later > f", timeout=TIMEOUT)
    with SyncClient(**options) as other:
        again = other.restore(kept, SPEC)
        shown = again.exec("cat f; pgrep -fc 'sleep 432[4]'", timeout=TIMEOUT)
        assert shown.stdout == "kept\n1\n"
        clock = float(again.exec("date +%s.%N", timeout=TIMEOUT).stdout)
        assert abs(clock - time.time()) < 5
        with pytest.raises(SandboxError, match="of other values"):
            other.restore(kept, MicroVM(memory="192MiB", disk="32MiB"))
        with pytest.raises(SandboxError, match="MicroVM"):
            other.restore(kept, Container())


@pytest.mark.parametrize("harm", ["cut", "facts", "state"])
def test_a_damaged_snapshot_is_refused(
    machines: SyncClient, machine: SyncSandbox, cache_dir: Path, harm: str
):
    kept = machine.snapshot()
    folder = cache_dir / "snapshots" / kept.id
    if harm == "cut":
        os.truncate(folder / "memory", 1 << 20)
    elif harm == "facts":
        facts = json.loads((folder / "facts.json").read_text())
        (folder / "facts.json").write_text(json.dumps({**facts, "secret": 5}))
    else:
        data = (folder / "state").read_bytes()
        (folder / "state").write_bytes(data[: len(data) // 2])
    with pytest.raises(SandboxError):
        machines.restore(kept, SPEC)


def test_what_was_written_becomes_a_layer(machines: SyncClient, machine: SyncSandbox):
    long = "d/" + "n" * 120
    machine.exec(
        f"mkdir d; echo one > d/f; ln -s f d/l; echo long > {long}; chmod 750 d; mkfifo p; "
        "dd if=/dev/urandom of=big bs=1M count=2 2>/dev/null; sha256sum big > sum",
        timeout=TIMEOUT,
    )
    digest = machine.pack_diff(name="test/vm-writes")
    assert digest.startswith("sha256:")
    check = f"cat d/l {long}; stat -c %a d; test -p p && sha256sum -c sum"
    wanted = "one\nlong\n750\nbig: OK\n"
    with machines.create(MicroVM(image="test/vm-writes", memory="160MiB", disk="32MiB")) as made:
        assert made.exec(check, timeout=TIMEOUT).stdout == wanted
    # The same image serves a container, whose tenant is the same user.
    with machines.create(Container(image="test/vm-writes")) as made:
        assert made.exec(check, timeout=TIMEOUT).stdout == wanted


def test_what_no_layer_can_hold(machine: SyncSandbox):
    machine.exec("truncate -s 1T hole", timeout=TIMEOUT)
    began = time.monotonic()
    with pytest.raises(SandboxError, match="holes included"):
        machine.pack_diff()
    assert time.monotonic() - began < 30
    deep = "rm hole; i=0; while [ $i -lt 220 ]; do mkdir d; cd d; i=$((i+1)); done"
    machine.exec(deep, timeout=TIMEOUT)
    with pytest.raises(SandboxError, match="nested more than 200 deep"):
        machine.pack_diff()


def test_limits(machine: SyncSandbox):
    assert machine.exec("head -c 64M /dev/zero > full", timeout=TIMEOUT).exit_code != 0
    machine.files.remove("full")
    bomb = machine.exec("head -c 500M /dev/zero | tail -c 500M", timeout=60)
    assert bomb.oom_killed
    # Each waits for a writer that never comes, without a program of its own.
    flood = "mkfifo /tmp/p; for i in $(seq 150); do { : < /tmp/p; } & done"
    with machine.run(flood, timeout=60, merge=True) as process:
        said = b""
        while b"fork" not in said and (piece := process.read()) is not None:
            said += piece[1]
    assert b"fork" in said
    assert machine.exec("echo alive", timeout=60).stdout == "alive\n"


def test_values_that_cannot_be_had(machines: SyncClient):
    for spec in (
        MicroVM(memory="64MiB"),
        MicroVM(memory="3GiB"),
        MicroVM(disk="200MiB"),
        MicroVM(cpu=0),
        MicroVM(hostname="a b"),
        MicroVM(idle_ttl=-1),
        FullVM(disk="1MiB"),
        FullVM(user="nobody"),  # type: ignore[arg-type]
    ):
        with pytest.raises(SandboxError):
            machines.create(spec)


def test_without_the_emulator_it_says_what_to_install(
    machines: SyncClient, monkeypatch: pytest.MonkeyPatch
):
    emulator.find.cache_clear()
    monkeypatch.setattr(emulator, "_PATH", "/nonexistent")
    with pytest.raises(Unsupported, match=r"apt-get install .* qemu-system-x86"):
        machines.create(SPEC)
    monkeypatch.undo()
    emulator.find.cache_clear()


def test_a_machine_that_dies_is_lost_and_leaves_nothing(
    machines: SyncClient, options: dict[str, Path], traces
):
    before = traces()
    sandbox = machines.create(SPEC)
    folder = options["runtime_dir"] / sandbox.id
    assert {"folder", "group", "process"} <= {trace.split()[0] for trace in traces() - before}
    os.kill(state.first_process(folder), signal.SIGKILL)
    with pytest.raises(SandboxLost):
        sandbox.exec("true", timeout=5)
    deadline = time.monotonic() + 10
    while traces() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert traces() - before == set()
    sandbox.stop()


@pytest.mark.usefixtures("need_machines")
def test_a_killed_node_takes_its_machines_along(options: dict[str, Path], traces):
    before = traces()
    client = SyncClient(**options)
    sandbox = client.create(SPEC)
    folder = options["runtime_dir"] / sandbox.id
    emulator_pid = state.first_process(folder)
    os.kill(locker_of(folder), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{emulator_pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{emulator_pid}").exists()
    client.close()
    assert traces() - before == set()
