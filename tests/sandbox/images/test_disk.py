"""Disks of virtual machines: what the kernel and e2fsprogs see, chains, snapshots, forks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.sandbox import syscalls
from fathom.sandbox.images import ImageDamaged, ImageError, Store, image_of_folder, snapshot
from fathom.sandbox.images.disk import Disk, unused, write_base
from tests.sandbox.images.listing import listing

Fill = Callable[[Path], Path]


def need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin"):
            pytest.skip(f"{program} is not installed")


@pytest.fixture
def image(store: Store, tmp_path: Path, fill: Fill):
    """Two layers, so that a disk has to join them."""
    folder = fill(tmp_path / "a")
    if os.geteuid() == 0:
        os.chown(folder / "empty", 70_000, 12)
    image = image_of_folder(store, folder, "one")
    upper = tmp_path / "u"
    upper.mkdir()
    (upper / "new").write_bytes(b"new" * 5000)
    shutil.copymode(folder, upper)
    os.utime(upper, (1_600_000_000, 1_600_000_000))
    return snapshot(store, image, upper)


@pytest.mark.parametrize("kind", ["erofs", "ext4"])
def test_a_base_shows_what_the_image_shows(need_root, store, image, tmp_path: Path, kind: str):
    if kind == "ext4":
        need("mke2fs", "debugfs")
    path = tmp_path / "base.raw"
    write_base(store, image, path, kind=kind)
    (tmp_path / "m").mkdir()
    options = ["-o", "ro,noload,loop"] if kind == "ext4" else ["-o", "ro"]
    subprocess.run(["mount", "-t", kind, *options, str(path), str(tmp_path / "m")], check=True)
    try:
        found = listing(tmp_path / "m")
    finally:
        syscalls.unmount(str(tmp_path / "m"))
    expected = listing(tmp_path / "a")
    assert found["new"][3] == listing(tmp_path / "u")["new"][3]
    for extra in ("new", "lost+found"):
        found.pop(extra, None)
    assert found == expected


@pytest.mark.parametrize("kind", ["erofs", "ext4"])
def test_the_same_image_gives_the_same_disk(store: Store, image, tmp_path: Path, kind: str):
    if kind == "ext4":
        need("mke2fs", "debugfs", "e2fsck")
    paths = [tmp_path / "one.raw", tmp_path / "two.raw"]
    for path in paths:
        write_base(store, image, path, kind=kind)
    if kind == "ext4":
        done = subprocess.run(
            ["e2fsck", "-fn", str(paths[0])], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_disk_that_cannot_be_written(store: Store, image, tmp_path: Path):
    with pytest.raises(ImageError, match="cannot be written"):
        write_base(store, image, tmp_path / "absent/base.raw")
    assert not (tmp_path / "absent").exists()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    need("qemu-img", "qemu-io")
    path = tmp_path / "base.raw"
    path.write_bytes(b"B" * (2 << 20))
    path.chmod(0o444)
    return path


def write(disk: Disk, offset: int, pattern: int) -> None:
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} 65536", str(disk.path)],
        check=True,
        capture_output=True,
    )


def content(disk: Disk, tmp_path: Path) -> bytes:
    out = tmp_path / "out.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(disk.path), str(out)], check=True)
    return out.read_bytes()


def test_a_chain_of_snapshots_and_forks(base: Path, tmp_path: Path):
    disk = Disk.create(tmp_path / "vm.qcow2", base)
    write(disk, 0, 1)
    first = disk.snapshot(tmp_path / "s1.qcow2")
    write(disk, 65536, 2)
    second = disk.snapshot(tmp_path / "s2.qcow2")
    write(disk, 0, 3)
    fork = first.fork(tmp_path / "fork.qcow2")
    write(fork, 131072, 4)

    def expected(*writes: tuple[int, int]) -> bytes:
        data = bytearray(b"B" * (2 << 20))
        for offset, pattern in writes:
            data[offset : offset + 65536] = bytes([pattern]) * 65536
        return bytes(data)

    assert content(disk, tmp_path) == expected((0, 3), (65536, 2))
    assert content(second, tmp_path) == expected((0, 1), (65536, 2))
    assert content(first, tmp_path) == expected((0, 1))
    assert content(fork, tmp_path) == expected((0, 1), (131072, 4))
    assert [path.name for path in disk.chain()] == ["vm.qcow2", "s2.qcow2", "s1.qcow2", "base.raw"]
    assert base.read_bytes() == expected()
    flat = disk.flatten(tmp_path / "flat.qcow2", keep=base)
    assert content(flat, tmp_path) == expected((0, 3), (65536, 2))
    assert [path.name for path in flat.chain()] == ["flat.qcow2", "base.raw"]
    assert unused([fork, flat], tmp_path) == [tmp_path / "s2.qcow2", tmp_path / "vm.qcow2"]
    with pytest.raises(ImageError, match="exists"):
        disk.snapshot(tmp_path / "s1.qcow2")
    with pytest.raises(ImageError, match="exists"):
        first.fork(tmp_path / "fork.qcow2")


def test_a_damaged_disk_is_not_frozen(base: Path, tmp_path: Path):
    disk = Disk.create(tmp_path / "vm.qcow2", base)
    write(disk, 0, 1)
    with disk.path.open("r+b") as file:
        file.seek(0)
        file.write(b"damage")
    with pytest.raises(ImageDamaged):
        disk.snapshot(tmp_path / "s1.qcow2")
    assert disk.path.exists()
    assert not (tmp_path / "s1.qcow2").exists()
