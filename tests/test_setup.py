"""scripts/setup.sh on machines that lack something, played by stand-ins on its PATH."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = ["bash", "cat", "dirname", "env", "mktemp", "rm", "sha256sum", "tail"]
PRESENT = ["bwrap", "crun", "runc", "nft", "musl-gcc", "node", "python3"]


class Machine:
    """A checkout and a PATH with nothing on it but what a test puts there."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.bin, self.checkout, self.log = folder / "bin", folder / "repo", folder / "calls"
        self.bin.mkdir()
        (self.checkout / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
            shutil.copy(repository / name, self.checkout / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for program in PRESENT:
            self.program(program)
        self.program("id", "echo 1000")
        self.program("python", where=self.checkout / ".venv" / "bin")

    def program(self, name: str, body: str = "", where: Path | None = None) -> None:
        file = (where or self.bin) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/bin/bash\necho "{name} $*" >>"{self.log}"\n{body}\n')
        file.chmod(0o755)

    def without(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def setup(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        return subprocess.run(
            [self.bin / "bash", self.checkout / "scripts" / "setup.sh", *arguments],
            env={"PATH": str(self.bin), "TMPDIR": str(self.bin.parent)},
            capture_output=True,
            text=True,
            timeout=30,
        )

    def calls(self, name: str) -> list[str]:
        lines = self.log.read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def machine(tmp_path, repository) -> Machine:
    return Machine(tmp_path, repository)


def test_installs_once(machine):
    first = machine.setup()
    assert first.returncode == 0, first.stderr
    assert machine.calls("python") == [
        "-m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev]",
        "-m fathom generate a --max-tokens 2",
    ]
    second = machine.setup()
    assert (second.returncode, second.stdout, machine.calls("python")) == (0, "", [])


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_installs_again_when_the_requirements_change(machine, file):
    machine.setup()
    with (machine.checkout / file).open("a") as f:
        f.write("\n# changed\n")
    machine.setup()
    assert len(machine.calls("python")) == 2


def test_a_failed_installation_is_tried_again(machine):
    machine.program("python", "exit 1", where=machine.checkout / ".venv" / "bin")
    failed = machine.setup()
    assert failed.returncode == 3
    assert failed.stderr.splitlines()[-1].endswith("pip install -c constraints.txt -e '.[dev]'")
    machine.setup()
    assert len(machine.calls("python")) == 1


def test_a_user_is_told_what_to_run(machine):
    machine.without("bwrap", "crun", "runc")
    machine.program("apt-get")
    result = machine.setup()
    assert result.returncode == 3
    # crun and runc are for root alone.
    last = "sudo apt-get install -y --no-install-recommends bubblewrap"
    assert result.stderr.splitlines()[-1].strip() == last
    assert machine.calls("apt-get") == []


def test_root_installs_what_is_missing(machine):
    machine.without("bwrap", "runc", "node")
    machine.program("id", "echo 0")
    machine.program("apt-get")
    assert machine.setup().returncode == 0
    install = "install -y --no-install-recommends bubblewrap runc"
    assert machine.calls("apt-get") == ["update -q", install]
    assert machine.setup("lint").returncode == 0
    assert machine.calls("apt-get") == ["update -q", f"{install} nodejs"]


def test_root_sees_why_the_installation_failed(machine):
    machine.without("bwrap")
    machine.program("id", "echo 0")
    machine.program("apt-get", 'if [ "$1" = install ]; then echo "no space left"; exit 100; fi')
    result = machine.setup()
    assert result.returncode == 3
    assert "no space left" in result.stderr
    assert result.stderr.splitlines()[-1].strip().startswith("apt-get install -y")


def test_without_apt_get(machine):
    machine.without("bwrap")
    result = machine.setup()
    assert result.returncode == 3
    assert "this system's package manager" in result.stderr


def test_without_python(machine):
    shutil.rmtree(machine.checkout / ".venv")
    machine.program("python3", "exit 1")
    machine.program("apt-get")
    result = machine.setup()
    assert result.returncode == 3
    assert result.stderr.splitlines()[-1].strip().endswith("python3 python3-venv")


def test_makes_the_environment_with_the_first_python_that_fits(machine):
    environment = machine.checkout / ".venv"
    shutil.rmtree(environment)
    machine.program("python3", "exit 1")
    machine.program("python3.12", f'[ "$2" != venv ] || {shutil.which("mkdir")} -p "$3/bin"')
    machine.setup()
    assert "-m venv .venv" in machine.calls("python3.12")
    assert environment.is_dir()
