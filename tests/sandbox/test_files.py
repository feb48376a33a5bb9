"""Moving files in and out, also where the tenant planted something else in their place."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from fathom.errors import SandboxError
from fathom.sandbox import (
    Container,
    SandboxFileIsFolder,
    SandboxFileMissing,
    SyncClient,
    SyncSandbox,
)
from fathom.sandbox.request import FIXED_ENVIRONMENT


@pytest.mark.parametrize("size", [0, 1, 65536, 5 << 20])
def test_round_trip(shared: SyncSandbox, size: int):
    data = os.urandom(size)
    shared.files.write("folder/with space/f", data)
    assert shared.files.read("/work/folder/with space/f") == data


@pytest.mark.parametrize(
    "name", ["-rf", "--help", "$(id)", "a\nb", "'", "\u00e9\u4e16", "*", "a;b"]
)
def test_strange_names(shared: SyncSandbox, name: str):
    shared.exec("rm -rf /work/* /work/.[!.]*", timeout=10)
    shared.files.write(name, name)
    assert shared.files.read(name) == name.encode()
    assert shared.exec(["ls", "-1N", "/work"], timeout=10).stdout == f"{name}\n"


def test_text_is_utf8_and_writing_replaces(shared: SyncSandbox):
    shared.files.write("a", "longer than what follows")
    shared.files.write("a", "\u00e9")
    assert shared.files.read("a") == b"\xc3\xa9"
    with pytest.raises(SandboxError, match="not valid Unicode"):
        shared.files.write("a", "\ud800")


def test_missing_is_a_file_not_found_error(shared: SyncSandbox):
    with pytest.raises(FileNotFoundError, match="missing does not exist in the sandbox") as caught:
        shared.files.read("missing")
    assert isinstance(caught.value, SandboxFileMissing)
    assert caught.value.code == "sandbox_file_missing"
    with pytest.raises(SandboxFileMissing):
        shared.files.read("missing/too")


def test_folders_are_not_files(shared: SyncSandbox):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        shared.files.read("/work")
    with pytest.raises(SandboxFileIsFolder):
        shared.files.write("/tmp", b"")


@pytest.mark.parametrize(
    "path", ["/etc/new", "/usr/bin/bash", "/proc/sys/kernel/hostname", "/new/x"]
)
def test_the_system_cannot_be_written(shared: SyncSandbox, path: str):
    with pytest.raises(SandboxError, match="cannot be written"):
        shared.files.write(path, b"x")


def test_a_file_without_permission(shared: SyncSandbox):
    shared.exec("rm -f secret; echo x > secret; chmod 0 secret", timeout=10)
    with pytest.raises(SandboxError, match="permission denied"):
        shared.files.read("secret")
    with pytest.raises(SandboxError, match=r"(?i)permission denied"):
        shared.files.write("secret", b"x")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "pipe"])
def test_devices_and_pipes_do_not_block(shared: SyncSandbox, path: str):
    shared.exec("rm -f pipe; mkfifo pipe", timeout=10)
    started = time.monotonic()
    with pytest.raises(SandboxError, match="not a plain file"):
        shared.files.read(path)
    with pytest.raises(SandboxError, match="not a plain file"):
        shared.files.write(path, b"x")
    assert time.monotonic() - started < 5


def test_a_file_above_the_limit_is_refused(shared: SyncSandbox):
    shared.exec("head -c 1001 /dev/zero > big", timeout=10)
    with pytest.raises(SandboxError, match="more than 1000 bytes"):
        shared.files.read("big", limit=1000)
    assert len(shared.files.read("big", limit=1001)) == 1001


@pytest.mark.parametrize(("path", "reason"), [("", "empty"), ("a\0b", "NUL")])
def test_paths_that_name_nothing(shared: SyncSandbox, path: str, reason: str):
    with pytest.raises(SandboxError, match=reason):
        shared.files.read(path)
    with pytest.raises(SandboxError, match=reason):
        shared.files.write(path, b"")


def test_a_full_disk_is_an_error(client: SyncClient):
    sandbox = client.create(Container(disk="1MiB"))
    with pytest.raises(SandboxError, match=r"(?i)no space left"):
        sandbox.files.write("big", bytes(2 << 20))
    with pytest.raises(FileNotFoundError):
        sandbox.files.read("big")
    sandbox.files.write("small", b"still works")
    assert sandbox.files.read("small") == b"still works"


# Traps set by the tenant ---------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../../../etc/passwd"])
def test_links_lead_to_files_of_the_sandbox_only(client: SyncClient, tmp_path: Path, target: str):
    tmp_path.chmod(0o755)
    sandbox = client.create(Container(workdir=tmp_path))
    (tmp_path / "trap").symlink_to(target)
    seen = sandbox.files.read("trap")
    assert seen == sandbox.exec(["cat", "/etc/passwd"], timeout=10).stdout.encode()
    assert seen != Path("/etc/passwd").read_bytes()
    before = Path("/etc/passwd").stat()
    with pytest.raises(SandboxError, match="cannot be written"):
        sandbox.files.write("trap", b"owned")
    assert Path("/etc/passwd").stat().st_mtime_ns == before.st_mtime_ns


def test_links_out_of_the_work_folder_reach_nothing_of_the_host(client: SyncClient, tmp_path: Path):
    work = tmp_path / "work"
    work.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("host")
    for folder in (tmp_path, work):
        folder.chmod(0o777)
    sandbox = client.create(Container(workdir=work))
    for trap in (str(secret), "../secret"):
        sandbox.exec(["ln", "-sfn", trap, "trap"], timeout=10)
        with pytest.raises(SandboxError):
            sandbox.files.read("trap")
        with pytest.raises(SandboxError):
            sandbox.files.write("trap", b"owned")
        sandbox.exec(["ln", "-sfn", str(tmp_path), "folder"], timeout=10)
        with pytest.raises(SandboxError):
            sandbox.files.write("folder/new", b"owned")
    assert secret.read_text() == "host"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "work"]


def test_a_path_swapped_all_the_time_never_leads_out(client: SyncClient, tmp_path: Path):
    """Between any two moments of a write the tenant changes folder to link and back."""
    work = tmp_path / "work"
    outside = tmp_path / "outside"
    for folder in (work, outside):
        folder.mkdir()
        folder.chmod(0o777)
    tmp_path.chmod(0o777)
    (outside / "file").write_text("host")
    (outside / "file").chmod(0o666)
    sandbox = client.create(Container(workdir=work))
    swap = (
        "mkdir -p real; echo inside > real/file; while :; do "
        f"ln -sfn real d; ln -sfn {outside} d; done"
    )
    sandbox.exec(f"({swap}) > /dev/null 2>&1 &", timeout=10)
    results = set()
    for _ in range(60):
        try:
            results.add(sandbox.files.read("d/file"))
            sandbox.files.write("d/file", b"inside\n")
        except SandboxError:
            results.add(b"refused")
    assert b"host" not in results
    assert b"inside\n" in results
    assert (outside / "file").read_text() == "host"
    assert sorted(path.name for path in outside.iterdir()) == ["file"]


@pytest.mark.parametrize("path", ["/proc/self/exe", "/proc/self/environ", "/proc/1/environ"])
def test_no_process_of_the_host_shows_through_proc(sandbox: SyncSandbox, path: str):
    sandbox.exec(["ln", "-s", path, "trap"], timeout=10)
    try:
        data = sandbox.files.read("trap")
    except SandboxError:
        return
    assert b"python" not in data.lower()
    if path.endswith("environ"):
        names = {line.partition(b"=")[0].decode() for line in data.split(b"\0") if line}
        assert names <= {*FIXED_ENVIRONMENT, "PWD", "SHLVL", "_"}


# The bound work folder -----------------------------------------------------------------------


def test_a_bound_folder_is_shared_both_ways(client: SyncClient, tmp_path: Path):
    (tmp_path / "given").write_text("from the host")
    sandbox = client.create(Container(workdir=tmp_path))
    assert sandbox.caps.workdir == "host"
    assert sandbox.files.read("given") == b"from the host"
    sandbox.exec(
        "echo from the tenant > made; mkdir sub; chmod 600 made; echo more >> given", timeout=10
    )
    assert (tmp_path / "made").read_text() == "from the tenant\n"
    assert (tmp_path / "given").read_text() == "from the hostmore\n"
    owner = tmp_path.stat()
    for name in ("made", "sub"):
        made = (tmp_path / name).stat()
        assert (made.st_uid, made.st_gid) == (owner.st_uid, owner.st_gid)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o600
    shown = sandbox.exec("stat -c %U:%G given made .", timeout=10).stdout
    assert shown == "user:user\n" * 3


def test_a_bound_folder_outlives_its_sandbox(client: SyncClient, tmp_path: Path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "file").write_text("precious")
    sandbox = client.create(Container(workdir=tmp_path))
    sandbox.files.write("deep/new", b"new")
    sandbox.stop()
    assert (tmp_path / "deep" / "er" / "file").read_text() == "precious"
    assert (tmp_path / "deep" / "new").read_text() == "new"


@pytest.mark.usefixtures("need_root")
def test_a_bound_folder_of_another_user_keeps_its_owner(client: SyncClient, tmp_path: Path):
    os.chown(tmp_path, 4321, 4322)
    (tmp_path / "of_root").write_text("x")
    (tmp_path / "of_root").chmod(0o600)
    sandbox = client.create(Container(workdir=tmp_path))
    sandbox.files.write("new", b"x")
    assert ((tmp_path / "new").stat().st_uid, (tmp_path / "new").stat().st_gid) == (4321, 4322)
    with pytest.raises(SandboxError, match="permission denied"):
        sandbox.files.read("of_root")


def test_a_bound_folder_carries_no_privileges(client: SyncClient, tmp_path: Path):
    sandbox = client.create(Container(workdir=tmp_path))
    options = sandbox.exec("grep ' /work ' /proc/self/mounts", timeout=10).stdout.split()[3]
    assert {"nosuid", "nodev"} <= set(options.split(","))


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_work_folder_that_is_none(client: SyncClient, tmp_path: Path, name: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(SandboxError, match="is not a folder"):
        client.create(Container(workdir=tmp_path / name))
