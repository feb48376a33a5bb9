"""The daemon of one machine: sandboxes that outlive the programs that made them, and itself.

It answers on a Unix socket: one request per connection, a line of JSON each way; after `open` the
connection becomes a line to the sandbox's agent. What it must remember lies in each sandbox's
folder, so a daemon that was killed is replaced by one that adopts every sandbox that still answers
and removes what is left of the others.

Paper: §5.2.5 (one node: admission, launch, expiry).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import anyio
from anyio.abc import UNIXSocketStream

from fathom.errors import FathomError, PolicyDenied, SandboxError, SandboxLost, Unsupported
from fathom.sandbox import messages, plain, state
from fathom.sandbox.host import Known, LocalHost
from fathom.sandbox.threads import in_thread
from fathom.sandbox.types import Caps, Container, Kept

SOCKET = "edge.sock"
NOTE = "edge.json"
_TICK = 0.5
_REQUEST_TIMEOUT = 30.0  # for a client to say what it wants
_LINE_LIMIT = 1 << 20
_CHUNK = 1 << 18
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Entry:
    """What the daemon remembers of a sandbox. Times are of the wall clock, in seconds."""

    id: str
    spec: Kept
    caps: Caps
    group: str
    key: str
    parent: str
    made: float
    used: float
    lines: int = 0
    paused: bool = False
    phase: str = ""
    net: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def plain(self) -> dict[str, Any]:
        """Return the entry as JSON."""
        return {
            "id": self.id,
            "spec": plain.spec_out(self.spec),
            "caps": plain.caps_out(self.caps),
            "group": self.group,
            "key": self.key,
            "parent": self.parent,
            "created": self.made,
            "used": self.used,
            "paused": self.paused,
            "phase": self.phase,
            "net": self.net,
            "environment": self.environment,
        }


class Edge:
    """The daemon. `most`: sandboxes it admits; `spare`: bytes of memory it leaves free."""

    def __init__(self, host: LocalHost, *, most: int = 3200, spare: int = 256 << 20) -> None:
        host.outlive = True
        host.link.reaps = False
        self.host = host
        self.most = most
        self.spare = spare
        self.entries: dict[str, Entry] = {}
        self.counts = dict.fromkeys(("created", "adopted", "expired", "refused", "failed"), 0)
        self._starts = 0
        self._making = anyio.CapacityLimiter(2 * (os.cpu_count() or 1))
        self._keys: dict[str, anyio.Lock] = {}
        self._operations: dict[str, Callable[..., Any]] = {
            "create": self._create,
            "restore": self._restore,
            "fork": self._fork,
            "destroy": self._destroy,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "phase": self._phase,
            "prewarm": self._prewarm,
            "list": self._list,
            "attach": self._attach,
            "metrics": self._metrics,
            "stats": self._pass,
            "snapshot": self._pass,
            "netlog": self._pass,
            "pack": self._pass,
            "screenshot": self._pass,
        }

    # Serving -----------------------------------------------------------------------------------

    async def serve(self, *, started: anyio.Event | None = None) -> None:
        """Adopt what is there, then answer until cancelled. Sandboxes stay. Raises SandboxError."""
        await in_thread(self._claim)
        await self._adopt_all()
        sock = await in_thread(messages.listen, self.host.runtime, SOCKET)
        sock.setblocking(False)
        _log.info("event=ready socket=%s sandboxes=%d", self.host.runtime / SOCKET, self.size)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._expire)
                if started is not None:
                    started.set()
                while True:
                    await anyio.wait_readable(sock)
                    try:
                        client, _ = sock.accept()
                    except BlockingIOError:
                        continue
                    except OSError as error:  # too many open files, say: later there may be fewer
                        _log.warning("event=accept error=%s", error)
                        await anyio.sleep(0.05)
                        continue
                    group.start_soon(self._serve_one, client)
        finally:
            sock.close()
            with contextlib.suppress(OSError):
                (self.host.runtime / SOCKET).unlink()
            with anyio.CancelScope(shield=True):
                await self.host.close()

    async def serve_until_told(self) -> None:
        """Serve until this process is told to end, by SIGINT or SIGTERM. Raises SandboxError."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with anyio.create_task_group() as group:
                group.start_soon(self.serve)
                async for _ in signals:
                    group.cancel_scope.cancel()
                    return

    @property
    def size(self) -> int:
        """How many sandboxes there are."""
        return len(self.entries)

    def _claim(self) -> None:
        """Make sure that no other daemon works in this folder. Raises SandboxError."""
        self.host.runtime.mkdir(parents=True, exist_ok=True, mode=0o711)
        with contextlib.suppress(OSError):
            messages.connect(self.host.runtime, SOCKET).close()
            raise SandboxError(f"a daemon answers in {self.host.runtime} already: stop it first")

    async def _serve_one(self, client: socket.socket) -> None:
        # Whatever goes wrong with one client must not end the daemon.
        try:
            async with await UNIXSocketStream.from_socket(client) as stream:
                with anyio.fail_after(_REQUEST_TIMEOUT):
                    request = await _read_line(stream)
                if request is None:
                    return
                if request.get("op") == "open":
                    await self._open(stream, str(request.get("id")))
                    return
                answer = await self._answer(request)
                await stream.send(json.dumps(answer).encode() + b"\n")
        except Exception as error:
            _log.debug("event=broken error=%r", error)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        op = str(request.pop("op", ""))
        try:
            if op not in self._operations:
                raise Unsupported(f"this daemon has no operation {op[:80]!r}")
            try:
                if self._operations[op] == self._pass:
                    return await self._pass(op, **request)
                return await self._operations[op](**request)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise SandboxError(f"the request does not fit {op}: {error}") from error
        except FathomError as error:
            self.counts["failed"] += 1
            _log.info("event=failed op=%s code=%s message=%s", op, error.code, error)
            return {"error": error.code, "message": str(error)}

    async def _open(self, stream: UNIXSocketStream, name: str) -> None:
        """Turn the connection into a line to an agent, and carry bytes both ways."""
        try:
            entry = self._find(name)
            if entry.paused:
                await self._thaw([name])
            line = await self.host.open(name)
        except FathomError as error:
            answer = {"error": error.code, "message": str(error)}
            await stream.send(json.dumps(answer).encode() + b"\n")
            return
        entry.lines += 1
        entry.used = time.time()
        try:
            agent = await UNIXSocketStream.from_socket(line.take())
            async with agent, anyio.create_task_group() as group:
                await stream.send(b"{}\n")

                async def carry(source: UNIXSocketStream, target: UNIXSocketStream) -> None:
                    try:
                        while True:
                            await target.send(await source.receive(_CHUNK))
                    except (
                        anyio.EndOfStream,
                        anyio.BrokenResourceError,
                        anyio.ClosedResourceError,
                    ):
                        group.cancel_scope.cancel()

                group.start_soon(carry, agent, stream)
                group.start_soon(carry, stream, agent)
        finally:
            entry.lines -= 1
            entry.used = time.time()

    # Operations --------------------------------------------------------------------------------

    def _find(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise SandboxLost(f"sandbox {name[:80]} ended: create another one")
        return entry

    def _admit(self, spec: Kept, count: int = 1) -> None:
        """Refuse what this machine has no room for. Raises PolicyDenied."""
        reason = ""
        if self.size + count > self.most:
            reason = f"it has {self.size} sandboxes of {self.most} that it admits"
        else:
            free = _available_memory()
            # What a sandbox is allowed is rarely what it uses; its first pages must be there.
            wanted = count * (spec.memory_bytes // 16) + self.spare
            if free < wanted:
                reason = f"it has {free >> 20} MiB of memory left and needs {wanted >> 20}"
        if reason:
            self.counts["refused"] += 1
            raise PolicyDenied(f"this machine takes no further sandbox: {reason}")

    async def _create(
        self,
        spec: dict[str, Any],
        key: str = "",
        group: str = "",
        net: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        wanted = plain.spec_in(spec)
        lock = self._keys.setdefault(key, anyio.Lock()) if key else anyio.Lock()
        async with lock:
            for entry in self.entries.values():
                if key and entry.key == key:
                    if entry.spec != wanted:
                        raise SandboxError(f"the key {key!r} belongs to a sandbox of another kind")
                    return entry.plain()
            self._admit(wanted)
            async with self._making:
                made = await self.host.call("create", spec=wanted)
            entry = self._enter(made, wanted, group=group, key=key)
        if net is not None:
            try:
                await self._phase(entry.id, "begin", net)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self._destroy(entry.id)
                raise
        return entry.plain()

    async def _restore(
        self, snapshot: str, spec: dict[str, Any], group: str = ""
    ) -> dict[str, Any]:
        wanted = plain.spec_in(spec)
        self._admit(wanted)
        made = await self.host.call("restore", snapshot=snapshot, spec=wanted)
        return self._enter(made, wanted, group=group).plain()

    async def _fork(self, id: str, count: int, reseed: bool) -> dict[str, Any]:
        parent = self._find(id)
        self._admit(parent.spec, count)
        answer = await self.host.call("fork", id=id, count=count, reseed=reseed)
        entries = [
            self._enter(made, parent.spec, group=parent.group, parent=id) for made in answer["made"]
        ]
        return {"made": [entry.plain() for entry in entries]}

    def _enter(
        self,
        made: dict[str, Any],
        spec: Kept,
        *,
        group: str = "",
        key: str = "",
        parent: str = "",
    ) -> Entry:
        now = time.time()
        entry = Entry(made["id"], spec, made["caps"], group, key, parent, now, now)
        self.entries[entry.id] = entry
        self._note(entry)
        self.counts["created"] += 1
        _log.info(
            "event=created id=%s group=%s substrate=%s", entry.id, group, entry.caps.substrate
        )
        return entry

    def _note(self, entry: Entry) -> None:
        """Write down what a later daemon must know; whole or not at all."""
        path = self.host.runtime / entry.id / NOTE
        fresh = path.with_suffix(".new")
        with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
            fresh.write_text(json.dumps(entry.plain()))
            fresh.rename(path)

    async def _destroy(self, id: str) -> dict[str, Any]:
        entry = self.entries.pop(id, None)
        await self.host.call("destroy", id=id)
        if entry is not None:
            _log.info("event=stopped id=%s", id)
        return {}

    async def _freeze(
        self, ids: list[str] | None = None, group: str = "", reclaim: bool = False
    ) -> dict[str, Any]:
        entries = self._several(ids, group)
        if entries:
            await self.host.call("freeze", ids=[entry.id for entry in entries], reclaim=reclaim)
        for entry in entries:
            entry.paused = True
            self._note(entry)
        return {"ids": [entry.id for entry in entries]}

    async def _thaw(self, ids: list[str] | None = None, group: str = "") -> dict[str, Any]:
        entries = self._several(ids, group)
        answer = await self.host.call("thaw", ids=[entry.id for entry in entries])
        for entry in entries:
            entry.paused = False
            entry.used = time.time()
            self._note(entry)
        return answer

    def _several(self, ids: list[str] | None, group: str) -> list[Entry]:
        if ids is None:
            return [entry for entry in self.entries.values() if entry.group == group]
        return [self._find(name) for name in ids]

    async def _phase(self, id: str, phase: str, net: dict[str, Any] | None) -> dict[str, Any]:
        entry = self._find(id)
        answer = await self.host.call("phase", id=id, phase=phase, net=plain.net_in(net))
        entry.phase, entry.net = phase, net
        entry.environment = answer["environment"]
        self._note(entry)
        _log.info("event=phase id=%s phase=%s version=%d", id, phase, answer["version"])
        return answer

    async def _pass(self, op: str, id: str, **values: Any) -> dict[str, Any]:
        self._find(id).used = time.time()
        return await self.host.call(op, id=id, **values)

    async def _prewarm(self, spec: dict[str, Any], count: int) -> dict[str, Any]:
        wanted = plain.spec_in(spec)
        self._admit(wanted, count)
        return await self.host.call("prewarm", spec=wanted, count=count)

    async def _list(self) -> dict[str, Any]:
        return {"sandboxes": [entry.plain() for entry in self.entries.values()]}

    async def _attach(self, id: str) -> dict[str, Any]:
        return self._find(id).plain()

    async def _metrics(self) -> dict[str, Any]:
        lines = [f"fathom_sandboxes {self.size}"]
        paused = sum(entry.paused for entry in self.entries.values())
        lines += [f"fathom_sandboxes_paused {paused}"]
        lines += [f"fathom_sandbox_lines {sum(e.lines for e in self.entries.values())}"]
        lines += [f"fathom_sandboxes_{name}_total {n}" for name, n in self.counts.items()]
        return {"text": "\n".join(lines) + "\n"}

    # Time --------------------------------------------------------------------------------------

    async def _expire(self) -> None:
        while True:
            await anyio.sleep(_TICK)
            await self._tend_node()
            now = time.time()
            for entry in list(self.entries.values()):
                gone = not (self.host.runtime / entry.id).exists()
                if gone or _is_due(entry, now):
                    self.counts["expired"] += not gone
                    _log.info("event=%s id=%s", "ended" if gone else "expired", entry.id)
                    with contextlib.suppress(SandboxError):
                        await self._destroy(entry.id)

    async def _tend_node(self) -> None:
        """See that a node is there which knows all sandboxes, and their policies."""
        link = self.host.link
        try:
            await in_thread(link.revive)
            if link.starts == self._starts:
                return
            policies = [entry for entry in self.entries.values() if entry.net is not None]
            for entry in policies if link.starts > 1 else []:
                _log.warning("event=node_died id=%s", entry.id)
                await self._phase(entry.id, entry.phase, entry.net)
            self._starts = link.starts
        except SandboxError as error:
            _log.warning("event=node_lost error=%s", error)

    # Adoption ----------------------------------------------------------------------------------

    async def _adopt_all(self) -> None:
        folders = [path for path in self.host.runtime.iterdir() if (path / "lock").exists()]
        for folder in folders:
            try:
                await self._adopt(folder)
            except (FathomError, OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("event=not_adopted id=%s error=%s", folder.name, error)
                await in_thread(state.reap_one, folder)

    async def _adopt(self, folder: Path) -> None:
        note = json.loads((folder / NOTE).read_text())
        session = json.loads((folder / state.SESSION).read_text())
        spec, caps = plain.spec_in(note["spec"]), plain.caps_in(note["caps"])
        launch = session["launch"]
        if isinstance(spec, Container):
            await self._adopt_container(folder, spec, caps, launch)
        else:
            await in_thread(self.host.adopt_machine, folder, spec, caps, launch)
        entry = Entry(
            folder.name,
            spec,
            caps,
            note["group"],
            note["key"],
            note["parent"],
            note["created"],
            time.time(),
            paused=note["paused"],
            phase=note["phase"],
        )
        self.entries[entry.id] = entry
        if note["net"] is not None:
            await self._phase(entry.id, note["phase"], note["net"])
        self.counts["adopted"] += 1
        _log.info("event=adopted id=%s", entry.id)

    async def _adopt_container(
        self, folder: Path, spec: Container, caps: Caps, launch: dict[str, Any]
    ) -> None:
        known = Known(
            spec=spec,
            name=launch["substrate"],
            program=launch["program"],
            image=await in_thread(self.host.image_of, spec.image, launch["rootfs"]),
            ids=int(launch["ids"]),
            caps=caps,
        )
        await in_thread(self.host.adopt, folder, known)


def _is_due(entry: Entry, now: float) -> bool:
    if entry.spec.ttl is not None and now - entry.made > entry.spec.ttl:
        return True
    idle = entry.spec.idle_ttl
    return idle is not None and not entry.lines and not entry.paused and now - entry.used > idle


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return shutil.disk_usage("/").free  # no such line on very old kernels


async def _read_line(stream: UNIXSocketStream) -> dict[str, Any] | None:
    data = b""
    while not data.endswith(b"\n"):
        if len(data) > _LINE_LIMIT:
            raise ValueError("a request is too long")
        try:
            data += await stream.receive()
        except anyio.EndOfStream:
            return None
    found: Any = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("a request is a JSON object")
    return cast("dict[str, Any]", found)
