"""Every vector of the protocol: same result, or listed in docs/protocol.md with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fathom.chat import (
    ArgumentsDelta,
    CallStarted,
    ContentDelta,
    Event,
    Message,
    ReasoningDelta,
    StreamParser,
)
from fathom.chat.requests import (
    PromptRequest,
    RequestOptions,
    read_chat,
    read_messages,
    read_responses,
)
from fathom.errors import RequestError
from tests.chat.conftest import Vector
from tests.chat.differences import listed
from tests.chat.samples import is_clean, read_stream

Read = Callable[[str], list[Vector]]
READERS: dict[str, Callable[[dict[str, Any], RequestOptions], PromptRequest]] = {
    "chat": read_chat,
    "messages": read_messages,
    "responses": read_responses,
}
STAGES = {
    None: "content",
    "ReasoningStart": "reasoning",
    "ReasoningContinuation": "reasoning",
    "ContentContinuation": "content",
}


def calls_of(message: Message) -> list[dict[str, str]]:
    return [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]


# Requests


def read_request(api: str, body: dict[str, Any], **options: Any) -> PromptRequest:
    body = dict(body)
    strict = body.pop("_option", None) == "reject_missing_reasoning"
    return READERS[api](body, RequestOptions(require_reasoning=strict, **options))


def outcome(request: PromptRequest) -> dict[str, Any]:
    sampling = request.default_sampling()
    return {
        "status": 200,
        "prompt": request.prompt(),
        "thinking": request.thinking != "off",
        "temperature": sampling.temperature,
        "top_p": pytest.approx(sampling.top_p),
        "start": request.start,
    }


def expected_outcome(expected: dict[str, Any]) -> dict[str, Any]:
    if expected["status"] != 200:
        return {"status": expected["status"]}
    wish = expected["parse"]
    start = "tool_calls" if wish["starts_in_tool_calls"] else STAGES[wish["stage"]]
    kept = ("status", "prompt", "thinking", "temperature", "top_p")
    return {key: expected[key] for key in kept} | {"start": start}


@pytest.mark.parametrize("api", READERS)
def test_request_vectors(read_vectors: Read, api: str) -> None:
    different: set[str] = set()
    for vector in read_vectors(f"request_{api}"):
        try:
            found = outcome(read_request(api, vector["input"]))
        except RequestError as error:
            found = {"status": 400 if error.param else 500}
        if expected_outcome(vector["expected"]) != found:
            different.add(vector["name"])
    assert different == listed(f"req.{api}.")


def test_system_messages_can_be_hoisted_as_the_hosted_api_does(read_vectors: Read) -> None:
    moved = ("req.chat.system_mid_hoisted", "req.chat.two_systems")
    vectors = [vector for vector in read_vectors("request_chat") if vector["name"] in moved]
    assert len(vectors) == len(moved)
    for vector in vectors:
        request = read_request("chat", vector["input"], hoist_system=True)
        assert request.prompt() == vector["expected"]["prompt"]


def test_special_ranges(read_vectors: Read) -> None:
    different: set[str] = set()
    for vector in read_vectors("special_ranges"):
        request = read_request(vector["name"].split(".")[1], vector["input"])
        at, ranges = 0, list[list[Any]]()
        for segment in request.segments():
            if segment.special:
                ranges.append([at, at + len(segment.text), segment.text])
            at += len(segment.text)
        expected = vector["expected"]
        if (request.prompt(), ranges) != (expected["prompt"], expected["special"]):
            different.add(vector["name"])
    assert different == listed("ranges.")


# Completions


def test_strict_vectors(read_vectors: Read) -> None:
    """What the reference reads, we read alike; what it refuses, we never take for canonical."""
    different: set[str] = set()
    compared = 0
    for vector in read_vectors("parse_strict"):
        thinking = "off" if vector["input"]["thinking_mode"] == "chat" else "high"
        message, _ = read_stream([vector["input"]["text"]], thinking)
        if vector["expected"].get("error"):
            if is_clean(message):
                different.add(vector["name"])
            continue
        found = {
            "reasoning_content": message.reasoning,
            "content": message.content,
            "tool_calls": calls_of(message),
        }
        compared += 1
        assert found == vector["expected"], vector["name"]
        assert is_clean(message), vector["name"]
    assert compared > 10
    assert different == listed("parse.strict.")


def test_official_stream_parser_vectors(read_vectors: Read) -> None:
    different: set[str] = set()
    for vector in read_vectors("parse_api"):
        given, expected = vector["input"], vector["expected"]
        message, _ = read_stream(
            [given["text"]],
            "high" if given["thinking"] else "off",
            trim=True,
            tools=given.get("parse_tool_calls", True),
            start="tool_calls" if given.get("starts_in_tool_calls") else None,
            stop=given.get("stop_sequences", ()),
        )
        found = (message.reasoning or None, message.content, calls_of(message))
        if found != (expected["reasoning"], expected["content"], expected["tool_calls"]):
            different.add(vector["name"])
    assert different == listed("parse.api.") | listed("parse.truncated.") | listed("parse.option.")


def test_observed_vectors(read_vectors: Read) -> None:
    """Where parsers disagree we side with at least one of them, or say why with none."""
    alone: set[str] = set()
    for vector in read_vectors("parse_observed"):
        message, _ = read_stream(
            [vector["input"]["text"]], "high" if vector["input"]["thinking"] else "off", trim=True
        )
        found = (message.content, calls_of(message))
        theirs: list[dict[str, Any]] = []
        for result in vector["expected"].values():
            theirs += [result, result.get("whole", {}), result.get("stream_char", {})]
        read = [
            ((result["content"] or "").rstrip("\n"), result["tool_calls"])
            for result in theirs
            if "tool_calls" in result
        ]
        if (str(found[0]).rstrip("\n"), found[1]) not in read:
            alone.add(vector["name"])
    assert alone == listed("parse.observed.")


# Streams


def merge(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join neighbouring pieces of the same kind: only their division may differ."""
    merged: list[tuple[str, str]] = []
    for kind, text in parts:
        if kind != "call" and merged and merged[-1][0] == kind:
            merged[-1] = (kind, merged[-1][1] + text)
        elif text or kind == "call":
            merged.append((kind, text))
    return merged


