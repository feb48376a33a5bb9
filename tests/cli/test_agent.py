"""`fathom agent`: what it prints where, its JSON object, its exit codes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fathom.cli import sandboxes
from fathom.cli.main import app
from fathom.cli.serve import shipped_tokenizer
from fathom.errors import Unsupported
from fathom.sandbox import Client, Container
from fathom.sandbox.paths import cache_folder
from fathom.sandbox.trajectory.store import Store
from fathom.server.run import running
from fathom.server.scripted import ScriptedBackend
from fathom.server.sessions import Session
from tests.agent.chat_server import Respond, answer, serving, status, tool_call
from tests.machines import skip_without_machines


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logs of these runs go away with the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def run(*arguments: str, script: tuple[Respond, ...] = (), stdin: str = "") -> tuple[Result, Any]:
    with serving(*script) as server:
        found = CliRunner().invoke(
            app, ["agent", *arguments, "--url", server.url, "--model", "m"], input=stdin
        )
    return found, server


@pytest.fixture
def sandbox() -> None:
    import anyio

    async def start() -> None:
        async with Client("local") as client:
            await client.create(Container())

    try:
        anyio.run(start)
    except Unsupported as error:
        pytest.skip(f"no sandbox on this machine: {error}")


@pytest.mark.usefixtures("sandbox")
def test_the_answer_alone_goes_to_standard_output(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    work = tool_call("bash", command="cat a.txt; echo y > b.txt")
    found, server = run(
        "count things", "--workdir", str(tmp_path), script=(work, answer("Just one."))
    )
    assert found.exit_code == 0, found.stderr
    assert found.stdout == "Just one.\n"
    for line in (
        "task  count things",
        "step 1",
        "$ cat a.txt; echo y > b.txt",
        "    x",
        "answered",
    ):
        assert line in found.stderr
    assert "\x1b" not in found.stderr
    assert (tmp_path / "b.txt").read_text() == "y\n"
    assert server.bodies[1]["messages"][-1]["content"] == "x"


@pytest.mark.usefixtures("sandbox")
def test_a_task_with_the_model_behind_the_own_server(tmp_path: Path) -> None:
    """The real server with scripted replies: two rounds of calls, thoughts returned, an answer."""
    (tmp_path / "notes.txt").write_text("the colour is blue\n")
    backend = ScriptedBackend(Session(), shipped_tokenizer())
    with running(backend) as url:
        arguments = ["agent", "[[two]] What colour?", "--url", f"{url}/v1", "--json"]
        found = CliRunner().invoke(app, [*arguments, "--workdir", str(tmp_path)])
    assert found.exit_code == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["answer"].startswith("Done. The folder holds notes.txt")
    first, second = told["tool_calls"]
    assert "notes.txt" in first["result"]
    assert second["result"] == "the colour is blue"
    prompts = [request.prompt for request in backend.requests]
    assert len(prompts) == 3
    for shorter, longer in pairwise(prompts):
        assert list(longer[: len(shorter)]) == list(shorter)
    assert "Round 1: I should look" in backend.requests[2].text
    assert told["usage"]["cached_tokens"] > 0


@pytest.mark.usefixtures("sandbox")
def test_the_json_object() -> None:
    script = (tool_call("bash", command="exit 3"), answer("It failed."))
    found, _ = run("try it", "--json", "--thinking", "max", "--seed", "3", script=script)
    assert found.exit_code == 0
    told = json.loads(found.stdout)
    assert told["answer"] == "It failed."
    assert (told["status"], told["steps"], told["thinking"]) == ("answered", 2, "max")
    (call,) = told["tool_calls"]
    seconds = call.pop("seconds")
    assert 0 < seconds < 30
    assert call == {
        "step": 1,
        "name": "bash",
        "arguments": {"command": "exit 3"},
        "result": "[exit code 3]",
        "executed": True,
        "exit_code": 3,
        "timed_out": False,
    }
    timings = told["timings"]
    assert timings["total"] >= timings["model"] + timings["tools"] > 0
    assert [set(step) for step in timings["per_step"]] == [{"model", "first_piece", "tools"}] * 2
    assert told["usage"]["prompt_tokens"] == 11


@pytest.mark.usefixtures("sandbox")
def test_no_answer_within_the_limits_is_a_failed_task() -> None:
    look = tool_call("bash", command="ls")
    found, _ = run("t", "--json", "--max-steps", "2", script=(look, look))
    assert found.exit_code == 1
    told = json.loads(found.stdout)
    assert (told["answer"], told["status"], told["steps"]) == (None, "step_limit", 2)


@pytest.mark.usefixtures("sandbox")
def test_settings_reach_the_model() -> None:
    found, server = run(
        *("-", "--thinking", "off", "--max-tokens", "9", "--temperature", "0.5", "--seed", "4"),
        script=(answer("ok"),),
        stdin="a task from a pipe",
    )
    assert found.exit_code == 0, found.stderr
    (body,) = server.bodies
    assert body["messages"][1]["content"] == "a task from a pipe"
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (9, 0.5, 4)
    assert body["thinking"] == {"type": "disabled"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("t", "--thinking", "medium"),
        ("t", "--sandbox", "cloud"),
        ("t", "--workdir", "/no/such/folder"),
        ("t", "--max-steps", "0"),
        (" ",),
        (),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0].exit_code == 2


def test_a_url_that_is_none() -> None:
    assert CliRunner().invoke(app, ["agent", "t", "--url", "nonsense"]).exit_code == 2


@pytest.mark.usefixtures("sandbox")
def test_a_server_that_refuses_is_something_the_machine_lacks() -> None:
    found, _ = run("t", "--json", script=(status(401, "who are you"),))
    assert found.exit_code == 3
    assert json.loads(found.stdout)["error"]["code"] == "model_unreachable"


def test_a_machine_without_sandboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hold(*_: object, **__: object) -> None:
        raise Unsupported("no sandbox can run here: install it")

    monkeypatch.setattr("fathom.sandbox.trajectory.store.hold", hold)
    found, server = run("t", script=(answer("x"),))
    assert found.exit_code == 3
    assert "install" in found.stderr
    assert server.bodies == []


def test_the_kinds_are_those_of_the_sandbox_package() -> None:
    from fathom.sandbox.probe import SUBSTRATES
    from fathom.sandbox.substrates.choice import MACHINES

    assert sandboxes.CONTAINERS == ("container", *SUBSTRATES)
    assert sandboxes.MACHINES == MACHINES


@pytest.mark.parametrize("kind", ["microvm", pytest.param("fullvm", marks=pytest.mark.full_vm)])
def test_a_task_in_a_virtual_machine(kind: str) -> None:
    skip_without_machines(cache_folder())
    script = (
        tool_call("bash", command="echo 6 > n; [ $(id -u) = 1000 ] && uname"),
        tool_call("bash", command="cat n"),
        answer("Six."),
    )
    found, _ = run("how many?", "--sandbox", kind, "--json", script=script)
    assert found.exit_code == 0, found.stderr
    told = json.loads(found.stdout)
    assert [call["result"] for call in told["tool_calls"]] == ["Linux", "6"]
    (known,) = Store().list()
    assert known.ended


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--sandbox", "fn"), "keeps nothing between two calls"),
        (("--sandbox", "microvm", "--workdir", "."), "shares no folder"),
    ],
)
def test_a_kind_that_cannot_do_this_is_refused_in_a_sentence(
    arguments: tuple[str, ...], reason: str
) -> None:
    found, server = run("t", *arguments)
    assert found.exit_code == 2
    assert reason in " ".join(found.stderr.replace("\u2502", " ").split())
    assert server.bodies == []
