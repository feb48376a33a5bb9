"""The runner of the evaluation, with a model that plays the oracle's part in the real sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from fathom.agent.tool import BASH, EDIT
from fathom.chat import Message
from fathom.chat.reply import Reply
from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.eval.agent_tasks import get_files, run_tasks, summarize
from fathom.eval.tasks import BUILDERS, FAMILIES
from fathom.eval.tasks.draw import Draw
from fathom.eval.tasks.heldout import make_task
from fathom.train.curriculum.oracle import SCRIPTS, Play
from fathom.train.curriculum.shell import Shell
from fathom.train.curriculum.toolsets import ToolNames

OWN_NAMES = ToolNames(
    "bash",
    "command",
    "edit",
    (("path", "path"), ("old", "old"), ("new", "new")),
    [BASH.schema(), EDIT.schema()],
)


class Scripted:
    """A model that knows by the prompt what to write."""

    name = "scripted"
    context_tokens = None

    def __init__(self) -> None:
        self.lines: dict[str, list[dict[str, Any]]] = {}
        self.thinking: set[str] = set()

    def count_tokens(self, messages: Any, **options: Any) -> None:
        return None

    async def complete(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: str = "high", **options: Any
    ) -> Reply:
        self.thinking.add(thinking)
        prompt = messages[1]["content"]
        said = sum(message["role"] == "assistant" for message in messages)
        message = Message.from_dict(self.lines[prompt][said])
        return Reply(message=message, finish_reason="tool_calls" if message.tool_calls else "stop")


def prepare(model: Scripted, right: bool = True) -> list:
    tasks = []
    for number, family in enumerate(FAMILIES):
        make = list(BUILDERS[family].values())[1][0]
        d = Draw(f"run/{number}", evaluation=True)
        scenario = make(d, {})
        task = make_task(d, family, scenario)
        messages: list[dict[str, Any]] = []
        SCRIPTS[scenario.kind](Play(messages, OWN_NAMES, Shell(scenario.files), True), scenario)
        said = [message for message in messages if message["role"] == "assistant"]
        model.lines[task.prompt] = said if right else said[-1:]
        if not right:
            said[-1]["content"] = "I did nothing at all."
        tasks.append(task)
    return tasks


def run(model: Scripted, tasks: list, **options: Any) -> list:
    try:
        return anyio.run(lambda: run_tasks(model, tasks, **options))
    except Unsupported as missing:
        pytest.skip(f"no sandbox on this machine: {missing}")


def test_the_oracle_solves_every_family_in_the_sandbox():
    model, heard = Scripted(), []
    outcomes = run(model, prepare(model), on_outcome=heard.append, thinking="off")
    summary = summarize(outcomes)
    assert heard == outcomes
    assert model.thinking == {"off"}
    assert summary["solved"] == summary["tasks"] == len(FAMILIES)
    assert summary["failures"] == []
    assert {name: part["score"] for name, part in summary["families"].items()} == dict.fromkeys(
        FAMILIES, 1.0
    )


def test_failures_come_with_their_conversations():
    model = Scripted()
    summary = summarize(run(model, prepare(model, right=False)))
    assert summary["score"] == 0.0
    assert len(summary["failures"]) == len(FAMILIES)
    failure = json.loads(json.dumps(summary["failures"][0]))
    assert failure["messages"][-1]["content"] == "I did nothing at all."
    assert failure["prompt"] == failure["messages"][1]["content"]


def test_nothing_to_summarize():
    assert summarize([])["tasks"] == 0


class Folder:
    """A sandbox whose files may refuse to be read."""

    def __init__(self, files: dict[str, bytes | Exception]) -> None:
        self._files = files
        self.files = self

    async def exec(self, command: str, **options: Any) -> Any:
        return SimpleNamespace(stdout="".join(f"./{path}\0" for path in self._files))

    async def read(self, path: str) -> bytes:
        found = self._files[path]
        if isinstance(found, Exception):
            raise found
        return found


def test_files_that_cannot_be_read_end_no_evaluation():
    """A model may leave a file of gigabytes, or one whose name is no text."""
    odd = {"a": b"x\n", "big": SandboxError("more than 64 MB"), "\ufffd": FileNotFoundError()}
    found = anyio.run(get_files, Folder(odd))
    assert found["a"] == "x\n"
    assert found["big"] == found["\ufffd"] == "\0"
    with pytest.raises(SandboxLost):
        anyio.run(get_files, Folder({"a": SandboxLost("ended")}))


def test_what_one_task_leaves_does_not_meet_the_next():
    model = Scripted()
    first, second, *_ = prepare(model)
    harm = "cp $(ls | head -n 1) /tmp/left; (while :; do touch /work/late; done) & chmod 000 /work"
    bash = {"function": {"name": "bash", "arguments": json.dumps({"command": harm})}, "id": "a"}
    model.lines[first.prompt] = [
        {"role": "assistant", "content": "", "tool_calls": [bash]},
        {"role": "assistant", "content": "Done."},
    ]
    outcomes = run(model, [first, second])
    assert [outcome.solved for outcome in outcomes] == [False, True]
