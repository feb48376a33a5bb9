"""Refusing what a machine has no room for, before anything is made.

Paper: §5.2.5 (admission on a node).
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fathom.errors import PolicyDenied
from fathom.sandbox.types import Kept

T = TypeVar("T")
_FRESH = 0.05  # seconds for which what was read of the memory is believed


@dataclass(slots=True)
class Room:
    """Room for sandboxes that are being made. `left`: how many of them are not there yet."""

    admission: Admission
    left: int

    def settle(self) -> AbstractContextManager[None]:
        """Have the next of them counted among what is there from inside on."""
        return self.admission.settle(self)


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
    def admit(self, spec: Kept, count: int = 1) -> Generator[Room]:
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
        room = Room(self, count)
        try:
            yield room
        finally:
            with self._lock:
                self._making -= room.left
                self._wanted -= wanted

    @contextlib.contextmanager
    def settle(self, room: Room | None) -> Generator[None]:
        """Have what was being made counted among what is there from inside on, never as both."""
        with self._lock:
            yield
            if room is not None and room.left:
                room.left -= 1
                self._making -= 1

    @contextlib.contextmanager
    def taking(self, take: Callable[[], T | None]) -> Generator[tuple[T | None, Room]]:
        """Take one that waits, and count it until its new owner has it."""
        with self._lock:
            found = take()
            room = Room(self, 0 if found is None else 1)
            self._making += room.left
        try:
            yield found, room
        finally:
            with self._lock:
                self._making -= room.left

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
