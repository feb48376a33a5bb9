"""Control groups of a sandbox, in the v1 layout (one tree per controller) and in the v2 layout.

Each sandbox has one group per controller. The freezer is taken where it is mounted (v1) or part of
every group (v2); what it is for, pausing, is not promised without it.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from fathom.errors import SandboxError, Unsupported

PARENT = "fathom"
CONTROLLERS = ("memory", "pids", "cpu")
FREEZER = "freezer"
IO = "blkio"  # v1; v2 calls it io
# What a sandbox's own plumbing uses of the process limit: the agent and two commands' monitors.
RESERVED_PIDS = 3
_PERIOD = 100_000
_MEMBERS = "cgroup.procs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How control groups are mounted: `version` 1 or 2, controller name -> root of its tree.

    `beside`: a v2 tree that is mounted too while v1 is the one in use. `others`: trees of
    controllers that are not used here, in which a container runtime may still make folders. `io`:
    the tree of the one that bounds reading from disks (v1), or that of all (v2) where it does.
    """

    version: int
    roots: dict[str, Path]
    beside: Path | None = None
    others: tuple[Path, ...] = ()
    io: Path | None = None


def read_layout(mounts: str) -> Layout | None:
    """Read the layout from the text of /proc/self/mountinfo; None where no controller is usable.

    A v2 tree beside v1 controllers carries none of the controllers needed here, so v1 wins.
    """
    v1: dict[str, Path] = {}
    v2: Path | None = None
    others: list[Path] = []
    io: Path | None = None
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        target = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), fields[4]))
        if kind[0] == "cgroup":
            wanted = (*CONTROLLERS, FREEZER)
            used = [option for option in kind[2].split(",") if option in wanted]
            for option in used:
                v1.setdefault(option, target)
            if not used:
                others.append(target)
            if IO in kind[2].split(","):
                io = target
        elif kind[0] == "cgroup2" and v2 is None:
            v2 = target
    if v1:
        if not all(controller in v1 for controller in CONTROLLERS):
            return None
        return Layout(version=1, roots=v1, beside=v2, others=tuple(others), io=io)
    if v2 is not None:
        return Layout(version=2, roots=dict.fromkeys(CONTROLLERS, v2), io=v2)
    return None


@functools.cache
def current_layout() -> Layout | None:
    """Return the layout of this machine, or None; looked at once, while there are few mounts."""
    return read_layout(Path("/proc/self/mountinfo").read_text())


def io_limits(layout: Layout | None) -> set[str]:
    """Return which ways to and from disks can be bounded.

    In v1 what a program writes is on its way long after, by nobody's group: only reading holds.
    """
    if layout is None or layout.io is None:
        return set()
    if layout.version == 1:
        there = (layout.io / "blkio.throttle.read_bps_device").exists()
        return {"io_read"} if there else set()
    with contextlib.suppress(OSError):
        if "io" in (layout.io / "cgroup.controllers").read_text().split():
            return {"io_read", "io_write"}
    return set()


def disks(block: Path = Path("/sys/block")) -> list[str]:
    """Return the numbers of this machine's disks, as MAJOR:MINOR; no memory, no empty ones."""
    found: list[str] = []
    for path in sorted(block.iterdir()):
        with contextlib.suppress(OSError):
            if path.name.startswith(("ram", "zram")) or not int((path / "size").read_text()):
                continue
            found.append((path / "dev").read_text().strip())
    return found


def io_files(
    layout: Layout, devices: list[str], read: int | None, write: int | None
) -> list[tuple[str, str]]:
    """Return what to write to bound the ways to and from disks: (file, text)."""
    if layout.version == 1:
        ways = {"read": read, "write": write}
        return [
            (f"blkio.throttle.{way}_bps_device", f"{device} {rate}")
            for way, rate in ways.items()
            for device in devices
            if rate is not None
        ]
    rates = [f"{name}={rate}" for name, rate in (("rbps", read), ("wbps", write)) if rate]
    return [("io.max", " ".join([device, *rates])) for device in devices]


def group_folders(layout: Layout, name: str) -> dict[str, Path]:
    """Return controller name -> folder of the sandbox `name` (one and the same under v2)."""
    return {key: root / PARENT / name for key, root in layout.roots.items()}


