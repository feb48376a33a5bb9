"""`fathom sandbox run` and `exec`: what they end with, and what they refuse."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from fathom.cli.main import app
from fathom.cli.sandbox import _finish
from fathom.errors import SandboxError
from fathom.sandbox import Container, ExecResult, SyncClient


def ended(exit_code: int, **more: bool) -> ExecResult:
    return ExecResult(exit_code=exit_code, stdout="out\n", stderr="", output="out\n", **more)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_s_own_exit_code_is_passed_on(as_json: bool):
    _finish(ended(0), as_json)
    given = [ended(37), ended(127), ended(137, oom_killed=True), ended(137, timed_out=True)]
    for result, code in zip(given, (37, 127, 137, 124), strict=True):
        with pytest.raises(typer.Exit) as end:
            _finish(result, as_json)
        assert end.value.exit_code == code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "Missing argument"),
        (["run", "--nothing", "--", "true"], "--nothing"),
        (["run", "--sandbox", "nope", "--", "true"], "choose container"),
        (["run", "--group", "g", "--", "true"], "--group needs --keep"),
        (["run", "--idle-ttl", "3", "--", "true"], "--idle-ttl needs --keep"),
        (["run", "--memory", "1KiB", "--", "true"], "at least 16MiB"),
        (["run", "--json", "--memory", "1KiB", "--", "true"], "at least 16MiB"),
        (["exec", "--folder", "/nowhere", "sb-1", "--", "true"], "no daemon"),
        (["exec", "sb-1", "--folder", "/nowhere", "--", "true"], "options go before it"),
    ],
)
def test_failures_that_are_not_the_command_s(words: list[str], said: str):
    done = CliRunner().invoke(app, ["sandbox", *words])
    assert (done.exit_code, said in done.output) == (125, True), done.output


def test_a_real_command(client: SyncClient):
    """One through all of it; `client` skips where nothing can run."""
    done = CliRunner().invoke(
        app, ["sandbox", "run", "--cwd", "/tmp", "--", "sh", "-c", "pwd; exit 37"]
    )
    assert (done.exit_code, done.stdout) == (37, "/tmp\n"), done.output
    with (
        client.create(Container()) as sandbox,
        pytest.raises(SandboxError, match="number of bytes"),
    ):
        sandbox.exec("true", timeout=9, spill=True)
