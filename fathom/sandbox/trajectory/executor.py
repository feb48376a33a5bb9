"""Who carries operations out: the one protocol between the log and whatever runs commands.

An executor takes an operation by its key, at most once, and can be asked later what became of the
key. One that keeps a journal outside of the process that asks can answer after that process died.

Paper: §5.2.5 (request path of a command).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import anyio

from fathom.errors import DaemonLost, SandboxError, SandboxLost
from fathom.sandbox.trajectory.changes import Change, Watcher
from fathom.sandbox.trajectory.operation import Outcome, Request, perform


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The operation came to this end."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Running:
    """The operation began and goes on; `wait` gives its outcome."""


@dataclass(frozen=True, slots=True)
class NeverSeen:
    """The operation has not begun, and this executor would know if it had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The operation may have begun; nobody can tell any more, for the `reason` given."""

    reason: str


Answer = Finished | Running | NeverSeen | Lost
OnStarted = Callable[[], None]
Commit = Callable[[], Awaitable[None]]


async def at_once() -> None:
    """Commit to an operation that nobody writes down."""


class Executor(Protocol):
    """Runs the operations of one sandbox. `epoch` names one life of its journal."""

    @property
    def epoch(self) -> str:
        """Changes when the sandbox, or what the executor remembers of it, is not the same."""
        ...

    @property
    def generation(self) -> int | None:
        """How many operations have ended in this sandbox, by whomever; None when not counted."""
        ...

    async def dispatch(
        self,
        key: str,
        digest: bytes,
        request: Request,
        on_started: OnStarted,
        commit: Commit = at_once,
    ) -> Outcome:
        """Carry out `request` unless `key` is known, and wait for the outcome of that key.

        `commit` is awaited before anything begins, while what can be prepared is; where it raises,
        nothing has begun. `on_started` is called once the operation has begun, so that no wish to
        stop can undo it. Raises SandboxLost when the outcome did not arrive: ask with `query`.
        """
        ...

    async def query(self, key: str, request: Request) -> Answer:
        """What became of an operation, whose request it is. Never begins one."""
        ...

    async def wait(self, key: str, request: Request) -> Outcome:
        """The outcome of an operation that is running. Raises SandboxLost."""
        ...

    async def acknowledge(self, key: str) -> None:
        """The outcome is in the log: it need not be kept. Never raises.

        It costs the caller no time: it is said with or beside the next operation.
        """
        ...


@runtime_checkable
class Restorable(Protocol):
    """An executor whose sandbox can be set back."""

    async def snapshot(self) -> str:
        """Keep the present state and return its name."""
        ...

    async def restore(self, name: str) -> None:
        """Set the sandbox back to a kept state. Raises SandboxError."""
        ...


class DirectExecutor:
    """Runs operations through a sandbox that this process owns.

    It remembers them for as long as it lives. Of what was begun before, it knows nothing, so every
    such operation is `Lost`: each object is a life of its own, whatever sandbox it is given.
    """

    def __init__(self, sandbox: Any) -> None:
        self.sandbox = sandbox
        self.epoch = secrets.token_hex(8)
        self.generation = 0
        self._ended: dict[str, Outcome] = {}
        self._begun: dict[str, anyio.Event] = {}

    async def dispatch(
        self,
        key: str,
        digest: bytes,
        request: Request,
        on_started: OnStarted,
        commit: Commit = at_once,
    ) -> Outcome:
        """See `Executor.dispatch`."""
        await commit()
        del digest  # the log has compared it; a journal of another process would as well
        if key in self._begun:
            return await self.wait(key, request)
        ended = self._begun[key] = anyio.Event()
        on_started()
        try:
            outcome = await perform(self.sandbox, request)
            self.generation += 1
            outcome = self._ended[key] = replace(outcome, generation=self.generation)
            return outcome
        finally:
            ended.set()

    async def query(self, key: str, request: Request) -> Answer:
        """See `Executor.query`; keys of an earlier life are lost."""
        if key in self._ended:
            return Finished(outcome=self._ended[key])
        if key not in self._begun:
            return NeverSeen()
        if self._begun[key].is_set():
            return Lost(reason="the sandbox ended, or the caller gave up, while it ran")
        return Running()

    async def wait(self, key: str, request: Request) -> Outcome:
        """See `Executor.wait`."""
        await self._begun[key].wait()
        if key not in self._ended:
            raise SandboxLost(f"the operation {key} ended without an outcome")
        return self._ended[key]

    async def acknowledge(self, key: str) -> None:
        """Forget the outcome, not the key."""
        self._ended.pop(key, None)


# How often a sandbox is asked that does not answer although somebody leads to it, and how long in
# between, in seconds.
_QUESTIONS = 8
_PAUSE = 0.15


class AgentExecutor:
    """Runs operations under keys that the agent inside a sandbox remembers.

    The agent keeps its receipts where the tenant cannot reach them, and for as long as the sandbox
    lives, whoever asks. Made by `open`. Reading a file changes nothing and leaves no receipt.
    `watcher` looks which files an operation changed.
    """

    def __init__(self, sandbox: Any, epoch: str, watcher: Watcher | None = None) -> None:
        self.sandbox = sandbox
        self.epoch = epoch
        self.generation = None  # the agent does not count
        self._watcher = watcher
        self._safe: list[str] = []

    @classmethod
    async def open(cls, sandbox: Any, watcher: Watcher | None = None) -> AgentExecutor:
        """An executor for a sandbox with `exec(op=...)`, `receipt` and `acknowledge`."""
        receipt = await sandbox.receipt("epoch")
        return cls(sandbox, f"{sandbox.id}/{receipt.epoch}", watcher)

    async def dispatch(
        self,
        key: str,
        digest: bytes,
        request: Request,
        on_started: OnStarted,
        commit: Commit = at_once,
    ) -> Outcome:
        """See `Executor.dispatch`. The agent compares requests by a digest of its own."""
        del digest, on_started  # the sandbox says nothing before the end of a command
        await commit()
        background = await self._changes(request)
        outcome = await self._perform(request, key)
        return replace(outcome, changes=await self._changes(request), background=background)

    async def _perform(self, request: Request, key: str) -> Outcome:
        safe, self._safe = self._safe, []
        if not safe:
            return await perform(self.sandbox, request, key)
        outcomes: list[Outcome] = []
        problems: list[SandboxError] = []
        async with anyio.create_task_group() as group:
            group.start_soon(self._give_up, safe)
            try:
                outcomes.append(await perform(self.sandbox, request, key))
            except SandboxError as error:
                problems.append(error)
        if problems:
            raise problems[0]
        return outcomes[0]

    async def _give_up(self, keys: list[str]) -> None:
        for key in keys:
            with contextlib.suppress(SandboxError):
                await self.sandbox.acknowledge(key)

    async def _changes(self, request: Request) -> tuple[Change, ...] | None:
        if self._watcher is None:
            return None
        if request.verb == "read":
            return ()
        found = await anyio.to_thread.run_sync(self._watcher.changes)
        return None if found is None else tuple(found)

    async def query(self, key: str, request: Request) -> Answer:
        """See `Executor.query`. A receipt is fetched by asking for the operation again.

        Raises DaemonLost where nobody leads to the sandbox: it may still be there.
        """
        if request.verb == "read":
            return NeverSeen()
        problem: SandboxError | None = None
        for _ in range(_QUESTIONS):
            try:
                return await self._query(key, request)
            except DaemonLost:
                raise
            except SandboxError as error:
                problem = error
            # A line that broke may have been the daemon's end: whether the sandbox is gone as well
            # shows as soon as nobody answers, or its successor does.
            await anyio.sleep(_PAUSE)
        return Lost(reason=str(problem))

    async def _query(self, key: str, request: Request) -> Answer:
        receipt = await self.sandbox.receipt(key)
        if f"{self.sandbox.id}/{receipt.epoch}" != self.epoch:
            return Lost(reason="the agent of the sandbox began anew")
        match receipt.state:
            case "never":
                return NeverSeen()
            case "running":
                return Running()
            case "finished":
                return Finished(outcome=await perform(self.sandbox, request, key))
            case "acked":
                return Lost(reason="its receipt was given up, and is not in the log")
            case _:
                return Lost(reason="the agent ended while it ran")

    async def wait(self, key: str, request: Request) -> Outcome:
        """See `Executor.wait`. Raises DaemonLost where nobody leads to the sandbox."""
        while True:
            try:
                return await perform(self.sandbox, request, key)
            except SandboxLost:
                answer = await self.query(key, request)
                if isinstance(answer, Finished):
                    return answer.outcome
                if not isinstance(answer, Running):
                    raise

    async def acknowledge(self, key: str) -> None:
        """See `Executor.acknowledge`."""
        self._safe.append(key)
