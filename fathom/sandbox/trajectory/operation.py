"""What is asked of a sandbox and what came of it, in a form that can be written down and compared.

Paper: §5.2.5 (command execution and file transfer, as entries of the log).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox.files import SandboxFileIsFolder, SandboxFileMissing
from fathom.sandbox.trajectory.body import canonical
from fathom.sandbox.trajectory.changes import Change, changes_from_json
from fathom.sandbox.types import DEFAULT_CAP, ExecResult

# Of names of files that a tenant chose, in each list of a receipt; more fits into no record.
_MOST_LISTED = 64 << 10
_LONGEST_ERROR = 1000
# "pure" changes nothing; "idempotent" may be done twice; "once" must not.
Effect = Literal["once", "idempotent", "pure"]
Verb = Literal["exec", "read", "write"]

_ERRORS: dict[str, type[SandboxError]] = {
    kind.code: kind for kind in (SandboxFileMissing, SandboxFileIsFolder, Unsupported)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a sandbox shall do: a verb, its arguments as JSON values, and the bytes it is given."""

    verb: Verb
    arguments: dict[str, Any]
    data: bytes | None = None

    def digest(self) -> bytes:
        """The same for equal requests only, wherever and whenever they are made."""
        content = None if self.data is None else hashlib.blake2b(self.data).hexdigest()
        text = canonical([self.verb, self.arguments, content])
        return hashlib.blake2b(text, digest_size=32).digest()

    def to_json(self) -> dict[str, Any]:
        """The verb and the arguments, without the bytes."""
        return {"verb": self.verb, "arguments": self.arguments}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], data: bytes | None) -> Request:
        """The request that `to_json` described."""
        return cls(verb=value["verb"], arguments=value["arguments"], data=data)

    def describe(self) -> str:
        """One line for a person."""
        if self.verb != "exec":
            return f"{self.verb} {self.arguments['path']}"
        command: str | list[str] = self.arguments["command"]
        return command if isinstance(command, str) else " ".join(command)