def events_of_api(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    for event in events:
        kind = event.get("type")
        delta = event.get("delta") or {}
        if event.get("object") == "chat.completion.chunk":
            delta = event["choices"][0]["delta"] if event["choices"] else {}
            parts.append(("reasoning", delta.get("reasoning_content") or ""))
            parts.append(("content", delta.get("content") or ""))
            for call in delta.get("tool_calls") or []:
                if "name" in call["function"]:
                    parts.append(("call", call["function"]["name"]))
                parts.append(("arguments", call["function"].get("arguments") or ""))
        elif kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
            parts.append(("call", event["content_block"]["name"]))
        elif kind == "content_block_delta":
            parts.append(("reasoning", delta.get("thinking", "")))
            parts.append(("content", delta.get("text", "")))
            parts.append(("arguments", delta.get("partial_json", "")))
        elif kind == "response.output_item.added" and event["item"]["type"] == "function_call":
            parts.append(("call", event["item"]["name"]))
        elif kind == "response.reasoning_text.delta":
            parts.append(("reasoning", delta))
        elif kind == "response.output_text.delta":
            parts.append(("content", delta))
        elif kind == "response.function_call_arguments.delta":
            parts.append(("arguments", delta))
    return merge(parts)


def events_of_parser(events: list[Event]) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                parts.append(("reasoning", text))
            case ContentDelta(text):
                parts.append(("content", text))
            case CallStarted(name=name):
                parts.append(("call", name))
            case ArgumentsDelta(text=text):
                parts.append(("arguments", text))
            case _:
                pass
    return merge(parts)


@pytest.mark.parametrize("stream_arguments", [True, False])
def test_stream_events(read_vectors: Read, stream_arguments: bool) -> None:
    vectors = read_vectors("stream_events")
    assert len(vectors) == 6
    for vector in vectors:
        given = vector["input"]
        parser = StreamParser(
            "high" if given["thinking"] else "off", trim=True, stream_arguments=stream_arguments
        )
        events = [event for chunk in given["chunks"] for event in parser.feed(chunk)]
        events += parser.close()
        expected = events_of_api(vector["expected"]["events"])
        assert events_of_parser(events) == expected, vector["name"]
        assert len(expected) > 1, vector["name"]
