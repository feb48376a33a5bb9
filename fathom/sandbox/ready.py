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

    `admit`: what keeps room for each while it is made, and may refuse it.
    """

    def __init__(self, make: Callable[[Kept], dict[str, Any]]) -> None:
        self._make = make
        self.admit: Callable[[Kept], AbstractContextManager[Room]] = _freely
        self._waiting: dict[Kept, list[dict[str, Any]]] = {}
        self._sizes: dict[Kept, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def take(self, spec: Kept) -> dict[str, Any] | None:
        """Hand out one that waits, or None."""
        with self._lock:
            waiting = self._waiting.get(spec)
            found = waiting.pop() if waiting else None
        if found is not None:
            threading.Thread(target=self._replace, args=(spec,), daemon=True).start()
        return found

    def hold(self, spec: Kept, count: int) -> None:
        """Have `count` of this kind wait from now on. Raises SandboxError."""
        with self._lock:
            self._sizes[spec] = count
        self._refill(spec)

    def _replace(self, spec: Kept) -> None:
        try:
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
