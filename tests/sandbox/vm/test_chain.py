"""Saved machines that grew from others: what each holds, what is proven, what is removed when."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fathom.cli.main import app
from fathom.errors import SandboxError, SnapshotDamaged, SnapshotMissing
from fathom.sandbox import FullVM, SyncClient, SyncSandbox
from fathom.sandbox.snapshots import Snapshots
from fathom.sandbox.vm import chain, memory, qcow2, saved
from fathom.sandbox.vm.chain import Origin
from tests.sandbox.vm.conftest import SPEC

TIMEOUT = 60.0
SIZE = 1 << 20


def save(folder: Path, pages: dict[int, bytes], origin: Origin | None = None) -> Origin:
    """Keep a machine with these pages, which grew from `origin`; return it as an origin."""
    folder.mkdir(parents=True)
    fd = memory.create(SIZE)
    disk = os.memfd_create("disk")
    os.write(disk, folder.name.encode())
    if origin is not None:
        before = saved.read(origin.folder)
        memory.copy_sparse(before.memory, fd, SIZE)
        below = before.disks
        changed = chain.merged(origin.pages, [(number, 1) for number in pages])
        grown = Origin(
            folder=origin.folder, digest=origin.digest, disks=origin.disks, pages=changed
        )
        os.close(before.memory)
    else:
        below, grown = (), None
    for number, data in pages.items():
        os.pwrite(fd, data.ljust(4096, b"\0"), number * 4096)
    one = saved.Saved(
        memory=fd,
        size=SIZE,
        state=folder.name.encode(),
        secret=b"k" * 32,
        disks=(*below, disk),
        origin=grown,
    )
    one.write(folder, {"substrate": "microvm"})
    one.close()
    return Origin(folder=folder, digest=chain.digest_of(folder), disks=len(below) + 1)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A template, a snapshot that grew from it, and one that grew from that."""
    root = save(tmp_path / "vm/templates/t", {0: b"zero", 7: b"seven", 8: b"eight"})
    middle = save(tmp_path / "snapshots/a", {7: b"", 100: b"hundred"}, root)
    last = save(tmp_path / "snapshots/b", {8: b"again"}, middle)
    return [root.folder, middle.folder, last.folder]


def test_each_holds_its_own_changes_and_all_are_put_together(three: list[Path]):
    sizes = [(folder / "memory").stat().st_size for folder in three]
    assert sizes == [3 * 4096, 2 * 4096, 4096]
    with_disks = [sorted(path.name for path in folder.glob("disk-*")) for folder in three]
    assert with_disks == [["disk-0.qcow2"]] * 3
    found = saved.read(three[2])
    try:
        pages = {n: os.pread(found.memory, 4096, n * 4096).rstrip(b"\0") for n in (0, 7, 8, 100)}
        # A page that became all zeros is zeros, not what it was before.
        assert pages == {0: b"zero", 7: b"", 8: b"again", 100: b"hundred"}
        assert [os.pread(disk, 9, 0) for disk in found.disks] == [b"t", b"a", b"b"]
        assert found.state == b"b"
        with pytest.raises(PermissionError):
            os.pwrite(found.memory, b"x", 0)
    finally:
        found.close()


