"""Bounds on clients that have not shown a token yet, and on those who guess.

Paper: none (access control).
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass

MOST_CONNECTIONS = 1024
MOST_STRANGERS = 128
STRANGERS_EACH = 16  # of one address
FAILURES = 10  # of one address, within
WINDOW = 60.0  # seconds; after these it may try again
_MOST_ADDRESSES = 4096


def source(host: str) -> str:
    """Return what counts as one address: for IPv6 the network that one customer has."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


@dataclass(slots=True)
class _Failures:
    since: float
    count: int = 0


class Guard:
    """Counts connections and refused tokens by address."""

    def __init__(self) -> None:
        self.connections = 0
        self._strangers: dict[str, int] = {}
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def enter(self, address: str) -> bool:
        """Count one more connection, unless there are too many."""
        each = self._strangers.get(address, 0)
        strangers = sum(self._strangers.values())
        if (
            self.connections >= MOST_CONNECTIONS
            or strangers >= MOST_STRANGERS
            or each >= STRANGERS_EACH
        ):
            return False
        self.connections += 1
        self._strangers[address] = each + 1
        return True

    def known(self, address: str) -> None:
        """Take note that a connection has shown a good token."""
        left = self._strangers[address] - 1
        if left:
            self._strangers[address] = left
        else:
            del self._strangers[address]

    def leave(self, address: str, *, known: bool) -> None:
        """Take note that a connection has ended."""
        self.connections -= 1
        if not known:
            self.known(address)

    def fail(self, address: str) -> None:
        """Take note of a token that was refused."""
        now = time.monotonic()
        found = self._failures.pop(address, None)
        if found is None or now - found.since > WINDOW:
            found = _Failures(now)
        found.count += 1
        self._failures[address] = found
        while len(self._failures) > _MOST_ADDRESSES:
            self._failures.popitem(last=False)

    def wait(self, address: str) -> float:
        """Return for how many seconds no token of this address is looked at."""
        found = self._failures.get(address)
        if found is None or found.count < FAILURES:
            return 0.0
        return max(0.0, found.since + WINDOW - time.monotonic())
