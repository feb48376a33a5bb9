"""What can go wrong with a trajectory, each with a stable code.

    SandboxError
    +-- TrajectoryError       a log or an operation cannot be used as asked
        +-- LogCorrupt           a record that was durable is damaged: nothing is guessed
        +-- LogTooNew            the log was written by a later version
        +-- LogLocked            another process writes this log
        +-- LogFull              there is no room for another record; nothing was begun
        +-- OperationConflict    an operation key was used for another request
        +-- Diverged             what is asked is not what the log holds at this position
        +-- OutcomeUnknown       whether an operation took effect cannot be decided
        +-- StateDiffers         the sandbox is not in the state after the last receipt

Paper: none (shared infrastructure).
"""

from __future__ import annotations

from fathom.errors import SandboxError


class TrajectoryError(SandboxError):
    """A trajectory log or an operation cannot be used as asked."""

    code = "trajectory_failed"


class LogCorrupt(TrajectoryError):
    """A record that had been durable is damaged or missing. Nothing after it is trusted."""

    code = "trajectory_log_corrupt"


class LogTooNew(TrajectoryError):
    """The log was written by a later version of this program."""

    code = "trajectory_log_too_new"


class LogLocked(TrajectoryError):
    """Another process writes this log."""

    code = "trajectory_log_locked"


class LogFull(TrajectoryError):
    """There is no room for another record. What was about to begin has not begun."""

    code = "trajectory_log_full"


class OperationConflict(TrajectoryError):
    """An operation key was used before, for another request."""

    code = "trajectory_conflict"


class Diverged(TrajectoryError):
    """The caller asks for something else than the log holds at this position.

    `position` counts the operations that did agree; a fork there keeps exactly those. `snapshot` is
    the key of the last snapshot before it, None when there is none.
    """

    code = "trajectory_diverged"

    def __init__(self, message: str, *, position: int = 0, snapshot: str | None = None) -> None:
        super().__init__(message)
        self.position = position
        self.snapshot = snapshot


class OutcomeUnknown(TrajectoryError):
    """Whether an operation took effect cannot be decided, and it is not run again on a guess."""

    code = "trajectory_outcome_unknown"

    def __init__(self, message: str, *, key: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.key = key
        self.reason = reason


class StateDiffers(TrajectoryError):
    """The sandbox is not in the state in which the last receipt left it."""

    code = "trajectory_state_differs"
