"""A sandbox whose every operation goes through a session: the same calls, written down.

Keys are the numbers of the operations in the order in which they are asked for, so a caller that
does the same things again, in the same order, gets what was recorded and then goes on live.

Paper: §5.2.5 (the common surface, recorded).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fathom.errors import SandboxError
from fathom.sandbox.files import DEFAULT_LIMIT
from fathom.sandbox.request import to_bytes
from fathom.sandbox.trajectory.errors import OutcomeUnknown
from fathom.sandbox.trajectory.operation import Effect, Operation, Outcome, Request, exec_request
from fathom.sandbox.trajectory.session import OnUnknown
from fathom.sandbox.types import DEFAULT_CAP, ExecResult

UNKNOWN_TEXT = (
    "contact with the sandbox was lost while this ran, so it may have taken effect or not; it was "
    "not repeated: look before you repeat it"
)


class Runs(Protocol):
    """The part of a session that runs operations."""

    name: str

    async def run(self, operation: Operation, *, on_unknown: OnUnknown = "fail") -> Outcome:
        """See `Session.run`."""
        ...


class RecordedFiles:
    """The files of a recorded sandbox; see `Files`."""

    def __init__(self, sandbox: RecordedSandbox) -> None:
        self._sandbox = sandbox

    async def read(self, path: str, *, limit: int = DEFAULT_LIMIT) -> bytes:
        """Return the content of a plain file; see `Files.read`. Raises TrajectoryError as well."""
        request = Request(verb="read", arguments={"path": path, "limit": limit})
        return (await self._sandbox.perform(request, "pure")).data()

    async def write(self, path: str, data: bytes | str) -> None:
        """Write a file; see `Files.write`. Raises TrajectoryError as well."""
        request = Request(verb="write", arguments={"path": path}, data=to_bytes(data))
        # Writing the same bytes again changes nothing, as long as nothing else came in between:
        # operations are asked for one after another, so nothing did.
        (await self._sandbox.perform(request, "idempotent")).check()


class RecordedSandbox:
    """A sandbox behind a session. One caller at a time: the order of its calls is their name.

    `tell`: an outcome that nobody can decide is raised as a plain SandboxError that says so, for
    callers who can look for themselves, such as a model; otherwise OutcomeUnknown is raised.
    """

    def __init__(
        self, session: Runs, *, tell: bool = False, on_unknown: OnUnknown = "fail"
    ) -> None:
        self.session = session
        self.files = RecordedFiles(self)
        self._tell = tell
        self._on_unknown: OnUnknown = on_unknown
        self._count = 0

    @property
    def id(self) -> str:
        """The name of the trajectory."""
        return self.session.name

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        timeout: float,
        cwd: str | None = None,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        merge: bool = False,
        cap: int = DEFAULT_CAP,
        effect: Effect = "once",
    ) -> ExecResult:
        """Run a command; see `Sandbox.exec`. Raises TrajectoryError as well."""
        request = exec_request(
            command,
            timeout=timeout,
            cwd=cwd,
            stdin=to_bytes(stdin),
            env=env,
            merge=merge,
            cap=cap,
        )
        return (await self.perform(request, effect)).exec_result()

    async def perform(self, request: Request, effect: Effect) -> Outcome:
        """Run the next operation, or return what came of it. Raises as `Session.run` does."""
        self._count += 1
        operation = Operation(key=f"op/{self._count}", request=request, effect=effect)
        try:
            return await self.session.run(operation, on_unknown=self._on_unknown)
        except OutcomeUnknown as error:
            if self._tell:
                raise SandboxError(UNKNOWN_TEXT) from error
            raise
