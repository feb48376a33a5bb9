"""The worker's end of its door: a session whose log and target are on the other side.

Whoever answers there may die and be replaced. Everything is therefore asked again until there is an
answer, under the key that makes it happen once.

Paper: §5.2.5 (V4.1: the loop in a worker beside its sandbox).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from fathom.errors import DaemonLost, SandboxError, SandboxLost, Unsupported
from fathom.sandbox.trajectory import errors
from fathom.sandbox.trajectory.frames import Frame, connect
from fathom.sandbox.trajectory.operation import Operation, Outcome, from_wire
from fathom.sandbox.trajectory.session import OnUnknown, Value
from fathom.sandbox.types import DOOR

PATIENCE = 86400.0
_PAUSE = 0.2
_ERRORS: dict[str, type[SandboxError]] = {
    kind.code: kind
    for kind in (
        DaemonLost,
        SandboxLost,
        Unsupported,
        errors.TrajectoryError,
        errors.LogCorrupt,
        errors.LogFull,
        errors.OperationConflict,
        errors.Diverged,
        errors.StateDiffers,
    )
}


class DoorSession:
    """The part of a `Session` that a recorded sandbox and a recorded model use."""

    def __init__(self, folder: Path = Path(DOOR), *, patience: float = PATIENCE) -> None:
        self.name = "worker"
        self._folder = folder
        self._patience = patience

    async def order(self) -> dict[str, Any]:
        """What the loop is to do. Raises SandboxLost when nobody ever answers."""
        head, _ = await self._ask({"ask": "order"})
        return head["order"]

    async def run(self, operation: Operation, *, on_unknown: OnUnknown = "fail") -> Outcome:
        """Run an operation once, or return what came of it; see `Session.run`."""
        if on_unknown != "fail":
            raise Unsupported("at the door of a worker an unknown outcome is an error: look")
        request = operation.request
        head = {
            "ask": "run",
            "key": operation.key,
            "effect": operation.effect,
            "has_data": request.data is not None,
            **request.to_json(),
        }
        answer, data = await self._ask(head, request.data or b"")
        return replace(from_wire(data), cached=bool(answer["cached"]))

    async def recall(self, key: str, digest: bytes) -> Value | None:
        """A recorded value; see `Session.recall`."""
        head, data = await self._ask({"ask": "recall", "key": key, "digest": digest.hex()})
        if head["is"] == "missing":
            return None
        blobs: dict[str, bytes] = {}
        at = 0
        for name, size in head["blobs"].items():
            blobs[name] = data[at : at + size]
            at += size
        return Value(fields=head["fields"], blobs=blobs)

    async def remember(
        self, key: str, digest: bytes, fields: Mapping[str, Any], blobs: Mapping[str, bytes]
    ) -> None:
        """Record a value durably; see `Session.remember`."""
        head: dict[str, Any] = {"ask": "remember", "key": key, "digest": digest.hex()}
        head |= {"fields": dict(fields), "blobs": {k: len(v) for k, v in blobs.items()}}
        asked = False
        while True:
            answer = await self._once(head, b"".join(blobs.values()))
            if answer is None:
                asked = True
                await anyio.sleep(_PAUSE)
                continue
            if answer[0]["is"] == "error":
                # It was recorded by an attempt of which nothing was heard.
                if asked and answer[0]["code"] == errors.OperationConflict.code:
                    return
                _raise(answer[0])
            return

    async def end(self, fields: Mapping[str, Any]) -> None:
        """Say that the loop is over."""
        await self._ask({"ask": "end", "fields": dict(fields)})

    async def fail(self, code: str, message: str) -> None:
        """Say that the loop cannot go on, and why."""
        await self._ask({"ask": "fail", "code": code, "message": message})

    async def _ask(self, head: dict[str, Any], data: bytes = b"") -> Frame:
        with anyio.move_on_after(self._patience):
            while True:
                if answer := await self._once(head, data):
                    if answer[0]["is"] == "error":
                        _raise(answer[0])
                    return answer
                await anyio.sleep(_PAUSE)
        raise SandboxLost(f"nobody has answered at {self._folder} for {self._patience:g} s")

    async def _once(self, head: dict[str, Any], data: bytes) -> Frame | None:
        """Ask once; None where nobody is there or whoever was there has gone."""
        try:
            async with connect(self._folder) as line:
                await line.send(head, data)
                return await line.receive()
        except (SandboxLost, OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
            return None


def _raise(head: Mapping[str, Any]) -> None:
    code, message = head["code"], head["message"]
    if code == errors.OutcomeUnknown.code:
        raise errors.OutcomeUnknown(message, key=head["key"], reason=head["reason"])
    raise _ERRORS.get(code, SandboxError)(message)
