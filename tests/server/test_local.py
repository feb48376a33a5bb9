"""The real model in this process behind the server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

import fathom
from fathom.engine.backend import LocalBackend
from fathom.server.run import running
from tests.server.conftest import BASH

# The first run on a machine compiles the decoder.
pytestmark = pytest.mark.timeout(300)

TITLE = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 10}, "done": {"type": "boolean"}},
    "required": ["title", "done"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def nano() -> Iterator[httpx2.Client]:
    backend = LocalBackend(fathom.load("nano"))
    with running(backend) as url, httpx2.Client(base_url=url, timeout=280) as client:
        yield client


def chat(nano: httpx2.Client, content: str = "What is 2 + 2? json", **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 100, **fields}
    response = nano.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_seed_repeats_a_reply_and_greedy_is_one(nano: httpx2.Client):
    def said(**fields: Any) -> str:
        return json.dumps(chat(nano, max_tokens=10, **fields)["choices"][0]["message"])

    assert said(seed=5) == said(seed=5)
    assert said(temperature=0) == said(temperature=0, seed=9)
    assert said(top_k=1) == said(temperature=0)  # the most probable token alone is greedy


def test_logprobs_are_those_of_the_model(nano: httpx2.Client):
    made = chat(nano, temperature=0, max_tokens=10, logprobs=True, top_logprobs=3)
    records = made["choices"][0]["logprobs"]["reasoning_content"]
    assert records
    for record in records:
        tops = [t["logprob"] for t in record["top_logprobs"]]
        assert tops == sorted(tops, reverse=True)
        assert record["logprob"] == tops[0]  # greedy takes the best one
        assert sum(2.718281828**t for t in tops) <= 1.0001


def test_cached_tokens_are_reported(nano: httpx2.Client):
    text = "Tell me about this: " + "a long story, " * 10
    chat(nano, text + "one", max_tokens=1)
    chat(nano, text + "two", max_tokens=1)  # finds out what both share, and keeps that
    usage = chat(nano, text + "six", max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 40


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_a_required_call_of_the_model(nano: httpx2.Client, thinking: str):
    choice = chat(nano, tools=[BASH], tool_choice="required", thinking={"type": thinking}, seed=1)
    calls = choice["choices"][0]["message"]["tool_calls"]
    assert calls[0]["function"]["name"] == "bash"
    assert isinstance(json.loads(calls[0]["function"]["arguments"]), dict)


def test_a_schema_binds_the_model(nano: httpx2.Client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": TITLE}}
    choice = chat(nano, response_format=form, seed=3)["choices"][0]
    value = json.loads(choice["message"]["content"])
    assert list(value) == ["title", "done"]
    assert len(value["title"]) <= 10


def test_without_tools_the_model_cannot_call(nano: httpx2.Client):
    for seed in range(2):
        made = chat(nano, seed=seed, max_tokens=25)
        assert "tool_calls" not in made["choices"][0]["message"]
        assert not made.get("fathom", {}).get("withheld_calls")


def test_leaving_frees_the_model_for_the_next(nano: httpx2.Client):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5000, "stream": True}
    with nano.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_bytes())
    started = time.perf_counter()
    chat(nano, max_tokens=2)
    assert time.perf_counter() - started < 5


def test_what_the_model_refuses_is_a_400(nano: httpx2.Client):
    response = nano.post("/v1/completions", json={"prompt": [10**6]})
    assert response.status_code == 400
