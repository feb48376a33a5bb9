"""The parent's end of the line to its API process, read as if an attacker wrote every message.

Messages are JSON objects with a number, an operation and its fields, one to a packet. Files that
come along are dropped by the kernel. Whoever sends what is no such object is cut off, which ends
the API process; whoever asks for what is not allowed gets an error. Answers too long for a packet
are passed as an open file in memory.

Paper: none (a thin form of the report's edge).
"""

from __future__ import annotations

import array
import contextlib
import json
import logging
import os
import socket
import struct
import threading
from functools import partial
from typing import Any, cast

from fathom.errors import FathomError, PolicyDenied, SandboxError, SandboxLost
from fathom.sandbox import messages
from fathom.sandbox.edge import MESSAGE_LIMIT, requests
from fathom.sandbox.edge.events import event
from fathom.sandbox.edge.keeper import Keeper
from fathom.sandbox.edge.tokens import Tokens
from fathom.sandbox.edge.work import Work

_INLINE = 60_000
_PATIENCE = 10  # seconds for the API process to take an answer
_log = logging.getLogger(__name__)


class Channel:
    """Serves one API process. `work` carries out what takes longer than a moment.

    `ready`: whether the process has said that it answers clients.
    """

    def __init__(
        self, sock: socket.socket, keeper: Keeper, tokens: Tokens | None, work: Work
    ) -> None:
        self._sock = sock
        self._keeper = keeper
        self._tokens = tokens
        self._work = work
        self.ready = threading.Event()
        patience = struct.pack("@ll", _PATIENCE, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    def serve(self) -> None:
        """Answer until the API process ends, or sends what no API process would."""
        try:
            while data := self._sock.recv(MESSAGE_LIMIT + 1):
                try:
                    number, op, given = _read(data)
                except (ValueError, RecursionError) as error:
                    event(_log, logging.ERROR, "api_forged", error=error)
                    break
                self._take(number, op, given, len(data))
        except OSError:
            pass
        except Exception:
            _log.exception("event=channel_broken")
        finally:
            # Whatever it was: clients must not wait for answers that nobody gives any more.
            self.close()

    def close(self) -> None:
        """End the line, and with it the API process."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Let go of the line, once `serve` has returned."""
        self._sock.close()

    def tell_gone(self, name: str) -> None:
        """Say that a sandbox has ended. Never raises."""
        self._send({"n": 0, "gone": name})

    def _take(self, number: int, op: Any, given: dict[str, Any], size: int) -> None:
        try:
            values = requests.read(op, given)
            # What takes but a moment never waits for what takes long.
            if op == "open" and self._open(number, values["id"], patient=False):
                return
            if op in ("token", "ready"):
                self._carry_out(number, op, values)
                return
            key = values.get("key", "") if op == "create" else ""
            task = partial(self._carry_out, number, op, values)
            self._work.add(op, task, size=size, key=key)
        except FathomError as error:
            self._send({"n": number, "error": error.code, "message": str(error)})

    def _carry_out(self, number: int, op: str, values: dict[str, Any]) -> None:
        try:
            if op == "open":
                self._open(number, values["id"], patient=True)
                return
            self._send({"n": number, **self._answer(op, values)})
        except FathomError as error:
            self._send({"n": number, "error": error.code, "message": str(error)[:4000]})
        except Exception as error:
            # A defect, or a machine that fails: neither may take the daemon along.
            _log.exception("event=broken op=%s", op)
            text = f"the daemon could not {op}: {error}"
            self._send({"n": number, "error": SandboxError.code, "message": text[:4000]})

    def _answer(self, op: str, values: dict[str, Any]) -> dict[str, Any]:
        if op == "ready":
            self.ready.set()
            return {}
        return self._token(**values) if op == "token" else self._keeper.do(op, values)

    def _token(self, digest: str) -> dict[str, Any]:
        if self._tokens is None:
            raise PolicyDenied("this daemon takes no tokens")
        token = self._tokens.find(digest)
        return {"name": token.name, "scope": token.scope}

    def _open(self, number: int, name: str, *, patient: bool) -> bool:
        """Pass a connection to an agent; False where that would have to wait first."""
        keeper = self._keeper
        try:
            if keeper.is_paused(name):
                if not patient:
                    return False
                keeper.do("thaw", {"ids": [name]})
            path, greeting = keeper.door(name)
            try:
                made = messages.connect(path.parent, path.name, timeout=0)
            except BlockingIOError:
                # It stands still, and more wait already than may: nobody waits for it in here.
                self._send({"n": number, "again": True})
                return True
            except OSError as error:
                text = f"sandbox {name} ended on its own ({error.strerror})"
                raise SandboxLost(text) from error
            with made:
                made.send(greeting)
                self._send({"n": number}, made.fileno())
        except FathomError as error:
            self._send({"n": number, "error": error.code, "message": str(error)})
        except OSError as error:
            text = f"sandbox {name} does not answer ({error.strerror})"
            self._send({"n": number, "error": SandboxLost.code, "message": text})
        return True

    def _send(self, answer: dict[str, Any], fd: int = -1) -> None:
        data = json.dumps(answer).encode()
        held = -1
        if len(data) > _INLINE:
            held = fd = _in_memory(data)
            data = json.dumps({"n": answer["n"], "long": True}).encode()
        rights = array.array("i", [fd] if fd >= 0 else [])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fd >= 0 else []
        try:
            self._sock.sendmsg([data], ancillary)
        except OSError:
            self.close()  # it ended, or takes no answers: another one is started
        finally:
            if held >= 0:
                os.close(held)


def _read(data: bytes) -> tuple[int, Any, dict[str, Any]]:
    """Take a message apart. Raises ValueError, RecursionError."""
    if len(data) > MESSAGE_LIMIT:
        raise ValueError("a message is too long")
    found: Any = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("a message is no object")
    given = cast("dict[str, Any]", found)
    number = given.pop("n", None)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 1 << 53:
        raise ValueError("a message has no number")
    return number, given.pop("op", None), given


def _in_memory(data: bytes) -> int:
    fd = os.memfd_create("answer", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd
