"""What a tenant may try against its host. Each test attacks; none trusts a configuration."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.errors import SandboxError
from fathom.sandbox import Container, SyncClient, SyncSandbox, agent
from fathom.sandbox.substrates.choice import suited

# What depends on how a runtime builds the sandbox is tried with each; the rest is the same code.
each_substrate = pytest.mark.parametrize("substrate", suited(), indirect=True)


def refused(sandbox: SyncSandbox, command: str) -> str:
    """Run what must fail, and return what it said."""
    result = sandbox.exec(command, timeout=20, merge=True)
    assert result.exit_code != 0, f"{command} worked: {result.output}"
    return result.output


@pytest.fixture
def python(client: SyncClient) -> SyncSandbox:
    """A sandbox in which system calls can be made by number."""
    return client.create(Container(image="python"))


def calls(sandbox: SyncSandbox, numbers: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Make raw system calls in the sandbox; name -> the name of its error, or "ok"."""
    code = (
        "import ctypes, errno, json, os\n"
        "c = ctypes.CDLL(None, use_errno=True)\n"
        "c.syscall.restype = ctypes.c_long\n"
        "def call(number, *arguments):\n"
        "    result = c.syscall(*map(ctypes.c_long, (number, *arguments)))\n"
        "    return 'ok' if result >= 0 else errno.errorcode[ctypes.get_errno()]\n"
        f"print(json.dumps({{name: call(*a) for name, a in {numbers!r}.items()}}))\n"
    )
    result = sandbox.exec(["python3", "-I", "-S", "-c", code], timeout=20)
    return json.loads(result.stdout)


# Files of the host ---------------------------------------------------------------------------


