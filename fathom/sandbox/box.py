"""One sandbox as its node sees it: made, watched, stopped for a while, copied, ended.

Paper: none (a thin form of the report's edge).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import cgroups, frames, messages, netns, seccomp, state, syscalls
from fathom.sandbox.frames import Frame, Tag
from fathom.sandbox.images import rootfs
from fathom.sandbox.substrates import bubblewrap, container
from fathom.sandbox.substrates.launch import OOM_SCORE, TENANT, Ends, Launch, Started

if TYPE_CHECKING:
    from fathom.sandbox.images.stack import Composed
    from fathom.sandbox.images.store import Hold

WRITABLE = (
    "/work",
    "/tmp",
    "/dev/shm",
    "/dev/pts",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/random",
    "/dev/urandom",
    "/proc",  # a process's own files; the rest of it is read-only or not the tenant's
    "/var/tmp",
    "/home",
    "/root",
    "/run",
    "/var",
    "/opt",
    "/srv",
    "/mnt",
    "/media",
)
# The holder of the user's own pause.
PAUSE = "pause"
# Where the agent keeps the folder of the writes: KEPT_FILE of agent.h.
_UPPER_FD = 100
_HELLO_TIMEOUT = 30.0
_GONE_TIMEOUT = 10.0


@dataclass(slots=True)
class Box:
    """A sandbox that runs.

    `frozen`: when it was stopped, by the monotonic clock. `stood`: for how many seconds it stood
    still before. `holders`: who wants it to, the user's pause and each copy that is being made.
    `line`: to the agent, so that nothing needs to connect to one that stands still; None for one
    that was adopted so.
    """

    folder: Path
    launch: Launch
    lock: int
    secret: bytes
    group: cgroups.Group | None = None
    started: Started | None = None
    pidfd: int = -1
    image_lock: int = -1
    net: int = -1
    upper: int = -1
    frozen: float | None = None
    stood: float = 0.0
    holders: set[str] = field(default_factory=set[str])
    line: socket.socket | None = None
    ended: bool = False
    composed: Composed | None = None
    held: Hold | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)

    @property
    def id(self) -> str:
        """The sandbox's name, which is its folder's."""
        return self.folder.name

    def facts(self) -> dict[str, Any]:
        """What its client needs to reach it."""
        assert self.started is not None
        oom = str(self.group.oom_file) if self.group is not None else ""
        return {"pid": self.started.pid, "secret": self.secret.hex(), "oom_file": oom}


def make(
    launch: Launch, nets: netns.Pool | None, copied: Box | None = None, saved: Path | None = None
) -> Box:
    """Start a sandbox and return once its agent has answered.

    `copied`: a sandbox whose files it begins with; `saved`: or a folder with those of one.
    Raises FathomError or OSError; then nothing of it is left.
    """
    box = Box(launch.folder, launch, state.claim(launch.folder), secrets.token_bytes(32))
    try:
        if not launch.layers:
            box.image_lock = rootfs.hold(Path(launch.rootfs))
        if launch.substrate == "bubblewrap":
            _start(box)
        else:
            layout = cgroups.current_layout()
            if layout is None:
                raise SandboxError("no control groups are mounted: mount them at /sys/fs/cgroup")
            io = launch.io_read is not None or launch.io_write is not None
            box.group = cgroups.Group(layout, launch.folder.name, io=io)
            state.note_groups(launch.folder, box.group.all_folders())
            box.net = nets.take() if nets is not None else netns.make()
            box.launch = replace(launch, netns=f"/proc/{os.getpid()}/fd/{box.net}")
            box.group.create()
            _start(box, copied, saved)
        return box
    except BaseException:
        destroy(box)
        raise


def _start(box: Box, copied: Box | None = None, saved: Path | None = None) -> None:
    launch = box.launch
    listener = messages.listen(launch.folder, state.SOCKET)
    journal = os.open(launch.folder / state.JOURNAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    ends = Ends(listener=listener.fileno(), journal=journal)
    try:
        if box.group is None:
            box.started = bubblewrap.start(launch, ends, seccomp.compile_filter())
        else:
            # It stands still for as long as its files are copied, not for all of the start.
            with _still(copied) if copied is not None else contextlib.nullcontext():
                source = writes_of(copied) if copied is not None else saved
                root, box.composed = container.mount_root(launch, source, box.group)
            box.started = container.start(launch, ends, box.group, root)
    finally:
        # From here on only the agent listens: its end is the end of every line to it.
        listener.close()
        os.close(journal)
    box.pidfd = os.pidfd_open(box.started.pid)
    if box.group is not None:
        _let_go_of_mounts(box)
    state.note_first(launch.folder, box.started.pid)
    try:
        introduce(box)
    except OSError as error:
        if launch.substrate == "bubblewrap":
            raise SandboxError(bubblewrap.failure(launch)) from error
        raise SandboxError(f"the sandbox's agent did not answer: {error}") from error
    note: dict[str, Any] = {"secret": box.secret.hex(), "pid": box.started.pid}
    note |= {"launch": as_json(launch), "upper": _identity(box.upper) if box.upper >= 0 else None}
    session = launch.folder / state.SESSION
    session.touch(mode=0o600)
    session.write_text(json.dumps(note))


def _let_go_of_mounts(box: Box) -> None:
    """Leave the mounts to the sandbox alone, which has them in a namespace of its own.

    Each sandbox that starts copies all mounts of this process first: there should be few.
    """
    disk = box.folder / state.DISK
    box.upper = syscalls.clone_mount(str(disk / container.UPPER))
    if box.composed is not None:
        box.composed.detach()
    _unmount(box)


def _unmount(box: Box) -> None:
    for name in (state.ROOTFS, state.DISK, state.WORK, state.DOOR):
        with contextlib.suppress(OSError):
            syscalls.unmount(str(box.folder / name))


def as_json(launch: Launch) -> dict[str, Any]:
    """Return a launch in the form that `Launch(**...)` takes after JSON."""
    values = {name: getattr(launch, name) for name in launch.__dataclass_fields__}
    return {**values, "folder": str(launch.folder)}


def launch_in(folder: Path, values: dict[str, Any]) -> Launch:
    """Read a launch from JSON. Raises TypeError for values that it has not."""
    given: dict[str, Any] = {**values, "folder": folder, "layers": tuple(values["layers"])}
    return Launch(**given)


def introduce(box: Box) -> None:
    """Set the session's secret and configure the agent. Raises OSError, SandboxError."""
    assert box.started is not None
    started = box.started
    settings: list[tuple[int, bytes | str | int]] = [
        (Tag.MORTAL, 0 if box.launch.outlive else 1),
        (Tag.OOM_SCORE, OOM_SCORE),
        (Tag.ADDRESS_SPACE, started.address_space),
        (Tag.PROCESSES, started.processes),
    ]
    if started.tenant is not None:
        settings += [(Tag.UID, started.tenant), (Tag.GID, started.tenant)]
    settings.append((Tag.JOURNAL, journal_limit(box.launch.disk)))
    if not started.filtered:
        settings.append((Tag.FILTER, seccomp.compile_filter()))
    if syscalls.landlock_version() > 0:
        settings.append((Tag.LANDLOCK, 1))
        settings += [(Tag.WRITABLE, path) for path in WRITABLE]
    if box.launch.cpu is not None:
        # So that programs start as many threads as they get processors.
        settings.append((Tag.CPUS, max(1, round(box.launch.cpu + 0.49))))
    with contextlib.ExitStack() as stack:
        # Its receipts say which commands ran out of memory, whoever is there to count.
        counter = box.group and stack.enter_context(box.group.oom_file.open("rb"))
        files = () if counter is None else (counter.fileno(),)
        # The agent keeps the folder of its writes open for the next node.
        box.line = _reach(box, (box.upper,) if box.upper >= 0 else ())
        _inquire(box.line, Frame.CONFIGURE, frames.join_fields(settings), files)


