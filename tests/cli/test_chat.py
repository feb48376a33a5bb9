"""`fathom chat` and `fathom generate` without a terminal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

import fathom
from fathom.chat import Message, Tokenizer
from fathom.chat.encode import render
from fathom.chat.quick import TASKS
from fathom.cli.main import app
from fathom.cli.serve import shipped_tokenizer
from fathom.server.run import running
from fathom.server.scripted import ScriptedBackend
from tests.agent.chat_server import answer, serving, status, stream, tool_call
from tests.engine.test_chat_model import ScriptedLLM


def test_each_line_is_a_message_and_answers_alone_are_printed() -> None:
    script = (answer("Hello.", reasoning_content="greet"), answer("42"))
    with serving(*script) as server:
        arguments = ["chat", "--url", server.url, "--system", "be brief", "--temperature", "0"]
        found = CliRunner().invoke(app, arguments, input="hi\n\nthe answer?\n")
    assert found.exit_code == 0, found.stderr
    assert found.stdout == "Hello.\n42\n"
    first, second = server.bodies
    assert first["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]
    assert first["temperature"] == 0
    assert [message["role"] for message in second["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert second["messages"][2]["reasoning_content"] == "greet"


def test_commands() -> None:
    lines = "one\n/thinking off\n/new\ntwo\n/wrong\n/exit\nthree\n"
    with serving(answer("1"), answer("2")) as server:
        found = CliRunner().invoke(app, ["chat", "--url", server.url], input=lines)
    assert found.stdout == "1\n2\n"
    assert len(server.bodies[1]["messages"]) == 1
    assert server.bodies[1]["thinking"] == {"type": "disabled"}
    assert "/new starts again" in found.stderr


def test_a_full_context_is_said_and_the_message_forgotten() -> None:
    full = status(400, {"error": {"code": "context_length_exceeded"}})
    with serving(full, answer("fine")) as server:
        found = CliRunner().invoke(app, ["chat", "--url", server.url], input="long\nshort\n")
    assert "does not fit" in found.stderr
    assert found.stdout.strip() == "fine"
    assert [m["content"] for m in server.bodies[1]["messages"]] == ["short"]


def test_quick_instructions_leave_the_conversation_alone() -> None:
    lines = "/task title\nhi\n/task title\n/task query where is it?\n/task nonsense\nbye\n"
    script = (answer("Hello."), answer("A greeting"), answer("location"), answer("Bye."))
    with serving(*script) as server:
        found = CliRunner().invoke(app, ["chat", "--url", server.url], input=lines)
    assert found.stdout == "Hello.\nA greeting\nlocation\nBye.\n"
    assert "needs a message of role assistant" in found.stderr
    assert "unknown task 'nonsense'" in found.stderr
    title, query, last = (body["messages"] for body in server.bodies[1:])
    assert [(m["role"], m.get("task")) for m in title] == [("user", None), ("assistant", "title")]
    assert query[-1] == {"role": "user", "content": "where is it?", "task": "query"}
    assert [m["content"] for m in last] == ["hi", "Hello.", "bye"]
    assert all("task" not in message for message in last)


def test_quick_instructions_of_the_server() -> None:
    """Against the real server: the prompt ends with the task's token; no thought comes."""
    tokenizer = shipped_tokenizer()
    prompts: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return "Short title" if prompt.endswith(TASKS["title"].token) else "So.</think>Hello."

    lines = "hi\n/task title\n/task action look it up\n"
    with running(ScriptedBackend(script, tokenizer)) as url:
        found = CliRunner().invoke(app, ["chat", "--url", url], input=lines)
    assert found.stdout.splitlines()[:2] == ["Hello.", "Short title"]
    assert prompts[1].startswith(prompts[0].removesuffix("<think>"))
    assert prompts[2].endswith("<think>" + TASKS["action"].token)


def test_calls_are_shown_like_the_agents_and_not_run() -> None:
    script = (tool_call("bash", command="rm -r /"), answer("As you like."))
    with serving(*script) as server:
        found = CliRunner().invoke(app, ["chat", "--url", server.url], input="go\nwell?\n")
    assert found.exit_code == 0
    assert "$ rm -r /" in found.stderr
    assert "not run" in found.stderr
    roles = [message["role"] for message in server.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "tool", "user"]


def test_a_reply_cut_off_is_marked() -> None:
    cut = stream({"choices": [{"delta": {"content": "half"}, "finish_reason": "length"}]})
    with serving(cut) as server:
        found = CliRunner().invoke(app, ["chat", "--url", server.url], input="x\n")
    assert found.stdout == "half\n"
    assert "cut off" in found.stderr


