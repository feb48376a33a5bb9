"""What every substrate is given to start a sandbox, and what it gives back.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

# Where the agent's program shows up inside: the one folder that no image brings along.
AGENT = "/dev/fathom-agent"
# The listening socket is its standard input and the journal its standard output: both were opened
# outside, and no path inside leads to either.
INIT = [AGENT, "--listen-fd", "0", "--journal-fd", "1"]
TENANT = 1000
OOM_SCORE = 500

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/key-users",
    "/proc/kmsg",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/vmallocinfo",
    "/proc/slabinfo",
    "/proc/modules",
    "/proc/config.gz",
    "/proc/mdstat",
    "/proc/interrupts",
    "/proc/sysrq-trigger",
)
READ_ONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A sandbox to start: limits in bytes and counts, `program` the substrate's executable.

    `agent`: the compiled agent. `ids`: host's id of root inside. `netns`: path of its network
    namespace, None for a new one without any device. `outlive`: whether it lives on without us.
    `io_read`, `io_write`: bytes per second from and to each disk. `layers`: of the image store
    `store`, the lowest first; then `rootfs` is of no meaning, and `image` describes their image,
    whatever its name means by now.
    """

    folder: Path
    substrate: str
    program: str
    agent: str
    rootfs: str
    workdir: str | None
    memory: int
    pids: int
    cpu: float | None
    disk: int
    hostname: str
    ids: int = 0
    netns: str | None = None
    outlive: bool = False
    store: str = ""
    layers: tuple[str, ...] = ()
    image: str = ""
    door: str | None = None
    io_read: int | None = None
    io_write: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A running agent: `pid` as the host sees it, and what it is to be told.

    `tenant`: the user inside that commands run as, None where there is only one. `address_space`,
    `processes`: limits that each command sets on itself where no control group holds them.
    `filtered`: whether the substrate has installed the system call filter already.
    """

    pid: int
    tenant: int | None = None
    address_space: int = 0
    processes: int = 0
    filtered: bool = False
    process: subprocess.Popen[bytes] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The agent's standard input and output: the listening socket and the journal."""

    listener: int
    journal: int
