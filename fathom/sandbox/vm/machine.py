"""One virtual machine as its node sees it: started, reached, stopped for a while, saved, ended.

Paper: §5.2.5 (microVM and full VM substrates; memory snapshots).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fathom.errors import SandboxError, SandboxLost
from fathom.sandbox import cgroups, frames, messages, netns, seccomp, state, syscalls
from fathom.sandbox.frames import Frame, Tag
from fathom.sandbox.substrates.launch import OOM_SCORE, TENANT
from fathom.sandbox.types import DEFAULT_PIDS
from fathom.sandbox.vm import jail, memory, note, qcow2, screen
from fathom.sandbox.vm.chain import Origin, origin_in
from fathom.sandbox.vm.launch import Files, MachineLaunch, command_line, launch_in
from fathom.sandbox.vm.mux import Mux
from fathom.sandbox.vm.qmp import Monitor
from fathom.sandbox.vm.saved import Saved

MONITOR, PORT = "monitor.sock", "port.sock"
# Processes that a tenant's commands may have at a time; the guest's own kernel counts them.
PROCESSES = {"microvm": DEFAULT_PIDS, "fullvm": 1024}
WRITABLE = ("/work", "/tmp", "/dev", "/proc", "/run", "/var/tmp")
_EMULATOR_PIDS = 64
_JOURNAL = 16 << 20  # bytes of receipts, in the guest's memory
_BOOT_TIMEOUT = {"microvm": 60.0, "fullvm": 300.0}
_RESTORE_TIMEOUT = 30.0
_GONE_TIMEOUT = 10.0
_HUSH_PATIENCE = 1.0
_STARTER = jail.Starter()


@dataclass(slots=True)
class Machine:
    """A machine that runs.

    `memory`: the file that it maps. `disk`: what it writes to, on top of the disks `below`, which
    never change. `origin`: what of it lies in a folder. `frozen`: when it was paused, by the
    monotonic clock; `between_frames`: whether its port then held no half of a frame. `online`:
    whether the guest's network device is on, None where that is not known.
    """

    folder: Path
    launch: MachineLaunch
    lock: int
    secret: bytes
    group: cgroups.Group | None = None
    pid: int = -1
    pidfd: int = -1
    net: int = -1
    memory: int = -1
    disk: int = -1
    below: tuple[int, ...] = ()
    origin: Origin | None = None
    process: subprocess.Popen[bytes] | None = None
    monitor: Monitor | None = None
    mux: Mux | None = None
    frozen: float | None = None
    between_frames: bool = True
    stood: float = 0.0
    online: bool | None = False
    ended: bool = False
    busy: threading.RLock = field(default_factory=threading.RLock)

    @property
    def id(self) -> str:
        """The sandbox's name, which is its folder's."""
        return self.folder.name

    def facts(self) -> dict[str, Any]:
        """What its client needs to reach it."""
        return {"pid": self.pid, "secret": self.secret.hex(), "oom_file": ""}

    def ask(self, command: str, **arguments: Any) -> Any:
        """Have the emulator do something. Raises SandboxError, SandboxLost."""
        if self.monitor is None:
            raise SandboxLost(f"sandbox {self.id} ended: create another one")
        return self.monitor.ask(command, **arguments)


def make(launch: MachineLaunch, nets: netns.Pool | None, source: Saved | None) -> Machine:
    """Start a machine and return once its agent has answered; `source` is where it goes on from.

    Raises SandboxError or OSError; then nothing of it is left.
    """
    machine = Machine(launch.folder, launch, state.claim(launch.folder), secrets.token_bytes(32))
    try:
        layout = cgroups.current_layout()
        if layout is None:
            raise SandboxError("no control groups are mounted: mount them at /sys/fs/cgroup")
        machine.group = cgroups.Group(layout, launch.folder.name)
        state.note_groups(launch.folder, machine.group.all_folders())
        machine.net = nets.take() if nets is not None else netns.make()
        machine.group.create()
        _start(machine, source)
        return machine
    except BaseException:
        destroy(machine)
        raise


def _start(machine: Machine, source: Saved | None) -> None:
    launch = machine.launch
    assert machine.group is not None
    root = launch.folder / state.ROOTFS
    root.mkdir(mode=0o755)
    jail.prepare(root, launch)
    opened: list[int] = []
    try:
        with contextlib.ExitStack() as stack:
            monitor = stack.enter_context(messages.listen(launch.folder, MONITOR))
            port = stack.enter_context(messages.listen(launch.folder, PORT))
            files = _open_files(machine, source, monitor.fileno(), port.fileno(), opened)
            words = command_line(launch, files)
            machine.group.limit(memory=launch.group_memory, pids=_EMULATOR_PIDS, cpu=launch.cpu)
            machine.process = jail.start(
                _STARTER,
                root,
                launch,
                words,
                doors=machine.group.doors(),
                netns=machine.net,
                keep=files.all(),
            )
        machine.pid = machine.process.pid
        machine.pidfd = os.pidfd_open(machine.pid)
        state.note_first(launch.folder, machine.pid)
        try:
            _introduce(machine, source, files.state)
        except (SandboxError, OSError) as error:
            raise SandboxError(_why(machine, root, error)) from error
    finally:
        for fd in opened:
            os.close(fd)
    note.write(
        launch,
        machine.secret,
        machine.pid,
        memory=machine.memory,
        disk=machine.disk,
        below=machine.below,
        origin=machine.origin,
    )


def _open_files(
    machine: Machine, source: Saved | None, monitor: int, port: int, opened: list[int]
) -> Files:
    launch = machine.launch

    def read_only(path: str) -> int:
        opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return opened[-1]

    if source is None:
        machine.memory = memory.create(launch.memory)
        memory.seal(machine.memory)
    else:
        machine.memory = os.dup(source.memory)
        machine.below = tuple(map(os.dup, source.disks))
        machine.origin = source.origin
    if launch.substrate == "fullvm":
        machine.disk = qcow2.fresh(Path(launch.scratch), os.stat(launch.base).st_size)
    begin: dict[str, int] = {}
    if source is None:
        begin = {"kernel": read_only(launch.kernel), "initramfs": read_only(launch.initramfs)}
    else:
        opened.append(memory.hold_bytes(source.state))
        begin = {"state": opened[-1]}
    return Files(
        monitor=monitor,
        port=port,
        memory=machine.memory,
        base=read_only(launch.base),
        below=machine.below,
        disk=machine.disk,
        **begin,
    )


def _why(machine: Machine, root: Path, error: Exception) -> str:
    words = f"the virtual machine did not start: {error}"
    with contextlib.suppress(SandboxError, OSError, KeyError):
        if text := machine.ask("ringbuf-read", device="console", size=4096).strip():
            words += f"; its console: {text[-800:]}"
    if text := jail.said(root):
        words += f"; the emulator: {text[-800:]}"
    return words


def _connect(machine: Machine, name: str, timeout: float) -> socket.socket:
    """Connect to one of the emulator's sockets, which waits in its queue until it is ready."""
    sock = messages.connect(machine.folder, name)
    sock.settimeout(timeout)
    return sock