def _reach(box: Box, files: tuple[int, ...] = ()) -> socket.socket:
    """Open the node's own line to an agent; `files` come along. Raises OSError."""
    line = messages.connect(box.folder, state.SOCKET, timeout=_HELLO_TIMEOUT)
    try:
        line.settimeout(_HELLO_TIMEOUT)
        _send(line, greeting(box.secret), files)
    except BaseException:
        line.close()
        raise
    return line


def journal_limit(disk: int) -> int:
    """Return how many bytes of receipts an agent keeps: as many as its sandbox may write."""
    return max(1 << 20, min(64 << 20, disk))


def greeting(secret: bytes) -> bytes:
    """Return the frame that begins every line."""
    return frames.pack(
        0, Frame.HELLO, frames.join_fields([(Tag.VERSION, frames.PROTOCOL), (Tag.SECRET, secret)])
    )


def ask(line: socket.socket, secret: bytes, kind: Frame, payload: bytes) -> frames.Received:
    """Begin a line, ask for one thing and return the answer. Raises OSError, SandboxError."""
    line.sendall(greeting(secret) + frames.pack(1, kind, payload))
    return _hear(line)


def _inquire(
    line: socket.socket, kind: Frame, payload: bytes, files: tuple[int, ...] = ()
) -> frames.Received:
    """Ask for one thing on a line that has begun; `files` come along.

    Raises OSError, SandboxError.
    """
    _send(line, frames.pack(1, kind, payload), files)
    return _hear(line)


