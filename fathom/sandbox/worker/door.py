"""What a worker can ask for: operations in its one target, values of its log, its one server.

Whoever asks is a stranger. Every request names what may be done with nothing but plain values, is
checked here, and can neither name a sandbox nor reach the daemon: those are not parts of a request.

    order       what the loop is to do
    run         an operation: once, whoever asks again and whoever died meanwhile
    recall      a value that was recorded, such as a turn of the model
    remember    record one
    end         the loop is over, with these words as the last record
    fail        the loop cannot go on

Paper: §5.2.5 (V4.1: the loop in a worker beside its sandbox).
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import anyio
from anyio.abc import ByteStream, SocketListener, SocketStream, TaskGroup

from fathom.errors import DaemonLost, FathomError, SandboxError, SandboxLost
from fathom.sandbox.trajectory.errors import OutcomeUnknown
from fathom.sandbox.trajectory.frames import SOCKET, Frame, Line
from fathom.sandbox.trajectory.operation import (
    Effect,
    Operation,
    Outcome,
    Request,
    exec_request,
    to_wire,
)
from fathom.sandbox.trajectory.session import Session

MODEL = "model"
# Of the loop, each with a request in memory, and to its model.
MOST_LINES, MOST_CONNECTIONS = 8, 32
LARGEST = 32 << 20
LARGEST_HEAD = 4 << 20  # of JSON, which takes many times its size as it is read
LARGEST_READ = 64 << 20
# What a worker may have written to the log in all, so that it cannot fill this machine's disk.
MOST_BYTES = 2 << 30
_LONGEST = 7 * 86400.0
_CHUNK = 1 << 16
_log = logging.getLogger(__name__)
_EFFECTS: tuple[Effect, ...] = ("once", "idempotent", "pure")


Handler = Callable[[SocketStream], Awaitable[None]]


class Refused(SandboxError):
    """A worker asked for what its door does not lead to."""

    code = "worker_refused"


@dataclass(slots=True)
class _Job:
    """An operation that somebody asked for; whoever asks again waits for the same end."""

    digest: bytes
    ended: anyio.Event = field(default_factory=anyio.Event)
    outcome: Outcome | None = None
    error: FathomError | None = None


class Door:
    """Answers one worker. `order`: what its loop is told; `model`: the one address it may talk to.

    `lives` is asked when a command was lost: it returns once the daemon answers, and says whether
    the target is still there.
    """

    def __init__(
        self,
        session: Session,
        order: Mapping[str, Any],
        model: tuple[str, int],
        lives: Callable[[], Awaitable[bool]],
    ) -> None:
        self.session = session
        self.order = dict(order)
        self.model = model
        self.ended = False
        self.failure: tuple[str, str] | None = None
        self._lives = lives
        self._jobs: dict[str, _Job] = {}
        self._written = 0
        self._gone = False
        self._group: TaskGroup | None = None

    async def serve(self, folder: Path, *, started: Callable[[], None]) -> None:
        """Answer at the sockets in `folder` until cancelled. Raises SandboxError, OSError."""
        talk, carry = await _listen(folder, SOCKET), await _listen(folder, MODEL)
        async with talk, carry, anyio.create_task_group() as group:
            self._group = group
            group.start_soon(talk.serve, _bounded(self._talk, MOST_LINES))
            group.start_soon(carry.serve, _bounded(self._carry, MOST_CONNECTIONS))
            started()

    # The target --------------------------------------------------------------------------------

    async def _talk(self, stream: SocketStream) -> None:
        line = Line(stream, LARGEST, LARGEST_HEAD)
        while (frame := await line.receive()) is not None:
            try:
                head, data = await self._answer(frame)
            except FathomError as error:
                head, data = _as_error(error), b""
            except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
                head, data = _as_error(Refused(f"that is no request: {error!r:.200}")), b""
            await line.send(head, data)

    async def _answer(self, frame: Frame) -> Frame:
        head, data = frame
        match head.get("ask"):
            case "order":
                return {"is": "order", "order": self.order}, b""
            case "run":
                return await self._run(head, data)
            case "recall":
                return await self._recall(head)
            case "remember":
                self._count(len(data))
                blobs = _split(head["blobs"], data)
                key, digest, fields = _key(head), _digest(head), _object(head["fields"])
                await self.session.remember(key, digest, fields, blobs)
                return {"is": "done"}, b""
            case "end":
                if not self.ended:
                    self._count(len(json.dumps(head)))
                    await self.session.end(_object(head["fields"]))
                    self.ended = True
                return {"is": "done"}, b""
            case "fail":
                self.failure = str(head["code"])[:100], str(head["message"])[:2000]
                return {"is": "done"}, b""
            case _:
                raise Refused("a worker may ask for: order, run, recall, remember, end, fail")

    def _count(self, size: int) -> None:
        self._written += size
        if self._written > MOST_BYTES:
            raise Refused(f"this run has written {MOST_BYTES} bytes to its log: begin another one")

    async def _recall(self, head: Mapping[str, Any]) -> Frame:
        value = await self.session.recall(_key(head), _digest(head))
        if value is None:
            return {"is": "missing"}, b""
        sizes = {name: len(blob) for name, blob in value.blobs.items()}
        said = {"is": "value", "fields": value.fields, "blobs": sizes}
        return said, b"".join(value.blobs.values())

    async def _run(self, head: Mapping[str, Any], data: bytes) -> Frame:
        request = read_request(head, data if head["has_data"] else None)
        key, effect = _key(head), cast("Effect", head["effect"])
        if effect not in _EFFECTS:
            raise Refused(f"an operation is {', '.join(_EFFECTS)}, not {effect!r:.40}")
        digest = request.digest()
        job = self._jobs.get(key)
        if job is None or job.digest != digest:
            # Of one that ended the session knows what came of it, or refuses another request.
            self._count(len(data) + len(json.dumps(head)))
            job = self._jobs[key] = _Job(digest)
            assert self._group is not None
            # Not this connection's: a worker that asks again finds it running.
            operation = Operation(key=key, request=request, effect=effect)
            self._group.start_soon(self._work, job, operation)
        await job.ended.wait()
        if job.error is not None:
            raise job.error
        assert job.outcome is not None
        self._count(sum(map(len, job.outcome.blobs.values())))
        return {"is": "ended", "cached": job.outcome.cached}, to_wire(job.outcome)

    async def _work(self, job: _Job, operation: Operation) -> None:
        try:
            job.outcome = await self._once(operation)
        except FathomError as error:
            job.error = error
        except Exception as error:
            # A defect, or a request that fits nothing, is not the end of everything else.
            _log.warning("event=not_done error=%r", error)
            job.error = SandboxError(f"{operation.key} could not be done: {error}")
        finally:
            job.ended.set()
            # Whoever waits has it. What came of it is in the log, and need not be held here.
            if self._jobs.get(operation.key) is job:
                del self._jobs[operation.key]

    async def _once(self, operation: Operation) -> Outcome:
        while not self._gone:
            try:
                return await self.session.run(operation)
            except OutcomeUnknown:
                self._gone = not await self._lives()
                raise
            except (SandboxLost, DaemonLost):
                # It did not begin, or nobody could say: asked again, the session finds out.
                self._gone = not await self._lives()
        raise SandboxLost("the sandbox that this worker works in is gone")

    # The model ---------------------------------------------------------------------------------

    async def _carry(self, stream: SocketStream) -> None:
        near = stream
        try:
            far = await anyio.connect_tcp(*self.model)
        except OSError:
            return  # it hears the end of its connection and tries again
        async with far, anyio.create_task_group() as group:

            async def carry(source: ByteStream, target: ByteStream, last: bool) -> None:
                try:
                    while True:
                        await target.send(await source.receive(_CHUNK))
                except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                    if last:
                        group.cancel_scope.cancel()

            group.start_soon(carry, near, far, True)
            group.start_soon(carry, far, near, True)


def _bounded(handler: Handler, most: int) -> Handler:
    """Serve so many connections at a time; whatever goes wrong with one is its own affair."""
    slots = anyio.Semaphore(most)

    async def serve(stream: SocketStream) -> None:
        async with stream:
            if slots.value == 0:
                return  # let alone to wait: each one that waits has a descriptor of ours
            async with slots:
                try:
                    await handler(stream)
                except Exception as error:
                    _log.debug("event=broken error=%r", error)

    return serve


async def _listen(folder: Path, name: str) -> SocketListener:
    """A listening socket that the tenant of a sandbox may connect to, whoever listened before."""
    path = folder / name
    path.unlink(missing_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # A socket's path is short by law of the kernel, a user's folder is not.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.bind(f"/proc/self/fd/{fd}/{name}")
    finally:
        os.close(fd)
    # To the kernel it is another user; the folders above are the owner's alone.
    os.chmod(path, 0o666)
    sock.listen(MOST_CONNECTIONS)
    sock.setblocking(False)
    return await SocketListener.from_socket(sock)


def _as_error(error: FathomError) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if isinstance(error, OutcomeUnknown):
        more = {"key": error.key, "reason": error.reason}
    return {"is": "error", "code": error.code, "message": str(error)[:4000], **more}


def read_request(head: Mapping[str, Any], data: bytes | None) -> Request:
    """Read an operation that a stranger asks for. Raises Refused, TypeError, KeyError."""
    given = _object(head["arguments"])
    match head["verb"]:
        case "exec":
            command = given.pop("command")
            words = cast("list[object]", command) if isinstance(command, list) else None
            text = "" if words is not None else _text(cast("object", command))
            return exec_request(
                text if words is None else [_text(word) for word in words],
                timeout=_number(given.pop("timeout"), _LONGEST),
                cwd=_text_or_none(given.pop("cwd", None)),
                stdin=data,
                env={_text(k): _text(v) for k, v in _object(given.pop("env", {})).items()},
                merge=bool(given.pop("merge", False)),
                cap=int(_number(given.pop("cap"), LARGEST // 2)),
                **_nothing(given),
            )
        case "read":
            limit = int(_number(given.pop("limit"), LARGEST_READ))
            arguments = {"path": _text(given.pop("path")), "limit": limit}
            return Request(verb="read", arguments=arguments, **_nothing(given))
        case "write":
            arguments = {"path": _text(given.pop("path"))}
            return Request(verb="write", arguments=arguments, data=data, **_nothing(given))
        case verb:
            raise Refused(f"a worker may exec, read and write, not {verb!r:.40}")


def _nothing(left: Mapping[str, Any]) -> dict[str, Any]:
    if left:
        raise Refused(f"an operation has no {', '.join(sorted(left))[:200]}")
    return {}


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused("an object is expected")
    return dict(cast("dict[str, Any]", value))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Refused("text is expected")
    return value


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)


def _number(value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused("a number is expected")
    if not 0 <= value <= most:
        raise Refused(f"{value} is not from 0 to {most:g}")
    return value


def _key(head: Mapping[str, Any]) -> str:
    key = _text(head["key"])
    if not 0 < len(key) <= 100 or not key.isprintable():
        raise Refused("a key is a short printable text")
    return key


def _digest(head: Mapping[str, Any]) -> bytes:
    digest = bytes.fromhex(_text(head["digest"]))
    if len(digest) != 32:
        raise Refused("a digest has 32 bytes")
    return digest


def _split(sizes: object, data: bytes) -> dict[str, bytes]:
    blobs: dict[str, bytes] = {}
    at = 0
    for name, size in _object(sizes).items():
        length = int(_number(size, LARGEST))
        blobs[name] = data[at : at + length]
        at += length
    if at != len(data) or len(blobs) > 16:
        raise Refused("the sizes of the blobs are not those of the data")
    return blobs
