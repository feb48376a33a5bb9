"""Driving real clients: each check can fail, and what is driven has no network but loopback."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fathom.chat.protocol import DSML
from fathom.cli.main import app
from fathom.cli.serve import shipped_tokenizer
from fathom.errors import MissingDependency, Unsupported
from fathom.eval.clients import checks, namespace
from fathom.eval.clients.namespace import StepResult
from fathom.eval.clients.plans import CLIENTS, STEPS, Client, check_installed

USER, ASSISTANT = 1, 2
HEAD = (10, 11, 12)
CALLS = f"Look first.</think><{DSML}tool_calls>"
Session = tuple[list[StepResult], list[checks.Entry]]


@pytest.fixture
def session() -> Session:
    """A session as it should be: 7 requests in two conversations, one of them cancelled."""
    results: list[StepResult] = []
    entries: list[checks.Entry] = []
    prompt: tuple[int, ...] = HEAD
    text, clock, word = "", 100.0, 1000
    for step in STEPS:
        if not step.again:
            prompt, text = HEAD, ""
        began = clock
        for at in range(step.requests):
            clock, word = clock + 1, word + 1
            prompt = (*prompt, USER, word, ASSISTANT, 3)
            calls = at < step.requests - 1
            entry = checks.Entry(
                n=len(entries) + 1,
                began=clock,
                ended=clock + 0.5,
                line="POST /v1/messages",
                status=200,
                body={"tools": [{}], "messages": [{"content": str(w)} for w in prompt[3:]]},
                restored=0,
                prompt=prompt,
                text=text,
                output=CALLS if calls else "Fine.</think>Yes",
                end="left" if step.cancel else "stop",
                freed=clock + 0.5,
                user=USER,
                assistant=ASSISTANT,
            )
            entries.append(entry)
            text += CALLS if calls else ""
            if step.cancel:
                prompt = prompt[:-2]
        clock += 1
        results.append(
            StepResult(
                name=step.name,
                began=began,
                ended=clock,
                exit_code=0,
                output=step.expect,
                interrupted=clock - 0.6 if step.cancel else None,
            )
        )
    return results, entries


def failed(results: list[StepResult], entries: list[checks.Entry]) -> set[str]:
    return {name for name, found in checks.check(results, entries).failures.items() if found}


def test_a_good_session_passes(session: Session) -> None:
    outcome = checks.check(*session)
    assert outcome.ok, outcome.failures
    assert set(outcome.failures) == set(checks.NAMES)
    assert outcome.numbers["shared_prefix"] == {"tokens": 3, "of_head": 3}
    assert outcome.numbers["thoughts_returned"] == 2


def test_each_check_can_fail(session: Session) -> None:
    results, entries = session
    assert failed([replace(r, output="") for r in results], entries) == {"answers"}
    assert "answers" in failed([replace(results[0], exit_code=1), *results[1:]], entries)
    assert failed(results, [replace(entries[0], status=500), *entries[1:]]) == {"status"}
    again = replace(entries[3], n=99)
    assert failed(results, [*entries, again]) >= {"loops", "doubles"}
    forgot = [*entries[:3], replace(entries[3], text="nothing"), *entries[4:]]
    assert failed(results, forgot) == {"reasoning"}
    changed = replace(entries[2], prompt=(*HEAD, USER, 5, *entries[2].prompt[5:]))
    assert failed(results, [*entries[:2], changed, *entries[3:]]) == {"append-only"}
    assert failed(results, []) >= {"status", "loops", "prefix"}
    other = [replace(e, prompt=(77, *e.prompt[1:])) for e in entries[5:]]
    assert failed(results, [*entries[:5], *other]) == {"prefix"}
    late = replace(entries[5], freed=entries[5].freed + 60)
    assert failed(results, [*entries[:5], late, entries[6]]) == {"cancel"}
    whole = replace(entries[5], end="stop")
    assert "cancel" in failed(results, [*entries[:5], whole, entries[6]])


def test_side_requests_are_told_apart(session: Session) -> None:
    results, entries = session
    title = replace(entries[0], n=50, body={"tools": []}, prompt=(*HEAD, USER, 9, ASSISTANT))
    memory = replace(title, n=51, body={"tools": [{"name": "x"}]}, prompt=(9, USER, 8))
    outcome = checks.check(results, [*entries, title, memory])
    assert outcome.ok, outcome.failures
    assert (outcome.numbers["main"], outcome.numbers["side"]) == (7, 2)
    many = [replace(title, n=60 + at, prompt=(USER, at)) for at in range(9)]
    assert failed(results, [*entries, *many]) == {"loops"}


def test_missing_clients_are_named_with_their_installation(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="npm install --prefix") as caught:
        check_installed(list(CLIENTS), tmp_path)
    said = str(caught.value)
    for word in ("@anthropic-ai/claude-code", "@openai/codex", "opencode-ai",
                 "@qwen-code/qwen-code", "mini/bin/pip install mini-swe-agent"):  # fmt: skip
        assert word in said
    try:
        namespace.check_sealable()
    except Unsupported as error:
        pytest.skip(str(error))
    found = CliRunner().invoke(app, ["bench", "clients", "--clients", str(tmp_path)])
    assert found.exit_code == 3


def test_unknown_clients(tmp_path: Path) -> None:
    arguments = ["bench", "clients", "--clients", str(tmp_path), "--only", "codex,who"]
    assert CliRunner().invoke(app, arguments).exit_code == 2


SPY = """\
#!{python}
import json, os, socket, sys, urllib.request
found = {{"variables": sorted(os.environ), "devices": [n for _, n in socket.if_nameindex()]}}
try:
    socket.create_connection(("192.0.2.1", 80), 3)
    found["outside"] = True
except OSError as error:
    found["outside"] = str(error)
body = {{"messages": [{{"role": "user", "content": sys.argv[1]}}]}}
ask = urllib.request.Request("http://127.0.0.1:8399/v1/chat/completions",
    json.dumps(body).encode(), {{"content-type": "application/json"}})
found["said"] = json.load(urllib.request.urlopen(ask))["choices"][0]["message"]["content"]
print(json.dumps(found))
"""


def test_a_client_is_sealed_off(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spy stands in for a client: it sees the server, and nothing of this machine's network."""
    try:
        namespace.check_sealable()
    except Unsupported as error:
        pytest.skip(str(error))
    spy = tmp_path_factory.mktemp("clients") / "node_modules/.bin/qwen"
    spy.parent.mkdir(parents=True)
    # The plan of a real client is used; only its program is another.
    script = SPY.format(python=sys.executable).replace("sys.argv[1]", "sys.argv[-1]")
    spy.write_text(script)
    spy.chmod(spy.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "x")
    client: Client = next(c for c in CLIENTS if c.name == "qwen-code")
    results = namespace.run(client, spy.parents[2], tmp_path)
    told = json.loads(results[0].output)
    assert told["said"] == "The answer is 4."
    assert told["outside"] is not True
    assert "SECRET_OF_THE_CALLER" not in told["variables"]
    entries = checks.read_record(tmp_path / namespace.RECORD, shipped_tokenizer())
    assert len([e for e in entries if e.generates]) == len(STEPS)
    assert os.environ["SECRET_OF_THE_CALLER"] == "x"
