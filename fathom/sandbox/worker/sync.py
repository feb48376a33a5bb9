"""Runs with workers without `await`; see `worker.py`.

Paper: §5.2.5 (V4.1: reconnect instead of replay).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from fathom.sandbox.threads import Portal
from fathom.sandbox.trajectory.replay import Event
from fathom.sandbox.trajectory.store import Store
from fathom.sandbox.types import Kept
from fathom.sandbox.worker.worker import Loop, OnLost, State, Worker


class SyncWorker:
    """One run whose loop lives in a sandbox of its own; see `Worker`."""

    def __init__(self, worker: Worker, portal: Portal) -> None:
        self._worker = worker
        self._portal = portal

    @classmethod
    def begin(
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
    ) -> SyncWorker:
        """Start a target and a worker beside it; see `Worker.begin`."""
        return cls._made(
            Worker.begin,
            fields,
            target,
            loop,
            name=name,
            idle=idle,
            edge_dir=edge_dir,
            cache_dir=cache_dir,
            store=store,
        )

    @classmethod
    def attach(
        cls,
        id_: str,
        *,
        fields: Mapping[str, Any] | None = None,
        secret: Mapping[str, Any] | None = None,
        on_lost: OnLost = "fail",
        store: Store | None = None,
    ) -> SyncWorker:
        """Come back to a run; see `Worker.attach`."""
        return cls._made(
            Worker.attach, id_, fields=fields, secret=secret, on_lost=on_lost, store=store
        )

    @classmethod
    def _made(cls, method: Any, *args: Any, **kwargs: Any) -> SyncWorker:
        portal = Portal()
        try:
            return cls(portal.call(method, *args, **kwargs), portal)
        except BaseException:
            portal.close()
            raise

    def __enter__(self) -> SyncWorker:
        """Return the worker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it; the loop goes on."""
        self._portal.close()

    @property
    def id(self) -> str:
        """The name of the run."""
        return self._worker.id

    @property
    def state(self) -> State:
        """Whether the loop is looked after; see `Worker.state`."""
        return self._worker.state

    def follow(self, after: int = 0) -> Iterator[Event]:
        """The records as they are written; see `Worker.follow`."""
        events: AsyncIterator[Event] = self._worker.follow(after)

        async def following() -> Event | None:
            return await anext(events, None)

        while (event := self._portal.call(following)) is not None:
            yield event

    def wait(self) -> dict[str, Any]:
        """The words with which the loop ended the run; see `Worker.wait`."""
        return self._portal.call(self._worker.wait)

    def stop(self) -> None:
        """End the run and both sandboxes; see `Worker.stop`."""
        self._portal.call(self._worker.stop)