def _send(line: socket.socket, data: bytes, files: tuple[int, ...]) -> None:
    line.sendall(data[socket.send_fds(line, [data], files) if files else 0 :])


def _hear(line: socket.socket) -> frames.Received:
    splitter = frames.Splitter()
    while True:
        data = line.recv(1 << 16)
        if not data:
            raise ConnectionResetError("the agent ended")
        for frame in splitter.feed(data):
            if frame.kind == Frame.ERROR:
                fields = frame.fields()
                raise SandboxError(
                    f"the sandbox's agent refused: {frames.text_of(fields.get(Tag.MESSAGE))} "
                    f"({os.strerror(frames.number_of(fields.get(Tag.ERRNO)))})"
                )
            if frame.number == 1:
                return frame


def freeze(box: Box, holder: str = PAUSE) -> None:
    """Stop every process of the sandbox, until every holder let it go on. Raises SandboxError."""
    if box.group is None:
        raise Unsupported("bubblewrap cannot pause a sandbox: run as root with crun or runc")
    with box.busy:
        if box.frozen is None:
            box.group.freeze()
            box.frozen = time.monotonic()
        box.holders.add(holder)


def thaw(box: Box, holder: str = PAUSE) -> float:
    """Let the sandbox go on as far as this holder is concerned. Raises SandboxError.

    Returns for how many seconds it has stood still, 0 where this holder had not asked for it.
    """
    with box.busy:
        if box.frozen is None or box.group is None or holder not in box.holders:
            return 0.0
        paused = time.monotonic() - box.frozen
        if box.holders == {holder}:
            told = _tell_shift(box, paused)
            box.group.thaw()
            box.frozen = None
            box.stood += paused
            box.holders.clear()
            _settle_shift(box, paused, told)
        box.holders.discard(holder)
        return paused


def _tell_shift(box: Box, paused: float) -> bool:
    """Say how long the pause was before the agent runs again: no command may end for it.

    Never raises and never waits: whatever the agent does, it is let go on.
    """
    if box.line is None:
        return False
    try:
        box.line.setblocking(False)
        box.line.send(frames.pack(1, Frame.SHIFT, frames.join_fields([(Tag.MICROS, _us(paused))])))
        return True
    except OSError:
        box.line.close()
        box.line = None
        return False


def _settle_shift(box: Box, paused: float, told: bool) -> None:
    """Hear that a shift was heard of; tell one that could not be told. Raises SandboxError."""
    try:
        if box.line is None:
            box.line = _reach(box)
        box.line.settimeout(_HELLO_TIMEOUT)
        if told:
            _hear(box.line)
        else:
            _inquire(box.line, Frame.SHIFT, frames.join_fields([(Tag.MICROS, _us(paused))]))
    except OSError as error:
        if box.line is not None:
            box.line.close()
            box.line = None
        if box.ended:
            return
        raise SandboxLost(f"sandbox {box.id} does not answer after a pause: {error}") from error


def _us(seconds: float) -> int:
    return int(seconds * 1e6)


@contextlib.contextmanager
def _still(box: Box) -> Generator[None]:
    """Have a sandbox stand still; then it goes on if nobody else holds it. Raises SandboxError."""
    holder = secrets.token_hex(8)
    freeze(box, holder)
    try:
        yield
    finally:
        thaw(box, holder)


def adopt(folder: Path) -> Box:
    """Take over a sandbox whose node is gone. Raises SandboxError, OSError, ValueError."""
    session = json.loads((folder / state.SESSION).read_text())
    launch = launch_in(folder, session["launch"])
    lock = state.claim(folder, patience=_GONE_TIMEOUT)
    box = Box(folder, launch, lock, bytes.fromhex(session["secret"]))
    try:
        pid = int(session["pid"])
        box.pidfd = os.pidfd_open(pid)
        if not state.is_first(folder, pid):
            raise SandboxError(f"the agent of {folder.name} is gone")
        _hold_image(box)
        box.upper = _kept_upper(pid, session.get("upper"))
        tenant = TENANT if launch.substrate != "bubblewrap" else None
        box.started = Started(pid=pid, tenant=tenant)
        layout = cgroups.current_layout()
        if tenant is not None and layout is not None:
            box.group = cgroups.Group(layout, folder.name)
            box.net = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            if box.group.can_freeze and box.group.frozen:
                box.frozen = time.monotonic()
                box.holders.add(PAUSE)
        if box.frozen is None:
            box.line = _reach(box)
            _inquire(box.line, Frame.PING, b"")
        else:
            # It cannot answer now, but a line that waits is heard of as it goes on.
            with contextlib.suppress(BlockingIOError):
                box.line = messages.connect(folder, state.SOCKET, timeout=0)
                box.line.send(greeting(box.secret))
        return box
    except BaseException:
        if box.line is not None:
            box.line.close()
        if box.held is not None:
            box.held.close()
        for fd in (box.pidfd, box.net, box.upper, box.image_lock, box.lock):
            if fd >= 0:
                os.close(fd)
        raise


