"""What the API process does for any client: passes requests on, opens lines, minds idle sandboxes.

Paper: §5.2.5 (one node: expiry).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from typing import Any

from fathom.errors import FathomError, SandboxLost, Unsupported
from fathom.sandbox.edge.events import event
from fathom.sandbox.edge.requests import OPERATIONS
from fathom.sandbox.edge.upcall import Upcall

_TICK = 0.5
# Operations that keep a sandbox from being idle; to look at its figures does not.
_USES = frozenset({"attach", "thaw", "snapshot", "pack", "phase", "fork", "screenshot"})
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Live:
    """A sandbox that ends when it is idle. `used`: when last, by the monotonic clock."""

    idle_ttl: float
    used: float
    lines: int = 0
    asked: bool = False


class Front:
    """Serves requests of every kind of client, by asking `upcall`, which is set before."""

    upcall: Upcall

    def __init__(self) -> None:
        self.live: dict[str, Live] = {}
        self.lines = 0
        self.requests: Counter[tuple[str, str]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.refused = 0

    async def begin(self) -> None:
        """Learn which sandboxes there are."""
        for entry in (await self.upcall.ask("list", {}))["sandboxes"]:
            self._note(entry)

    async def answer(self, request: dict[str, Any], who: str) -> dict[str, Any]:
        """Have a client's request done; what goes wrong is the answer."""
        began = time.perf_counter()
        op = request.pop("op", None)
        try:
            # What else the parent does is for this process alone.
            if not isinstance(op, str) or op not in OPERATIONS:
                raise Unsupported(f"this daemon has no operation {str(op)[:80]!r}")
            found: dict[str, Any] = await self.upcall.ask(op, request)
        except FathomError as error:
            found = {"error": error.code, "message": str(error)}
        name = op if isinstance(op, str) and op in OPERATIONS else "unknown"
        self._count(name, found, time.perf_counter() - began, who)
        if op == "metrics" and "text" in found:
            found["text"] += self._metrics()
        made: list[dict[str, Any]] = found.get("made", [])
        for entry in (found, *made):
            if "spec" in entry:
                self._note(entry)
        if name in _USES:
            self._touch(request.get("id"))
        return found

    @contextlib.asynccontextmanager
    async def line(
        self, name: Any, who: str
    ) -> AsyncGenerator[tuple[socket.socket | None, dict[str, Any]]]:
        """Give a line to an agent and the answer that goes with it, or None and an error."""
        began = time.perf_counter()
        opened: socket.socket | None = None
        try:
            answer, opened = await self.upcall.open(name)
        except FathomError as error:
            answer = {"error": error.code, "message": str(error)}
        self._count("open", answer, time.perf_counter() - began, who)
        with self._used(name if opened is not None else None):
            try:
                yield opened, answer
            finally:
                if opened is not None:
                    opened.close()

    @contextlib.contextmanager
    def _used(self, name: Any) -> Generator[None]:
        """Count one more line of a sandbox, which is not idle meanwhile."""
        live = self.live.get(name) if isinstance(name, str) else None
        self.lines += name is not None
        if live is not None:
            live.lines += 1
        try:
            yield
        finally:
            self.lines -= name is not None
            if live is not None:
                live.lines -= 1
                live.used = time.monotonic()

    def _note(self, entry: dict[str, Any]) -> None:
        idle = entry["spec"]["idle_ttl"]
        if idle is not None and entry["id"] not in self.live:
            self.live[entry["id"]] = Live(float(idle), time.monotonic())

    def _touch(self, name: Any) -> None:
        if isinstance(name, str) and (live := self.live.get(name)) is not None:
            live.used = time.monotonic()

    def forget(self, name: str) -> None:
        """Take note that a sandbox has ended."""
        self.live.pop(name, None)

    def _count(self, op: str, answer: dict[str, Any], seconds: float, who: str) -> None:
        code = str(answer.get("error", "ok"))
        self.requests[op, code] += 1
        self.seconds[op] += seconds
        milliseconds = round(seconds * 1000, 3)
        event(_log, logging.DEBUG, "request", op=op, code=code, who=who, ms=milliseconds)

    def _metrics(self) -> str:
        lines = [f"fathom_sandbox_lines {self.lines}"]
        lines.append(f"fathom_tokens_refused_total {self.refused}")
        lines += [
            f'fathom_requests_total{{op="{op}",code="{code}"}} {count}'
            for (op, code), count in sorted(self.requests.items())
        ]
        lines += [
            f'fathom_request_seconds_total{{op="{op}"}} {seconds:.6f}'
            for op, seconds in sorted(self.seconds.items())
        ]
        return "\n".join(lines) + "\n"

    async def mind(self) -> None:
        """End sandboxes of which nothing was asked for their time, again and again."""
        while True:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            for name, live in list(self.live.items()):
                if live.lines or live.asked or now - live.used <= live.idle_ttl:
                    continue
                live.asked = True
                try:
                    answer = await self.upcall.ask("idle", {"id": name})
                finally:
                    live.asked = False
                if answer.get("ended") or answer.get("error") == SandboxLost.code:
                    self.forget(name)
                else:
                    # It is paused, and that is no idleness; or nobody could end it just now.
                    live.used = time.monotonic()
