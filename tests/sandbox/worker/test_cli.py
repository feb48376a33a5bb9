"""`fathom agent --placement worker`: begun, left, come back to, and refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fathom.cli.main import app
from fathom.sandbox.trajectory.store import Store
from fathom.sandbox.worker.worker import PLAN
from tests.agent.chat_server import Server, serving
from tests.sandbox.edge.daemon import Daemon
from tests.sandbox.worker.test_worker import ONCE, SCRIPT, began, until


@pytest.fixture
def state(node: Daemon, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The user's own folders are those of this test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("fathom.sandbox.paths.edge_folder", lambda: node.folder)
    made = Store()
    store.folder = made.folder  # what is left of it is stopped afterwards
    return made


def run(server: Server, *arguments: str) -> tuple[int, str, str]:
    command = ["agent", "a task", "--url", server.url, "--model", "m", "--placement", "worker"]
    found = CliRunner().invoke(app, [*command, *arguments])
    return found.exit_code, found.stdout, found.stderr


def test_a_run_is_left_and_come_back_to(state: Store):
    from fathom.sandbox.worker.worker import Worker

    with serving(*SCRIPT) as server:
        code, out, err = run(server, "--detach")
        assert code == 0, err
        name = out.strip()
        until(began(Worker(name, state), "op/2"))
        code, out, err = run(server, "--resume", "--json")
        assert code == 0, err
        told = json.loads(out)
        assert (told["answer"], told["steps"]) == ("Fine.", 4)
        assert told["tool_calls"][2]["result"] == ONCE
        assert f"run   {name}, in a worker" in err
        # What one client has shown the next one does not show again.
        assert "receipt  op/3" in err
        code, out, err = run(server, "--resume", name)
        assert (code, out) == (0, "Fine.\n")
        assert "receipt  op/3" not in err
        assert len(server.bodies) == 4
    (known,) = state.list()
    assert (known.id, known.ended, known.fields["placement"]) == (name, True, "worker")
    logs = CliRunner().invoke(app, ["sandbox", "logs", name, "--files"])
    assert "/work/log" in logs.stdout
    assert CliRunner().invoke(app, ["sandbox", "logs", name, "--verify"]).exit_code == 0
    assert CliRunner().invoke(app, ["sandbox", "forget", name]).exit_code == 0
    assert state.list() == []


def test_a_run_that_goes_on_is_forgotten_with_its_sandboxes(node: Daemon, state: Store):
    from fathom.sandbox.worker.worker import Worker

    with serving(*SCRIPT) as server:
        name = run(server, "--detach")[1].strip()
        until(began(Worker(name, state), "op/2"))
        assert CliRunner().invoke(app, ["sandbox", "forget", name]).exit_code == 0
    assert not (state.folder / name / PLAN).exists()
    with node.client() as client:
        assert client.list() == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--placement", "moon", "--url", "http://localhost"], "choose here, worker"),
        (["--placement", "worker"], "by its --url only"),
        (
            ["--placement", "worker", "--url", "http://localhost", "--on-lost", "rebuild"],
            "fail and continue only",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str):
    found = CliRunner().invoke(app, ["agent", "a task", *arguments])
    assert found.exit_code == 2
    assert reason in " ".join(found.stderr.replace("\u2502", " ").split())


def test_without_a_daemon_nothing_begins(
    state: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fathom.sandbox.paths.edge_folder", lambda: tmp_path)
    with serving() as server:
        code, _, err = run(server)
    assert code in (1, 3)
    assert "fathom sandbox edge" in err
    assert state.list() == []
