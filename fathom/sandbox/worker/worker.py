"""A client's end of a worker: begin a run, come back to it, follow it, end it.

    worker = await Worker.begin({"task": "..."}, Container(), Loop(model=url, order={...}))
    ... this process dies ...
    worker = await Worker.attach(worker.id)
    async for event in worker.follow(after=seen):  # records of the log, as they are written
        ...
    print(await worker.wait())

The daemon (`fathom sandbox edge`) has both sandboxes, and the loop needs nobody who looks on.

Paper: §5.2.5 (V4.1: reconnect instead of replay).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from fathom.errors import SandboxError, Unsupported
from fathom.sandbox import paths, plain
from fathom.sandbox.client import Client
from fathom.sandbox.nodelink import raise_error
from fathom.sandbox.trajectory import detached
from fathom.sandbox.trajectory.errors import TrajectoryError
from fathom.sandbox.trajectory.record import Kind
from fathom.sandbox.trajectory.replay import Event, events
from fathom.sandbox.trajectory.segment import SUFFIX
from fathom.sandbox.trajectory.store import LOG, Store, new_name
from fathom.sandbox.types import Kept
from fathom.sandbox.worker import toolkit
from fathom.sandbox.worker.attendant import TROUBLE, LoopFailed

PLAN = "worker.json"
_ATTENDANT = "fathom.sandbox.worker.attendant"
_POLL = 0.1
State = Literal["running", "ended", "stopped early"]
OnLost = Literal["fail", "continue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What runs in a worker: `main` of a module of the toolkit.

    `model`: the URL of the one server that it can talk to. `order`: what it is told as it asks;
    `secret`: more of it that is written down nowhere, such as a key of that server.
    """

    model: str
    order: Mapping[str, Any]
    secret: Mapping[str, Any] = field(default_factory=dict[str, Any])
    module: str = "fathom.agent.worker"

    def address(self) -> tuple[str, int]:
        """The server's host and port. Raises SandboxError."""
        parts = urlsplit(self.model)
        try:
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (KeyError, ValueError) as error:
            raise SandboxError(f"{self.model!r} is no address of a server: give http://...") from (
                error
            )
        if not parts.hostname:
            raise SandboxError(f"{self.model!r} names no server: give http://HOST:PORT")
        return parts.hostname, port


