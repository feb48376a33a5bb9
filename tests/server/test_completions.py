"""Plain completions: several at the same time, their offsets, and what is told of a request."""

from __future__ import annotations

import time
from typing import Any

import httpx2
import pytest

from fathom.server.scripted import Reply
from tests.server.conftest import Open, Server, events


def complete(server: Server, **fields: Any) -> httpx2.Response:
    return server.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 50} | fields)


@pytest.mark.parametrize("fields", [{"n": 4}, {"prompt": ["a", "b", "c", "d"]}], ids=["n", "many"])
def test_completions_that_are_not_streamed_run_at_the_same_time(
    server: Server, fields: dict[str, Any]
):
    server.say(Reply(text="said", first_delay=0.4))
    started = time.perf_counter()
    choices = complete(server, **fields).json()["choices"]
    assert time.perf_counter() - started < 1.0  # one behind the other takes 1.6
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        (at, "said") for at in range(4)
    ]


def test_one_failure_ends_all_of_them(server: Server):
    def script(prompt: str) -> Reply:
        return Reply(
            text="word " * 4000, delay=0.01, fail_after=3 if prompt.endswith("b") else None
        )

    server.say(script)
    assert complete(server, prompt=["a", "b"], max_tokens=4000).status_code == 502
    assert server.backend.running == 0


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_of_a_stream_go_on(server: Server, echo: bool):
    server.say("one two three")
    fields = {"logprobs": 1, "echo": echo, "prompt": "zero "}
    whole = complete(server, **fields).json()["choices"][0]
    found = events(complete(server, stream=True, **fields).text)
    parts = [choice["logprobs"] for event in found for choice in event["choices"]]
    offsets = [at for part in parts if part for at in part["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]
    assert offsets[0] == (len("zero ") if echo else 0)
    for at, token in zip(offsets, whole["logprobs"]["tokens"], strict=True):
        assert whole["text"][at:].startswith(token) or "sentence" in token


def test_fields_without_effect_are_told(server: Server):
    response = complete(server, best_of=2, presence_penalty=1.0, user="me", top_k=5, n=1)
    notice = response.headers["x-fathom-notice"]
    assert "'best_of'" in notice
    assert "presence_penalty has no effect: this engine chooses no tokens" in notice
    assert "top_k has no effect" in notice
    assert "'user'" not in notice
    assert "x-fathom-notice" not in complete(server).headers


def test_the_queue_counts_every_completion_of_a_request(open_server: Open):
    server = open_server(limits={"running": 2, "waiting": 1})
    server.say("x</think>y")
    refused = complete(server, n=4)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert server.chat(n=4).status_code == 503
    assert complete(server, n=3).status_code == 200
    assert server.chat(n=3).status_code == 200


def test_usage_counts_every_prompt_once(server: Server):
    body = {"prompt": [[5, 6, 7], [8, 9]], "n": 2, "max_tokens": 3}
    reply = server.client.post("/v1/completions", json=body).json()
    made = reply["usage"]["completion_tokens"]
    assert reply["usage"]["prompt_tokens"] == 5
    assert reply["usage"]["total_tokens"] == 5 + made
    assert len(reply["choices"]) == 4


def test_missing_logprobs_of_the_prompt_are_told(server: Server):
    body = {"prompt": "a b", "echo": True, "logprobs": 1, "max_tokens": 1}
    reply = server.client.post("/v1/completions", json=body)
    assert "no logprobs of the prompt" in reply.headers["x-fathom-notice"]
