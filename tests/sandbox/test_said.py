"""What comes from inside of a sandbox makes sense, or is an error like any other."""

from __future__ import annotations

import anyio
import pytest

from fathom.errors import SandboxError
from fathom.sandbox import fn_command
from fathom.sandbox.files import DEFAULT_LIMIT, Files
from fathom.sandbox.frames import Frame, Received, Tag, join_fields
from fathom.sandbox.process import Ended, file_problem, read_end
from fathom.sandbox.request import Request

GOOD = b"f\x00644\x005\x001000\x001\x00name\x00"


def files(said: bytes, problem: str = "", total: int | None = None) -> Files:
    """Return the files of a sandbox that answers all requests with these words."""
    size = len(said) if total is None else total
    fields = [(Tag.PROBLEM, problem), (Tag.EXIT, 125 if problem else 0), (Tag.STDOUT_TOTAL, size)]
    ended: Ended = read_end(Received(1, Frame.EXIT, join_fields(fields)))

    async def run(*_: Request | bytes | int | str | None) -> tuple[Ended, bytes]:
        return ended, said

    return Files(run)


def test_an_entry_is_read():
    (info,) = anyio.run(files(GOOD).list)
    assert (info.kind, info.mode, info.size, info.name) == ("file", 0o644, 5, "name")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"f", b"q"),
        (b"644", b"9"),
        (b"644", b"-"),
        (b"5", b"x"),
        (b"1000", b"9" * 400),
        (b"1000", b"9" * 5000),
    ],
)
def test_an_entry_without_sense_is_refused(old: bytes, new: bytes):
    said = GOOD.replace(old, new, 1)
    for ask in (files(said).stat, files(said).list):
        with pytest.raises(SandboxError, match="makes no sense"):
            anyio.run(ask, "name")


@pytest.mark.parametrize("said", [b"", b"f\x00", GOOD * 2])
def test_one_entry_is_one(said: bytes):
    with pytest.raises(SandboxError, match="makes no sense"):
        anyio.run(files(said).stat, "name")


def test_a_folder_that_is_not_listed_whole_is_not_listed():
    with pytest.raises(SandboxError, match="list it by a command"):
        anyio.run(files(GOOD, total=DEFAULT_LIMIT + 1).list)


@pytest.mark.parametrize("problem", ["E\u00b2", "E" + "9" * 30, "E" + "9" * 5000, "E-1", "E"])
def test_an_error_without_sense_is_told_as_it_is(problem: str):
    assert file_problem(problem) is None
    with pytest.raises(SandboxError, match="cannot be read"):
        anyio.run(files(b"", problem).read, "name")


@pytest.mark.parametrize("code", [float("inf"), float("nan"), None, "x", [1]])
def test_a_command_of_a_pool_ends_with_a_number(code: object):
    value = {"out": "", "err": "", "code": code, "truncated": False}
    with pytest.raises(SandboxError, match="no result"):
        fn_command.ended(value, 1.0)
