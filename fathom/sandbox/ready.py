"""Sandboxes that wait to be taken: each one taken is replaced in the background.

Paper: §5.2.5 (pre-created containers).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from fathom.errors import FathomError
from fathom.sandbox.types import Kept

_log = logging.getLogger(__name__)


class Room(Protocol):
    """Room for one that is being made."""

    def settle(self) -> AbstractContextManager[None]:
        """Count it among those that are there from inside on."""
        ...


class Ready:
    """The sandboxes of one host that wait. `make` starts one and returns what its client gets.

    `lives`, `end`: whether the one of a name still runs, and what ends it. `admit`: what keeps room
    for each while it is made, and may refuse it.
    """

    def __init__(
        self,
        make: Callable[[Kept], dict[str, Any]],
        lives: Callable[[str], bool],
        end: Callable[[str], object],
    ) -> None:
        self._make = make
        self._lives = lives
        self._end = end
        self.admit: Callable[[Kept], AbstractContextManager[Room]] = _freely
        self._waiting: dict[Kept, list[dict[str, Any]]] = {}
        self._sizes: dict[Kept, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def take(self, spec: Kept) -> dict[str, Any] | None:
        """Hand out one that waits and lives, or None."""
        dead: list[str] = []
        with self._lock:
            waiting = self._waiting.get(spec, [])
            found = waiting.pop() if waiting else None
            while found is not None and not self._lives(found["id"]):
                dead.append(found["id"])
                found = waiting.pop() if waiting else None
        if found is not None or dead:
            threading.Thread(target=self._replace, args=(spec, dead), daemon=True).start()
        return found

    def hold(self, spec: Kept, count: int) -> None:
        """Have `count` of this kind wait from now on. Raises SandboxError."""
        with self._lock:
            self._sizes[spec] = count
            waiting = self._waiting.setdefault(spec, [])
            surplus = [waiting.pop()["id"] for _ in range(len(waiting) - count)]
        for name in surplus:
            self._end(name)
        self._refill(spec)

    def _replace(self, spec: Kept, dead: list[str]) -> None:
        try:
            for name in dead:
                self._end(name)
            self._refill(spec)
        except FathomError as error:
            # Whoever asks next is told the same by `create` itself.
            _log.warning("event=not_replaced error=%s", error)

    def _refill(self, spec: Kept) -> None:
        while True:
            with self._lock:
                waiting = self._waiting.setdefault(spec, [])
                if len(waiting) >= self._sizes.get(spec, 0):
                    return
            with self.admit(spec) as room:
                made = self._make(spec)
                with room.settle(), self._lock:
                    waiting.append(made)


class _Boundless:
    """Room where nobody counts."""

    def settle(self) -> AbstractContextManager[None]:
        """Count nothing."""
        return contextlib.nullcontext()


def _freely(_: Kept) -> AbstractContextManager[Room]:
    return contextlib.nullcontext(_Boundless())
