"""Stores and folders for the tests, and the proof that no mount or loop device is left."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fathom.sandbox.cgroups import PARENT
from fathom.sandbox.images import Store
from fathom.sandbox.paths import runtime_folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store", durable=False) as made:
        yield made


@pytest.fixture
def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def fill() -> Callable[[Path], Path]:
    """Make a small folder with one of everything that a layer can hold."""

    def make(folder: Path) -> Path:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/tool").write_bytes(b"#!/bin/sh\necho tool\n")
        (folder / "bin/tool").chmod(0o755)
        (folder / "bin/same").hardlink_to(folder / "bin/tool")
        (folder / "bin/link").symlink_to("tool")
        (folder / "long").symlink_to("x" * 250 + "/y" * 1000)
        (folder / "empty").touch()
        (folder / "empty folder").mkdir(mode=0o700)
        (folder / "big").write_bytes(os.urandom(3_000_001))
        (folder / "twice").write_bytes((folder / "big").read_bytes()[:50_000])
        (folder / "again").write_bytes((folder / "twice").read_bytes())
        (folder / "many").mkdir()
        for number in range(200):
            (folder / "many" / f"file-with-a-long-name-{number:04}").write_text(str(number))
        os.mkfifo(folder / "pipe")
        os.setxattr(folder / "bin/tool", "user.note", b"kept")
        for path in sorted(folder.rglob("*"), reverse=True):
            os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
        os.utime(folder, (1_600_000_000, 1_600_000_000))
        return folder

    return make


def _traces(own: str) -> set[str]:
    """What these tests have on this machine right now: mounts, loop devices, groups, folders.

    own: the folder of this process's tests; others run beside it.
    """
    found = {
        f"mount {line.split()[4]}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if own in line or f"/build-{os.getpid()}-" in line
    }
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if own in (text := file.read_text()):
                found.add(f"loop {text.strip()}")
    name = f"build-{os.getpid()}-*"
    for pattern in (f"*/{PARENT}/{name}", f"{PARENT}/{name}"):
        found |= {f"group {path}" for path in Path("/sys/fs/cgroup").glob(pattern)}
    return found | {f"folder {path}" for path in runtime_folder().glob(name)}


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After every test: no mount, loop device, control group, folder or descriptor is left.

    Takes the place of the check for sandboxes, of which these tests make none.
    """
    descriptors = len(os.listdir("/proc/self/fd"))
    own = str(tmp_path_factory.getbasetemp())
    before = _traces(own)
    yield
    # The kernel lets go of a loop device a while after what was mounted from it.
    deadline = time.monotonic() + 10
    while (left := _traces(own) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == set()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