def _hold_image(box: Box) -> None:
    """Keep what an adopted sandbox runs on. It lives on without, but no copy can be made of it."""
    from fathom.sandbox.images.store import Store

    with contextlib.suppress(SandboxError):
        if box.launch.layers:
            box.held = Store(box.launch.store, durable=False).hold(*box.launch.layers)
        else:
            box.image_lock = rootfs.hold(Path(box.launch.rootfs))


def _identity(fd: int) -> list[int]:
    found = os.fstat(fd)
    return [found.st_dev, found.st_ino]


def _kept_upper(pid: int, identity: object) -> int:
    """Open the folder of its writes that an agent keeps for us; -1 where it has another or none."""
    try:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(f"/proc/{pid}/fd/{_UPPER_FD}", flags)
    except OSError:
        return -1
    if _identity(fd) == identity:
        return fd
    os.close(fd)
    return -1


def writes_of(box: Box) -> Path:
    """Return the folder with what the sandbox wrote, marks of deletion included.

    Never what its root shows: there a deleted file of the image is missing without a mark, and a
    copy would have it again. Raises Unsupported where the folder cannot be reached.
    """
    if box.upper < 0:
        raise Unsupported(
            f"the writes of {box.id} cannot be copied: it outlived the node that made it, and its "
            "agent holds no folder of them (an older one does not); start another sandbox"
        )
    return Path(f"/proc/{os.getpid()}/fd/{box.upper}")


def copy_writes(box: Box, target: Path) -> int:
    """Copy what the sandbox wrote, at one moment, into the folder `target`.

    Returns how many bytes its files have. Raises SandboxError.
    """
    if box.group is None:
        raise Unsupported("bubblewrap keeps no writes that could be copied: run as root")
    with _still(box):
        return container.copy_tree(box.launch.agent, writes_of(box), target, box.group)


def destroy(box: Box) -> None:
    """End every process of the sandbox and remove every trace. Never raises."""
    box.ended = True
    if box.pidfd >= 0:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(box.pidfd, signal.SIGKILL)
    if box.started is not None and box.started.process is not None:
        with contextlib.suppress(Exception):
            box.started.process.wait(_GONE_TIMEOUT)
    if box.pidfd >= 0:
        # Not a child of ours where it was adopted.
        poller = select.poll()
        poller.register(box.pidfd, select.POLLIN)
        with contextlib.suppress(OSError, SandboxError):
            if box.group is not None and box.group.can_freeze:
                box.group.thaw()
        poller.poll(_GONE_TIMEOUT * 1000)
    if box.group is None and box.started is not None:
        # Its runtime waits for it, unless that was killed first.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(box.started.pid, os.WNOHANG)
    if box.group is not None:
        # Also ends what is frozen, and waits for every process to be gone.
        if box.started is not None:
            _await_child(box.started.pid, box.group)
        box.group.destroy()
    if box.composed is not None:
        with contextlib.suppress(OSError, SandboxError):
            box.composed.close()
    if box.held is not None:
        with contextlib.suppress(OSError):
            box.held.close()
    if box.upper < 0:
        _unmount(box)
    state.remove(box.folder)
    if box.line is not None:
        box.line.close()
        box.line = None
    for fd in (box.pidfd, box.image_lock, box.net, box.upper, box.lock):
        if fd >= 0:
            os.close(fd)
    box.pidfd = box.image_lock = box.net = box.upper = box.lock = -1


def _await_child(pid: int, group: cgroups.Group) -> None:
    """Take note of the agent's end: a process that nobody waited for keeps its groups."""
    deadline = time.monotonic() + _GONE_TIMEOUT
    with contextlib.suppress(OSError, SandboxError):
        if group.can_freeze:
            group.thaw()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.001)


__all__ = ["TENANT", "Box", "ask", "copy_writes", "destroy", "freeze", "greeting", "make", "thaw"]
