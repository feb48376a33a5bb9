"""How old a sandbox is, whatever is done to the clock on the wall.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path


def boot() -> str:
    """Return what tells this start of the machine from every other one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def uptime() -> float:
    """Return the seconds since the machine started, those that it slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Birth:
    """When something was made: seconds of the clock on the wall, and since the start `boot`."""

    wall: float
    uptime: float
    boot: str

    @staticmethod
    def now() -> Birth:
        """Return this moment."""
        return Birth(time.time(), uptime(), boot())

    def age(self) -> float:
        """Return for how many seconds it has been there.

        What was written down under another start, or by who knew of none, has the clock on the wall
        alone; it is no older than this start of the machine, for no sandbox outlives one.
        """
        since = uptime()
        if self.boot and self.boot == boot():
            return max(0.0, since - self.uptime)
        return min(max(0.0, time.time() - self.wall), since)
