"""Refusing what a machine has no room for, before anything is made.

Paper: §5.2.5 (admission on a node).
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

from fathom.errors import PolicyDenied
from fathom.sandbox.types import Kept

_FRESH = 0.05  # seconds for which what was read of the memory is believed


class Admission:
    """How many sandboxes there may be. `there`: how many there are, without those being made."""

    def __init__(self, most: int, spare: int, there: Callable[[], int]) -> None:
        self.most = most
        self._spare = spare
        self._there = there
        self._making = 0
        self._wanted = 0
        self._read = (-_FRESH, 0)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def admit(self, spec: Kept, count: int = 1) -> Generator[None]:
        """Keep room for sandboxes while they are made. Raises PolicyDenied."""
        # What a sandbox is allowed is rarely what it uses; its first pages must be there.
        wanted = count * (spec.memory_bytes // 16)
        with self._lock:
            there = self._there() + self._making
            free = self.available()
            needs = wanted + self._wanted + self._spare
            reason = ""
            if there + count > self.most:
                reason = f"it has {there} sandboxes of {self.most} that it admits"
            elif free < needs:
                reason = f"it has {free >> 20} MiB of memory left and needs {needs >> 20}"
            if reason:
                raise PolicyDenied(f"this machine takes no further sandbox: {reason}")
            self._making += count
            self._wanted += wanted
        try:
            yield
        finally:
            with self._lock:
                self._making -= count
                self._wanted -= wanted

    def available(self) -> int:
        """Return how many bytes of memory programs can still get."""
        read, found = self._read
        if time.monotonic() - read > _FRESH:
            found = _available_memory()
            self._read = time.monotonic(), found
        return found


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return shutil.disk_usage("/").free  # no such line on very old kernels
