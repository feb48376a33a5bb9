"""The folder that an emulator is shut into, and the start of the emulator in it.

Inside lie the emulator's own program and libraries, read-only, three devices, its own entries of
/proc, and a small folder in memory that it may write to. Nothing else of this machine has a path
there; disks, kernel and memory are open files that it inherits. It runs as a user that no file
belongs to, without a capability, in a network namespace with nothing but the sandbox's rules.

Paper: none (sandbox security; the report only names its platform).
"""

from __future__ import annotations

import os
import queue
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

from fathom.errors import SandboxError
from fathom.sandbox import syscalls
from fathom.sandbox.vm.launch import MachineLaunch

_MS_RDONLY = 0x1
_MS_NOEXEC = 0x8
_MS_REMOUNT = 0x20
_DEVICES = {"null": (1, 3), "urandom": (1, 9), "zero": (1, 5)}
# The emulator's own writes: a saved state, and what it says when it fails.
OWN = "own"
LOG = "log"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def prepare(root: Path, launch: MachineLaunch) -> None:
    """Mount and fill the folder `root`, which exists. Raises OSError."""
    quiet = syscalls.MS_NOSUID
    syscalls.mount("tmpfs", str(root), "tmpfs", quiet, "size=48m,nr_inodes=256,mode=755")
    for name in ("usr", "dev", "proc", OWN):
        (root / name).mkdir(mode=0o755)
    for name in ("lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    bound = str(root / "usr")
    syscalls.mount(f"{launch.tree}/usr", bound, None, syscalls.MS_BIND)
    read_only = syscalls.MS_BIND | _MS_REMOUNT | _MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("none", bound, None, read_only)
    # Only the entries of processes that it may look at anyway, which are its own.
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | _MS_NOEXEC
    syscalls.mount("proc", str(root / "proc"), "proc", flags, "hidepid=invisible,subset=pid")
    devices = dict(_DEVICES)
    if launch.accelerator == "kvm":
        kvm = os.stat("/dev/kvm").st_rdev
        devices["kvm"] = (os.major(kvm), os.minor(kvm))
    for name, (major, minor) in devices.items():
        path = root / "dev" / name
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        path.chmod(0o666)
        if name == "kvm":
            os.chown(path, launch.uid, launch.uid)
    os.chown(root / OWN, launch.uid, launch.uid)
    (root / OWN).chmod(0o700)


class Starter:
    """Starts programs from one thread that lives on.

    The kernel ends a child with the thread that made it where the child asked for that, not with
    the process; a thread that serves one request would take its machine along.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[dict[str, Any], queue.SimpleQueue[Any]]]
        self._work = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, words: list[str], **how: Any) -> subprocess.Popen[bytes]:
        """Start a program. Raises OSError, subprocess.SubprocessError."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._work.put(({"args": words, **how}, answer))
        found = answer.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self) -> None:
        while True:
            how, answer = self._work.get()
            try:
                answer.put(subprocess.Popen(**how))
            except BaseException as error:
                answer.put(error)


def start(
    starter: Starter,
    root: Path,
    launch: MachineLaunch,
    words: list[str],
    *,
    doors: list[str],
    netns: int,
    keep: tuple[int, ...],
) -> subprocess.Popen[bytes]:
    """Start the emulator shut into `root`, in the namespace `netns`, with the open files `keep`.

    `doors`: the files by which it enters its control groups.

    Raises SandboxError.
    """
    who = ["--reuid", str(launch.uid), "--regid", str(launch.uid), "--clear-groups"]
    less = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    if not launch.outlive:
        less.append("--pdeathsig=KILL")
    # By a path through this process: the emulator shall not inherit the namespace as an open file.
    command = [launch.agent, "--enter", *doors, "--", "/usr/bin/nsenter"]
    command += ["nsenter", f"--net=/proc/{os.getpid()}/fd/{netns}"]
    command += ["unshare", "--ipc", "--uts", "--"]
    command += ["chroot", str(root), "/usr/bin/setpriv", *who, *less, *words]
    log = os.open(root / OWN / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return starter.start(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=keep,
            env={"PATH": _PATH, "LC_ALL": "C"},
            cwd="/",
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"the emulator did not start: {error}") from error
    finally:
        os.close(log)


def said(root: Path) -> str:
    """Return the last of what the emulator wrote as it failed."""
    try:
        # An emulator that was taken over may have put anything there, a pipe as well.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(root / OWN / LOG, flags)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        file.seek(max(0, os.fstat(fd).st_size - 1500))
        return file.read().decode(errors="replace").strip()
