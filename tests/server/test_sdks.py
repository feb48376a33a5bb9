"""The official openai and anthropic SDKs drive the server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from fathom.server.scripted import Reply
from tests.server.conftest import BASH, Server, block, call

TOOL = BASH["function"]
ANTHROPIC_BASH: Any = {"name": "bash", "description": "Run.", "input_schema": TOOL["parameters"]}
RESPONSES_BASH: Any = {"type": "function", "strict": False, **TOOL}


@pytest.fixture
def gpt(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Wait for a condition and say how long it took."""
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < seconds, "it never happened"
        time.sleep(0.002)
    return time.perf_counter() - started


def test_openai_rounds_of_tools_with_thinking(server: Server, gpt: openai.OpenAI):
    messages: list[Any] = [{"role": "user", "content": "[[two]] What is there?"}]
    lengths: list[int] = []
    for _ in range(3):
        reply = gpt.chat.completions.create(model="deepseek-v4", messages=messages, tools=[BASH])
        choice = reply.choices[0]
        lengths.append(len(server.backend.requests[-1].prompt))
        messages.append(choice.message)
        if choice.finish_reason != "tool_calls":
            break
        for one in choice.message.tool_calls or []:
            assert isinstance(json.loads(one.function.arguments), dict)
            messages.append({"role": "tool", "tool_call_id": one.id, "content": "blue"})
    assert choice.finish_reason == "stop"
    assert "the colour is blue" in (choice.message.content or "")
    assert lengths == sorted(lengths)
    assert server.prompt.count("I should look with a tool") == 2  # the SDK returned both thoughts
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details.cached_tokens > lengths[0]
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0


@pytest.mark.parametrize("stream_arguments", [False, True])
def test_openai_custom_tools_of_chat(gpt: openai.OpenAI, server: Server, stream_arguments: bool):
    server.say("x</think>" + block(call("run", input='print("hi")\n{}'), call("run")))
    asked: Any = {
        "model": "x",
        "messages": [{"role": "user", "content": "Go"}],
        "tools": [{"type": "custom", "custom": {"name": "run", "description": "Runs code."}}],
        "extra_body": {"stream_arguments": stream_arguments},
    }
    message = gpt.chat.completions.create(**asked).choices[0].message
    calls: Any = message.tool_calls
    assert [(one.type, one.custom.name) for one in calls] == [("custom", "run")] * 2
    assert [one.custom.input for one in calls] == ['print("hi")\n{}', ""]
    streamed: list[Any] = [
        one
        for chunk in gpt.chat.completions.create(stream=True, **asked)
        for one in chunk.choices[0].delta.tool_calls or []
    ]
    assert [(one.index, one.type, one.custom) for one in streamed] == [
        (at, "custom", one.custom.model_dump()) for at, one in enumerate(calls)
    ]
    results = [{"role": "tool", "tool_call_id": one.id, "content": "hi"} for one in calls]
    asked["messages"] += [message, *results]
    gpt.chat.completions.create(**asked)
    assert 'print("hi")\n{}' in server.prompt