def limit_files(
    layout: Layout, *, memory: int, pids: int, cpu: float | None
) -> list[tuple[str, str, str, bool]]:
    """Return what to write: (controller, file, text, whether a missing file is an error)."""
    pids_text = str(pids + RESERVED_PIDS)
    quota = str(int((cpu or 0) * _PERIOD))
    if layout.version == 1:
        wanted = [
            ("memory", "memory.limit_in_bytes", str(memory), True),
            # The swap limit exists only where swap accounting is compiled in.
            ("memory", "memory.memsw.limit_in_bytes", str(memory), False),
            ("pids", "pids.max", pids_text, True),
        ]
        if cpu is not None:
            wanted += [
                ("cpu", "cpu.cfs_period_us", str(_PERIOD), True),
                ("cpu", "cpu.cfs_quota_us", quota, True),
            ]
        return wanted
    wanted = [
        ("memory", "memory.max", str(memory), True),
        ("memory", "memory.swap.max", "0", False),
        ("pids", "pids.max", pids_text, True),
    ]
    if cpu is not None:
        wanted.append(("cpu", "cpu.max", f"{quota} {_PERIOD}", True))
    return wanted


def oom_count(text: str) -> int:
    """Read the number of OOM kills from memory.oom_control (v1) or memory.events (v2)."""
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


class Group:
    """The control groups of one sandbox. Made by root on the host; raises OSError."""

    def __init__(self, layout: Layout, name: str, *, io: bool = False) -> None:
        self.layout = layout
        self.folders = group_folders(layout, name)
        if io and layout.io is not None:
            self.folders[IO] = layout.io / PARENT / name

    def create(self) -> None:
        """Make the folders, still without limits: a runtime may need more than its sandbox."""
        for folder in sorted(set(self.folders.values())):
            self._make(folder)

    def limit(self, *, memory: int, pids: int, cpu: float | None) -> None:
        """Set the limits."""
        for controller, file, text, required in limit_files(
            self.layout, memory=memory, pids=pids, cpu=cpu
        ):
            try:
                _write(self.folders[controller] / file, text)
            except OSError:
                if required:
                    raise

    def limit_io(self, read: int | None, write: int | None) -> None:
        """Bound the bytes per second from and to each disk. Raises OSError."""
        if read is not None or write is not None:
            for file, text in io_files(self.layout, disks(), read, write):
                _write(self.folders[IO] / file, text)

    def _make(self, folder: Path) -> None:
        for attempt in range(100):
            try:
                folder.parent.mkdir(exist_ok=True)
                if self.layout.version == 2:
                    more = ("io",) if IO in self.folders else ()
                    _enable(folder.parent.parent, more)
                    _enable(folder.parent, more)
                folder.mkdir()
                return
            except FileNotFoundError:
                # The last other sandbox ended and took the shared parent with it.
                if attempt == 99:
                    raise

    def doors(self, *controllers: str) -> list[str]:
        """Return the files by which a process with one thread enters the groups by itself.

        `controllers`: all of them when not given.
        """
        # In v1, `tasks` takes a single thread, for which the kernel need not stop any other.
        name = "tasks" if self.layout.version == 1 else _MEMBERS
        wanted = {self.folders[one] for one in controllers} or set(self.folders.values())
        return [str(folder / name) for folder in sorted(wanted)]

    def enter(self, pid: int) -> None:
        """Put a process into the sandbox's groups. Raises OSError."""
        for folder in sorted(set(self.folders.values())):
            _write(folder / _MEMBERS, str(pid))

    @property
    def can_freeze(self) -> bool:
        """Whether `freeze` works here."""
        return self.layout.version == 2 or FREEZER in self.layout.roots

    def freeze(self, patience: float = 10.0) -> None:
        """Stop every process of the sandbox where it is. Raises SandboxError or OSError."""
        if not self.can_freeze:
            raise Unsupported("no freezer is mounted: mount the freezer controller, or use v2")
        deadline = time.monotonic() + patience
        v1 = self.layout.version == 1
        folder = self.folders[FREEZER if v1 else "pids"]
        _write(folder / ("freezer.state" if v1 else "cgroup.freeze"), "FROZEN" if v1 else "1")
        while not self.frozen:
            if time.monotonic() > deadline:
                self.thaw()
                raise SandboxError(f"{folder.name} did not freeze within {patience:g} s")
            time.sleep(0.0005)

    def thaw(self) -> None:
        """Let the processes go on. Raises OSError."""
        if self.layout.version == 1:
            _write(self.folders[FREEZER] / "freezer.state", "THAWED")
        else:
            _write(self.folders["pids"] / "cgroup.freeze", "0")

    @property
    def frozen(self) -> bool:
        """Whether every process is stopped."""
        if self.layout.version == 1:
            return (self.folders[FREEZER] / "freezer.state").read_text().strip() == "FROZEN"
        events = (self.folders["pids"] / "cgroup.events").read_text()
        return "frozen 1" in events.splitlines()

    def reclaim(self) -> None:
        """Ask the kernel to take back what memory it can; does its best and never raises."""
        with contextlib.suppress(OSError):
            if self.layout.version == 1:
                _write(self.folders["memory"] / "memory.force_empty", "1")
            else:
                used = (self.folders["memory"] / "memory.current").read_text().strip()
                _write(self.folders["memory"] / "memory.reclaim", used)

    @property
    def memory_used(self) -> int:
        """Bytes charged to the sandbox now. Raises OSError."""
        name = "memory.usage_in_bytes" if self.layout.version == 1 else "memory.current"
        return int((self.folders["memory"] / name).read_text())

    @property
    def oom_file(self) -> Path:
        """The file from which `oom_count` reads."""
        name = "memory.oom_control" if self.layout.version == 1 else "memory.events"
        return self.folders["memory"] / name

    def destroy(self) -> None:
        """End every process of the sandbox and remove the folders. Never raises."""
        destroy_folders(self.all_folders())

    def all_folders(self) -> list[Path]:
        """Return every folder that this sandbox may have on the host."""
        name = self.folders["pids"].name
        trees = {*self.layout.roots.values(), *self.layout.others}
        if self.layout.beside is not None:
            trees.add(self.layout.beside)
        return sorted(tree / PARENT / name for tree in trees)


