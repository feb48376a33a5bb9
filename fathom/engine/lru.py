"""Values in host memory up to a number of bytes; what was used longest ago goes first.

Paper: none (engine).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class LRU(Generic[T]):
    """Values by name, with their sizes; at most `limit` bytes, but always the newest one.

    What is pinned goes only when nothing else is left.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.pinned: set[bytes] = set()
        self._values: OrderedDict[bytes, tuple[T, int]] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def keys(self) -> list[bytes]:
        """All names, the one used longest ago first."""
        return list(self._values)

    def get(self, key: bytes) -> T | None:
        """A value, which is thereby used."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: bytes, value: T, size: int) -> list[tuple[bytes, T]]:
        """Keep a value, in place of one of the same name; returns those that had to go."""
        self.pop(key)
        self._values[key] = value, size
        self.size += size
        gone: list[tuple[bytes, T]] = []
        while self.size > self.limit and len(self._values) > 1:
            unpinned = (k for k in self._values if k not in self.pinned and k != key)
            oldest = next(unpinned, next(iter(self._values)))
            gone.append((oldest, self.pop(oldest)))  # type: ignore[arg-type]
        return gone

    def pop(self, key: bytes) -> T | None:
        """Take a value out, if it is there."""
        value, size = self._values.pop(key, (None, 0))
        self.size -= size
        return value

    def clear(self) -> None:
        """Forget everything, pins too."""
        self._values.clear()
        self.pinned.clear()
        self.size = 0
