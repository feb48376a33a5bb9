"""Beginnings and ends under a daemon: what is taken over, refused, timed, and never lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import KeyConflict, MachineFull, PolicyDenied, SandboxError
from fathom.sandbox import Container, Net, SyncClient, SyncSandbox, cgroups, state
from fathom.sandbox.edge import age
from fathom.sandbox.edge.admission import Admission
from fathom.sandbox.edge.age import Birth
from fathom.sandbox.edge.entry import NOTE
from fathom.sandbox.images import ImageMissing, Store, collect, rootfs
from fathom.sandbox.types import Kept
from tests.sandbox.edge.daemon import Daemon

SMALL = Container(memory="64MiB", disk="8MiB")
NAME = f"test/life-{os.getpid()}"


def restart(daemon: Daemon) -> None:
    daemon.end(signal.SIGKILL)
    daemon.start()


def until(true: Callable[[], bool], patience: float = 15.0) -> None:
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# What a sandbox runs on --------------------------------------------------------------------------


@pytest.fixture
def store(cache_dir: Path, need_root: None) -> Iterator[Store]:
    with Store(cache_dir / "store") as made:
        yield made
        if NAME in made.names():
            made.untag(NAME)


def image_with(client: SyncClient, file: str) -> None:
    """Give the name to a layered image that has this file."""
    with client.create(SMALL) as made:
        made.exec(f"touch /work/{file}", timeout=10).check()
        made.pack_diff(name=NAME)


def files(sandbox: SyncSandbox) -> set[str]:
    return set(sandbox.exec("ls /work", timeout=10).stdout.split())


def layered(name: str = NAME) -> Container:
    return Container(image=name, memory="64MiB", disk="8MiB")


def test_an_adopted_sandbox_keeps_its_own_image(daemon: Daemon, store: Store):
    with daemon.client() as client:
        image_with(client, "first")
        name = client.create(layered()).id
        image_with(client, "second")
        with pytest.raises(ImageMissing):
            client.create(layered("no/such"))
    restart(daemon)
    with daemon.client() as client:
        (copy,) = client.attach(name).fork()
        assert files(copy) == {"first"}


def test_an_image_without_a_name_ends_no_sandbox(daemon: Daemon, store: Store):
    with daemon.client() as client:
        image_with(client, "first")
        name = client.create(layered()).id
        plain = client.create(SMALL)
    store.untag(NAME)
    nodes = [Path("/proc", str(pid)) for pid in daemon.processes("node")]
    daemon.end(signal.SIGKILL)
    until(lambda: not any(node.exists() for node in nodes))
    # Each sandbox holds what it runs on, also while there is no daemon.
    collect(store)
    with (rootfs.build("base", daemon.cache) / rootfs._LOCKED).open() as image:
        with pytest.raises(BlockingIOError):
            fcntl.flock(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
    daemon.start()
    # The new daemon holds the layers as the former one did.
    collect(store)
    with daemon.client() as client:
        assert files(client.attach(plain.id).fork()[0]) == set()
        sandbox = client.attach(name)
        assert files(sandbox) == {"first"}
        assert files(sandbox.fork()[0]) == {"first"}
    restart(daemon)
    with daemon.client() as client:
        assert files(client.attach(name)) == {"first"}
        for entry in client.list():
            client.attach(entry["id"]).stop()
    assert not {path.name for path in (store.folder / "holds").iterdir()} & {name, plain.id}


def damage(path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Change a note, and return what was in it."""
    text = path.read_text()
    note = json.loads(text)
    change(note)
    path.write_text(json.dumps(note))
    return text


@pytest.mark.parametrize("note", [NOTE, state.SESSION])
def test_what_cannot_be_taken_over_is_left_and_tried_again(daemon: Daemon, note: str):
    with daemon.client() as client:
        name = client.create(SMALL).id
        client.attach(name).exec("echo kept > f", timeout=10)
    daemon.end(signal.SIGKILL)
    path = daemon.folder / name / note
    text = damage(path, lambda found: found.clear())
    daemon.start()
    with daemon.client() as client:
        with pytest.raises(SandboxError, match="tried again"):
            client.attach(name)
        assert state.lives(daemon.folder / name)
        path.write_text(text)

        def adopted() -> bool:
            return name in [entry["id"] for entry in client.list()]

        until(adopted)
        assert client.attach(name).files.read("f") == b"kept\n"