@pytest.mark.parametrize("link", [0, 1, 2])
@pytest.mark.parametrize("name", ["memory", "pages", "state", "disk-0.qcow2", "facts.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_whatever_is_damaged_in_a_chain_is_found(
    three: list[Path], link: int, name: str, harm: str
):
    path = three[link] / name
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises((SnapshotDamaged, SnapshotMissing)):
        chain.check(three[2])
    # An older machine's devices are of no use to a later one, so a start does not read them.
    if name != "state" or link == 2:
        with pytest.raises((SnapshotDamaged, SnapshotMissing)):
            saved.read(three[2])
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_parent_that_was_replaced_or_removed_is_said(three: list[Path], tmp_path: Path):
    shutil.rmtree(three[0])
    with pytest.raises(SnapshotMissing, match="grew from t, which is not there any more"):
        saved.read(three[2])
    save(tmp_path / "vm/templates/t", {0: b"other"})
    with pytest.raises(SnapshotDamaged, match="grew from another t"):
        saved.read(three[2])


def test_a_circle_and_an_endless_chain_end(tmp_path: Path):
    folder = tmp_path / "snapshots/x"
    save(folder, {0: b"x"})
    facts = json.loads((folder / "facts.json").read_text())
    facts["parent"] = {"path": "x", "digest": chain.digest_of(folder)}
    (folder / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(SnapshotDamaged):
        saved.read(folder)
    for parent in ({"path": 5, "digest": "x"}, {}, [], "x"):
        (folder / "facts.json").write_text(json.dumps({**facts, "parent": parent}))
        with pytest.raises(SnapshotDamaged):
            saved.read(folder)
        Snapshots(tmp_path).list()


def test_without_its_parent_a_machine_is_saved_whole(three: list[Path], tmp_path: Path):
    found = saved.read(three[1])
    shutil.rmtree(three[1])
    folder = tmp_path / "snapshots/whole"
    folder.mkdir()
    found.write(folder, {"substrate": "microvm"})
    found.close()
    again = saved.read(folder)
    assert os.pread(again.memory, 7, 100 * 4096) == b"hundred"
    assert len(again.disks) == 2
    again.close()
    assert chain.lineage(folder)[0][0] == folder


def test_what_others_grew_from_stays_until_they_go(three: list[Path], tmp_path: Path):
    kept = Snapshots(tmp_path)
    listed = {one.id: one for one in kept.list()}
    assert (listed["a"].parent, listed["b"].parent) == ("t", "a")
    assert kept.needed() == {three[0].resolve(), three[1].resolve()}
    assert kept.drop("a") == []
    assert [one.id for one in kept.list() if one.dropped] == ["a"]
    with pytest.raises(SnapshotMissing, match="no snapshot 'a'"):
        kept.path("a")
    assert kept.check("b") > 0
    # With the last one that grew from it goes what was kept for it.
    assert sorted(kept.drop("b")) == ["a", "b"]
    assert kept.list() == []
    assert kept.needed() == set()
    for name in ("nothing", "../vm", "", "."):
        with pytest.raises(SnapshotMissing):
            kept.drop(name)


def test_the_command(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fathom.sandbox.paths.cache_folder", lambda: tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["sandbox", "snapshots", *arguments])

    rows = json.loads(run("ls", "--json").stdout)["snapshots"]
    assert [(row["id"], row["parent"]) for row in rows] == [("a", "t"), ("b", "a")]
    assert "all whole" in run("check", "b").stdout
    assert "stays for those" in run("rm", "a").stderr
    assert "kept for others" in run("ls").stdout
    assert run("check", "a").exit_code == 1
    assert run("rm", "b").stdout.split() == ["b", "a"]
    os.truncate(three[0] / "memory", 1)
    assert run("ls").exit_code == 0


runs = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12)


@given(one=runs, other=runs)
def test_runs_are_joined(one: list[tuple[int, int]], other: list[tuple[int, int]]):
    def pages(found: object) -> set[int]:
        return {n for first, count in found for n in range(first, first + count)}  # type: ignore[attr-defined]

    joined = chain.merged(one, other)
    assert pages(joined) == pages(one) | pages(other)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(joined))
    assert chain.pages_in(chain.pages_out(joined), 100 * 4096) == list(joined)


@pytest.mark.parametrize("data", [b"x", b"x" * 8, chain.pages_out([(5, 1), (4, 1)])])
def test_runs_that_are_none_are_refused(data: bytes):
    with pytest.raises(SnapshotDamaged):
        chain.pages_in(data, 1 << 20)


@pytest.mark.parametrize("size", [1 << 20, (1 << 31) + (1 << 29), 1 << 40])
def test_an_empty_disk_is_what_qemu_takes_for_one(size: int, tmp_path: Path):
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("qemu-img is not installed")
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2.empty(size))
    subprocess.run([program, "check", "-q", str(path)], check=True)
    told = subprocess.run(
        [program, "info", "--output=json", str(path)], check=True, capture_output=True
    )
    facts = json.loads(told.stdout)
    assert (facts["format"], facts["virtual-size"]) == ("qcow2", size)
    assert not facts["format-specific"]["data"]["corrupt"]
    # And it can be written to.
    io = ["qemu-io", "-c", "write -P 7 65536 4096", "-c", "read -P 7 65536 4096", str(path)]
    if shutil.which("qemu-io"):
        subprocess.run(io, check=True, capture_output=True)
        subprocess.run([program, "check", "-q", str(path)], check=True)


