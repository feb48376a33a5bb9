"""Run one command of a recipe in a container on a mounted stack of layers.

The command is root in a user namespace of its own, with the few capabilities that installing
software takes, the sandbox's system call filter, no network, and limits on memory and processes.
What it writes goes to the stack's upper folder and nowhere else.

Paper: none (recipes of container images).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import Unsupported
from fathom.sandbox import cgroups, paths, seccomp, userns
from fathom.sandbox.images.errors import ImageError

IDS = 0x5F000000
ID_COUNT = 65536
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP SETFCAP SYS_CHROOT "
        "NET_BIND_SERVICE"
    ).split()
]
_MASKED = (
    "/proc/acpi /proc/kcore /proc/keys /proc/kmsg /proc/kpagecgroup /proc/kpagecount "
    "/proc/kpageflags /proc/latency_stats /proc/sched_debug /proc/scsi /proc/sysrq-trigger "
    "/proc/timer_list /proc/timer_stats /proc/config.gz /proc/slabinfo /proc/vmallocinfo"
).split()
_KEPT = 64 << 10
# Shows the tree where the container's root can pass, hides what crun 1.8 refuses, enters the
# control groups, then becomes the runtime.
_ENTER = (
    'mount --bind "$1" "$2" || exit 125; if [ -n "$3" ]; then umount "$3"; fi; n="$4"; shift 4; '
    'while [ "$n" -gt 0 ]; do echo 0 > "$1" || exit 125; shift; n=$((n - 1)); done; exec "$@"'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A command and how to run it. `timeout` in seconds, `memory` in bytes."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    timeout: float = 600.0
    memory: int = 2 << 30
    pids: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a step ended: its exit code, and the last part of both its streams."""

    exit_code: int
    output: str
    timed_out: bool = False


def mapping() -> int:
    """Return a descriptor of the user namespace that steps run in. Raises OSError, Unsupported."""
    if os.geteuid() != 0:
        raise Unsupported(
            "RUN needs root: only root can give files the owners that an image wants; recipes "
            "without RUN work for every user"
        )
    ids = f"0 {IDS} {ID_COUNT}"
    return userns.make(ids, ids)


def runtime() -> str:
    """Return the program that runs steps. Raises Unsupported."""
    for name in ("crun", "runc"):
        if found := shutil.which(name, path="/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"):
            return found
    raise Unsupported("RUN needs crun or runc: `apt-get install -y crun`")


def run(step: Step, root: Path, bundle: Path) -> Outcome:
    """Run `step` on the writable tree at `root`; `bundle` is an empty folder for its records.

    Raises ImageError when the container cannot be started, Unsupported.
    """
    program = runtime()
    name = f"build-{os.getpid()}-{secrets.token_hex(4)}"
    layout = cgroups.current_layout()
    group = cgroups.Group(layout, name) if layout is not None else None
    # The tree may lie in a folder that only root can pass; the container's root cannot.
    place = paths.make_runtime_folder(paths.runtime_folder()) / name
    place.mkdir(mode=0o711)
    (bundle / "config.json").write_text(json.dumps(_configuration(step, place)))
    try:
        entries: list[str] = []
        hidden = ""
        if group is not None and layout is not None:
            group.create()
            group.limit(memory=step.memory, pids=step.pids, cpu=None)
            entries = [str(folder / "cgroup.procs") for folder in group.folders.values()]
            hidden = str(layout.beside) if layout.version == 1 and layout.beside else ""
        argv = [program, "--root", str(bundle / "state"), "--cgroup-manager", "disabled"]
        if program.endswith("runc"):
            argv = argv[:3]
        argv += ["--log", str(bundle / "log"), "run", "--bundle", str(bundle)]
        argv += ["--pid-file", str(bundle / "pid"), name]
        shell = ["/bin/sh", "-c", _ENTER, "enter", str(root), str(place), hidden]
        shell += [str(len(entries)), *entries, *argv]
        outcome = _watch(["unshare", "--mount", "--propagation=private", *shell], step, bundle)
        log = bundle / "log"
        if outcome.exit_code and not (bundle / "pid").exists():
            said = log.read_text(errors="replace")[-1000:] if log.exists() else outcome.output
            raise ImageError(f"the container of RUN could not be started: {said.strip()}")
        return outcome
    finally:
        _kill(bundle)
        if group is not None:
            group.destroy()
        shutil.rmtree(bundle / "state", ignore_errors=True)
        with contextlib.suppress(OSError):
            place.rmdir()


def _watch(argv: Sequence[str], step: Step, bundle: Path) -> Outcome:
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": _PATH},
        cwd="/",
        start_new_session=True,
    )
    kept = bytearray()

    assert process.stdout is not None
    output = process.stdout.fileno()

    def drain() -> None:
        while piece := os.read(output, 65536):
            kept.extend(piece)
            del kept[:-_KEPT]

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    timed_out = False
    try:
        process.wait(step.timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        _kill(bundle)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        reader.join()
        process.stdout.close()
    return Outcome(
        exit_code=process.returncode, output=kept.decode(errors="replace"), timed_out=timed_out
    )


def _kill(bundle: Path) -> None:
    """End the container's first process, and with it every other one of its namespace."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((bundle / "pid").read_text())
        fd = os.pidfd_open(pid)
        try:
            # The number may be another process's by now: ours is a child namespace's first one.
            if os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid"):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def _configuration(step: Step, root: Path) -> dict[str, Any]:
    ids = [{"containerID": 0, "hostID": IDS, "size": ID_COUNT}]
    quiet = ["nosuid", "nodev", "noexec"]

    def special(target: str, kind: str, options: list[str]) -> dict[str, Any]:
        return {"destination": target, "type": kind, "source": kind, "options": options}

    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": step.uid, "gid": step.gid},
            "args": list(step.argv),
            "env": [f"{key}={value}" for key, value in ({"PATH": _PATH} | dict(step.env)).items()],
            "cwd": step.cwd,
            "capabilities": {
                kind: _CAPABILITIES if step.uid == 0 else []
                for kind in ("bounding", "effective", "permitted")
            },
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": False},
        "hostname": "build",
        "mounts": [
            special("/proc", "proc", quiet),
            special("/dev", "tmpfs", ["nosuid", "noexec", "mode=755", "size=64k"]),
            special("/dev/pts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666"]),
            special("/dev/shm", "tmpfs", [*quiet, "mode=1777", "size=64m"]),
        ],
        "linux": {
            "uidMappings": ids,
            "gidMappings": ids,
            "namespaces": [
                {"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "user")
            ],
            "maskedPaths": _MASKED,
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
            "seccomp": seccomp.oci_form(),
        },
    }