@each_substrate
def test_host_files_cannot_be_seen(sandbox: SyncSandbox, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("host")
    for path in (secret, "/root/.bashrc", "/home", "/etc/shadow", "/boot", "/run", __file__):
        found = sandbox.exec(f"cat {path} {path}/* 2>/dev/null", timeout=20)
        assert found.stdout == ""
    assert sandbox.exec("cat /etc/passwd", timeout=20).stdout != Path("/etc/passwd").read_text()


@pytest.mark.parametrize("cwd", ["../../../../../..", "/proc/1/root", "/proc/self/cwd/../../.."])
def test_climbing_out_of_the_folder_stays_inside(sandbox: SyncSandbox, cwd: str):
    command = f"cd {cwd} && cat etc/hostname; ls -d root/.cache"
    result = sandbox.exec(command, timeout=20)
    assert result.stdout in ("sandbox\n", "")
    with contextlib.suppress(SandboxError):
        inside = sandbox.exec("cat etc/hostname; ls -d root/.cache", timeout=20, cwd=cwd)
        assert inside.stdout == "sandbox\n"


@each_substrate
def test_old_root_and_double_chroot(sandbox: SyncSandbox):
    refused(sandbox, "chroot /tmp /bin/true")
    refused(sandbox, "ls /oldroot /.pivot_root /old_root")
    inode = sandbox.exec("stat -c %i:%d /", timeout=20).stdout.strip()
    host = os.stat("/")
    assert inode != f"{host.st_ino}:{host.st_dev}"


@each_substrate
def test_the_system_is_read_only(sandbox: SyncSandbox):
    for path in ("/", "/usr/bin", "/etc", "/lib", "/root", "/home", "/run", "/var", "/dev", "/sys"):
        said = refused(sandbox, f"touch {path}/x")
        assert "Read-only" in said or "Permission denied" in said
    root = sandbox.exec("grep ' / ' /proc/self/mounts", timeout=20).stdout.split()
    assert "ro" in root[3].split(",")
    refused(sandbox, "echo x >> /usr/bin/bash")
    refused(sandbox, "rm -f /usr/bin/ls")


def test_a_replaced_shell_is_never_run(sandbox: SyncSandbox):
    """The tenant owns /work only; neither the shell nor what files.* runs is looked up there."""
    sandbox.exec(
        "for n in bash cat dirname mkdir sh; do printf '#!/bin/sh\\necho owned' > $n; "
        "chmod +x $n; done; echo 'echo owned' > .bashrc; echo 'echo owned' > .profile; "
        "echo 'echo owned' > .bash_env",
        timeout=20,
    )
    assert sandbox.exec("echo fine", timeout=20).output == "fine\n"
    sandbox.files.write("x", b"fine")
    assert sandbox.files.read("x") == b"fine"


# Privileges ----------------------------------------------------------------------------------


@each_substrate
def test_no_privileges_at_all(sandbox: SyncSandbox):
    status = sandbox.exec("cat /proc/self/status", timeout=20).stdout
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(values[kind], 16) == 0
    assert values["NoNewPrivs"] == "1"
    assert values["Seccomp"] == "2"
    assert values["Uid"].split() == ["1000"] * 4
    assert set(values["Groups"].split()) <= {"65534"}


@each_substrate
def test_the_first_process_has_next_to_none(sandbox: SyncSandbox):
    status = sandbox.exec("cat /proc/1/status", timeout=20).stdout
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    # To become the tenant and to end what the tenant started: KILL, SETGID, SETUID, SETPCAP.
    allowed = 0b111100000 if sandbox.caps.separate_user else 0
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(values[kind], 16) & ~allowed == 0
    assert values["NoNewPrivs"] == "1"
    assert values["Seccomp"] == "2"


@each_substrate
def test_setuid_programs_give_nothing(client: SyncClient, tmp_path: Path):
    """Also one that root of the host put into the bound folder."""
    program = tmp_path / "suid"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    sandbox = client.create(Container(workdir=tmp_path))
    assert sandbox.exec("./suid -u", timeout=20).stdout == "1000\n"
    refused(sandbox, "find / -xdev -perm /6000 -type f -not -path '/work/*' | grep .")


def test_no_setuid_program_can_be_left_for_the_host(client: SyncClient, tmp_path: Path):
    """In a bound folder it would belong to the folder's owner, and that may be root."""
    sandbox = client.create(Container(workdir=tmp_path, image="python"))
    sandbox.exec("cp /usr/bin/id id; touch file; mkdir folder", timeout=20)
    for mode in ("4755", "2755", "6755", "u+s", "g+s"):
        assert "not permitted" in refused(sandbox, f"chmod {mode} id")
    refused(sandbox, "install -m 4755 /usr/bin/id other")
    for attempt in (
        "os.chmod('id', 0o4755)",
        "os.fchmod(os.open('id', os.O_RDONLY), 0o4755)",
        "os.open('new', os.O_CREAT | os.O_WRONLY, 0o4755)",
        "os.open('.', os.O_TMPFILE | os.O_WRONLY, 0o4755)",
        "os.mknod('new', 0o104755)",
    ):
        said = refused(sandbox, f'python3 -c "import os; {attempt}"')
        assert "PermissionError" in said, attempt
    assert sandbox.exec("chmod 755 id && ./id -u", timeout=20).stdout == "1000\n"
    for path in tmp_path.rglob("*"):
        assert not path.stat().st_mode & 0o6000, path


def test_other_identities_cannot_be_taken(python: SyncSandbox):
    code = "import os; os.setuid(0)"
    # Where no root is mapped into the sandbox, the kernel calls the number itself invalid.
    assert re.search(r"PermissionError|Invalid argument", refused(python, f"python3 -c '{code}'"))
    refused(python, "chown 0:0 /work")


# Name -> the error that x86_64 must answer, the number, arguments.
SYSTEM_CALLS: dict[str, tuple[str, tuple[int, ...]]] = {
    "mount": ("EPERM", (165,)),
    "umount2": ("EPERM", (166,)),
    "pivot_root": ("EPERM", (155,)),
    "chroot": ("EPERM", (161,)),
    "open_tree": ("EPERM", (428,)),
    "fsopen": ("EPERM", (430,)),
    "mount_setattr": ("EPERM", (442,)),
    "unshare user": ("EPERM", (272, 0x10000000)),
    "unshare network": ("EPERM", (272, 0x40000000)),
    "clone user": ("EPERM", (56, 0x10000011)),
    "clone3": ("ENOSYS", (435,)),
    "setns": ("EPERM", (308, 0, 0)),
    "ptrace": ("EPERM", (101, 16, 1)),
    "process_vm_readv": ("EPERM", (310, 1)),
    "bpf": ("EPERM", (321,)),
    "perf_event_open": ("EPERM", (298,)),
    "openat2": ("ENOSYS", (437,)),
    "userfaultfd": ("EPERM", (323,)),
    "io_uring_setup": ("EPERM", (425, 8)),
    "keyctl": ("EPERM", (250,)),
    "add_key": ("EPERM", (248,)),
    "init_module": ("EPERM", (175,)),
    "kexec_load": ("EPERM", (246,)),
    "reboot": ("EPERM", (169, 0xFEE1DEAD, 672274793, 0x1234567)),
    "open_by_handle_at": ("EPERM", (304,)),
    "syslog": ("EPERM", (103, 3)),
    "personality": ("EPERM", (135, 0x0040000)),
    "packet socket": ("EAFNOSUPPORT", (41, 17, 3, 0)),
    "vsock socket": ("EAFNOSUPPORT", (41, 40, 1, 0)),
    "crypto socket": ("EAFNOSUPPORT", (41, 38, 5, 0)),
    "netfilter socket": ("EAFNOSUPPORT", (41, 16, 3, 12)),
    "terminal input": ("EPERM", (16, 0, 0x5412, 0)),
    "a call of tomorrow": ("ENOSYS", (480,)),
    "an x32 call": ("ENOSYS", (0x40000000 + 39,)),
    # What ordinary programs need keeps working.
    "getpid": ("ok", (39,)),
    "unix socket": ("ok", (41, 1, 1, 0)),
    "route socket": ("ok", (41, 16, 3, 0)),
    "internet socket": ("ok", (41, 2, 1, 0)),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers of x86_64")
def test_system_calls(python: SyncSandbox):
    found = calls(python, {name: numbers for name, (_, numbers) in SYSTEM_CALLS.items()})
    assert found == {name: answer for name, (answer, _) in SYSTEM_CALLS.items()}


# The kernel's own files ----------------------------------------------------------------------


@each_substrate
def test_kernel_settings_cannot_be_changed(sandbox: SyncSandbox):
    for path in ("kernel/core_pattern", "kernel/hostname", "vm/drop_caches", "fs/file-max"):
        refused(sandbox, f"echo '|/work/x' > /proc/sys/{path}")
    refused(sandbox, "echo b > /proc/sysrq-trigger")
    refused(sandbox, "echo 1 > /proc/irq/default_smp_affinity")
    refused(sandbox, "test -e /sys/kernel || test -e /sys/fs/cgroup")


@each_substrate
def test_masked_files_show_nothing(sandbox: SyncSandbox):
    for name in (
        "kcore",
        "kallsyms_none",
        "keys",
        "kpagecount",
        "kpageflags",
        "timer_list",
        "sysrq-trigger",
        "vmallocinfo",
        "kmsg",
        "interrupts",
        "cmdline",
        "diskstats",
        "partitions",
    ):
        shown = sandbox.exec(f"timeout 2 head -c 64 /proc/{name}", timeout=20)
        assert shown.stdout == "", name
    assert (
        sandbox.exec(
            "ls -A /proc/acpi /proc/scsi 2>/dev/null | grep -v :", timeout=20
        ).stdout.strip()
        == ""
    )


def test_a_recursive_search_of_everything_does_no_harm(sandbox: SyncSandbox):
    """A grep through every file, kernel files included, once stopped a whole machine."""
    # Left out: the files of processes, of which some never end (the map of pages).
    search = "grep -rqs --exclude-dir='[0-9]*' --exclude-dir='*self' no-such-text-$RANDOM /"
    assert sandbox.exec(f"{search}; echo ended", timeout=60).stdout == "ended\n"


# Devices -------------------------------------------------------------------------------------


@each_substrate
def test_only_harmless_devices(sandbox: SyncSandbox):
    shown = sandbox.exec("find /dev -type b -o -type c | xargs -n1 basename | sort", timeout=20)
    harmless = "console full null ptmx random tty urandom zero 0".split()
    assert set(shown.stdout.split()) <= set(harmless)


def test_devices_cannot_be_made(sandbox: SyncSandbox):
    for kind in ("b 254 0", "b 8 0", "c 1 1", "c 1 3"):
        refused(sandbox, f"mknod /work/d {kind}") if sandbox.exec(
            "command -v mknod", timeout=20
        ).exit_code == 0 else None
    result = sandbox.exec("echo x > /dev/mem; echo x > /dev/vda; echo x > /dev/sda", timeout=20)
    assert result.exit_code != 0


@pytest.mark.usefixtures("need_root")
def test_devices_in_the_bound_folder_cannot_be_opened(client: SyncClient, tmp_path: Path):
    os.mknod(tmp_path / "zero", 0o666 | 0o020000, os.makedev(1, 5))
    os.chmod(tmp_path / "zero", 0o666)
    sandbox = client.create(Container(workdir=tmp_path))
    assert "ermission denied" in refused(sandbox, "head -c 1 zero")


# Processes of the host -----------------------------------------------------------------------


@each_substrate
def test_processes_of_the_host_are_not_there(sandbox: SyncSandbox):
    shown = sandbox.exec("ps -A -o pid=,args=", timeout=20).stdout.splitlines()
    assert len(shown) < 6
    assert not [line for line in shown if "python" in line]
    refused(sandbox, f"kill -0 {os.getpid()} && test -e /proc/{os.getpid()}/exe")


def test_killing_everything_ends_nothing_else(sandbox: SyncSandbox):
    sandbox.exec("kill -KILL -1; kill -KILL 1", timeout=20)
    assert sandbox.exec("echo still here", timeout=20).stdout == "still here\n"


@each_substrate
def test_own_namespaces(sandbox: SyncSandbox):
    shown = sandbox.exec("readlink /proc/self/ns/*", timeout=20).stdout.split()
    ours = {os.readlink(f"/proc/self/ns/{kind}") for kind in os.listdir("/proc/self/ns")}
    for kind in ("user", "uts", "ipc", "pid", "mnt", "net", "cgroup"):
        (theirs,) = {name for name in shown if name.startswith(f"{kind}:[")}
        assert theirs not in ours
    assert sandbox.exec("hostname", timeout=20).stdout == "sandbox\n"


@each_substrate
def test_shared_memory_is_its_own(sandbox: SyncSandbox):
    assert sandbox.exec("ls -A /dev/shm /tmp", timeout=20).stdout == "/dev/shm:\n\n/tmp:\n"


# Watches for processes that are still ours, in the moment before they execute the command.
WATCH = """
import os, time
OURS = "fathom-" + "agent"  # in two parts, or this very program would answer to it
seen, reached, last, end = 0, set(), 0, time.monotonic() + 2.5
while time.monotonic() < end:
    last = max([last, *(int(name) for name in os.listdir("/proc") if name.isdigit())])
    for pid in range(last, last + 3):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                ours = OURS in file.read()
        except OSError:
            continue
        if not ours:
            continue
        seen += 1
        for name in ("exe", "cwd", "root"):
            try:
                reached.add(name + " " + os.readlink(f"/proc/{pid}/{name}"))
            except OSError:
                pass
        for name in ("maps", "environ", "mem", "fd"):
            try:
                if name == "fd" and os.listdir(f"/proc/{pid}/fd"):
                    reached.add(name)
                elif name != "fd" and open(f"/proc/{pid}/{name}", "rb").read(1):
                    reached.add(name)
            except OSError:
                pass
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                if OURS not in file.read():
                    reached.clear()  # it had become the tenant's own program meanwhile
        except OSError:
            reached.clear()
        if reached:
            print(reached, flush=True)
print(seen)
"""


def test_our_own_process_cannot_be_reached(python: SyncSandbox):
    """A command's process is ours until it executes; its memory and files must stay closed."""
    results: list[str] = []
    thread = threading.Thread(
        target=lambda: results.append(python.exec(["python3", "-c", WATCH], timeout=20).output)
    )
    thread.start()
    while thread.is_alive():
        python.exec("true", timeout=20)
    thread.join()
    *reached, seen = results[0].splitlines()
    assert reached == []
    assert int(seen) > 0, "the attack never met the moment that it is about"


def test_the_program_of_our_own_process_gives_nothing(sandbox: SyncSandbox, cache_dir: Path):
    """Executing /proc/self/exe finds the agent's program, which gives nothing."""
    program = agent.binary(cache_dir)
    before = program.read_bytes()
    result = sandbox.exec(["/proc/self/exe", "--version"], timeout=20)
    assert result.exit_code == 71
    inside = "/dev/fathom-agent"
    for path in ("/proc/$PPID/exe", "/proc/1/exe", inside):
        refused(sandbox, f"exec 3<> {path}")
        refused(sandbox, f"echo > {path}")
    refused(sandbox, f"rm -f {inside} || mv {inside} /tmp/x || ln {inside} /work/x")
    assert program.read_bytes() == before


def test_no_descriptor_is_inherited(sandbox: SyncSandbox):
    assert sandbox.exec(["ls", "-1", "/proc/self/fd"], timeout=20).stdout == "0\n1\n2\n3\n"


# Network -------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield server.getsockname()[1]


@each_substrate
def test_nothing_can_be_reached(sandbox: SyncSandbox, listener: int):
    addresses = {"127.0.0.1", "1.1.1.1", "169.254.169.254"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9)) if _has_route() else None
        addresses.add(probe.getsockname()[0])
    for address in addresses:
        refused(sandbox, f"timeout 0.5 bash -c ': < /dev/tcp/{address}/{listener}'")
        refused(
            sandbox,
            f"timeout 0.5 bash -c 'echo x > /dev/udp/{address}/53 && cat < /dev/udp/{address}/53'",
        )


def _has_route() -> bool:
    return len(Path("/proc/net/route").read_text().splitlines()) > 1


@each_substrate
def test_only_the_loopback_device(sandbox: SyncSandbox):
    devices = sandbox.exec("tail -n +3 /proc/net/dev | cut -d: -f1", timeout=20).stdout.split()
    assert devices == ["lo"]
    assert (
        sandbox.exec(
            "cat /proc/net/route /proc/net/ipv6_route | grep -v lo$ | tail -n +2", timeout=20
        ).stdout
        == ""
    )


def test_loopback_inside_works(python: SyncSandbox):
    code = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); "
        "c = socket.create_connection(s.getsockname()); print(c.getpeername()[0])"
    )
    assert python.exec(["python3", "-c", code], timeout=20).stdout == "127.0.0.1\n"


