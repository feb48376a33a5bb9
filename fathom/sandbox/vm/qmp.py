"""The emulator's monitor: one request at a time over its socket, answers and events as JSON.

What it says is not trusted more than the guest: lines have a limit, and files it wrote are read as
a stranger's.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

from fathom.errors import SandboxError, SandboxLost

_LINE_LIMIT = 1 << 20
_TIMEOUT = 60.0


class Monitor:
    """A connected monitor. Requests of several threads wait for each other."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._held = b""
        self._lock = threading.Lock()
        self._sock.settimeout(_TIMEOUT)
        self._greeted = False

    def ask(self, command: str, timeout: float = _TIMEOUT, **arguments: Any) -> Any:
        """Have one command done and return its result. Raises SandboxError, SandboxLost."""
        with self._lock:
            deadline = time.monotonic() + timeout
            if not self._greeted:
                self._line(deadline)
                self._request("qmp_capabilities", {}, deadline)
                self._greeted = True
            return self._request(command, arguments, deadline)

    def _request(self, command: str, arguments: dict[str, Any], deadline: float) -> Any:
        request = {"execute": command, "arguments": arguments}
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise SandboxLost(f"the virtual machine is gone ({error.strerror})") from error
        while True:
            answer = self._line(deadline)
            if "error" in answer:
                said = str(answer["error"].get("desc"))[:500]
                raise SandboxError(f"the emulator refused {command}: {said}")
            if "return" in answer:
                return answer["return"]

    def _line(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._held:
            if len(self._held) > _LINE_LIMIT:
                raise SandboxError("the emulator's monitor says too much")
            self._sock.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self._sock.recv(1 << 16)
            except TimeoutError as error:
                raise SandboxError("the emulator's monitor does not answer") from error
            except OSError as error:
                raise SandboxLost(f"the virtual machine is gone ({error.strerror})") from error
            if not data:
                raise SandboxLost("the virtual machine is gone")
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        found: Any = json.loads(line)
        if not isinstance(found, dict):
            raise SandboxError("the emulator's monitor says something that is no object")
        return found  # type: ignore[return-value]

    def close(self) -> None:
        """Close the line. Does nothing the second time."""
        self._sock.close()
