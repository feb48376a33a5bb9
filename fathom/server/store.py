"""What the server remembers between requests, within bounds: reasoning by call, turns by response.

Clients drop reasoning that the model needs after tool calls; it is found again by the id of the
call, which nobody can guess. Every entry belongs to the key that made it, so that no client ever
sees another's, whatever id it names.

Paper: §5.1.1 (reasoning is kept across tool calls).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fathom.chat import Message
from fathom.chat.requests import ToolSpec

V = TypeVar("V")


class Bounded(Generic[V]):
    """A dictionary that forgets what was used longest ago when it grows too large."""

    def __init__(self, entries: int, size: int) -> None:
        self._entries = entries
        self._size = size
        self._used = 0
        self._items: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = threading.RLock()  # large requests are read in threads

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self._items)

    def put(self, key: Hashable, value: V, size: int) -> None:
        """Keep `value`; one that is larger than everything allowed together is not kept."""
        with self._lock:
            self.pop(key)
            if size > self._size or not self._entries:
                return
            self._items[key] = (value, size)
            self._used += size
            while self._used > self._size or len(self._items) > self._entries:
                _, (_, freed) = self._items.popitem(last=False)
                self._used -= freed

    def get(self, key: Hashable) -> V | None:
        """The value, which is the most recently used one from now on."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                return None
            self._items.move_to_end(key)
            return item[0]

    def pop(self, key: Hashable) -> V | None:
        """Forget an entry and return its value."""
        with self._lock:
            item = self._items.pop(key, None)
            if item is None:
                return None
            self._used -= item[1]
            return item[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A finished response: the conversation with its answer, and the object the client got.

    found_tools: those that searches of the conversation found, which no request names again.
    """

    messages: list[Message]
    body: dict[str, Any]
    found_tools: list[ToolSpec] = field(default_factory=list[ToolSpec])


class TurnStore:
    """Reasoning by call id and responses by their id, both by owner."""

    def __init__(self, entries: int, size: int) -> None:
        self._reasoning: Bounded[str] = Bounded(16 * entries, size // 2)
        self._responses: Bounded[StoredResponse] = Bounded(entries, size // 2)

    def keep_reasoning(self, owner: str, call_ids: list[str], reasoning: str) -> None:
        """Remember what was thought before these calls."""
        for call_id in call_ids:
            self._reasoning.put((owner, call_id), reasoning, len(reasoning) + 64)

    def recall(self, owner: str, call_id: str) -> str | None:
        """What was thought before this call, if the call was made for `owner`."""
        return self._reasoning.get((owner, call_id)) if call_id else None

    def keep_response(self, owner: str, response_id: str, response: StoredResponse) -> None:
        """Remember a response."""
        size = len(repr(response))
        self._responses.put((owner, response_id), response, size)

    def response(self, owner: str, response_id: str) -> StoredResponse | None:
        """The response of that id that belongs to `owner`."""
        return self._responses.get((owner, response_id))

    def forget_response(self, owner: str, response_id: str) -> bool:
        """Forget a response; whether there was one."""
        return self._responses.pop((owner, response_id)) is not None
