"""The chat-completions format without a network."""

from __future__ import annotations

from typing import Any

import pytest

from fathom.agent.wire import (
    ReplyBuilder,
    UnreadableReply,
    endpoint,
    is_overflow,
    request_body,
    unwanted_field,
)
from fathom.chat.reply import Piece, Reply, Sampling, Timings, Usage
from fathom.errors import AgentError


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("http://host/v1", "http://host/v1"),
        ("http://host/v1/", "http://host/v1"),
        ("https://api.host/beta", "https://api.host/beta"),
        ("http://host/v1/chat/completions", "http://host/v1"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert endpoint(url) == base


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "", "file:///etc"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(AgentError, match="http"):
        endpoint(url)


def body(thinking: str = "high", **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tools": [],
        "thinking": thinking,
        "max_tokens": None,
        "sampling": Sampling(),
        "reasoning_field": "reasoning_content",
    }
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"role": "assistant", "content": "b"},
    ]
    return request_body("m", messages, **(settings | changes))


def test_reasoning_travels_back_under_the_server_s_name() -> None:
    assert body()["messages"][1:] == [
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"role": "assistant", "content": "b", "reasoning_content": ""},
    ]
    assert body(reasoning_field="reasoning")["messages"][1] == {
        "role": "assistant",
        "content": "a",
        "reasoning": "r",
    }
    assert body("off")["messages"][1] == {"role": "assistant", "content": "a"}


def test_thinking_is_switched_in_every_dialect() -> None:
    off, most = body("off"), body("max")
    assert off["thinking"] == {"type": "disabled"}
    assert off["chat_template_kwargs"]["thinking"] is False
    assert "reasoning_effort" not in off
    assert most["thinking"] == {"type": "enabled"}
    assert most["reasoning_effort"] == "max"


def test_what_was_not_chosen_is_not_sent() -> None:
    assert not {"tools", "max_tokens", "temperature", "top_p", "seed"} & body().keys()
    sent = body(max_tokens=5, sampling=Sampling(temperature=0.0, top_p=0.5, seed=0))
    assert [sent[name] for name in ("max_tokens", "temperature", "top_p", "seed")] == [5, 0, 0.5, 0]


@pytest.mark.parametrize(
    ("refusal", "field"),
    [
        ("Unrecognized request argument supplied: thinking", "thinking"),
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.", "max_tokens"),
        ("extra fields not permitted: chat_template_kwargs", "chat_template_kwargs"),
        ("unknown field `seed`", "seed"),
        ("The reasoning_content in the thinking mode must be passed back", None),
        ("Unknown model m", None),
    ],
)
def test_the_field_a_refusal_names(refusal: str, field: str | None) -> None:
    assert unwanted_field(body(max_tokens=5, sampling=Sampling(seed=1)), refusal) == field


def test_overflows_are_told_from_other_refusals() -> None:
    assert is_overflow('{"error": {"code": "context_length_exceeded"}}')
    assert is_overflow("This model's maximum context length is 4096 tokens")
    assert not is_overflow("messages must not be empty")


def build(*chunks: Any) -> tuple[Reply, list[Piece]]:
    builder = ReplyBuilder()
    pieces = [piece for chunk in chunks for piece in builder.add(chunk)]
    return builder.reply(Timings()), pieces


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": finish}]}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_stream_of_reasoning_and_content(name: str) -> None:
    reply, pieces = build(
        delta(role="assistant", content=""),
        delta(**{name: "th"}),
        delta(**{name: "ink"}, content=None),
        delta(content="4"),
        delta(content="2"),
        delta("stop"),
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}},
    )
    assert (reply.message.reasoning, reply.message.content) == ("think", "42")
    assert reply.finish_reason == "stop"
    assert reply.usage == Usage(prompt_tokens=7, completion_tokens=4)
    assert [(piece.kind, piece.text) for piece in pieces] == [
        ("reasoning", "th"),
        ("reasoning", "ink"),
        ("content", "4"),
        ("content", "2"),
    ]


