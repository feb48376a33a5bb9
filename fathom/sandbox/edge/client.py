"""A program's end of the daemon: the same requests as to a node of its own, sent elsewhere.

Paper: §5.2.5 (one surface; where a sandbox lives is a parameter).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any

from fathom.sandbox import plain
from fathom.sandbox.line import Line
from fathom.sandbox.nodelink import raise_error


class EdgeHost(ABC):
    """A daemon, whatever leads to it."""

    def __init__(self) -> None:
        self._owner = os.getpid()

    @property
    def is_ours(self) -> bool:
        """Whether this process opened it, rather than a fork of it."""
        return os.getpid() == self._owner

    async def call(self, op: str, **values: Any) -> dict[str, Any]:
        """Have one operation done by the daemon. Raises SandboxError, DaemonLost."""
        if "spec" in values:
            values["spec"] = plain.spec_out(values["spec"])
        if "net" in values:
            values["net"] = plain.net_out(values["net"])
        answer = await self.ask(op, values)
        raise_error(answer)
        for one in (answer, *answer.get("made", ()), *answer.get("sandboxes", ())):
            if "caps" in one:
                one["caps"] = plain.caps_in(one["caps"])
        return answer

    @abstractmethod
    async def ask(self, op: str, values: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer, which may be an error. Raises DaemonLost."""

    @abstractmethod
    async def open(self, name: str) -> Line:
        """Open a line to an agent through the daemon. Raises SandboxLost, DaemonLost."""

    @abstractmethod
    async def oom_count(self, name: str) -> int:
        """Return how many processes of the sandbox were killed for memory so far."""

    async def close(self) -> None:
        """Let go of the daemon; its sandboxes go on."""
        self.close_at_exit()

    @abstractmethod
    def close_at_exit(self) -> None:
        """Let go of the daemon where no event loop runs any more; its sandboxes go on."""
