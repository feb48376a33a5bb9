"""Without root: the same tests once more as the user `nobody`, with bubblewrap."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.sandbox.substrates.choice import program_of

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
# In parts of about the same length, which may run side by side.
SAME_TESTS = (
    ("attacks", "attacks_agent", "probe"),
    ("conformance", "limits", "lifetime", "files", "exec"),
)
# The daemon of a user other than root, with the API process that sees nothing.
DAEMON_TESTS = ("daemon", "forged", "confine")
DAEMON_PART = "killed_api or no_rights or forged_request or ends_with"
# What does not depend on how a sandbox is built, entered and ended.
LEFT_OUT = (
    "values_that or broken_promise or strange_names or useless_timeouts or unusable or exit_codes "
    "or round_trip or pipes or path or utf8 or cap or given or stdin or lists or undecodable "
    "or stranger or nonsense or lies or no_container or longest or large or many_commands "
    "or calls_of or stale or removal or where or background or orphan or stopped or missing_is "
    "or folders_are or above_the or without_permission or ignores or endless"
)
NOBODY = 65534


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of nobody's own; pytest's are closed to other users."""
    folder = Path(tempfile.mkdtemp(prefix="fathom-nobody-", dir="/tmp"))
    os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


# Through `env`, because setpriv itself still has root's rights when it looks for the program.
BECOME = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/env")


def as_nobody(home: Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run Python as nobody, with an interpreter that nobody may run."""
    candidates = (sys.executable, "/usr/bin/python3")
    for interpreter in candidates:
        done = subprocess.run(
            [*BECOME, interpreter, "-c", "import anyio, pytest, pytest_timeout, fathom.sandbox"],
            env=_environment(home),
            cwd=home,
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            break
    else:
        pytest.skip(f"none of {', '.join(candidates)} with its packages can be run by nobody")
    return subprocess.run(
        [*BECOME, interpreter, *arguments],
        env=_environment(home),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _environment(home: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/nonexistent",
        "XDG_CACHE_HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]),
    }


@pytest.fixture(autouse=True)
def _needs(need_root: None) -> None:
    if program_of("bubblewrap") is None:
        pytest.skip("bubblewrap is not installed")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("names", SAME_TESTS, ids="-".join)
def test_the_same_tests_pass_as_nobody(home: Path, names: tuple[str, ...]):
    files = [str(HERE / f"test_{name}.py") for name in names]
    options = [
        "-p",
        "no:cacheprovider",
        f"--basetemp={home}/tests",
        "-q",
        "--no-header",
        "-k",
        f"not ({LEFT_OUT})",
    ]
    done = as_nobody(home, "-m", "pytest", *options, *files, timeout=380)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > 40, done.stdout[-500:]


@pytest.mark.timeout(200)
def test_the_daemon_of_another_user(home: Path):
    files = [str(HERE / "edge" / f"test_{name}.py") for name in DAEMON_TESTS]
    options = ["-p", "no:cacheprovider", f"--basetemp={home}/tests", "-q", "--no-header"]
    done = as_nobody(home, "-m", "pytest", *options, "-k", DAEMON_PART, *files, timeout=180)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) >= 4, done.stdout[-500:]


def test_without_a_home_the_error_says_what_to_set(home: Path):
    code = (
        "from fathom.sandbox import SyncClient\n"
        "with SyncClient(cache_dir='/nonexistent/x') as client:\n"
        "    client.create()\n"
    )
    done = as_nobody(home, "-c", code, timeout=60)
    assert "XDG_CACHE_HOME" in done.stderr


def test_root_substrates_are_refused(home: Path):
    code = (
        "from fathom.sandbox import SyncClient\n"
        "with SyncClient(substrate='crun') as client:\n"
        "    client.create()\n"
    )
    done = as_nobody(home, "-c", code, timeout=60)
    assert "Unsupported: crun is not for a user other than root: use bubblewrap" in done.stderr