def test_a_refusing_server_ends_with_its_exit_code() -> None:
    with serving(status(401, "no")) as server:
        found = CliRunner().invoke(app, ["chat", "--url", server.url], input="x\n")
    assert found.exit_code == 3


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> ScriptedLLM:
    tokenizer = Tokenizer.train(["a few words to learn from"], 400)
    llm = ScriptedLLM(tokenizer, [])
    real = llm.stream

    def stream(prompt: Any, **settings: Any) -> Any:
        ids = tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else prompt
        run = real(ids, **settings)
        run.prompt_tokens = len(ids)
        return run

    llm.stream = stream  # type: ignore[method-assign]
    monkeypatch.setattr(fathom, "load", lambda name, device="cpu", engine=None: llm, raising=False)
    return llm


def test_generate_goes_on_from_text(llm: ScriptedLLM) -> None:
    llm.texts = ["words \x1b[31m"]
    found = CliRunner().invoke(app, ["generate", "a few ", "--max-tokens", "50"])
    assert found.exit_code == 0, found.output
    assert found.stdout == "words \x1b[31m\n"
    assert llm.asked[0]["prompt"] == llm.tokenizer.encode("a few ")
    assert (llm.asked[0]["max_tokens"], llm.asked[0]["temperature"]) == (50, 0.0)


def test_generate_as_json(llm: ScriptedLLM) -> None:
    llm.texts = ["words"]
    arguments = ["generate", "-", "--json", "--temperature", "0.7", "--top-p", "0.9", "--seed", "2"]
    found = CliRunner().invoke(app, arguments, input="a few ")
    told = json.loads(found.stdout)
    assert told["text"] == "words"
    assert told["token_ids"] == llm.tokenizer.encode("words")
    assert len(told["logprobs"]) == len(told["token_ids"])
    assert told["finish_reason"] == "length"
    asked = llm.asked[0]
    assert (asked["temperature"], asked["top_p"], asked["seed"]) == (0.7, 0.9, 2)


def test_generate_answers_a_message(llm: ScriptedLLM) -> None:
    llm.texts = [render(Message(content="5", reasoning="so"))] * 2
    found = CliRunner().invoke(app, ["generate", "--chat", "2+3?"])
    assert found.stdout == "5\n"
    asked = llm.asked[0]["prompt"]
    assert asked == llm.tokenizer.encode_prompt([{"role": "user", "content": "2+3?"}])
    told = json.loads(CliRunner().invoke(app, ["generate", "--chat", "2+3?", "--json"]).stdout)
    assert (told["content"], told["reasoning"], told["finish_reason"]) == ("5", "so", "stop")


def test_generate_answers_a_quick_instruction(llm: ScriptedLLM) -> None:
    llm.texts = ["Yes", render(Message(content="5", reasoning="so")), "Sums"]
    found = CliRunner().invoke(app, ["generate", "--task", "query", "2+3?"])
    assert found.stdout == "Yes\n"
    user = {"role": "user", "content": "2+3?"}
    asked = [{**user, "task": "query"}]
    assert llm.asked[0]["prompt"] == llm.tokenizer.encode_prompt(asked)
    found = CliRunner().invoke(app, ["generate", "--task", "title", "2+3?", "--json"])
    told = json.loads(found.stdout)
    assert (told["task"], told["content"]) == ("title", "Sums")
    answered = {"role": "assistant", "content": "5", "reasoning_content": "so", "task": "title"}
    assert llm.asked[2]["prompt"] == llm.tokenizer.encode_prompt([user, answered])
    assert CliRunner().invoke(app, ["generate", "--task", "no", "x"]).exit_code == 2


def test_generate_checks_its_mode() -> None:
    assert CliRunner().invoke(app, ["generate", "x", "--thinking", "no"]).exit_code == 2


def test_the_shipped_model_is_greedy_unless_told() -> None:
    from fathom.chat.reply import Sampling
    from fathom.cli.models import default_sampling

    assert default_sampling(None, None, Sampling(seed=1)) == Sampling(temperature=0.0, seed=1)
    assert default_sampling("nano", None, Sampling(temperature=0.5)).temperature == 0.5
    assert default_sampling("/some/folder", None, Sampling()).temperature is None
    assert default_sampling(None, "http://x", Sampling()).temperature is None


def test_a_model_that_is_not_there() -> None:
    found = CliRunner().invoke(app, ["generate", "x", "--model", "/no/such/model"])
    assert found.exit_code == 2


@pytest.mark.parametrize("command", [["generate", "a"], ["chat"], ["agent", "a"]])
def test_a_device_is_asked_for_by_name(command: list[str]) -> None:
    for device, said in (("abacus", "names no device"), ("cuda:99", "there is no device cuda:99")):
        result = CliRunner().invoke(app, [*command, "--device", device], input="a\n")
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", [["chat"], ["agent", "a"]])
def test_a_server_has_its_own_device(command: list[str]) -> None:
    options = ["--url", "http://127.0.0.1:9", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, *options], input="a\n")
    assert result.exit_code == 2
    assert "--device and --url exclude each other" in " ".join(result.stderr.split())