def test_sockets_of_the_host_cannot_be_reached(python: SyncSandbox, tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0fathom-test-{os.getpid()}")
        server.listen()
        code = (
            f"import socket; socket.socket(socket.AF_UNIX).connect('\\0fathom-test-{os.getpid()}')"
        )
        assert "ConnectionRefused" in refused(python, f'python3 -c "{code}"')


def test_two_sandboxes_do_not_see_each_other(client: SyncClient):
    one, other = client.create(Container()), client.create(Container())
    one.exec("echo mine > /work/f; echo mine > /tmp/f; sleep 3333 > /dev/null 2>&1 &", timeout=20)
    refused(other, "cat /work/f /tmp/f")
    assert other.exec("pgrep -c sleep", timeout=20).stdout == "0\n"


# Exhaustion ----------------------------------------------------------------------------------


def test_a_fork_bomb_stays_small(client: SyncClient):
    sandbox = client.create(Container(pids=40))
    before = time.monotonic()
    bomb = "f() { f | f & }; f; sleep 2; ls -d /proc/[0-9]* | wc -l"
    result = sandbox.exec(bomb, timeout=2)
    assert result.timed_out or "fork" in result.stderr
    assert time.monotonic() - before < 30
    # The next command finds room again: what a timeout ended is gone.
    sandbox.exec("sleep 3", timeout=0.2)
    for _ in range(50):
        if sandbox.exec("true", timeout=10).exit_code == 0:
            break
    count = sandbox.exec("ls -d /proc/[0-9]* | wc -l", timeout=10)
    assert int(count.stdout) <= 48


def test_open_files_are_bounded(sandbox: SyncSandbox):
    assert sandbox.exec("ulimit -n; ulimit -Hn", timeout=20).stdout == "1024\n1024\n"
    refused(sandbox, "ulimit -n 4096")


@each_substrate
def test_memory_in_folders_is_bounded(client: SyncClient):
    sandbox = client.create(Container(disk="4MiB"))
    for folder in ("/work", "/tmp", "/dev/shm"):
        assert "No space" in refused(sandbox, f"head -c 16M /dev/zero > {folder}/full")
    assert sandbox.exec("rm /work/full /tmp/full; echo fine", timeout=20).stdout == "fine\n"
