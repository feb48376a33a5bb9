"""Limits: what holds, what is said when one is hit, and what is refused where it cannot hold."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fathom.errors import SandboxError, Unsupported
from fathom.sandbox import Container, SyncClient, cgroups
from fathom.sandbox.substrates.choice import suited

each_substrate = pytest.mark.parametrize("substrate", suited(), indirect=True)
EAT = "head -c {} /dev/zero | tail -c 1G > /dev/null"


@pytest.fixture
def limited(client: SyncClient, substrate: str) -> SyncClient:
    if substrate == "bubblewrap":
        pytest.skip("bubblewrap holds no limit of memory or processor time")
    return client


@each_substrate
def test_too_much_memory_is_reported(limited: SyncClient):
    sandbox = limited.create(Container(memory="64MiB"))
    result = sandbox.exec(EAT.format("256M"), timeout=30)
    assert result.oom_killed
    assert result.exit_code != 0
    assert not result.timed_out
    calm = sandbox.exec("echo fine", timeout=10)
    assert (calm.stdout, calm.oom_killed) == ("fine\n", False)


@each_substrate
def test_the_number_of_files_is_bounded_or_said_not_to_be(client: SyncClient, substrate: str):
    sandbox = client.create(Container(memory="64MiB" if substrate != "bubblewrap" else None))
    if substrate == "bubblewrap":
        assert "files" in sandbox.caps.not_enforced
        return
    assert "files" in sandbox.caps.enforced
    fill = "cd {} && for i in $(seq 100); do seq -f $i-%g 100 | xargs touch || exit; done"
    for folder, disk in (("/work", 16 << 20), ("/dev/shm", 4 << 20)):
        result = sandbox.exec(fill.format(folder), timeout=60)
        assert "No space left" in result.stderr
        found = int(sandbox.exec(f"find {folder} | wc -l", timeout=30).stdout)
        assert found <= disk // 4096 + 1024 + 100


def test_memory_within_the_limit_is_not(limited: SyncClient):
    sandbox = limited.create(Container(memory="64MiB"))
    result = sandbox.exec(EAT.format("24M"), timeout=30)
    assert (result.exit_code, result.oom_killed) == (0, False)


def test_many_small_eaters_count_together(limited: SyncClient):
    sandbox = limited.create(Container(memory="64MiB"))
    many = f"for i in 1 2 3 4 5 6; do {EAT.format('20M')} & done; wait"
    assert sandbox.exec(many, timeout=30).oom_killed


def test_files_in_memory_count_too(limited: SyncClient):
    sandbox = limited.create(Container(memory="48MiB", disk="16MiB"))
    fill = "head -c 10M /dev/zero > /work/a; head -c 5M /dev/zero > /tmp/a; echo filled"
    assert sandbox.exec(fill, timeout=30).stdout == "filled\n"
    assert sandbox.exec(EAT.format("40M"), timeout=30).oom_killed
    assert sandbox.exec("rm /work/a /tmp/a; echo fine", timeout=10).stdout == "fine\n"


@each_substrate
def test_a_command_is_the_first_to_go_when_memory_is_short(limited: SyncClient):
    sandbox = limited.create(Container())
    scores = sandbox.exec("cat /proc/1/oom_score_adj /proc/self/oom_score_adj", timeout=10)
    first, own = map(int, scores.stdout.split())
    assert first < own == 500
    assert sandbox.exec("echo -1000 > /proc/self/oom_score_adj", timeout=10).exit_code != 0


@each_substrate
def test_the_smallest_sandbox_works(limited: SyncClient):
    sandbox = limited.create(Container(memory="16MiB", pids=8))
    sandbox.files.write("f", b"x" * 100_000)
    assert len(sandbox.files.read("f")) == 100_000


def test_memory_is_per_process_without_root(client: SyncClient, substrate: str):
    if substrate != "bubblewrap":
        pytest.skip("the limit holds for the whole sandbox here")
    sandbox = client.create(Container())
    assert sandbox.exec("ulimit -v", timeout=10).stdout == f"{512 << 10}\n"
    assert sandbox.exec(EAT.format("900M"), timeout=30).exit_code != 0


@each_substrate
def test_processes(client: SyncClient):
    sandbox = client.create(Container(pids=20))
    result = sandbox.exec("for i in $(seq 60); do sleep 5 & done; jobs -p | wc -l", timeout=1)
    assert "fork" in result.stderr
    fits = sandbox.exec("for i in $(seq 12); do sleep 0.2 & done; wait; echo fits", timeout=20)
    assert fits.stdout == "fits\n"


@each_substrate
def test_processor_time(limited: SyncClient):
    sandbox = limited.create(Container(cpu=0.2))
    busy = "TIMEFORMAT='%R %U %S'; time for ((i = 0; i < 200000; i++)); do :; done"
    wall, user, system = map(float, sandbox.exec(busy, timeout=60).stderr.split())
    assert user + system < 0.4 * wall


@each_substrate
def test_caps_say_what_holds(client: SyncClient, substrate: str):
    caps = client.create(Container()).caps
    assert caps.substrate == substrate
    everything = {"memory", "pids", "cpu", "disk", "files"}
    assert (caps.enforced | caps.not_enforced) - {"io_read", "io_write"} == everything
    assert not caps.enforced & caps.not_enforced
    if os.geteuid() == 0:
        assert caps.enforced >= everything
        assert (caps.reports_oom, caps.timeout_kills, caps.separate_user) == (True, "command", True)
    else:
        assert caps.not_enforced == {"memory", "cpu", "files"}
        assert (caps.reports_oom, caps.timeout_kills) == (False, "command")


@pytest.mark.parametrize("limit", [{"memory": "512MiB"}, {"cpu": 1.0}])
def test_a_limit_that_cannot_hold_is_refused(client: SyncClient, substrate: str, limit):
    if substrate != "bubblewrap":
        client.create(Container(**limit))
        return
    with pytest.raises(Unsupported, match="leave it out, or run as root"):
        client.create(Container(**limit))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"memory": "1 MB"}, "memory"),
        ({"memory": "15MiB"}, "at least 16MiB"),
        ({"memory": 0}, "memory"),
        ({"memory": -5}, "memory"),
        ({"memory": "64MiB", "disk": "32MiB"}, "kept in memory"),
        ({"disk": "x"}, "disk"),
        ({"pids": 0}, "pids"),
        ({"cpu": 0.0}, "cpu"),
        ({"cpu": float("nan")}, "cpu"),
        ({"ttl": 0.0}, "ttl"),
        ({"idle_ttl": float("inf")}, "idle_ttl"),
        ({"image": "debian"}, "image"),
        ({"hostname": "a b"}, "hostname"),
        ({"hostname": ""}, "hostname"),
    ],
)
def test_values_that_no_sandbox_could_have(client: SyncClient, values, reason):
    with pytest.raises(SandboxError, match=reason):
        client.create(Container(**values))


def test_limits_do_not_slow_the_start(client: SyncClient):
    client.create(Container()).stop()
    started = time.monotonic()
    client.create(Container())
    assert time.monotonic() - started < 3


def test_bytes_read_from_a_disk(limited: SyncClient, tmp_path: Path):
    """The folder is on a disk, which the program reads past what is in memory of it."""
    if "io_read" not in limited.create(Container()).caps.enforced:
        pytest.skip("no control group bounds reading here")
    file = tmp_path / "big"
    file.write_bytes(os.urandom(6 << 20))
    os.sync()
    if not os.stat(file).st_dev >> 8:
        pytest.skip(f"{tmp_path} is on no disk")
    command = "dd if=big of=/dev/null bs=1M iflag=direct"
    free = limited.create(Container(workdir=tmp_path)).exec(command, timeout=60)
    bound = limited.create(Container(workdir=tmp_path, io_read="2MiB")).exec(command, timeout=60)
    assert (free.exit_code, bound.exit_code) == (0, 0), (free.stderr, bound.stderr)
    # 6 MiB at 2 MiB a second; the kernel lets the first tenth of a second through.
    assert bound.duration > 2.4
    assert free.duration < bound.duration / 2


def test_limits_of_io_that_cannot_hold(client: SyncClient, limited: SyncClient):
    with pytest.raises(SandboxError, match="64KiB"):
        client.create(Container(io_read=5))
    layout = cgroups.current_layout()
    for name in sorted({"io_read", "io_write"} - cgroups.io_limits(layout)):
        with pytest.raises(Unsupported, match=name):
            limited.create(Container(**{name: "1MiB"}))