def exec_request(
    command: str | Sequence[str],
    *,
    timeout: float,
    cwd: str | None = None,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    merge: bool = False,
    cap: int = DEFAULT_CAP,
) -> Request:
    """A command, with the arguments of `Sandbox.exec`."""
    arguments = {
        "command": command if isinstance(command, str) else list(command),
        "timeout": timeout,
        "cwd": cwd,
        "env": dict(env or {}),
        "merge": merge,
        "cap": cap,
    }
    return Request(verb="exec", arguments=arguments, data=stdin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A request under the key that its caller chose: the same key means the same operation."""

    key: str
    request: Request
    effect: Effect = "once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a request: JSON fields and named bytes, or an error that the sandbox gave.

    `generation` is how often the sandbox had been changed after this; None where nobody counts.
    `changes`: files that it changed, `background`: files that had changed since the operation
    before; both are None where nobody looked.
    `cached`: it was taken from the log. `lost`: names of bytes for which the log had no room.
    """

    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    blobs: dict[str, bytes] = field(default_factory=dict[str, bytes])
    error: tuple[str, str] | None = None
    generation: int | None = None
    changes: tuple[Change, ...] | None = None
    background: tuple[Change, ...] | None = None
    cached: bool = False
    lost: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raise the error that the sandbox gave, if it gave one."""
        if self.error is not None:
            code, message = self.error
            raise _ERRORS.get(code, SandboxError)(message)

    def exec_result(self) -> ExecResult:
        """The outcome of a command. Raises SandboxError as `Sandbox.exec` does."""
        self.check()
        if self.lost:
            raise SandboxError("the output of this command was lost: the log had no room for it")
        stdout = self.blobs["stdout"].decode()
        stderr = self.blobs.get("stderr", b"").decode()
        return ExecResult(stdout=stdout, stderr=stderr, output=stdout + stderr, **self.fields)

    def data(self) -> bytes:
        """The content that was read. Raises SandboxError as `Files.read` does."""
        self.check()
        if self.lost:
            raise SandboxError("the content of this file was lost: the log had no room for it")
        return self.blobs["data"]

    def least(self) -> Outcome:
        """What must be kept where there is no room for all: names of files are left out."""
        error = None if self.error is None else (self.error[0], self.error[1][:_LONGEST_ERROR])
        return replace(self, error=error, changes=None, background=None)

    def same_as(self, other: Outcome) -> bool:
        """Whether both say the same, the time that it took left out."""
        return (
            _timeless(self.fields) == _timeless(other.fields)
            and self.blobs == other.blobs
            and self.error == other.error
        )


def _timeless(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "duration"}


def outcome_of(result: ExecResult) -> Outcome:
    """A command's result as an outcome."""
    blobs = {"stdout": result.stdout.encode()}
    if result.stderr:
        blobs["stderr"] = result.stderr.encode()
    return Outcome(
        fields={
            "exit_code": result.exit_code,
            "timed_out": result.timed_out,
            "oom_killed": result.oom_killed,
            "truncated": result.truncated,
            "duration": result.duration,
        },
        blobs=blobs,
    )


# Errors that are an answer of the sandbox. Any other leaves open what happened.
_ANSWERS = (SandboxError, *_ERRORS.values())


async def perform(sandbox: Any, request: Request, op: str | None = None) -> Outcome:
    """Do in `sandbox` what is asked; `op` is a key for sandboxes that keep receipts themselves.

    What the sandbox answers is an outcome, an error too. Raises SandboxLost when it gave none.
    """
    arguments = dict(request.arguments)
    key = {} if op is None else {"op": op}
    try:
        if request.verb == "exec":
            command = arguments.pop("command")
            result = await sandbox.exec(command, stdin=request.data, **arguments, **key)
            return outcome_of(result)
        if request.verb == "read":
            return Outcome(blobs={"data": cast("bytes", await sandbox.files.read(**arguments))})
        await sandbox.files.write(arguments["path"], request.data or b"", **key)
        return Outcome()
    except SandboxLost:
        raise
    except SandboxError as error:
        if type(error) not in _ANSWERS:
            raise SandboxLost(str(error)) from error
        return Outcome(error=(error.code, str(error)))


def encode_outcome(outcome: Outcome) -> dict[str, Any]:
    """The fields of a receipt."""
    return {
        "fields": outcome.fields,
        "error": None if outcome.error is None else list(outcome.error),
        "generation": outcome.generation,
        "changes": _listed(outcome.changes),
        "background": _listed(outcome.background),
    }


def _listed(changes: tuple[Change, ...] | None) -> list[list[Any]] | None:
    if changes is None:
        return None
    kept: list[list[Any]] = []
    left = _MOST_LISTED
    for change in changes:
        one = change.to_json()
        left -= len(canonical(one)) + 1
        if left < 0:
            break
        kept.append(one)
    return kept


def _changes(value: list[list[Any]] | None) -> tuple[Change, ...] | None:
    return None if value is None else changes_from_json(value)


def decode_outcome(fields: Mapping[str, Any], blobs: Mapping[str, bytes | None]) -> Outcome:
    """The outcome that a receipt holds; a blob that is None was lost."""
    error = fields["error"]
    return Outcome(
        fields=fields["fields"],
        blobs={name: data for name, data in blobs.items() if data is not None},
        error=None if error is None else (error[0], error[1]),
        generation=fields["generation"],
        changes=_changes(fields["changes"]),
        background=_changes(fields["background"]),
        cached=True,
        lost=frozenset(name for name, data in blobs.items() if data is None),
    )


def to_wire(outcome: Outcome) -> bytes:
    """An outcome for a socket between two processes of one version."""
    head = json.dumps(
        {**encode_outcome(outcome), "blobs": {k: len(v) for k, v in outcome.blobs.items()}}
    ).encode()
    return b"".join((len(head).to_bytes(4, "little"), head, *outcome.blobs.values()))


def from_wire(data: bytes) -> Outcome:
    """What `to_wire` wrote. Raises ValueError or KeyError for anything else."""
    at = 4 + int.from_bytes(data[:4], "little")
    fields = json.loads(data[4:at])
    blobs: dict[str, bytes | None] = {}
    for name, size in fields.pop("blobs").items():
        blobs[name] = data[at : at + size]
        at += size
    return replace(decode_outcome(fields, blobs), cached=False)