def _introduce(machine: Machine, source: Saved | None, state_file: int) -> None:
    """Reach the agent and make it this session's. Raises OSError, SandboxError."""
    launch = machine.launch
    booting = source is None
    timeout = _BOOT_TIMEOUT[launch.substrate] if booting else _RESTORE_TIMEOUT
    machine.monitor = Monitor(_connect(machine, MONITOR, timeout))
    port = _connect(machine, PORT, timeout)
    listener = messages.listen(machine.folder, state.SOCKET)
    machine.mux = Mux(listener, port, machine.secret, partial(_kill, machine))
    if source is not None:
        _restore(machine, state_file)
        if source.video:
            screen.put_video(machine.pid, machine.ask, source.video)
        machine.ask("cont")
    machine.mux.greet(machine.secret if source is None else source.secret, timeout)
    machine.mux.start()
    if booting:
        machine.mux.ask(Frame.CONFIGURE, settings(launch), timeout=60)
    _rekey(machine)
    if source is not None and source.online:
        # A copy has no policy yet.
        machine.online = None
        set_online(machine, False)


def settings(launch: MachineLaunch) -> bytes:
    """Return what the agent is told once: as whom commands run, and what holds for them."""
    found: list[tuple[int, bytes | str | int]] = [
        (Tag.GUEST, 1),
        (Tag.OOM_SCORE, OOM_SCORE),
        (Tag.JOURNAL, _JOURNAL),
    ]
    if launch.user != "root":
        found += [
            (Tag.UID, TENANT),
            (Tag.GID, TENANT),
            (Tag.PROCESSES, PROCESSES[launch.substrate]),
            (Tag.FILTER, seccomp.compile_filter()),
        ]
        if launch.substrate == "microvm":
            found += [(Tag.LANDLOCK, 1), *((Tag.WRITABLE, path) for path in WRITABLE)]
    return frames.join_fields(found)