def part(index: int | None, call_id: str | None, name: str | None, arguments: str) -> dict:
    fragment: dict[str, Any] = {"function": {"name": name, "arguments": arguments}}
    if index is not None:
        fragment["index"] = index
    if call_id is not None:
        fragment["id"] = call_id
    return fragment


def test_calls_in_fragments() -> None:
    reply, _ = build(
        delta(tool_calls=[part(0, "a", "bash", "")]),
        delta(tool_calls=[part(0, None, None, '{"comm')]),
        delta(tool_calls=[part(1, "b", "edit", '{"path": "x"}')]),
        delta(tool_calls=[part(0, None, None, 'and": "ls"}')]),
        delta("tool_calls"),
    )
    first, second = reply.message.tool_calls
    assert (first.id, first.name, first.arguments) == ("a", "bash", '{"command": "ls"}')
    assert (second.id, second.name, second.arguments) == ("b", "edit", '{"path": "x"}')
    assert reply.finish_reason == "tool_calls"


def test_whole_calls_without_index_or_id() -> None:
    reply, _ = build(
        delta(tool_calls=[part(None, None, "bash", "{}"), part(None, None, "edit", "")]),
        delta("stop"),
    )
    assert [call.name for call in reply.message.tool_calls] == ["bash", "edit"]
    assert len({call.id for call in reply.message.tool_calls}) == 2
    assert all(call.arguments == "{}" for call in reply.message.tool_calls)
    assert reply.finish_reason == "tool_calls"


def test_calls_whose_index_is_null_stay_apart() -> None:
    calls = [{"index": None, "function": {"name": name, "arguments": "{}"}} for name in "ab"]
    reply, _ = build(delta(tool_calls=calls), delta("stop"))
    assert [call.name for call in reply.message.tool_calls] == ["a", "b"]


@pytest.mark.parametrize("odd", ["3", None, [], {}, float("nan"), float("inf"), -1])
def test_an_odd_account_costs_no_reply(odd: Any) -> None:
    usage = {"prompt_tokens": odd, "completion_tokens": odd, "prompt_cache_hit_tokens": odd}
    reply, _ = build(delta("stop", content="hi"), {"choices": [], "usage": usage})
    assert (reply.message.content, reply.usage) == ("hi", Usage())


@pytest.mark.parametrize(("finish", "partial"), [("length", True), ("tool_calls", False)])
@pytest.mark.parametrize("arguments", ['{"command": "rm', "[1]", "hello"])
def test_arguments_that_are_no_object_are_marked(
    arguments: str, finish: str, partial: bool
) -> None:
    reply, _ = build(delta(tool_calls=[part(0, "a", "bash", arguments)]), delta(finish))
    (made,) = reply.message.tool_calls
    assert (made.partial, made.repaired, made.arguments) == (partial, not partial, "{}")


def test_a_call_cut_off_before_its_arguments_is_partial() -> None:
    reply, _ = build(delta(tool_calls=[part(0, "a", "bash", "")]), delta("length"))
    assert reply.message.tool_calls[0].partial
    assert reply.finish_reason == "length"


def test_a_whole_completion_reads_like_a_stream() -> None:
    reply, _ = build(
        {
            "choices": [
                {
                    "message": {"role": "assistant", "content": "hi", "reasoning_content": "r"},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
        }
    )
    assert (reply.message.content, reply.message.reasoning) == ("hi", "r")
    assert reply.usage.cached_tokens == 2


@pytest.mark.parametrize(
    "chunk",
    [
        [],
        "text",
        {"choices": [3]},
        {"choices": [{"delta": {"content": 5}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"name": 1}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": "0", "function": {"name": "a"}}]}}]},
        {"error": {"message": "overloaded"}},
    ],
)
def test_anything_else_is_unreadable(chunk: Any) -> None:
    with pytest.raises(UnreadableReply):
        build(chunk)
