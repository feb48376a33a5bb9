"""What a tenant of a machine, or an emulator that was taken over, may try."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path

import pytest

from fathom.errors import SandboxError
from fathom.sandbox import SyncClient, SyncSandbox, box, frames, messages, state
from fathom.sandbox.frames import Frame, Tag
from fathom.sandbox.vm import jail, machine, memory
from tests.sandbox.vm.conftest import SPEC

TIMEOUT = 30.0


@pytest.fixture(scope="module")
def folder(shared_machine: SyncSandbox, runtime_dir: Path) -> Path:
    return runtime_dir / shared_machine.id


@pytest.fixture(scope="module")
def emulator(folder: Path) -> Path:
    """The emulator's process, as /proc shows it."""
    return Path(f"/proc/{state.first_process(folder)}")


def status_of(process: Path) -> dict[str, str]:
    lines = (process / "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# The emulator --------------------------------------------------------------------------------


def test_the_emulator_is_nobody_and_has_no_rights(emulator: Path):
    status = status_of(emulator)
    assert all(int(number) >= 0x60000000 for number in status["Uid"].split())
    assert all(int(number) >= 0x60000000 for number in status["Gid"].split())
    assert status["Groups"] == ""
    for kind in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_no_path_of_this_machine_leads_into_the_emulator_s_folder(emulator: Path):
    root = Path(f"{emulator}/root")
    assert sorted(os.listdir(root)) == ["dev", "lib", "lib64", "own", "proc", "usr"]
    devices = {"null", "urandom", "zero"}
    assert set(os.listdir(root / "dev")) in (devices, devices | {"kvm"})
    assert set(os.listdir(root / "usr/bin")) == {"qemu-system-x86_64", "setpriv"}
    # Nothing there that it could start but itself, and no interpreter.
    assert not list(root.glob("usr/**/python*")) + list(root.glob("usr/**/*sh"))
    files = {os.readlink(link) for link in (emulator / "fd").iterdir()}
    wanted = (
        r"socket:|anon_inode:|/memfd:|/dev/null$|.*/vm/disks/|.*/own/log$|pipe:|.*/proc/\d+$|/$"
    )
    assert [name for name in files if not re.match(wanted, name)] == []


def test_the_emulator_sees_no_network_and_no_process_of_others(emulator: Path):
    devices = (emulator / "net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in devices] == ["lo"]
    assert os.readlink(emulator / "ns/net") != os.readlink("/proc/self/ns/net")
    assert os.readlink(emulator / "ns/ipc") != os.readlink("/proc/self/ns/ipc")
    options = [
        line for line in (emulator / "mountinfo").read_text().splitlines() if "/proc " in line
    ]
    assert any("hidepid=invisible" in line and "subset=pid" in line for line in options)


def test_the_emulator_is_bounded_by_its_group(emulator: Path, folder: Path):
    assert folder.name in (emulator / "cgroup").read_text()
    group = next(Path("/sys/fs/cgroup").glob(f"memory/fathom/{folder.name}"), None)
    if group is not None:
        limit = int((group / "memory.limit_in_bytes").read_text())
        assert SPEC.memory_bytes < limit < 2 * SPEC.memory_bytes + (512 << 20)


def test_the_memory_that_machines_share_cannot_be_written(emulator: Path):
    """An emulator that was taken over must not change what other machines begin with."""
    shared = [link for link in (emulator / "fd").iterdir() if memory.NAME in os.readlink(link)]
    assert shared
    for link in shared:
        fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
        try:
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"owned", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)


def test_the_session_s_files_are_closed_to_others(folder: Path):
    for name in (state.SOCKET, state.SESSION, machine.MONITOR, machine.PORT):
        assert (folder / name).stat().st_mode & 0o077 == 0, name


def test_a_link_in_place_of_a_saved_state_is_not_followed(machines: SyncClient, runtime_dir: Path):
    """The emulator's own folder is the one place of its that we read."""
    with machines.create(SPEC) as sandbox:
        own = Path(f"/proc/{state.first_process(runtime_dir / sandbox.id)}/root/{jail.OWN}")
        own.chmod(0o500)
        os.chown(own, 1, 1)
        with pytest.raises(SandboxError):
            sandbox.snapshot()
        # It goes on where it was.
        assert sandbox.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"


# The guest -----------------------------------------------------------------------------------


def fails(sandbox: SyncSandbox, command: str) -> str:
    result = sandbox.exec(command, timeout=TIMEOUT, merge=True)
    assert result.exit_code != 0, f"{command} worked: {result.output}"
    return result.output


def test_a_guest_has_no_devices_but_those_it_needs(shared_machine: SyncSandbox):
    """No shared folder, no vsock, no balloon, no graphics, nothing on a bus of its own."""
    seen = shared_machine.exec(
        "cat /sys/bus/virtio/devices/*/device; ls /sys/bus/pci/devices 2>/dev/null; "
        "grep -cE '9p|virtiofs|fuse' /proc/filesystems; ls /sys/class/block /sys/class/net",
        timeout=TIMEOUT,
    ).stdout.split()
    # A console, a disk, a network device whose driver is not loaded; in any order.
    assert sorted(seen[:3]) == ["0x0001", "0x0002", "0x0003"]
    assert seen[3:] == ["0", "/sys/class/block:", "vda", "/sys/class/net:", "lo"]
    for kind in ("9p", "virtiofs", "vboxsf", "nfs"):
        fails(shared_machine, f"mount -t {kind} host /tmp")


def test_no_device_of_the_guest_is_the_tenant_s(shared_machine: SyncSandbox):
    open_to_all = shared_machine.exec(
        "find /dev -type b -writable -o -type b -readable -o -type c -writable | sort",
        timeout=TIMEOUT,
    )
    harmless = {"full", "null", "ptmx", "random", "tty", "urandom", "zero", "pts/ptmx"}
    assert {p.removeprefix("/dev/") for p in open_to_all.stdout.split()} <= harmless
    for name in ("vda", "vport1p1", "vport0p1", "ttyS0", "mem", "port", "kmsg", "hwrng"):
        fails(shared_machine, f"test -e /dev/{name} && head -c 1 /dev/{name} 2>&1; exit 1")
        fails(shared_machine, f"echo flood > /dev/{name}")


def test_the_agent_s_folder_is_closed(shared_machine: SyncSandbox):
    fails(shared_machine, "ls /run/fathom")
    fails(shared_machine, "cat /run/fathom/journal /run/fathom/writes/upper/x")
    fails(shared_machine, "echo max > /run/fathom/group/tenant/memory.max")
    fails(shared_machine, "kill -9 1; head -c 1 /proc/1/mem; ls /proc/1/fd/; exit 1")
    assert shared_machine.exec("echo alive", timeout=TIMEOUT).stdout == "alive\n"


def test_the_kernel_is_closed(shared_machine: SyncSandbox):
    for command in (
        "unshare -U true",
        "unshare -n true",
        "mount -t tmpfs x /tmp",
        "echo 1 > /proc/sys/kernel/sysrq",
        "echo c > /proc/sysrq-trigger",
        "echo x > /sys/kernel/uevent_helper",
        "echo /tmp/x > /proc/sys/kernel/core_pattern",
        "chroot / true",
        "hostname other",
        "date -s 2020-01-01",
    ):
        fails(shared_machine, command)
    assert shared_machine.exec("cat /proc/self/status", timeout=TIMEOUT).stdout.count("\t2\n") >= 1


def test_forged_frames_are_plain_output(shared_machine: SyncSandbox):
    forged = frames.pack(1, Frame.EXIT, frames.join_fields([(Tag.EXIT, 0)]))
    forged += frames.pack(1, Frame.OK) + frames.pack(0, Frame.EXIT)
    text = "".join(f"\\x{byte:02x}" for byte in forged)
    result = shared_machine.exec(f"printf '{text}'; printf '{text}' >&2; exit 9", timeout=TIMEOUT)
    assert (result.exit_code, result.stdout) == (9, forged.decode(errors="replace"))


def test_a_flood_on_one_line_delays_no_other(shared_machine: SyncSandbox):
    """Output that nobody reads is held in the guest; it takes neither memory here nor the port."""
    with shared_machine.run("yes", timeout=60) as process:
        assert process.read() is not None
        for _ in range(3):
            assert shared_machine.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"


def test_copies_share_no_randomness_and_no_secret(machines: SyncClient, runtime_dir: Path):
    with machines.create(SPEC) as origin:
        copies = origin.fork(2)
        every = [origin, *copies]
        random = {
            one.exec("head -c 16 /dev/urandom | md5sum", timeout=TIMEOUT).stdout for one in every
        }
        assert len(random) == 3
        assert len({one.receipt("x").epoch for one in every}) == 3
        sessions = [(runtime_dir / one.id / state.SESSION).read_text() for one in every]
        secrets = [re.search(r'"secret": "(\w+)"', text)[1] for text in sessions]  # type: ignore[index]
        assert len(set(secrets)) == 3
        with messages.connect(runtime_dir / copies[0].id, state.SOCKET) as line:
            line.settimeout(10)
            with pytest.raises(SandboxError, match="wrong secret"):
                box.ask(line, bytes.fromhex(secrets[0]), Frame.PING, b"")
        for copy in copies:
            copy.stop()


# The line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        box.greeting(b"w" * 32),
        box.greeting(b""),
        frames.pack(1, Frame.EXEC, frames.join_fields([(Tag.ARG, "id")])),
        frames.pack(1, Frame.REKEY, frames.join_fields([(Tag.SECRET, b"n" * 32)])),
        frames.pack(0, Frame.HELLO, b"\xff" * 5000),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 5000,
        box.greeting(b"w" * 32) + frames.pack(1, Frame.QUERY, frames.join_fields([(Tag.OP, "x")])),
    ],
    ids=lambda data: repr(data[:14]),
)
def test_a_stranger_on_the_line_gets_nothing(
    shared_machine: SyncSandbox, folder: Path, first: bytes
):
    with messages.connect(folder, state.SOCKET) as line:
        line.settimeout(10)
        answer = b""
        with contextlib.suppress(OSError):
            line.sendall(first)
            line.shutdown(socket.SHUT_WR)
            while data := line.recv(4096):
                answer += data
    kinds = {frame.kind for frame in frames.Splitter().feed(answer)}
    assert kinds <= {Frame.ERROR}
    assert shared_machine.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"


