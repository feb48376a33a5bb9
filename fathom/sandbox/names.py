"""Looking up names for sandboxes, so that one that asks for slow ones delays no other.

The system's resolver blocks a thread for as long as a name's server is silent. Each sandbox has a
few threads at most, and what it asks for beyond waits for one of its own.

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import time

# Threads of one sandbox; it keeps each for as long as the resolver does, whoever gave up meanwhile.
AT_ONCE = 4
TIMEOUT = 10.0
_FAILED = 5.0  # seconds for which a name that was not found is not asked for again
_MOST_FAILED = 256
_pool = concurrent.futures.ThreadPoolExecutor(1024 * AT_ONCE, "names")


class Names:
    """The lookups of one sandbox."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(AT_ONCE)
        self._failed: dict[str, float] = {}

    async def find(self, host: str, port: int) -> list[str]:
        """Return the addresses of a name. Raises OSError, TimeoutError after `TIMEOUT` seconds."""
        now = time.monotonic()
        if now - self._failed.get(host, -_FAILED) < _FAILED:
            raise OSError(f"{host} was not found a moment ago")
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._free.acquire()
                try:
                    job = asyncio.get_running_loop().run_in_executor(_pool, _ask, host, port)
                except RuntimeError as error:  # this machine has no thread left
                    self._free.release()
                    raise OSError(f"{host} cannot be looked up: {error}") from error
                job.add_done_callback(self._done)
                return await asyncio.shield(job)
        except (OSError, TimeoutError):
            if len(self._failed) >= _MOST_FAILED:
                self._failed.clear()
            self._failed[host] = time.monotonic()
            raise

    def _done(self, job: asyncio.Future[list[str]]) -> None:
        self._free.release()
        if not job.cancelled():
            job.exception()  # where nobody waits any more, nobody need be told


def _ask(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that no name can have
        raise OSError(f"{host} is no name") from error
    return [str(address[0]) for *_, address in found]