# Real machines -------------------------------------------------------------------------------


def test_a_snapshot_of_a_restored_one_holds_what_changed_since(
    machines: SyncClient, machine: SyncSandbox, cache_dir: Path
):
    kept = Snapshots(cache_dir)
    machine.exec("head -c 2M /dev/urandom > /tmp/a; sha256sum /tmp/a > /tmp/sums", timeout=TIMEOUT)
    first = machine.snapshot()
    with machines.restore(first, SPEC) as second:
        second.exec("head -c 300k /dev/urandom > /tmp/b; cd /tmp; sha256sum b >> sums", timeout=20)
        later = second.snapshot()
        (copy,) = second.fork()
        with copy:
            copy.exec("echo copied > /tmp/c", timeout=TIMEOUT)
            of_copy = copy.snapshot()
    sizes = {one.id: one.size for one in kept.list()}
    memory_size = SPEC.memory_bytes
    assert sizes[first.id] < memory_size // 3
    assert sizes[later.id] < sizes[first.id]
    names = [[at.name for at, _ in chain.lineage(kept.folder / one.id)] for one in (later, of_copy)]
    assert names[0][1:] == [first.id, later.id]
    # A copy of a running machine grew from what that one grew from.
    assert names[1][1:] == [first.id, of_copy.id]
    for name in (later.id, of_copy.id):
        assert kept.check(name) > sizes[first.id] // 2
    assert kept.drop(first.id) == []
    with machines.restore(of_copy, SPEC) as again:
        shown = again.exec("cd /tmp; sha256sum -c sums; cat c", timeout=TIMEOUT).stdout
        assert shown == "/tmp/a: OK\nb: OK\ncopied\n"
    with pytest.raises(SnapshotMissing):
        machines.restore(first, SPEC)
    (kept.folder / first.id / "memory").write_bytes(b"other")
    with pytest.raises(SnapshotDamaged):
        machines.restore(later, SPEC)
    (kept.folder / first.id / "facts.json").unlink()
    with pytest.raises(SnapshotMissing, match="grew from"):
        machines.restore(later, SPEC)


@pytest.mark.full_vm
@pytest.mark.timeout(900)
def test_disks_of_full_machines_lie_on_one_another(machines: SyncClient, cache_dir: Path):
    kept = Snapshots(cache_dir)
    with machines.create(FullVM()) as system:
        system.exec("head -c 20M /dev/urandom > a; sha256sum a > sums; sync", timeout=TIMEOUT)
        first = system.snapshot()
        system.exec("rm a; sync", timeout=TIMEOUT)
    with machines.restore(first, FullVM()) as second:
        second.exec("head -c 1M /dev/urandom > b; sha256sum b >> sums; sync", timeout=TIMEOUT)
        later = second.snapshot()
        copies = second.fork(2)
        for number, copy in enumerate(copies):
            copy.exec(f"echo {number} > c; sync", timeout=TIMEOUT)
        of_copy = copies[1].snapshot()
        for copy in copies:
            copy.stop()
    for one, disks_of_its_own in ((first, 1), (later, 1), (of_copy, 2)):
        found = sorted(path.name for path in (kept.folder / one.id).glob("disk-*"))
        assert len(found) == disks_of_its_own
    size = sum(path.stat().st_size for path in (kept.folder / later.id).glob("disk-*"))
    assert size < 12 << 20
    with machines.restore(of_copy, FullVM()) as again:
        # From the disks, not from what the memory still holds of them.
        again.exec("sync", timeout=TIMEOUT)
        shown = again.exec("sha256sum -c sums; cat c", timeout=TIMEOUT).stdout
        assert shown == "a: OK\nb: OK\n1\n"
    with pytest.raises(SandboxError):
        machines.restore(first, FullVM(disk="3GiB"))
