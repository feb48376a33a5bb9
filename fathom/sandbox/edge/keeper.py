"""The privileged half of the daemon: which sandboxes there are, and what is done with them.

Every request comes from a process that may have been taken over. Its values were checked one by one
(`requests`); here they are held against what this daemon has: only sandboxes in its own table are
touched, folders of the host are bound only below those that it was started with, and there are
never more sandboxes than it admits. Paths, programs, users and mounts are chosen here, never named
by a request.

Paper: §5.2.5 (one node: admission, launch, expiry).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fathom.errors import (
    DaemonLost,
    FathomError,
    KeyConflict,
    PolicyDenied,
    SandboxError,
    SandboxLost,
    Unsupported,
)
from fathom.sandbox import paths, plain
from fathom.sandbox.edge.admission import Admission, Room
from fathom.sandbox.edge.age import Birth
from fathom.sandbox.edge.entry import Entry
from fathom.sandbox.edge.events import event
from fathom.sandbox.edge.tending import Tending
from fathom.sandbox.host import LocalHost
from fathom.sandbox.net import Net
from fathom.sandbox.state import SOCKET
from fathom.sandbox.types import Container, Kept

_log = logging.getLogger(__name__)


class Keeper:
    """The sandboxes of one daemon. Every call may come from any thread and blocks.

    `most`: sandboxes it admits; `spare`: bytes of memory it leaves free; `work`: folders of the
    host below which a sandbox's work folder and door may lie; a door may lie below the user's
    trajectories too. `gone` is called with each name that ended;
    `more` adds to the metrics.
    """

    def __init__(
        self,
        host: LocalHost,
        *,
        most: int = 3200,
        spare: int = 256 << 20,
        work: tuple[Path, ...] = (),
    ) -> None:
        host.outlive = True
        host.link.reaps = False
        self.host = host
        self.entries: dict[str, Entry] = {}
        self.counts = dict.fromkeys(("created", "adopted", "expired", "refused", "failed"), 0)
        self.admission = Admission(most, spare, self._count)
        host.ready.admit = self.admission.admit
        self.gone: Callable[[str], None] = lambda _: None
        self.more: Callable[[], dict[str, int]] = dict
        self._work = tuple(folder.resolve(strict=True) for folder in work)
        self._doors = (*self._work, paths.trajectory_folder().resolve())
        self._lock = threading.Lock()
        self.tending = Tending(self)
        self._making = threading.Semaphore(2 * (os.cpu_count() or 1))
        self._keys: dict[str, tuple[threading.Lock, list[int]]] = {}
        self._operations: dict[str, Callable[..., dict[str, Any]]] = {
            "create": self._create,
            "restore": self._restore,
            "fork": self._fork,
            "destroy": self._destroy,
            "idle": self._idle,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "phase": self._phase,
            "prewarm": self._prewarm,
            "list": self._list,
            "attach": self._attach,
            "metrics": self._metrics,
            "oom": self._oom,
        }
        for op in ("stats", "snapshot", "netlog", "pack", "screenshot"):
            self._operations[op] = self._passed(op)

    def do(self, op: str, values: dict[str, Any]) -> dict[str, Any]:
        """Carry out a request whose values were checked. Raises FathomError."""
        try:
            if op not in self._operations:
                raise Unsupported(f"this daemon has no operation {op!r}")
            return self._operations[op](**values)
        except FathomError as error:
            with self._lock:
                self.counts["failed"] += 1
                self.counts["refused"] += isinstance(error, PolicyDenied)
            event(_log, logging.INFO, "failed", op=op, code=error.code, message=error)
            raise

    # Making ------------------------------------------------------------------------------------

    def _allowed(self, spec: Kept) -> Kept:
        """Return a specification with its folders resolved. Raises PolicyDenied."""
        if isinstance(spec, Container) and spec.workdir is not None:
            spec = replace(spec, workdir=_below(self._work, "work folder", str(spec.workdir)))
        if isinstance(spec, Container) and spec.door is not None:
            spec = replace(spec, door=_below(self._doors, "door", str(spec.door)))
        try:
            spec.check()
        except (TypeError, ValueError) as error:
            raise SandboxError(f"the values of the sandbox do not fit: {error}") from error
        return spec

    def _create(
        self, spec: Kept, key: str = "", group: str = "", net: Net | None = None
    ) -> dict[str, Any]:
        spec = self._allowed(spec)
        with self._alone(key):
            for entry in list(self.entries.values()) if key else ():
                if entry.key == key:
                    _same(entry, spec, group, net)
                    return entry.plain()
            if key and (name := self.tending.left_under(key)) is not None:
                self.find(name)  # which says why it is not given out
            values = {
                "group": group,
                "key": key,
                "first": json.loads(json.dumps(plain.net_out(net))),
            }
            with self.admission.taking(lambda: self.host.ready.take(spec)) as (made, room):
                if made is not None:
                    return self._begin(made, spec, room, net, values)
            with self.admission.admit(spec) as room, self._making:
                made = self.host.do("create", spec=spec)
                return self._begin(made, spec, room, net, values)

    def _begin(
        self, made: dict[str, Any], spec: Kept, room: Room, net: Net | None, values: dict[str, Any]
    ) -> dict[str, Any]:
        """Give a sandbox out, once its policy is set."""
        entry = self._enter(made, spec, room, **values)
        if net is not None:
            try:
                self._phase(entry.id, "begin", net)
            except BaseException:
                self._destroy(entry.id)
                raise
        return entry.plain()

    @contextlib.contextmanager
    def _alone(self, key: str) -> Generator[None]:
        """Keep others that ask under the same key waiting."""
        if not key:
            yield
            return
        with self._lock:
            lock, users = self._keys.setdefault(key, (threading.Lock(), [0]))
            users[0] += 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                users[0] -= 1
                if not users[0]:
                    del self._keys[key]

    def _restore(self, snapshot: str, spec: Kept, group: str = "") -> dict[str, Any]:
        spec = self._allowed(spec)
        with self.admission.admit(spec) as room:
            made = self.host.do("restore", snapshot=snapshot, spec=spec)
            return self._enter(made, spec, room, group=group).plain()

    def _fork(self, id: str, count: int, reseed: bool = True) -> dict[str, Any]:
        parent = self.find(id)
        with self.admission.admit(parent.spec, count) as room:
            answer = self.host.do("fork", id=id, count=count, reseed=reseed)
            entries: list[Entry] = []
            try:
                for made in answer["made"]:
                    entry = self._enter(made, parent.spec, room, group=parent.group, parent=id)
                    entries.append(entry)
            except BaseException:
                for made in answer["made"]:
                    self._destroy(made["id"])
                    self.host.do("destroy", id=made["id"])
                raise
        return {"made": [entry.plain() for entry in entries]}

    def _prewarm(self, spec: Kept, count: int) -> dict[str, Any]:
        spec = self._allowed(spec)
        with self.admission.admit(spec, count):
            pass  # refused at once where there is no room for all of them
        return self.host.do("prewarm", spec=spec, count=count)

    def _enter(
        self,
        made: dict[str, Any],
        spec: Kept,
        room: Room,
        *,
        group: str = "",
        key: str = "",
        parent: str = "",
        first: dict[str, Any] | None = None,
    ) -> Entry:
        entry = Entry(
            made["id"],
            spec,
            made["caps"],
            group,
            key,
            parent,
            Birth.now(),
            # Noted before it is set: a daemon that takes over sets it.
            phase="begin" if first is not None else "",
            net=first,
            first=first,
            environment=made["environment"],
        )
        try:
            entry.write(self.host.runtime)
        except BaseException:
            self.host.do("destroy", id=entry.id)
            raise
        with room.settle(), self._lock:
            self.entries[entry.id] = entry
            self.counts["created"] += 1
        substrate = entry.caps.substrate
        event(_log, logging.INFO, "created", id=entry.id, group=group, substrate=substrate)
        return entry

    # Living ------------------------------------------------------------------------------------

    def find(self, name: str) -> Entry:
        """Return a sandbox of this daemon. Raises SandboxLost, DaemonLost for one left alone."""
        entry = self.entries.get(name)
        if entry is None and (why := self.tending.left.get(name)) is not None:
            raise DaemonLost(
                f"sandbox {name} runs on, but this daemon could not take it over ({why}): it is "
                "tried again every few seconds"
            )
        if entry is None:
            raise SandboxLost(f"sandbox {name[:80]} ended: create another one")
        return entry

    def is_paused(self, name: str) -> bool:
        """Whether a sandbox must be resumed before it answers. Raises SandboxLost."""
        return self.find(name).paused

    def door(self, name: str) -> tuple[Path, bytes]:
        """Return where a sandbox's agent listens, and what begins a line. Raises SandboxLost."""
        self.find(name)
        folder, greeting = self.host.link.door(name)
        return folder / SOCKET, greeting

    def _destroy(self, id: str) -> dict[str, Any]:
        return {"ended": self.end(id, "stopped")}

    def end(self, id: str, why: str) -> bool:
        """End a sandbox, also one that could not be taken over; False for others.

        Raises SandboxError where something is left of one that could not.
        """
        dropped = self.tending.drop(id)
        # Only what is in the table: no other folder is ever touched.
        with self._lock:
            entry = self.entries.pop(id, None)
        if entry is not None:
            self.host.do("destroy", id=id)
            event(_log, logging.INFO, why, id=id)
            self.gone(id)
        return dropped or entry is not None

    def _idle(self, id: str) -> dict[str, Any]:
        """End a sandbox of which nothing was asked for its time, unless it is paused."""
        entry = self.find(id)
        if entry.spec.idle_ttl is None or entry.paused:
            return {"ended": False}
        self.counts["expired"] += 1
        self.end(id, "expired")
        return {"ended": True}

    def _freeze(
        self, ids: list[str] | None = None, group: str = "", reclaim: bool = False
    ) -> dict[str, Any]:
        entries = self._several(ids, group)
        with contextlib.ExitStack() as notes:
            for entry in entries:
                notes.enter_context(entry.changing(self.host.runtime, paused=True))
            if entries:
                self.host.do("freeze", ids=[entry.id for entry in entries], reclaim=reclaim)
        return {"ids": [entry.id for entry in entries]}

    def _thaw(self, ids: list[str] | None = None, group: str = "") -> dict[str, Any]:
        entries = self._several(ids, group)
        answer = self.host.do("thaw", ids=[entry.id for entry in entries])
        for entry in entries:
            entry.paused = False
            self._note(entry)
        return answer

    def _note(self, entry: Entry) -> None:
        """Note what was done, where the former note does no harm."""
        try:
            entry.write(self.host.runtime)
        except SandboxError as error:
            event(_log, logging.WARNING, "not_noted", id=entry.id, error=error)

    def _several(self, ids: list[str] | None, group: str) -> list[Entry]:
        if ids is None:
            return [entry for entry in list(self.entries.values()) if entry.group == group]
        return [self.find(name) for name in ids]

    def _phase(self, id: str, phase: str, net: Net | None = None) -> dict[str, Any]:
        entry = self.find(id)
        with entry.changing(self.host.runtime, phase=phase, net=plain.net_out(net)):
            return self.set_policy(entry, phase, net)

    def set_policy(self, entry: Entry, phase: str, net: Net | None) -> dict[str, Any]:
        """Set the policy that was noted. Raises SandboxError."""
        id = entry.id
        answer = self.host.do("phase", id=id, phase=phase, net=net)
        entry.environment = answer["environment"]
        self._note(entry)
        version = answer["version"]
        event(_log, logging.INFO, "phase", id=id, phase=phase, version=version)
        return answer

    def _passed(self, op: str) -> Callable[..., dict[str, Any]]:
        def work(id: str, **values: Any) -> dict[str, Any]:
            self.find(id)
            return self.host.do(op, id=id, **values)

        return work

    def _list(self) -> dict[str, Any]:
        entries = [entry.plain() for entry in list(self.entries.values())]
        return {"sandboxes": entries, "left": dict(self.tending.left)}

    def _attach(self, id: str) -> dict[str, Any]:
        return self.find(id).plain()

    def _oom(self, id: str) -> dict[str, Any]:
        self.find(id)
        return {"count": self.host.link.oom_count(id)}

    def _metrics(self) -> dict[str, Any]:
        entries = list(self.entries.values())
        found = {
            "fathom_sandboxes": len(entries),
            "fathom_sandboxes_paused": sum(entry.paused for entry in entries),
            "fathom_sandboxes_waiting": len(self.host.ready),
            "fathom_sandboxes_left_alone": len(self.tending.left),
            "fathom_sandboxes_most": self.admission.most,
            "fathom_memory_available_bytes": self.admission.available(),
            "fathom_node_starts_total": self.host.link.starts,
        }
        found |= self.more()
        found |= {f"fathom_sandboxes_{name}_total": n for name, n in self.counts.items()}
        return {"text": "".join(f"{name} {value}\n" for name, value in found.items())}

    # Time --------------------------------------------------------------------------------------

    def _count(self) -> int:
        return len(self.entries) + len(self.tending.left) + len(self.host.ready)

    def tend(self) -> None:
        """See that a node is there, and end what has had its time. Called again and again."""
        self.tending.tend()

    def adopt(self) -> None:
        """Take over what an earlier daemon left; what has died is removed."""
        self.tending.adopt()


def _same(entry: Entry, spec: Kept, group: str, net: Net | None) -> None:
    """Refuse to give out a sandbox for values that it was not made from. Raises KeyConflict."""
    pairs = (
        ("other values", entry.spec, spec),
        ("another group", entry.group, group),
        ("another network policy", entry.first, json.loads(json.dumps(plain.net_out(net)))),
    )
    for what, then, now in pairs:
        if then != now:
            raise KeyConflict(
                f"the key {entry.key!r} belongs to sandbox {entry.id}, which was made with {what}: "
                "use another key, or stop that one first"
            )


def _below(allowed: tuple[Path, ...], what: str, path: str) -> str:
    # Whether there is such a folder elsewhere is not told either.
    folder = _resolved(path)
    if not any(folder == one or one in folder.parents for one in allowed):
        raise PolicyDenied(
            f"the {what} {path[:200]!r} is not one that this daemon may bind: start it with "
            "--work FOLDER for a folder above it"
        )
    return str(folder)


def _resolved(path: str) -> Path:
    """Return a path without links; the root, which is never allowed by chance, for none."""
    try:
        return Path(os.path.realpath(path)) if os.path.isabs(path) else Path("/")
    except OSError:
        return Path("/")
