"""Images: complete, deterministic, built once, safe when two build at the same time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.errors import SandboxError
from fathom.sandbox import Container, SyncClient, SyncSandbox
from fathom.sandbox.images import rootfs

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rootfs.build("base", tmp_path_factory.mktemp("cache"))


def test_what_is_in_it(image: Path):
    assert sorted(path.name for path in image.iterdir()) == sorted(
        "bin dev etc home lib lib64 proc root run sbin sys tmp usr var work".split()
    )
    programs = {path.name for path in (image / "usr/bin").iterdir()}
    assert set(rootfs.REQUIRED) <= programs
    assert {"grep", "sed", "awk", "find", "xargs", "sort", "diff", "tar", "gzip"} <= programs
    assert "python3" not in programs
    assert os.readlink(image / "usr/bin/sh") == "bash"
    accounts = (image / "etc/passwd").read_text()
    assert "user:x:1000:1000" in accounts
    assert accounts != Path("/etc/passwd").read_text()


def test_nothing_points_out_of_it_and_nothing_is_privileged(image: Path):
    for path, folders, files in os.walk(image):
        for name in (*folders, *files):
            entry = Path(path, name)
            found = entry.lstat()
            assert not found.st_mode & 0o6000, entry
            if entry.is_symlink():
                inside = (
                    (image / os.readlink(entry).lstrip("/"))
                    if os.readlink(entry).startswith("/")
                    else entry.resolve()
                )
                assert str(inside).startswith(str(image)), entry
            elif entry.parent != image or name != "tmp":
                assert not found.st_mode & 0o022, entry


def test_every_program_finds_its_libraries(sandbox: SyncSandbox):
    check = (
        "for p in /usr/bin/*; do case $(head -c4 $p | tr -d '\\177') in ELF) echo $p; "
        'LD_TRACE_LOADED_OBJECTS=1 $p | grep "not found";; esac; done'
    )
    result = sandbox.exec(check, timeout=60, merge=True)
    assert "not found" not in result.output
    assert len(result.output.splitlines()) > 60


def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = rootfs.build("base", tmp_path)
    monkeypatch.setattr(rootfs, "_fill", None)
    assert rootfs.build("base", tmp_path) == first
    assert [path.name for path in (tmp_path / "images").iterdir()] == [first.name]


def test_its_name_follows_what_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = rootfs.build("base", tmp_path)
    monkeypatch.setitem(rootfs._ETC, "hosts", "127.0.0.1 other\n")
    rootfs._known.clear()
    second = rootfs.build("base", tmp_path)
    assert second != first
    assert re.fullmatch(r"base-[0-9a-f]{20}", second.name)


def test_replaced_images_are_removed_once_nobody_runs_on_them(
    substrate, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tmp_path.chmod(0o755)
    images = tmp_path / "images"
    with SyncClient(substrate=substrate, **{**options, "cache_dir": tmp_path}) as client:
        old = client.create()
        (first,) = images.iterdir()
        (images / ".building-x").mkdir()
        os.utime(images / ".building-x", (0, 0))
        monkeypatch.setitem(rootfs._ETC, "hosts", "127.0.0.1 second\n")
        rootfs._known.clear()
        second = rootfs.build("base", tmp_path)
        assert {path.name for path in images.iterdir()} == {first.name, second.name}
        assert old.exec("ls /usr/bin/bash", timeout=10).exit_code == 0
        old.stop()
        monkeypatch.setitem(rootfs._ETC, "hosts", "127.0.0.1 third\n")
        rootfs._known.clear()
        third = rootfs.build("base", tmp_path)
        assert [path.name for path in images.iterdir()] == [third.name]


def test_an_image_that_is_gone_is_an_error(tmp_path: Path):
    with pytest.raises(SandboxError, match="try again"):
        rootfs.hold(tmp_path / "missing")


def test_two_builders_at_the_same_time(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from fathom.sandbox.images import rootfs; "
        "print(rootfs.build('base', Path(sys.argv[1])))"
    )
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            text=True,
        )
        for _ in range(4)
    ]
    said = {builder.communicate(timeout=60)[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0] * 4
    assert len(said) == 1
    assert [str(path) for path in (tmp_path / "images").iterdir()] == list(said)


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rootfs, "_copy_program", fail)
    with pytest.raises(SandboxError, match=r"No space left on device.*XDG_CACHE_HOME"):
        rootfs.build("base", tmp_path)
    assert list((tmp_path / "images").iterdir()) == []


def test_a_cache_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(SandboxError, match="XDG_CACHE_HOME"):
        rootfs.build("base", tmp_path / "file")


def test_a_machine_without_a_needed_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rootfs, "_SEARCH", (str(tmp_path),))
    with pytest.raises(SandboxError, match="install coreutils and bash"):
        rootfs.build("base", tmp_path)


def test_loaders_and_libraries(tmp_path: Path):
    loader = rootfs.interpreter_of(Path("/bin/ls").resolve())
    assert loader is not None
    assert Path(loader).exists()
    libraries = rootfs.libraries_of(Path("/bin/ls").resolve(), loader)
    assert loader in libraries
    assert any("libc.so" in name for name in libraries)
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    assert rootfs.interpreter_of(script) is None


def test_python_is_there_when_asked(client: SyncClient):
    sandbox = client.create(Container(image="python"))
    code = "import json, hashlib, sqlite3, subprocess, sys; print(sys.version_info[0], sys.prefix)"
    assert sandbox.exec(["python3", "-c", code], timeout=20).stdout == "3 /usr\n"
    assert sandbox.exec("command -v python", timeout=20).exit_code == 0
