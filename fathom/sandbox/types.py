"""What a caller hands to a sandbox and gets back: plain frozen values.

Paper: §5.2.5 (the sandbox types share one surface; `Caps` says what this backend really does).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fathom.errors import SandboxError, SandboxOutOfMemory, SandboxTimeout

DEFAULT_MEMORY = "512MiB"
DEFAULT_PIDS = 128
DEFAULT_CAP = 1 << 20
MINIMUM_MEMORY = 16 << 20
MINIMUM_IO = 64 << 10
WORKDIR = "/work"
DOOR = "/run/door"

# What snapshots are called.
SNAPSHOT = re.compile(r"snap-[0-9a-f]{16}")
_HOSTNAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")
LONGEST_LIFE = 1e10  # seconds, 300 years
_SIZE = re.compile(r"(-?\d{1,30})(?:\s*(B|KiB|MiB|GiB|TiB))?")
_UNITS = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_LARGEST = 1 << 50

Limit = Literal["memory", "pids", "cpu", "disk", "io_read", "io_write"]


def parse_size(value: str | int, what: str) -> int:
    """Turn 1024, "512MiB" or "2GiB" into bytes. Raises SandboxError."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = int(match[1]) * _UNITS[match[2]]
    else:
        raise SandboxError(
            f"{what} is {value!r:.80}: give bytes or text such as "
            '"512MiB" or "2GiB" (B, KiB, MiB, GiB, TiB)'
        )
    if size <= 0:
        raise SandboxError(f"{what} is {value!r}: it must be more than nothing")
    if size > _LARGEST:
        raise SandboxError(f"{what} is {value!r:.80}: it can be 1024TiB at most")
    return size


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A sandbox that shares the kernel of this machine and nothing else that can be kept apart.

    `workdir`: host folder bound read-write at /work; without it /work is empty and kept in memory.
    `memory`, `pids`: limits of the whole sandbox; None asks for the defaults (512MiB, 128), which
    are enforced where the substrate can; a limit that is given must be enforced or creation raises
    Unsupported. `disk` bounds all that the sandbox writes outside of a `workdir` (under bubblewrap
    /work and /tmp each); it is kept in memory and counts towards it, so the default is a quarter of
    the memory. It bounds the number of files too, one for each 4 KiB and 1024, where
    `caps.enforced` has "files". Outside of it are what the host keeps of the sandbox: receipts and
    output of commands with an operation key, and its network's log.
    `io_read`, `io_write`: bytes per second from and to each disk, such as "10MiB", where
    `caps.enforced` has them. `cpu`: cores as a number, None for no limit. `image`: "base", or
    "python" for base and python3, or the name or digest of an image in the store. `ttl`,
    `idle_ttl`: seconds after which a daemon ends the sandbox, in any case and when nothing was
    asked of it; None for never. `door`: host folder shown read-only at /run/door, for Unix sockets
    that somebody answers there: each is a way out of the sandbox, whatever its network policy says.
    """

    workdir: str | Path | None = None
    memory: str | int | None = None
    pids: int | None = None
    cpu: float | None = None
    disk: str | int | None = None
    io_read: str | int | None = None
    io_write: str | int | None = None
    image: str = "base"
    hostname: str = "sandbox"
    ttl: float | None = None
    idle_ttl: float | None = None
    door: str | Path | None = None

    def check(self) -> None:
        """Refuse values that no substrate could serve. Raises SandboxError."""
        if self.memory is not None and self.memory_bytes < MINIMUM_MEMORY:
            raise SandboxError(f"memory is {self.memory!r}: a sandbox needs at least 16MiB")
        pids: object = self.pids_limit
        if not _is_number(pids, 1, 1 << 20) or isinstance(pids, float):
            raise SandboxError(f"pids is {self.pids!r:.80}: give a number of processes from 1 up")
        if self.cpu is not None and not _is_number(self.cpu, 0.01, 4096):
            raise SandboxError(f"cpu is {self.cpu!r:.80}: give a number of cores from 0.01 up")
        for way in ("read", "write"):
            if (rate := self.io_bytes(way)) is not None and rate < MINIMUM_IO:
                raise SandboxError(f"io_{way} is {rate} bytes a second: give 64KiB or more")
        if 3 * self.disk_bytes > self.memory_bytes:
            raise SandboxError(
                f"disk is {self.disk!r}, which is kept in memory: it may be a third of memory at "
                "most; ask for more memory"
            )
        _check_lives(self)
        for name in ("workdir", "door"):
            value: object = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str | Path):
                raise SandboxError(f"{name} is {value!r:.80}: give the path of a folder")
            if "\0" in str(value) or not Path(value).is_dir():
                raise SandboxError(f"{name} {value!s:.300} is not a folder: create it first")

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes, the default where none was given."""
        return parse_size(DEFAULT_MEMORY if self.memory is None else self.memory, "memory")

    @property
    def disk_bytes(self) -> int:
        """The size of each in-memory folder in bytes, the default where none was given."""
        return self.memory_bytes // 4 if self.disk is None else parse_size(self.disk, "disk")

    def io_bytes(self, way: Literal["read", "write"]) -> int | None:
        """The limit of one way in bytes per second, None for none. Raises SandboxError."""
        value = self.io_read if way == "read" else self.io_write
        return None if value is None else parse_size(value, f"io_{way}")

    @property
    def pids_limit(self) -> int:
        """The number of processes, the default where none was given."""
        return DEFAULT_PIDS if self.pids is None else self.pids