def _rekey(machine: Machine) -> None:
    """Give the machine a secret, randomness, a name and a time that no copy of it has."""
    assert machine.mux is not None
    fields: list[tuple[int, bytes | str | int]] = [
        (Tag.SECRET, machine.secret),
        (Tag.ENTROPY, secrets.token_bytes(64)),
        (Tag.HOSTNAME, machine.launch.hostname),
        (Tag.CLOCK_US, time.time_ns() // 1000),
    ]
    answer = machine.mux.ask(Frame.REKEY, frames.join_fields(fields))
    machine.mux.rekeyed(machine.secret, answer)


def _restore(machine: Machine, file: int) -> None:
    """Have the emulator take up a saved state, once it has the line to the agent.

    Without one the guest would be told that its host hung up, and end what it runs for it.
    """
    deadline = time.monotonic() + _RESTORE_TIMEOUT
    while any(
        one["label"] == "agent" and one["filename"].startswith("disconnected")
        for one in machine.ask("query-chardev")
    ):
        if time.monotonic() > deadline:
            raise SandboxError("the emulator did not take the line to the agent")
        time.sleep(0.001)
    machine.ask("migrate-incoming", uri=f"fd:{file}")
    while (status := machine.ask("query-status")["status"]) == "inmigrate":
        if time.monotonic() > deadline:
            raise SandboxError("the saved machine was not taken up in time")
        time.sleep(0.002)
    if status not in ("paused", "prelaunch", "running"):
        raise SandboxError(f"the saved machine could not be taken up: it is {status}")


# Living ----------------------------------------------------------------------------------------


def freeze(machine: Machine, _: str = "", patience: float = _HUSH_PATIENCE) -> None:
    """Stop the machine's processors, and with them its clock. Raises SandboxError.

    Its guest need not agree: an agent that does not answer within `patience` seconds is stopped
    where it is. Whoever copies it keeps it `busy` meanwhile, so a pause needs no other holder than
    its user.
    """
    with machine.busy:
        if machine.frozen is not None or machine.mux is None:
            return
        try:
            # At the end of a frame: whoever copies a paused machine finds no half of one in it.
            machine.between_frames = machine.mux.hush(patience)
            machine.ask("stop")
        except BaseException:
            machine.mux.go_on()
            raise
        machine.frozen = time.monotonic()


def thaw(machine: Machine, _: str = "") -> float:
    """Let the machine go on; return for how many seconds it was paused. Raises SandboxError."""
    with machine.busy:
        if machine.frozen is None or machine.mux is None:
            return 0.0
        paused = time.monotonic() - machine.frozen
        machine.ask("cont")
        machine.frozen = None
        machine.stood += paused
        machine.mux.go_on()
        # What counts down in the guest stood still as well; only its date is late. An agent that
        # does not answer sets it when it goes on.
        clock = frames.join_fields([(Tag.CLOCK_US, time.time_ns() // 1000)])
        with contextlib.suppress(SandboxError):
            machine.mux.ask(Frame.SHIFT, clock, timeout=_HUSH_PATIENCE)
        return paused


def set_online(machine: Machine, on: bool) -> None:
    """Turn the guest's network device on or off. Raises SandboxError."""
    assert machine.mux is not None
    if machine.online != on:
        machine.mux.ask(Frame.NETWORK, frames.join_fields([(Tag.STATE, int(on))]), timeout=60)
        machine.online = on


def adopt(folder: Path) -> Machine:
    """Take over a machine whose node is gone. Raises SandboxError, OSError, ValueError."""
    session = json.loads((folder / state.SESSION).read_text())
    launch = launch_in(folder, session["launch"])
    machine = Machine(
        folder, launch, state.claim(folder, _GONE_TIMEOUT), bytes.fromhex(session["secret"])
    )
    machine.online = None
    try:
        pid = machine.pid = int(session["pid"])
        machine.pidfd = os.pidfd_open(pid)
        if not state.is_first(folder, pid):
            raise SandboxError(f"the machine {folder.name} is gone")
        layout = cgroups.current_layout()
        if layout is not None:
            machine.group = cgroups.Group(layout, folder.name)
        machine.net = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        machine.memory = note.open_kept(pid, session["memory"])
        if session["disk"] is not None:
            machine.disk = note.open_kept(pid, session["disk"])
        for wanted in session["below"]:
            machine.below = (*machine.below, note.open_kept(pid, wanted))
        machine.origin = origin_in(session["origin"])
        machine.monitor = Monitor(_connect(machine, MONITOR, _RESTORE_TIMEOUT))
        if machine.ask("query-status")["status"] == "paused":
            # A paused guest cannot answer; it is let go on for the moment that this takes.
            machine.frozen = time.monotonic()
            machine.ask("cont")
        port = _connect(machine, PORT, _RESTORE_TIMEOUT)
        listener = messages.listen(folder, state.SOCKET)
        machine.mux = Mux(listener, port, machine.secret, partial(_kill, machine))
        machine.mux.greet(machine.secret, _RESTORE_TIMEOUT)
        machine.mux.start()
        if machine.frozen is not None:
            machine.frozen = None
            freeze(machine)
        return machine
    except BaseException:
        _let_go(machine)
        raise


def _kill(machine: Machine) -> None:
    """End the emulator; its node takes note of that as of any end."""
    if machine.pidfd >= 0:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(machine.pidfd, signal.SIGKILL)


def destroy(machine: Machine) -> None:
    """End the machine and remove every trace. Never raises."""
    machine.ended = True
    _kill(machine)
    if machine.pidfd >= 0:
        poller = select.poll()
        poller.register(machine.pidfd, select.POLLIN)
        poller.poll(_GONE_TIMEOUT * 1000)
    if machine.process is not None:
        with contextlib.suppress(Exception):
            machine.process.wait(_GONE_TIMEOUT)
    if machine.group is not None:
        machine.group.destroy()
    root = machine.folder / state.ROOTFS
    for path in (root / "usr", root / "proc", root):
        with contextlib.suppress(OSError):
            syscalls.unmount(str(path))
    state.remove(machine.folder)
    _let_go(machine)


def _let_go(machine: Machine) -> None:
    if machine.mux is not None:
        machine.mux.close()
    if machine.monitor is not None:
        machine.monitor.close()
        machine.monitor = None
    files = (machine.memory, machine.disk, *machine.below)
    for fd in (machine.pidfd, machine.net, *files, machine.lock):
        if fd >= 0:
            os.close(fd)
    machine.below = ()
    machine.pidfd = machine.net = machine.memory = machine.disk = machine.lock = -1
