"""Random conversations and completions: the same prompt and the same calls as DeepSeek's own code.

What we decide otherwise (docs/protocol.md) is left out of the inputs, and nothing else.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.chat import Message, ToolCall, render
from fathom.chat.protocol import DSML, EOS
from fathom.chat.requests import PromptRequest, read_chat, read_messages, read_responses
from tests.chat import samples
from tests.chat.samples import read_stream
from tests.chat.test_properties import agent_talks, as_messages_api, as_responses_api, cut

oracle = pytest.importorskip("tests.chat.oracle", reason="needs the package deepseek-recipe")

texts = samples.hostile_text.map(lambda text: text.encode("utf-8", "replace").decode())
# Both write these alike; about other numbers see the page.
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.sampled_from([0.5, -1.25, 1e22]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
keys = texts.filter(lambda key: DSML not in key and "string=" not in key)
arguments = st.dictionaries(
    keys, texts.filter(lambda text: DSML not in text) | plain_values, max_size=3
).filter(lambda found: f"</{DSML}" not in json.dumps(found, ensure_ascii=False))
tools = st.lists(
    st.builds(
        lambda name, description, schema: {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": {"type": "object", "properties": schema},
            },
        },
        st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True),
        texts,
        st.dictionaries(texts, st.just({"type": "string"}), max_size=2),
    ),
    max_size=2,
    unique_by=lambda tool: tool["function"]["name"],
)


def content_of(draw: st.DrawFn) -> Any:
    parts = st.lists(texts.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3)
    return draw(texts | parts)


@st.composite
def chat_bodies(draw: st.DrawFn) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 2))):
        messages.append({"role": "system", "content": draw(texts)})
    for turn in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["user", "user", "assistant", "calls", "latest_reminder"]))
        if kind == "user":
            messages.append({"role": "user", "content": content_of(draw)})
        elif kind == "latest_reminder":
            messages.append({"role": kind, "content": draw(texts)})
        else:
            message: dict[str, Any] = {"role": "assistant", "content": draw(texts)}
            if draw(st.booleans()):
                message["reasoning_content"] = draw(texts)
            messages.append(message)
            if kind == "calls":
                ids = [f"{turn}.{at}" for at in range(draw(st.integers(1, 3)))]
                message["tool_calls"] = [
                    samples.call("run", call_id, **{}) | {"function": function(draw)}
                    for call_id in ids
                ]
                for call_id in draw(st.permutations(ids)):
                    result = {"role": "tool", "tool_call_id": call_id, "content": content_of(draw)}
                    messages.append(result)
    body: dict[str, Any] = {"messages": messages, "tools": draw(tools)}
    effort = draw(st.sampled_from([None, "none", "minimal", "low", "medium", "xhigh", "ultra"]))
    switch = draw(st.sampled_from([None, "enabled", "disabled", "adaptive"]))
    if effort:
        body["reasoning_effort"] = effort
    if switch:
        body["thinking"] = {"type": switch}
    if draw(st.booleans()):
        schema = {"name": "x", "schema": {"type": "object", "title": draw(texts)}}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    # The oracle refuses to continue an answer where there are tools or were calls.
    has_tools = body["tools"] or any("tool_calls" in message for message in messages)
    if messages[-1]["role"] == "assistant" and not has_tools and draw(st.booleans()):
        messages[-1]["prefix"] = True
    return body


def function(draw: st.DrawFn) -> dict[str, Any]:
    wrong = st.sampled_from(["", "{", "[1]", '"text"', "5", "null"])
    given_arguments = draw(arguments.map(lambda a: json.dumps(a, ensure_ascii=False)) | wrong)
    return {"name": draw(st.sampled_from(["run", "f-1"])), "arguments": given_arguments}


def outcome(request: PromptRequest) -> dict[str, Any]:
    at, ranges = 0, list[list[int]]()
    for segment in request.segments():
        if segment.special:
            ranges.append([at, at + len(segment.text)])
        at += len(segment.text)
    thinking = request.thinking != "off"
    return {
        "status": 200,
        "prompt": request.prompt(),
        "special": ranges,
        "thinking": thinking,
    }


@settings(max_examples=50)
@given(chat_bodies())
def test_chat_requests_give_the_same_prompt_and_special_tokens(body: dict[str, Any]) -> None:
    assert outcome(read_chat(body)) == oracle.convert("chat", body)


@settings(max_examples=50)
@given(agent_talks())
def test_messages_and_responses_give_the_same_prompt(messages: list[dict[str, Any]]) -> None:
    for message in messages:  # the oracle takes no lone surrogates
        for key in ("content", "reasoning_content"):
            if key in message:
                message[key] = message[key].encode("utf-8", "replace").decode()
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps({"text": "value"})
    messages.append({"role": "user", "content": "next"})
    for api, read, make in (
        ("messages", read_messages, as_messages_api),
        ("responses", read_responses, as_responses_api),
    ):
        body = make(messages)
        assert outcome(read(body)) == oracle.convert(api, body), api


# The oracle writes argument names into its JSON as they are and strips blanks around them, so that
# a name with a quote breaks it. Names here are words.
canonical_arguments = st.dictionaries(
    st.from_regex(r"[\w.$-]{1,8}", fullmatch=True),
    texts.filter(lambda text: DSML not in text) | plain_values,
    max_size=3,
).filter(lambda found: DSML not in json.dumps(found, ensure_ascii=False))
canonical_calls = st.lists(
    st.builds(
        lambda name, values: ToolCall(name=name, arguments=json.dumps(values, ensure_ascii=False)),
        st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True),
        canonical_arguments,
    ),
    max_size=3,
)
canonical_prose = samples.prose.map(lambda text: text.encode("utf-8", "replace").decode()).filter(
    # An EOS at the end is the end for us; the oracle leaves it to its caller.
    lambda text: DSML not in text and EOS not in text
)


@settings(max_examples=50)
@given(canonical_prose, canonical_prose, canonical_calls, st.booleans(), st.data())
def test_canonical_completions_are_read_alike(
    reasoning: str, content: str, calls: list[ToolCall], thinks: bool, data: st.DataObject
) -> None:
    message = Message(reasoning=reasoning if thinks else "", content=content, tool_calls=calls)
    mode = "high" if thinks else "off"
    completion = render(message, mode).removesuffix(EOS)
    found, _ = read_stream(cut(completion, data), mode, trim=True)
    result = oracle.parse(cut(completion, data), thinks)
    assert found.reasoning == result["reasoning"]
    expected = result["content"]
    if calls and content.endswith("<"):
        # The oracle takes the "<" for the beginning of a tag and leaves one of the block's two line
        # breaks in the content: docs/protocol.md.
        expected = expected.removesuffix("\n")
    assert found.content == expected
    assert [(call.name, call.arguments) for call in found.tool_calls] == [
        (call["name"], call["arguments"]) for call in result["tool_calls"]
    ]


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["a", "b", "ab", "\n", " ", "<"]), max_size=12), st.data())
def test_stop_texts_end_the_content_alike(parts: list[str], data: st.DataObject) -> None:
    content = "".join(parts)
    stop = data.draw(st.lists(st.sampled_from(["ab", "ba", "\n\n", "a b", "bb"]), max_size=2))
    found, _ = read_stream(cut(content, data), "off", trim=True, stop=stop)
    assert found.content == oracle.parse([content], False, stop_sequences=stop)["content"]
