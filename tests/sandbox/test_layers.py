"""Containers on layered images: what one wrote becomes a layer that the next one runs on."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fathom.errors import SandboxError, Unsupported
from fathom.sandbox import Container, SyncClient
from fathom.sandbox.images import Image, RunConfig, Store, pack_folder


@pytest.fixture
def stored(runtime_dir: Path, tmp_path: Path, need_root: None) -> Iterator[SyncClient]:
    with SyncClient(runtime_dir=runtime_dir, cache_dir=tmp_path) as client:
        yield client


def test_writes_become_a_layer_to_run_on(stored: SyncClient):
    first = stored.create(Container())
    first.exec("echo one > f; mkdir d; echo two > d/g; ln -s ../f d/l; chmod 700 d", timeout=20)
    assert first.pack_diff() == first.pack_diff(name="job/1")
    with pytest.raises(SandboxError, match="names below builtin/ are this program's own"):
        first.pack_diff(name="builtin/base-0123456789")
    later = stored.create(Container(image="job/1"))
    shown = later.exec("cat f d/g d/l; stat -c %U:%a d; id -u", timeout=20)
    assert shown.stdout == "one\ntwo\none\nuser:700\n1000\n"
    assert later.exec("touch /etc/x || touch /x || touch /usr/x", timeout=20).exit_code != 0
    later.exec("rm -r d; echo three > f", timeout=20)
    later.pack_diff(name="job/2")
    (copy,) = later.fork()
    for last in (stored.create(Container(image="job/2")), copy):
        assert last.exec("cat f; ls", timeout=20).stdout == "three\nf\n"
    # What came first is what it was.
    again = stored.create(Container(image="job/1"))
    assert again.exec("cat f d/g", timeout=20).stdout == "one\ntwo\n"


def test_a_file_of_nothing_cannot_fill_the_disk_of_the_store(stored: SyncClient, tmp_path: Path):
    sandbox = stored.create(Container(memory="64MiB", disk="8MiB"))
    sandbox.exec("truncate -s 256M hole; truncate -s 4M small; echo x >> small", timeout=20)
    for name in (None, "holes"):
        with pytest.raises(SandboxError, match="/work/hole has 268435456 bytes") as caught:
            sandbox.pack_diff(name=name)
        assert caught.value.code == "image_too_large"
    assert list((tmp_path / "store/tmp").iterdir()) == []
    assert not list(tmp_path.glob(".pack-*"))
    sandbox.exec("rm hole", timeout=20)
    sandbox.pack_diff(name="holes")
    later = stored.create(Container(image="holes"))
    assert later.exec("stat -c %s small; tail -c 2 small", timeout=20).stdout == "4194306\nx\n"


def test_of_what_an_image_says_its_variables_are_used_through_policies(
    stored: SyncClient, tmp_path: Path
):
    stored.create(Container()).pack_diff(name="plain")
    with Store(tmp_path / "store") as store:
        run = RunConfig(
            env=(("PATH", "/usr/bin"), ("GREETING", "hi")),
            workdir="/usr",
            user="0",
            entrypoint=("/usr/bin/false",),
        )
        store.put_image(replace(store.resolve("plain"), run=run), "greeting")
    sandbox = stored.create(Container(image="greeting"))
    for _ in range(2):
        said = sandbox.exec("echo $GREETING; pwd; id -u", timeout=20).stdout
        assert said == "hi\n/work\n1000\n"
        sandbox.phase("next")


COUNT = "find /work -type d | wc -l"


def test_folders_in_folders(stored: SyncClient, tmp_path: Path):
    spec = Container(memory="64MiB", disk="8MiB")
    sandbox = stored.create(spec)
    sandbox.exec(f"mkdir -p {'d/' * 511}", timeout=60).check()
    (copy,) = sandbox.fork()
    kept = sandbox.snapshot()
    sandbox.pack_diff(name="deep")
    restored, later = stored.restore(kept, spec), stored.create(replace(spec, image="deep"))
    for one in (copy, restored, later):
        assert one.exec(COUNT, timeout=60).stdout == "512\n"
    sandbox.exec(f"cd {'d/' * 511} && mkdir -p {'d/' * 700}", timeout=60).check()
    assert sandbox.exec(COUNT, timeout=60).stdout == "1212\n"
    for attempt in (sandbox.fork, sandbox.snapshot, sandbox.pack_diff):
        with pytest.raises(SandboxError, match="nested more than 512 deep"):
            attempt()
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == [kept.id]


def test_what_a_killed_process_left_is_removed(stored: SyncClient, tmp_path: Path):
    sandbox = stored.create(Container(memory="64MiB", disk="8MiB"))
    left = [tmp_path / ".pack-old", tmp_path / "snapshots/.snap-old"]
    used = tmp_path / ".pack-used"
    for folder in (*left, used):
        (folder / "upper/work").mkdir(parents=True)
        os.utime(folder, (1_600_000_000, 1_600_000_000))
    fd = os.open(used, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        sandbox.pack_diff()
        sandbox.snapshot()
        assert [folder.exists() for folder in (*left, used)] == [False, False, True]
    finally:
        os.close(fd)
    sandbox.pack_diff()
    assert not used.exists()


def test_nothing_of_a_layered_sandbox_stays(stored: SyncClient, traces):
    sandbox = stored.create(Container())
    sandbox.pack_diff(name="x")
    stored.create(Container(image="x"))
    stored.close()
    assert traces(nodes=True) == set()


def test_an_image_that_is_not_there(stored: SyncClient):
    with pytest.raises(SandboxError, match="no image is called 'debian'"):
        stored.create(Container(image="debian"))


def test_an_image_whose_work_folder_is_a_trap(stored: SyncClient, tmp_path: Path):
    """Its /work leads to a folder of the host, where the tenant would be made the owner."""
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    tree = tmp_path / "tree"
    for name in ("usr/bin", "dev", "proc", "tmp"):
        (tree / name).mkdir(parents=True)
    (tree / "work").symlink_to(victim)
    with Store(tmp_path / "store") as store:
        layer = pack_folder(store, tree)
        store.put_image(Image(layers=(layer.digest,), architecture="amd64"), "trap")
    with pytest.raises(SandboxError, match="/work is not a folder"):
        stored.create(Container(image="trap"))
    assert victim.stat().st_uid == 0


def test_layers_need_root(client: SyncClient, tmp_path: Path):
    if client.create().caps.substrate != "bubblewrap":
        pytest.skip("root can mount layers")
    with pytest.raises(Unsupported, match="pack_diff"):
        client.create().pack_diff()


def test_a_snapshot_goes_on_from_its_own_image(stored: SyncClient):
    """A name that has moved since must not put another image below what was written."""
    for file in ("first", "second"):
        with stored.create(Container()) as made:
            made.exec(f"touch {file}", timeout=10).check()
            made.pack_diff(name="moved")
        if file == "first":
            sandbox = stored.create(Container(image="moved"))
            sandbox.exec("touch mine", timeout=10).check()
            kept = sandbox.snapshot()
    again = stored.restore(kept, Container(image="moved"))
    assert again.exec("ls", timeout=10).stdout.split() == ["first", "mine"]