def test_one_that_cannot_be_taken_over_can_be_stopped(daemon: Daemon):
    with daemon.client() as client:
        sandbox = client.create(SMALL)
        daemon.end(signal.SIGKILL)
        damage(daemon.folder / sandbox.id / NOTE, lambda found: found.clear())
        daemon.start()
        sandbox.stop()
    assert not (daemon.folder / sandbox.id).exists()


def test_one_that_was_left_alone_is_shown_and_ended_by_its_name(daemon: Daemon):
    with daemon.client() as client:
        name = client.create(SMALL).id
        other = client.create(SMALL).id
    first = state.first_process(daemon.folder / name)
    daemon.end(signal.SIGKILL)
    damage(daemon.folder / name / NOTE, lambda found: found.clear())
    daemon.start()
    command = [sys.executable, "-m", "fathom", "sandbox"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        words = (*words, "--folder", str(daemon.folder))
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=60)

    shown = json.loads(run("ls", "--json").stdout)
    assert [entry["id"] for entry in shown["sandboxes"]] == [other]
    assert list(shown["left_alone"]) == [name]
    table = run("ls").stdout
    assert "left alone" in table
    assert f"{name} was left alone" in table
    done = run("stop", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (daemon.folder / name).exists()
    with contextlib.suppress(FileNotFoundError):  # or its parent has not noticed
        assert Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    again = run("stop", name)
    assert again.returncode != 0
    assert "nothing to stop" in again.stderr
    with daemon.client() as client:
        assert client.left_alone() == {}
        assert client.attach(other).exec("echo on", timeout=10).stdout == "on\n"
        client.end(other)
        assert client.list() == []


def test_a_policy_that_cannot_be_set_again_costs_no_sandbox(daemon: Daemon):
    with daemon.client() as client:
        sandbox = client.create(SMALL)
        if "mirror" not in sandbox.caps.networks:
            pytest.skip("this substrate has no network")
    daemon.end(signal.SIGKILL)
    policy = {"addresses": [], "domains": [], "mirrors": ["nowhere"], "private": False}
    damage(daemon.folder / sandbox.id / NOTE, lambda found: found.update(net=policy))
    daemon.start()
    with daemon.client() as client:
        assert client.attach(sandbox.id).exec("echo on", timeout=10).stdout == "on\n"


def test_a_copy_whose_daemon_is_killed_leaves_nothing_standing_still(daemon: Daemon):
    with daemon.client() as client:
        sandbox = client.create(SMALL)
        layout = cgroups.current_layout()
        if not sandbox.caps.pause or layout is None:
            pytest.skip("this substrate has no pause")
    daemon.end(signal.SIGKILL)
    cgroups.Group(layout, sandbox.id).freeze()
    daemon.start()
    with daemon.client() as client:
        assert client.attach(sandbox.id).exec("echo on", timeout=10).stdout == "on\n"


def test_nothing_is_left_of_what_a_killed_daemon_was_making(daemon: Daemon):
    def make() -> None:
        with daemon.client() as client:
            try:
                client.create(SMALL, group="g").fork(2)
            except SandboxError:
                pass

    workers = [threading.Thread(target=make) for _ in range(4)]
    for worker in workers:
        worker.start()
    time.sleep(0.3)
    daemon.end(signal.SIGKILL)
    for worker in workers:
        worker.join()
    (daemon.folder / "sb-1-0123456789").mkdir()
    daemon.start()
    assert not (daemon.folder / "sb-1-0123456789").exists()
    (daemon.folder / "sb-1-abcdef0123").mkdir()
    (daemon.folder / "sb-1-abcdef0123" / "lock").touch()

    def known() -> bool:
        with daemon.client() as client:
            listed = {entry["id"] for entry in client.list()}
        return {path.name for path in daemon.folder.glob("sb-*")} == listed

    until(known)


# Keys --------------------------------------------------------------------------------------------


def test_a_key_means_one_set_of_values(daemon: Daemon, options: dict[str, Path]):
    net = Net.deny().domain("*.example.org")
    with daemon.client() as far, SyncClient("local", **options) as near:
        for client in (far, near):
            plain = client.create(SMALL, key="plain", group="g")
            assert client.create(SMALL, key="plain", group="g").id == plain.id
            values: list[dict[str, Any]] = [{}, {"group": "h"}, {"group": "g", "net": net}]
            for other in values:
                with pytest.raises(KeyConflict, match="use another key"):
                    client.create(SMALL, key="plain", **other)
            if "domain" not in plain.caps.networks:
                continue
            open_ = client.create(SMALL, key="open", net=net)
            open_.phase("closed")
            assert client.create(SMALL, key="open", net=net).id == open_.id
            with pytest.raises(KeyConflict):
                client.create(SMALL, key="open")
            with pytest.raises(SandboxError, match="nowhere"):
                client.create(SMALL, key="bad", net=Net.deny().mirror("nowhere"))
            client.create(SMALL, key="bad").stop()


# Time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_no_clock_on_a_wall_says_how_old_something_is(jump: float, monkeypatch: pytest.MonkeyPatch):
    made = Birth.now()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    assert 0 <= made.age() < 5


def test_ages_of_what_another_start_or_an_older_daemon_wrote_down():
    up = age.uptime()
    assert Birth(time.time() - up - 99999, 0.0, "").age() <= up + 1
    assert Birth(time.time() + 99999, 0.0, "").age() == 0
    assert Birth(time.time() - 1, up + 500, "another").age() == pytest.approx(1, abs=2)


def test_time_goes_on_while_there_is_no_daemon(daemon: Daemon):
    with daemon.client() as client:
        short = client.create(Container(memory="64MiB", disk="8MiB", ttl=3)).id
        long = client.create(Container(memory="64MiB", disk="8MiB", ttl=600)).id
    daemon.end(signal.SIGKILL)
    note = daemon.folder / long / NOTE
    # Whatever becomes of the clock on the wall meanwhile.
    damage(note, lambda found: found.update(created=found["created"] - 86400))
    damage(daemon.folder / short / NOTE, lambda found: found.update(created=time.time() + 86400))
    time.sleep(2)
    daemon.start()

    def left() -> set[str]:
        with daemon.client() as client:
            return {entry["id"] for entry in client.list()}

    until(lambda: left() == {long}, 8)


# Room --------------------------------------------------------------------------------------------


class Host:
    """Counts as a keeper does, and makes nothing."""

    def __init__(self, most: int) -> None:
        self.there = 0
        self.highest = 0
        self.admission = Admission(most, 0, lambda: self.there)

    def make(self, spec: Kept) -> None:
        with self.admission.admit(spec) as room:
            time.sleep(0.001)
            with room.settle():
                self.there += 1
                self.highest = max(self.highest, self.there)
            time.sleep(0.001)

    def take(self) -> int | None:
        self.there -= 1
        return 1


def test_never_more_than_admitted_and_never_fewer():
    host = Host(40)
    refused: list[int] = []

    def work() -> None:
        for _ in range(10):
            try:
                host.make(SMALL)
            except PolicyDenied:
                refused.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (host.there, refused) == (40, [])
    with pytest.raises(PolicyDenied, match="40 sandboxes of 40"):
        host.make(SMALL)
    # One that waited is counted on its way to whom it is given, so none takes its place.
    with host.admission.taking(host.take) as (found, room):
        assert found == 1
        with pytest.raises(PolicyDenied):
            host.make(SMALL)
        with room.settle():
            host.there += 1
    assert host.there == 40


@pytest.fixture
def cramped(cache_dir: Path, need_root: None) -> Iterator[tuple[Daemon, Path]]:
    """A daemon whose folder lies on a file system of its own, and what fills that."""
    disk = Path("/run") / f"fathom-cramped-test-{os.getpid()}"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(disk)], check=True
    )
    try:
        made = Daemon(disk / "edge", cache_dir)
        made.start()
        yield made, disk / "fill"
        (disk / "fill").unlink(missing_ok=True)
        made.remove()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        disk.rmdir()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass


def test_a_full_folder_of_live_sandboxes(cramped: tuple[Daemon, Path]):
    daemon, filler = cramped
    with daemon.client() as client:
        sandbox = client.create(SMALL)
        fill(filler)
        with pytest.raises(MachineFull, match="no room"):
            client.create(SMALL)
        with pytest.raises(MachineFull):
            sandbox.pause()
        with pytest.raises(MachineFull):
            sandbox.phase("open", net=Net.deny().domain("x.example"))
        (entry,) = client.list()
        assert (entry["id"], entry["paused"], entry["net"]) == (sandbox.id, False, None)
        assert sandbox.exec("echo on", timeout=10).stdout == "on\n"
        assert "http_proxy" not in sandbox.exec("env", timeout=10).stdout
        assert len(list(daemon.folder.glob("sb-*"))) == 1
        filler.unlink()
        sandbox.pause()
        fill(filler)
        sandbox.resume()  # what was noted does no harm
        assert sandbox.exec("echo on", timeout=10).stdout == "on\n"
    daemon.end(signal.SIGKILL)
    filler.unlink()
    daemon.start()
    with daemon.client() as client:
        assert client.attach(sandbox.id).exec("echo on", timeout=10).stdout == "on\n"