def _enable(folder: Path, more: tuple[str, ...] = ()) -> None:
    """Turn on the controllers for the groups below `folder`, where they are not on yet (v2)."""
    wanted = (*CONTROLLERS, *more)
    file = folder / "cgroup.subtree_control"
    present = file.read_text().split() if file.exists() else []
    if missing := [f"+{name}" for name in wanted if name not in present]:
        try:
            _write(file, " ".join(missing))
        except OSError as error:
            raise SandboxError(
                f"the controllers {', '.join(wanted)} cannot be turned on in {folder} "
                f"({error.strerror}): run outside of a container, or move the processes of "
                f"{folder} into a group below it"
            ) from error


def kill_group(folder: Path, patience: float = 5.0) -> bool:
    """Kill every process in `folder` and below; True when none is left."""
    deadline = time.monotonic() + patience
    while True:
        left = _members(folder)
        if not left:
            return True
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)


def _members(folder: Path) -> list[int]:
    found: list[int] = []
    for path, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            found += [int(line) for line in (Path(path) / _MEMBERS).read_text().split()]
    return found


def destroy_folders(folders: list[Path]) -> bool:
    """Kill what is inside `folders` and remove them; True when nothing is left. Never raises."""
    # Most are empty by now, or were never made: one call each.
    left = [folder for folder in folders if not _removed(folder)]
    for folder in left:
        # A frozen process does not even die.
        for name, text in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            with contextlib.suppress(OSError):
                _write(folder / name, text)
    for folder in left:
        kill_group(folder)
    for _ in range(200):
        left = [folder for folder in left if not _removed(folder)]
        if not left:
            for folder in folders:
                # Refused while another sandbox has its group there.
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()
            return True
        # A killed process leaves its group only once it is reaped.
        time.sleep(0.005)
    return False


def _removed(folder: Path) -> bool:
    """Remove a group with those below it; False where one still holds a process."""
    try:
        os.rmdir(folder)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        pass
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(path)
    return not folder.exists()


def _write(path: Path, text: str) -> None:
    """Write to a file of the kernel's in one call, without what a text file needs besides."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
