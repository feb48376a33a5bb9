"""A program's end of the daemon: the same requests as to a node of its own, over a socket.

Paper: §5.2.5 (one surface; where a sandbox lives is a parameter).
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from fathom.errors import DaemonLost, SandboxLost
from fathom.sandbox import plain
from fathom.sandbox.edge import SOCKET
from fathom.sandbox.line import Line, dial
from fathom.sandbox.nodelink import raise_error


class EdgeHost:
    """The daemon whose socket is in the folder `runtime`."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
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
        line = await self._dial()
        try:
            answer = await self._ask(line, {"op": op, **values})
        finally:
            line.close()
        for one in (answer, *answer.get("made", ()), *answer.get("sandboxes", ())):
            if "caps" in one:
                one["caps"] = plain.caps_in(one["caps"])
        return answer

    async def open(self, name: str) -> Line:
        """Open a line to an agent through the daemon. Raises SandboxLost, DaemonLost."""
        line = await self._dial()
        try:
            await self._ask(line, {"op": "open", "id": name})
        except BaseException:
            line.close()
            raise
        return line

    async def _dial(self) -> Line:
        try:
            return await dial(self.runtime, SOCKET)
        except SandboxLost as error:
            raise DaemonLost(
                f"no daemon answers in {self.runtime} ({error}): "
                "start one with `fathom sandbox edge`"
            ) from error

    async def _ask(self, line: Line, request: dict[str, Any]) -> dict[str, Any]:
        try:
            await line.send(json.dumps(request).encode() + b"\n")
            text = await line.receive_line()
        except SandboxLost as error:
            raise DaemonLost(f"the daemon in {self.runtime} went away") from error
        answer = json.loads(text)
        raise_error(answer)
        return answer

    def oom_count(self, name: str) -> int:
        """Return how many processes of the sandbox were killed for memory so far."""
        from fathom.sandbox import cgroups

        layout = cgroups.current_layout()
        if layout is None:
            return 0
        with contextlib.suppress(OSError):
            return cgroups.oom_count(cgroups.Group(layout, name).oom_file.read_text())
        return 0

    async def close(self) -> None:
        """Let go of the daemon; its sandboxes go on."""

    def close_at_exit(self) -> None:
        """Let go of the daemon; its sandboxes go on."""