class Worker:
    """One run whose loop lives in a sandbox of its own. Made by `begin` or `attach`."""

    def __init__(self, id_: str, store: Store) -> None:
        self.id = id_
        self._store = store
        self._folder = store.path(id_)

    @classmethod
    async def begin(
        cls,
        fields: Mapping[str, Any],
        target: Kept,
        loop: Loop,
        *,
        name: str | None = None,
        idle: float = 1800.0,
        edge_dir: Path | None = None,
        cache_dir: Path | None = None,
        store: Store | None = None,
    ) -> Worker:
        """Start a target and a worker beside it with the daemon, and the loop in it.

        `fields` say what is done, as the first record. `idle`: seconds after which the daemon ends
        both when the attendant is gone and nobody comes back. Raises DaemonLost without a daemon,
        Unsupported where its sandboxes can have no door, SandboxError.
        """
        store = store or Store()
        id_ = name or new_name()
        worker = cls(id_, store)
        # A folder without either was made by one that was killed in that moment.
        if any((worker._folder / part).exists() for part in (PLAN, LOG)):
            raise TrajectoryError(f"there is a trajectory {id_}: resume it or choose another name")
        if os.geteuid() != 0:
            raise Unsupported("a worker needs layers and a door, which only root's sandboxes have")
        edge = edge_dir or paths.edge_folder()
        cache = cache_dir or paths.cache_folder()
        async with Client("edge", runtime_dir=edge, cache_dir=cache) as client:
            await client.list()  # before anything is made: is there a daemon?
        plan = {
            "id": id_,
            "fields": dict(fields),
            "target": {"idle_ttl": idle, **_given(plain.spec_out(target))},
            "image": await anyio.to_thread.run_sync(toolkit.image, cache),
            "module": loop.module,
            "model": list(loop.address()),
            "order": dict(loop.order),
            "edge": str(edge.absolute()),
            "cache": str(cache.absolute()),
            "idle": idle,
            "on_lost": "fail",
            "durability": store.durability,
        }
        worker._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            worker._write_plan(plan)
            await worker._start(plan, loop.secret)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(detached.stop, worker._folder)
            shutil.rmtree(worker._folder, ignore_errors=True)
            raise
        return worker

    @classmethod
    def last(cls, fields: Mapping[str, Any], store: Store | None = None) -> str | None:
        """The latest run that began with `fields`, ended or not; None where none did."""
        store = store or Store()
        found: list[tuple[float, str]] = []
        # The plans say more than the logs: what was killed early has a plan and no record.
        for path in store.folder.glob(f"*/{PLAN}"):
            with contextlib.suppress(OSError, TrajectoryError):
                if cls(path.parent.name, store)._read_plan()["fields"] == dict(fields):
                    found.append((path.stat().st_mtime, path.parent.name))
        return max(found, default=(0.0, None))[1]

    @classmethod
    async def attach(
        cls,
        id_: str,
        *,
        fields: Mapping[str, Any] | None = None,
        secret: Mapping[str, Any] | None = None,
        on_lost: OnLost = "fail",
        store: Store | None = None,
    ) -> Worker:
        """Come back to a run: its loop went on, or goes on now.

        An attendant that died is replaced, and then may need `secret` again. `fields`: what the run
        must have begun with. `on_lost`: what to do when the target is gone. Raises TrajectoryError
        when there is no such run, SandboxLost, DaemonLost, SandboxError.
        """
        worker = cls(id_, store or Store())
        plan = worker._read_plan()
        if fields is not None and dict(fields) != plan["fields"]:
            other = sorted(k for k in fields if plan["fields"].get(k) != fields[k])
            raise TrajectoryError(f"{id_} began with another {', '.join(other)}: repeat it")
        if worker.state == "stopped early":
            await worker._start({**plan, "on_lost": on_lost}, secret or {})
        return worker

    @property
    def state(self) -> State:
        """Whether the loop is looked after, is over, or waits for somebody to come back."""
        if self._ending() is not None:
            return "ended"
        return "running" if detached.lives(self._folder) else "stopped early"

    async def follow(self, after: int = 0) -> AsyncIterator[Event]:
        """The records after number `after` of the log, as they are written, until the run stops.

        Raises LogCorrupt.
        """
        while True:
            # Asked before reading: what is written after the last look must not be missed.
            alive = detached.lives(self._folder)
            for event in await anyio.to_thread.run_sync(self._read, after):
                after = event.record.node_sequence
                yield event
                if event.record.kind is Kind.END:
                    return
            if not alive:
                return
            await anyio.sleep(_POLL)

    async def wait(self) -> dict[str, Any]:
        """The words with which the loop ended the run.

        Raises LoopFailed when it stopped before that: attach to go on.
        """
        while True:
            alive = detached.lives(self._folder)
            if (ending := self._ending()) is not None:
                return ending
            if not alive:
                break
            await anyio.sleep(_POLL)
        try:
            trouble = json.loads((self._folder / TROUBLE).read_text())["message"]
        except (OSError, ValueError, KeyError):
            trouble = "its attendant was ended"
        raise LoopFailed(f"{self.id} stopped before its work was done: {trouble}")

    async def stop(self) -> None:
        """End the run and both sandboxes where it is not over; the log stays."""
        plan = self._read_plan()
        await anyio.to_thread.run_sync(detached.stop, self._folder)
        async with Client("edge", runtime_dir=plan["edge"], cache_dir=plan["cache"]) as client:
            for entry in await client.list():
                if entry["group"] == self.id:
                    await (await client.attach(entry["id"])).stop()

    def _read(self, after: int) -> list[Event]:
        if not self._has_begun:
            return []
        with self._store.read(self.id) as log:
            return list(events(log, self.id, after))

    @property
    def _has_begun(self) -> bool:
        return any((self._folder / LOG).glob(f"*{SUFFIX}"))

    def _ending(self) -> dict[str, Any] | None:
        return self._store.ending(self.id)

    async def _start(self, plan: Mapping[str, Any], secret: Mapping[str, Any]) -> None:
        given = {"plan": dict(plan), "secret": dict(secret), "folder": str(self._folder)}
        start = partial(detached.start, _ATTENDANT, self._folder, given)
        # Not abandoned when the caller is cancelled: nobody would know of the attendant.
        answers: list[dict[str, Any] | None] = []
        with anyio.CancelScope(shield=True):
            answers.append(await anyio.to_thread.run_sync(start))
        raise_error(answers[0] or {})

    def _write_plan(self, plan: Mapping[str, Any]) -> None:
        path = self._folder / f"{PLAN}.new"
        path.touch(mode=0o600)
        path.write_text(json.dumps(plan))
        path.rename(self._folder / PLAN)

    def _read_plan(self) -> dict[str, Any]:
        try:
            return json.loads((self._folder / PLAN).read_text())
        except FileNotFoundError:
            raise TrajectoryError(
                f"there is no run {self.id} with a worker in {self._store.folder}: see "
                "`fathom sandbox logs`"
            ) from None
        except ValueError as error:
            raise TrajectoryError(f"the plan of {self.id} is damaged: {error}") from error


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a spec that were given, so that another default can stand for the others."""
    return {name: value for name, value in values.items() if value is not None}