def test_a_stranger_that_hangs_up_ends_nothing(shared_machine: SyncSandbox, folder: Path):
    for _ in range(3):
        with messages.connect(folder, state.SOCKET) as line:
            line.sendall(box.greeting(b"x" * 32))
    assert shared_machine.exec("echo fine", timeout=TIMEOUT).stdout == "fine\n"
    shared_machine.pause()
    shared_machine.resume()


@pytest.mark.parametrize("kind", [Frame.CONFIGURE, Frame.REKEY, Frame.NETWORK, Frame.LEAVE, 200])
def test_a_client_with_the_secret_cannot_do_what_is_the_node_s(
    shared_machine: SyncSandbox, folder: Path, kind: int
):
    text = (folder / state.SESSION).read_text()
    secret = bytes.fromhex(re.search(r'"secret": "(\w+)"', text)[1])  # type: ignore[index]
    with messages.connect(folder, state.SOCKET) as line:
        line.settimeout(10)
        payload = frames.join_fields([(Tag.STATE, 1), (Tag.UID, 0)])
        with pytest.raises(SandboxError, match="not a client's"):
            box.ask(line, secret, kind, payload)  # type: ignore[arg-type]
    assert shared_machine.exec("id -u", timeout=TIMEOUT).stdout == "1000\n"
