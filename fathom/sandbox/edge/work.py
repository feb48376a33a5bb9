"""Requests that take longer than a moment: each waits for a thread, and nobody waits for it.

What may take minutes (making, copying) has threads of its own, so that the rest does not stand
behind it. Of requests under one key one is worked on at a time, and the others take no thread.

Paper: §5.2.5 (admission on a node).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fathom.errors import PolicyDenied

_log = logging.getLogger(__name__)
AT_ONCE = 64  # of each sort
MOST = 4096  # that wait or are worked on,
MOST_BYTES = 64 << 20  # with so many bytes of messages
_SLOW = frozenset({"create", "restore", "fork", "prewarm", "snapshot", "pack"})
_Task = Callable[[], None]


class Work:
    """Carries out requests in the order in which they came, many at a time."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._slow = ThreadPoolExecutor(at_once, thread_name_prefix="fathom-edge-slow")
        self._brief = ThreadPoolExecutor(at_once, thread_name_prefix="fathom-edge")
        for pool in (self._slow, self._brief):
            pool.submit(int)  # so that each has a thread, whatever becomes of the machine
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._count = 0
        self._bytes = 0
        self._behind: dict[str, deque[_Task]] = {}

    def add(self, op: str, task: _Task, *, size: int, key: str = "") -> None:
        """Have `task` carried out, which must not raise; `size`: of its message, in bytes.

        Never blocks. Raises PolicyDenied where too much waits already.
        """

        def work() -> None:
            try:
                task()
            finally:
                self._done(size, key)

        with self._lock:
            if self._count >= MOST or self._bytes + size > MOST_BYTES:
                raise PolicyDenied(
                    f"this daemon has {self._count} requests to carry out: ask again later"
                )
            self._count += 1
            self._bytes += size
            if key and key in self._behind:
                self._behind[key].append(work)
                return
            if key:
                self._behind[key] = deque()
        _submit(self._slow if op in _SLOW else self._brief, work)

    def _done(self, size: int, key: str) -> None:
        with self._lock:
            self._count -= 1
            self._bytes -= size
            if not self._count:
                self._idle.notify_all()
            if not key:
                return
            if not self._behind[key]:
                del self._behind[key]
                return
            following = self._behind[key].popleft()
        _submit(self._slow, following)

    def shutdown(self) -> None:
        """Wait for all that was added."""
        with self._lock:
            # What stands behind a key is handed on by the one before it, which needs the threads.
            self._idle.wait_for(lambda: not self._count)
        self._slow.shutdown()
        self._brief.shutdown()


def _submit(pool: ThreadPoolExecutor, work: _Task) -> None:
    try:
        pool.submit(work)
    except RuntimeError as error:
        # No other thread can be started just now: it waits for one of those that there are.
        _log.warning("event=no_thread error=%s", error)
