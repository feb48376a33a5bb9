"""What this machine can do for sandboxes, proven by running one.

Opening a device or finding a program proves nothing: each substrate that suits this user starts a
sandbox, and what its `Caps` promise is tried inside it.

Paper: none (machine facts).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fathom.errors import SandboxError
from fathom.sandbox.substrates.choice import (
    SUBSTRATES,
    Name,
    install_command,
    program_of,
    suited,
)
from fathom.sandbox.sync import SyncClient, SyncSandbox
from fathom.sandbox.types import Container, MicroVM

_TIMEOUT = 20.0
_MEMORY = 64 << 20
# Settings that stand in the way of user namespaces, the value that allows them, and what to do.
_OBSTACLES = {
    "/proc/sys/kernel/unprivileged_userns_clone": "kernel.unprivileged_userns_clone=1",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "kernel.apparmor_restrict_unprivileged_userns=0"
    ),
    "/proc/sys/user/max_user_namespaces": "user.max_user_namespaces=15000",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found out about one substrate.

    `works`: a sandbox ran and kept every promise. `suited`: it is meant for this user. `broken`:
    promises that did not hold. `problem` says what is wrong, `fix` the command that may help.
    `create_ms`, `exec_ms`: how long it took to start, and then to run `true` (median of 20).
    """

    name: Name
    suited: bool
    installed: bool
    works: bool = False
    problem: str | None = None
    fix: str | None = None
    broken: tuple[str, ...] = ()
    enforced: tuple[str, ...] = ()
    create_ms: float | None = None
    exec_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All substrates, and the facts of the machine that decide about them."""

    findings: tuple[Finding, ...]
    user: str
    kernel: str = field(default_factory=lambda: os.uname().release)

    @property
    def usable(self) -> tuple[Name, ...]:
        """The substrates that work here, the preferred one first."""
        return tuple(finding.name for finding in self.findings if finding.works)


def examine(cache_dir: str | Path | None = None, runtime_dir: str | Path | None = None) -> Report:
    """Try every substrate that suits this user. Never raises for what does not work."""
    findings = tuple(_examine_one(name, cache_dir, runtime_dir) for name in SUBSTRATES)
    return Report(findings=findings, user="root" if os.geteuid() == 0 else f"uid {os.geteuid()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What was found out about virtual machines.

    `accelerator`: "kvm" where a guest was really booted with it, else "tcg" (emulated); `reason`:
    how that is known. `create_ms`: until the first command of a machine had ended; `exec_ms`: of a
    later one, median.
    """

    installed: bool
    works: bool = False
    accelerator: str = ""
    reason: str = ""
    problem: str | None = None
    fix: str | None = None
    create_ms: float | None = None
    exec_ms: float | None = None


def examine_machines(
    cache_dir: str | Path | None = None, runtime_dir: str | Path | None = None
) -> Machines:
    """Try a small virtual machine. Never raises for what does not work."""
    from fathom.sandbox import paths
    from fathom.sandbox.vm import accel, emulator

    if emulator.program() is None:
        sudo = "" if os.geteuid() == 0 else "sudo "
        return Machines(
            installed=False, problem="QEMU is not installed", fix=sudo + emulator.INSTALL
        )
    try:
        found = accel.find(Path(cache_dir) if cache_dir else paths.cache_folder())
        with SyncClient(cache_dir=cache_dir, runtime_dir=runtime_dir) as client:
            client.create(MicroVM()).stop()  # the first one of a kind is booted, others go on
            started = time.perf_counter()
            sandbox = client.create(MicroVM())
            sandbox.exec("true", timeout=_TIMEOUT)
            create_ms = (time.perf_counter() - started) * 1000
            times: list[float] = []
            for _ in range(5):
                started = time.perf_counter()
                sandbox.exec("true", timeout=_TIMEOUT)
                times.append((time.perf_counter() - started) * 1000)
    except SandboxError as error:
        return Machines(installed=True, problem=str(error))
    return Machines(
        installed=True,
        works=True,
        accelerator=found.name,
        reason=found.reason,
        create_ms=round(create_ms, 1),
        exec_ms=round(sorted(times)[2], 1),
    )