@dataclass(frozen=True, slots=True, kw_only=True)
class Fn:
    """A pool of interpreters that answer stateless calls; see `fathom.sandbox.fn`.

    `workers`: how many are made ready; `maximum`: how many there may be while calls wait. The
    limits are those of each one's `Container`.
    """

    workers: int = 2
    maximum: int = 4
    memory: str | int | None = None
    pids: int | None = None
    cpu: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroVM:
    """A virtual machine with a kernel of its own and no more devices than it needs.

    `image`: as of a `Container`; it is the read-only root, with /work and /tmp to write to.
    `memory`: of the whole machine, its kernel included; `disk`: what can be written, kept in that
    memory. `cpu`: cores as a number; the guest sees as many processors, rounded up. `ttl`,
    `idle_ttl`: as of a `Container`.
    """

    image: str = "base"
    memory: str | int = "256MiB"
    cpu: float | None = None
    disk: str | int = "64MiB"
    hostname: str = "sandbox"
    ttl: float | None = None
    idle_ttl: float | None = None

    def check(self) -> None:
        """Refuse values that no machine could serve. Raises SandboxError."""
        _check_machine(self, least=128 << 20)
        if 2 * self.disk_bytes > self.memory_bytes:
            raise SandboxError(
                f"disk is {self.disk!r}, which is kept in memory: it may be half of memory at "
                "most; ask for more memory"
            )

    @property
    def memory_bytes(self) -> int:
        """The size of the machine's memory in bytes."""
        return parse_size(self.memory, "memory")

    @property
    def disk_bytes(self) -> int:
        """The room for writes in bytes."""
        return parse_size(self.disk, "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class FullVM:
    """A virtual machine that boots a whole Debian system with systemd, and has a screen.

    `image`: "debian", built on first use, or the name of a bootable one in the store. `user`: as
    whom commands run; "root" for what a system's owner does, such as installing packages: then
    nothing inside is closed to them, the machine is the boundary, and the agent's receipts can be
    forged by what they protect. `disk`: what can be written, a copy-on-write file on top of the
    image. The rest as of a `MicroVM`.
    """

    image: str = "debian"
    memory: str | int = "512MiB"
    cpu: float | None = None
    disk: str | int = "2GiB"
    hostname: str = "sandbox"
    user: Literal["user", "root"] = "user"
    ttl: float | None = None
    idle_ttl: float | None = None

    def check(self) -> None:
        """Refuse values that no machine could serve. Raises SandboxError."""
        _check_machine(self, least=256 << 20)
        if self.user not in ("user", "root"):
            raise SandboxError(f'user is {self.user!r}: choose "user" or "root"')
        if not 64 << 20 <= self.disk_bytes <= 1 << 40:
            raise SandboxError(f"disk is {self.disk!r}: give 64MiB to 1024GiB")

    @property
    def memory_bytes(self) -> int:
        """The size of the machine's memory in bytes."""
        return parse_size(self.memory, "memory")

    @property
    def disk_bytes(self) -> int:
        """The room for writes in bytes."""
        return parse_size(self.disk, "disk")


def _check_machine(spec: MicroVM | FullVM, least: int) -> None:
    if not least <= spec.memory_bytes <= 2 << 30 or spec.memory_bytes % (2 << 20):
        raise SandboxError(
            f"memory is {spec.memory!r}: give {least >> 20}MiB to 2048MiB, an even number"
        )
    if spec.cpu is not None and not _is_number(spec.cpu, 0.01, 64):
        raise SandboxError(f"cpu is {spec.cpu!r:.80}: give a number of cores from 0.01 to 64")
    _check_lives(spec)


def _check_lives(spec: Container | MicroVM | FullVM) -> None:
    for name in ("ttl", "idle_ttl"):
        value = getattr(spec, name)
        if value is not None and not _is_number(value, 1e-9, LONGEST_LIFE):
            raise SandboxError(f"{name} is {value!r:.80}: give a number of seconds above 0")
    if not _is_text(spec.hostname) or not _HOSTNAME.fullmatch(spec.hostname):
        raise SandboxError(f"hostname is {spec.hostname!r:.80}: use letters, digits and hyphens")
    if not _is_text(spec.image) or not spec.image:
        raise SandboxError(
            f'image is {spec.image!r:.80}: give "base" or "python" for a Container or MicroVM, or '
            "the name of one of the store"
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return least <= value <= most


# What `Client.create` makes, and what a daemon keeps.
Kept = Container | MicroVM | FullVM
Spec = Container | Fn | MicroVM | FullVM


@dataclass(frozen=True, slots=True, kw_only=True)
class Spilled:
    """Output that went beyond the cap: all of it is kept in the content store by its digest."""

    stream: Literal["stdout", "stderr"]
    digest: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """How a command ended.

    A command ended by signal n has `exit_code` 128 + n, as in a shell. `output` holds both streams
    in order of arrival when `merge=True` was asked (then `stderr` is empty and `stdout` is the same
    text), else stdout followed by stderr. Bytes that are not UTF-8 are replaced. `truncated` says
    that more was written than is here; `spilled` where what came is, if that was asked, and
    `spill_problem` why it is not, where the content store could not take it.
    `oom_killed`: a process of this sandbox was killed for memory while the command ran.
    `duration`: seconds inside the sandbox; `cpu`: processor seconds of the command and what it
    waited for. `replayed`: the command had run before under the same operation key; `lost`: bytes
    of its output that were kept then and are not any more, for want of room or because its result
    was acknowledged.
    """

    exit_code: int
    stdout: str
    stderr: str
    output: str
    timed_out: bool = False
    oom_killed: bool = False
    truncated: bool = False
    replayed: bool = False
    lost: int = 0
    duration: float = 0.0
    cpu: float = 0.0
    spilled: tuple[Spilled, ...] = ()
    spill_problem: str = ""

    def check(self) -> ExecResult:
        """Return this result where the command succeeded.

        Raises SandboxOutOfMemory, SandboxTimeout or SandboxError for another end.
        """
        said = (self.stderr or self.stdout).strip()[-500:] or "it said nothing"
        if self.oom_killed:
            raise SandboxOutOfMemory(f"the command ran out of memory: raise memory= ({said})")
        if self.timed_out:
            raise SandboxTimeout(f"the command took too long: raise timeout= ({said})")
        if self.exit_code:
            raise SandboxError(f"the command failed with exit code {self.exit_code}: {said}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a sandbox had written at one moment, kept on this machine by its name."""

    id: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a sandbox uses now: bytes of memory (None where it is not counted)."""

    memory: int | None
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What this sandbox really does.

    `substrate`: "crun", "runc", "bubblewrap", "microvm" or "fullvm". `accelerator`: how a virtual
    machine is run, "kvm" where a guest was really booted with it, else "tcg". `enforced`: limits
    that hold for the whole sandbox, "files" is their number; `not_enforced`: limits in the
    request's defaults that do not hold here. `reports_oom`: whether `oom_killed` can be told.
    `timeout_kills`: what a timeout ends, the "command" with everything that it started or every
    process of the "sandbox".
    `separate_user`: the tenant is another user than the owner of this process for the kernel too.
    `networks`: what a policy may allow ("none", "address", "domain", "mirror"). `snapshot`, `fork`:
    "disk" for files, "memory" for running processes too, "" where there is none.
    """

    substrate: str
    enforced: frozenset[str]
    not_enforced: frozenset[str]
    reports_oom: bool
    timeout_kills: Literal["command", "sandbox"]
    separate_user: bool
    networks: frozenset[str] = frozenset({"none"})
    workdir: Literal["memory", "host"] = "memory"
    seccomp: bool = True
    landlock: bool = False
    hardware_isolation: bool = False
    snapshot: Literal["", "disk", "memory"] = ""
    fork: Literal["", "disk", "memory"] = ""
    pause: bool = False
    pty: bool = True
    screenshot: bool = False
    accelerator: str = ""