def test_openai_stream_helper(gpt: openai.OpenAI):
    messages: list[Any] = [{"role": "user", "content": "[[one]]"}]
    with gpt.chat.completions.stream(
        model="x", messages=messages, tools=[BASH], stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    message = final.choices[0].message
    assert message.role == "assistant"
    assert message.tool_calls[0].function.name == "bash"
    assert final.usage.completion_tokens > 0


def test_openai_structured_output(gpt: openai.OpenAI):
    class Answer(BaseModel):
        answer: int
        why: list[str]

    parsed = gpt.chat.completions.parse(
        model="x", messages=[{"role": "user", "content": "6 x 7"}], response_format=Answer
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_openai_responses_rounds_stream_and_store(gpt: openai.OpenAI, server: Server):
    first = gpt.responses.create(model="x", input="[[one]] Look.", tools=[RESPONSES_BASH])
    function = next(item for item in first.output if item.type == "function_call")
    output: Any = {
        "type": "function_call_output",
        "call_id": function.call_id,
        "output": "the colour is blue",
    }
    second = gpt.responses.create(
        model="x", previous_response_id=first.id, input=[output], tools=[RESPONSES_BASH]
    )
    assert "blue" in second.output_text
    assert "I should look with a tool" in server.prompt
    assert gpt.responses.retrieve(second.id).output_text == second.output_text
    gpt.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(second.id)
    with gpt.responses.stream(model="x", input="[[one]] Look.", tools=[RESPONSES_BASH]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.output_text.delta"} <= kinds
    assert final.output[-1].type == "function_call"


def test_openai_responses_say_what_form_they_have(gpt: openai.OpenAI):
    class Title(BaseModel):
        title: str

    reply = gpt.responses.parse(model="x", input="Name it", text_format=Title)
    form: Any = reply.text.format if reply.text else None
    assert (form.type, form.name, form.strict) == ("json_schema", "Title", True)
    assert form.schema_["required"] == ["title"]
    plain = gpt.responses.create(model="x", input="Name it", text={"verbosity": "low"})
    assert plain.text is not None
    assert plain.text.model_dump(exclude_unset=True) == {
        "format": {"type": "text"},
        "verbosity": "low",
    }


def test_openai_errors(gpt: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as refused:
        gpt.chat.completions.create(model="x", messages=[])
    assert refused.value.param == "messages"
    assert refused.value.request_id is not None
    with pytest.raises(openai.NotFoundError):
        gpt.models.retrieve("unknown")
    assert [m.id for m in gpt.models.list()] == ["scripted"]


def test_openai_logprobs_choices_and_completions(gpt: openai.OpenAI):
    made = gpt.chat.completions.create(
        model="x",
        messages=[{"role": "user", "content": "[[plain]]"}],
        logprobs=True,
        top_logprobs=2,
        n=2,
    )
    for choice in made.choices:
        tokens = choice.logprobs.content
        assert "".join(token.token for token in tokens) == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in tokens)
    plain = gpt.completions.create(model="x", prompt="Once", max_tokens=2, logprobs=1)
    assert plain.choices[0].finish_reason == "length"
    assert len(plain.choices[0].logprobs.tokens) == 2


def test_openai_cancellation_frees_the_work(gpt: openai.OpenAI, server: Server):
    server.say(Reply(text="word " * 5000, delay=0.005))
    before = server.backend.cancelled
    stream = gpt.chat.completions.create(
        model="x", messages=[{"role": "user", "content": "Count"}], stream=True
    )
    for _ in zip(range(5), stream, strict=False):
        pass
    assert server.backend.running == 1
    stream.close()
    assert until(lambda: server.backend.running == 0) < 1.0
    assert server.backend.cancelled == before + 1


def test_anthropic_rounds_of_tools_with_thinking(claude: anthropic.Anthropic, server: Server):
    messages: list[Any] = [{"role": "user", "content": "[[two]] What is there?"}]
    for _ in range(3):
        reply = claude.messages.create(
            model="claude",
            max_tokens=2000,
            messages=messages,
            tools=[ANTHROPIC_BASH],
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
        messages.append({"role": "assistant", "content": reply.content})
        if reply.stop_reason != "tool_use":
            break
        results: list[Any] = [
            {"type": "tool_result", "tool_use_id": part.id, "content": "blue"}
            for part in reply.content
            if part.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    assert reply.stop_reason == "end_turn"
    assert server.prompt.count("I should look with a tool") == 2
    assert reply.usage.cache_read_input_tokens > 0


def test_anthropic_stream_helper(claude: anthropic.Anthropic):
    with claude.messages.stream(
        model="x",
        max_tokens=1000,
        messages=[{"role": "user", "content": "[[par]] Look."}],
        tools=[ANTHROPIC_BASH],
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert {"thinking", "text", "signature", "input_json"} <= kinds
    assert [part.type for part in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert final.usage.output_tokens > 0


def test_anthropic_errors_models_and_counting(claude: anthropic.Anthropic):
    with pytest.raises(anthropic.BadRequestError) as refused:
        claude.messages.create(model="x", max_tokens=10, messages=[])
    assert "messages" in str(refused.value)
    counted = claude.messages.count_tokens(
        model="x", messages=[{"role": "user", "content": "Hello"}]
    )
    assert counted.input_tokens > 2
    assert [model.id for model in claude.models.list()] == ["scripted"]


def test_anthropic_stop_sequences_and_cancellation(claude: anthropic.Anthropic, server: Server):
    server.say("x</think>one two STOP three")
    reply = claude.messages.create(
        model="x", max_tokens=100, messages=[{"role": "user", "content": "Go"}],
        stop_sequences=["STOP"],
    )  # fmt: skip
    assert reply.stop_reason == "stop_sequence"
    assert reply.stop_sequence == "STOP"
    assert reply.content[-1].text == "one two "
    server.say(Reply(text="word " * 5000, delay=0.005))
    with claude.messages.stream(
        model="x", max_tokens=9000, messages=[{"role": "user", "content": "Count"}]
    ) as stream:
        next(iter(stream))
    assert until(lambda: server.backend.running == 0) < 1.0


def test_anthropic_tool_runner(claude: anthropic.Anthropic, server: Server):
    """It asks for a thread on the server at first, and goes on without when there is none."""

    @anthropic.beta_tool
    def bash(command: str) -> str:
        """Run a command."""
        return f"ran {command}"

    runner = claude.beta.messages.tool_runner(
        model="x",
        max_tokens=2000,
        messages=[{"role": "user", "content": "[[two]] Look."}],
        tools=[bash],
    )
    assert [reply.stop_reason for reply in runner] == ["tool_use", "tool_use", "end_turn"]
    assert server.prompt.count("<tool_result>ran ") == 2


def test_anthropic_structured_output(claude: anthropic.Anthropic):
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
        "additionalProperties": False,
    }
    reply = claude.messages.create(
        model="x",
        max_tokens=1000,
        messages=[{"role": "user", "content": "Name it"}],
        extra_body={"output_config": {"format": {"type": "json_schema", "schema": schema}}},
    )
    assert list(json.loads(reply.content[-1].text)) == ["title"]
