"""The command line as a whole: exit codes, help, start-up."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import fathom
from fathom import errors
from fathom.cli import main, output

COMMANDS = [
    "doctor",
    "demo",
    "agent",
    "chat",
    "generate",
    "inspect",
    "convert",
    "efficiency",
    "serve",
    "train",
    "eval",
    "bench",
    "sandbox",
]


def command_line(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "fathom", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "tasks", "--failures"], "--failures: cannot write"),
        (["bench", "engine", "--plot"], "--plot: cannot write"),
        (["bench", "clients", "--clients", "/nowhere", "--out"], "--out: cannot write"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(arguments, says):
    found = CliRunner().invoke(main.app, [*arguments, "/nowhere/file.png"])
    assert found.exit_code == 2
    assert f"{says} /nowhere/file.png: No such file or directory" in found.stderr


def test_looking_whether_a_file_can_be_written_changes_nothing(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kept")
    output.check_writable("--out", old)
    output.check_writable("--out", new)
    assert old.read_text() == "kept"
    assert not new.exists()


def test_a_picture_of_another_kind_is_refused_before_the_work(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[run]\nsteps = 0\n")
    arguments = ["train", str(recipe), "--out", str(tmp_path / "run"), "--plot", "curves.foo"]
    found = CliRunner().invoke(main.app, arguments)
    assert found.exit_code == 2
    assert "name a file that ends in .png" in found.stderr
    assert not (tmp_path / "run").exists()


def failing(error: Exception) -> typer.Typer:
    """The real group around a command that raises `error`."""
    app = typer.Typer(cls=main._Fathom, pretty_exceptions_enable=False)
    app.callback()(main._global_options)

    @app.command()
    def fail(as_json: bool = typer.Option(False, "--json")) -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.UnsupportedModelError("x"), 2),
        (errors.CheckpointError("x"), 2),
        (errors.ChatError("x"), 2),
        (errors.TokenizerError("x"), 2),
        (errors.GenerationError("x"), 2),
        (errors.KernelError("x"), 3),
        (errors.Unsupported("x"), 3),
        (errors.MissingDependency("x"), 3),
        (errors.SandboxError("x"), 1),
        (errors.SandboxLost("x"), 1),
        (errors.TrainError("x"), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_exit_codes(error, code):
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exit_code == code
    assert result.stderr == "fathom: x\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "/home/x/.cache"), "/home/x/.cache: Permission"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, says):
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exit_code == 3
    assert result.stderr.startswith(f"fathom: {says}")
    assert result.stderr.count("\n") == 1
    found = json.loads(CliRunner().invoke(failing(error), ["fail", "--json"]).stdout)
    assert found["error"]["code"] == "os_error"


def test_every_error_has_an_exit_code_and_a_code_of_its_own():
    classes = [errors.FathomError]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    own = [c for c in classes if c.__module__ == errors.__name__]
    assert {main.exit_code(cls("x")) for cls in own} == {1, 2, 3}
    assert len({cls.code for cls in own}) == len(own)
    assert all(cls.__name__ in errors.__doc__ for cls in own)


def test_errors_as_json():
    result = CliRunner().invoke(failing(errors.Unsupported("no crun")), ["fail", "--json"])
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {
        "error": {"code": "sandbox_unsupported", "message": "no crun"}
    }


def test_debug_shows_where_an_error_was_raised():
    result = command_line("--debug", "efficiency", "--convention", "none")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "cost.py" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fathom: no FLOP convention")
    assert "Traceback" not in command_line("efficiency", "--convention", "none").stderr


def test_messages_cannot_steer_the_terminal():
    result = CliRunner().invoke(failing(errors.ConfigError("a\x1b]0;b\x07")), ["fail"])
    assert "\x1b" not in result.stderr
    assert "\x07" not in result.stderr


def test_mistakes_in_the_code_are_not_hidden():
    result = CliRunner().invoke(failing(ZeroDivisionError("x")), ["fail"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_version():
    result = command_line("--version")
    assert (result.returncode, result.stdout) == (0, f"fathom {fathom.__version__}\n")


def test_help_lists_every_command():
    result = command_line("--help")
    assert result.returncode == 0
    listed = [
        line.split()[0]
        for line in result.stdout.partition("Commands:")[2].splitlines()[1:]
        if line.startswith("  ") and not line.startswith("   ")
    ]
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("arguments", [["nothing"], ["--nothing"], ["efficiency", "--nothing"]])
def test_wrong_usage(arguments):
    result = command_line(*arguments)
    assert result.returncode == 2
    assert "nothing" in result.stderr
    assert "Traceback" not in result.stderr


def test_nothing_to_do_shows_the_help():
    result = command_line()
    assert result.returncode == 2
    assert "Usage: fathom" in result.stdout + result.stderr


def test_help_is_quick():
    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    seconds = []
    for _ in range(3):
        before = used()
        assert command_line("--help").returncode == 0
        seconds.append(used() - before)
    assert min(seconds) < 0.9  # of processor time, which doubles when other tests run beside it


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    result = CliRunner().invoke(main.app, [name, "--help"])
    assert result.exit_code == 0
    assert f" {name} " in result.stdout.splitlines()[0]
