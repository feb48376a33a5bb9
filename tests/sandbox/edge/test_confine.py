"""What the API process could still do were it taken over: it is tried from inside of one."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.sandbox import syscalls
from tests.sandbox.edge.daemon import REPOSITORY, Daemon
from tests.sandbox.test_rootless import BECOME

NOBODY = 65534
# Runs confined; prints the names of the attempts that came to something.
ATTEMPTS = """
import ctypes, json, mmap, os, resource, signal, socket, subprocess, sys, threading
from pathlib import Path
from fathom.sandbox import syscalls
from fathom.sandbox.edge.confine import confine
user, root, parent, own, secret = json.loads(sys.argv[1])
folder = os.open(".", os.O_RDONLY)  # a folder that was left open, and not by us
os.close(folder)
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
confine(user, Path(root) if root else None, parent)

def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

def write(path):
    with open(path, "w") as file:
        file.write("x")

def thread():
    done = threading.Event()
    threading.Thread(target=done.set).start()
    assert done.wait(5)

zero = ctypes.c_long(0)
attempts = {
    "read a file of the system": lambda: open("/etc/passwd").read(),
    "read a file of root": lambda: open(secret).read(),
    "read own program": lambda: open(sys.executable, "rb").read(1),
    "read own memory": lambda: open("/proc/self/mem", "rb"),
    "list a folder": lambda: os.listdir("/usr"),
    "write beside the sandboxes": lambda: write(own + "/x"),
    "write to /tmp": lambda: write("/tmp/fathom-confined"),
    "write here": lambda: write("x"),
    "make a folder": lambda: os.mkdir("/tmp/fathom-confined-d"),
    "make a link": lambda: os.symlink("/etc", "/tmp/fathom-confined-l"),
    "remove a folder": lambda: os.rmdir(own),
    "open a device": lambda: open("/dev/kmsg"),
    "start a program": lambda: subprocess.run(["/bin/true"]),
    "execute in place": lambda: os.execv("/bin/true", ["true"]),
    "fork": lambda: os.fork() or os._exit(0),
    "TCP": lambda: socket.socket(socket.AF_INET),
    "IPv6": lambda: socket.socket(socket.AF_INET6),
    "UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "Unix socket": lambda: socket.socket(socket.AF_UNIX),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "raw packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "signal to the parent": lambda: os.kill(parent, 0),
    "signal to all": lambda: os.kill(-1, 0),
    "signal by a file": lambda: signal.pidfd_send_signal(os.pidfd_open(parent), 0),
    "become root": lambda: os.setuid(0) if os.getuid() else 1 / 0,
    "take root's group": lambda: os.setgid(0) if os.getgid() else 1 / 0,
    "other groups": lambda: os.setgroups([0]),
    "mount": lambda: syscalls.mount("none", own, "tmpfs", 0),
    "new namespaces": lambda: syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS),
    "chroot": lambda: os.chroot("/"),
    "out of the root": lambda: open("../../../../etc/passwd").read(),
    "trace the parent": lambda: call(101, ctypes.c_long(16), ctypes.c_long(parent), zero, zero),
    "read the parent's memory": lambda: open(f"/proc/{parent}/mem", "rb"),
    "keys": lambda: call(250, zero, ctypes.c_long(-3), ctypes.c_long(1)),
    "bpf": lambda: call(321, zero, zero, zero),
    "io_uring": lambda: call(425, ctypes.c_long(8), ctypes.create_string_buffer(200)),
    "userfaultfd": lambda: call(323, zero),
    "a new file system": lambda: call(430, b"tmpfs", zero),
    "raise its limits": lambda: resource.setrlimit(resource.RLIMIT_CORE, (5, 5)),
}
found = []
for name, attempt in attempts.items():
    try:
        attempt()
        found.append(name)
    except (OSError, ValueError, subprocess.SubprocessError, ZeroDivisionError):
        pass
one, other = socket.socketpair()
one.send(b"x")
thread()
works = other.recv(1) == b"x" and len(os.urandom(8)) == 8 and mmap.mmap(-1, 4096) is not None
print(json.dumps([found, bool(works)]))
"""


@pytest.fixture
def empty() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fathom-confined-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    folder.rmdir()


def attempt(command: list[str], user: int | None, empty: Path, secret: Path) -> list[str]:
    """Start it as the parent does: the process that waits is its parent."""
    given = [user, str(empty) if user is not None else None, 0, str(empty), str(secret)]
    code = "import os, sys, json; a = json.loads(sys.argv[1]); a[2] = os.getppid(); "
    code += "sys.argv[1] = json.dumps(a)\n" + ATTEMPTS
    done = subprocess.run(
        [*command, "-c", code, json.dumps(given)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, works = json.loads(done.stdout)
    assert works, "it cannot even serve what it has open"
    return found


@pytest.mark.usefixtures("need_root")
def test_nothing_is_left_to_root_s(empty: Path, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    # Should one succeed, this machine's mounts are not those that it changes.
    command = ["unshare", "--mount", "--propagation", "private", sys.executable]
    assert attempt(command, 0x5FFF1234, empty, secret) == []


@pytest.mark.usefixtures("need_root")
def test_nothing_is_left_to_another_user_s(empty: Path, tmp_path: Path):
    """Where the daemon is a user's own, its API process stays that user, and sees no file."""
    if not syscalls.landlock_version():
        pytest.skip("this kernel has no Landlock")
    secret = tmp_path / "secret"
    secret.write_text("x")
    os.chown(empty, NOBODY, NOBODY)
    for program in (sys.executable, "/usr/bin/python3"):
        command = [*BECOME, program]
        if subprocess.run([*command, "-c", ""], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("no Python can be run by nobody")
    assert attempt(command, None, empty, secret) == []


def test_the_api_process_has_no_rights(daemon: Daemon):
    (api,) = daemon.processes("fathom.sandbox.edge.api")
    lines = Path(f"/proc/{api}/status").read_text().splitlines()
    status = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name][0], 16) == 0, name
    assert status["NoNewPrivs"] == ["1"]
    assert status["Seccomp"] == ["2"]
    if os.geteuid() == 0:
        assert int(status["CapBnd"][0], 16) == 0
        users = {*status["Uid"], *status["Gid"]}
        assert len(users) == 1
        assert int(users.pop()) >= 0x5FFF0000
        assert status["Groups"] == []
        root = Path(f"/proc/{api}/root")
        assert root.readlink() == daemon.folder / "empty"
        assert os.listdir(root) == []
        # Beside its sockets it has nothing open.
        kinds = {os.readlink(f"/proc/{api}/fd/{fd}") for fd in os.listdir(f"/proc/{api}/fd")}
        assert all(kind.startswith(("socket:", "anon_inode:", "/dev/null")) for kind in kinds)
    else:
        with pytest.raises(PermissionError):  # not even its own user may look
            os.listdir(f"/proc/{api}/fd")


def test_it_ends_with_the_parent(daemon: Daemon):
    (api,) = daemon.processes("fathom.sandbox.edge.api")
    pidfd = os.pidfd_open(api)
    daemon.end(9)
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
    daemon.start()