def _examine_one(
    name: Name, cache_dir: str | Path | None, runtime_dir: str | Path | None
) -> Finding:
    installed = program_of(name) is not None
    if name not in suited():
        return Finding(name=name, suited=False, installed=installed)
    if not installed:
        return Finding(
            name=name,
            suited=True,
            installed=False,
            problem="not installed",
            fix=install_command(name),
        )
    try:
        return _try(name, cache_dir, runtime_dir)
    except SandboxError as error:
        return Finding(
            name=name, suited=True, installed=True, problem=str(error), fix=_obstacle_fix()
        )


def _try(name: Name, cache_dir: str | Path | None, runtime_dir: str | Path | None) -> Finding:
    with SyncClient(substrate=name, cache_dir=cache_dir, runtime_dir=runtime_dir) as client:
        # Built before the clock starts: an image is made once.
        client.create(Container()).stop()
        started = time.perf_counter()
        sandbox = client.create(Container())
        create_ms = (time.perf_counter() - started) * 1000
        times: list[float] = []
        for _ in range(20):
            started = time.perf_counter()
            sandbox.exec("true", timeout=_TIMEOUT)
            times.append((time.perf_counter() - started) * 1000)
        enforced = sandbox.caps.enforced
        limits = Container(
            memory=_MEMORY if "memory" in enforced else None,
            pids=32 if "pids" in enforced else None,
            disk=4 << 20,
        )
        limited = client.create(limits)
        broken = tuple(
            promise
            for promise, holds in _PROMISES.items()
            if (promise not in ("memory", "pids") or promise in enforced) and not holds(limited)
        )
    return Finding(
        name=name,
        suited=True,
        installed=True,
        works=not broken,
        problem=f"not kept: {', '.join(broken)}" if broken else None,
        broken=broken,
        enforced=tuple(sorted(enforced)),
        create_ms=round(create_ms, 1),
        exec_ms=round(sorted(times)[len(times) // 2], 1),
    )


def _succeeds(sandbox: SyncSandbox, command: str) -> bool:
    return sandbox.exec(command, timeout=_TIMEOUT).exit_code == 0


def _memory_holds(sandbox: SyncSandbox) -> bool:
    result = sandbox.exec(
        f"head -c {4 * _MEMORY} /dev/zero | tail -c 1G > /dev/null", timeout=_TIMEOUT
    )
    return result.oom_killed


def _pids_hold(sandbox: SyncSandbox) -> bool:
    # Once there is no room the shell waits for some, ever longer: the timeout is part of this.
    result = sandbox.exec("for i in $(seq 60); do sleep 9 & done", timeout=1.5)
    return "fork" in result.stderr


_PROMISES: dict[str, Callable[[SyncSandbox], bool]] = {
    "tenant without privileges": lambda s: _succeeds(
        s,
        "grep -qx 'NoNewPrivs:\t1' /proc/self/status && grep -qx 'Seccomp:\t2' /proc/self/status "
        "&& grep -qxE 'CapEff:\t0+' /proc/self/status && grep -qxE 'CapBnd:\t0+' /proc/self/status",
    ),
    "no network": lambda s: _succeeds(
        s, "! grep -qvE '^ *lo:|^Inter|^ face' /proc/net/dev && ! : < /dev/tcp/1.1.1.1/53"
    ),
    "read-only system": lambda s: _succeeds(s, "! touch /usr/x && ! touch /etc/x && touch /work/x"),
    "own processes only": lambda s: _succeeds(s, "(( $(ls -d /proc/[0-9]* | wc -l) < 10 ))"),
    "disk": lambda s: _succeeds(s, "! head -c 8M /dev/zero > /tmp/full; rm /tmp/full"),
    "pids": _pids_hold,
    "memory": _memory_holds,
}


def _obstacle_fix() -> str | None:
    """Return the command that lifts the first known obstacle to user namespaces, or None."""
    for path, setting in _OBSTACLES.items():
        try:
            value = int(Path(path).read_text())
        except (OSError, ValueError):
            continue
        wanted = int(setting.partition("=")[2])
        if (value == 0) != (wanted == 0):
            return f"sudo sysctl -w {setting}"
    return None
