"""Streams: the first byte, signs of life, and the end of the work when the client leaves."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from fathom.server.scripted import Reply
from tests.server.conftest import BASH, Open, Server, block, call, events
from tests.server.test_sdks import until


def open_request(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection


MESSAGES = [{"role": "user", "content": "x"}]
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5000},
    "/v1/responses": {"input": MESSAGES},
    "/v1/completions": {"prompt": "x", "max_tokens": 5000},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_work_ends_when_the_client_leaves(server: Server, path: str, stream: bool, phase: str):
    """Also during a long prefill and also when nothing is streamed."""
    wait = {"first_delay": 30.0} if phase == "prefill" else {"delay": 0.01}
    server.say(Reply(text="word " * 4000, **wait))
    seen = len(server.backend.requests)
    connection = open_request(server, path, {**BODIES[path], "stream": stream})
    until(lambda: len(server.backend.requests) > seen and server.backend.running == 1)
    connection.close()
    assert until(lambda: server.backend.running == 0) < 0.5


def test_a_waiting_request_whose_client_left_never_runs(open_server: Open):
    server = open_server(limits={"running": 1})
    server.say(Reply(text="word " * 400, delay=0.01))
    first = open_request(server, "/v1/chat/completions", BODIES["/v1/chat/completions"])
    until(lambda: server.backend.running == 1)
    second = open_request(server, "/v1/chat/completions", BODIES["/v1/chat/completions"])
    until(lambda: "fathom_waiting 1.0" in server.client.get("/metrics").text)
    second.close()
    until(lambda: "fathom_waiting 0.0" in server.client.get("/metrics").text)
    first.close()
    until(lambda: server.backend.running == 0)
    assert len(server.backend.requests) == 1


@pytest.mark.parametrize("path", BODIES)
def test_signs_of_life_during_a_long_prefill(open_server: Open, path: str):
    server = open_server(limits={"keep_alive_seconds": 0.05})
    server.say(Reply(text="</think>ok", first_delay=0.4))
    body = {**BODIES[path], "stream": True}
    with server.client.stream("POST", path, json=body) as response:
        started, first = time.perf_counter(), 0.0
        text = ""
        for piece in response.iter_text():
            first = first or time.perf_counter() - started
            text += piece
    sign = "event: ping" if path == "/v1/messages" else ": keep-alive"
    assert text.count(sign) >= 3
    assert first < 0.3
    assert "ok" in text


def test_trouble_before_the_first_byte_is_an_http_error_and_after_it_an_event(open_server: Open):
    server = open_server(limits={"keep_alive_seconds": 0.05})
    server.say(Reply(text="</think>ok", fail_after=0))
    assert server.chat(stream=True).status_code == 502
    server.say(Reply(text="</think>ok", fail_after=0, first_delay=0.3))
    late = server.chat(stream=True)  # a sign of life went out before
    assert late.status_code == 200
    assert events(late.text)[-1]["error"]["code"] == "backend_failed"
    assert "[DONE]" not in late.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_the_first_byte_comes_with_the_first_token(server: Server, path: str):
    times: list[float] = []

    def script(prompt: str) -> Reply:
        return Reply(text="one two</think>" + "word " * 50, delay=0.03)

    server.say(script)
    for _ in range(3):
        with server.client.stream("POST", path, json={**BODIES[path], "stream": True}) as response:
            chunks = response.iter_bytes()
            next(chunks)
            first = time.perf_counter()
            next(chunks)
            times.append(time.perf_counter() - first)
            response.close()
    # The first piece went out on its own, a token's time before the second, not collected with it.
    assert max(times) > 0.015
    until(lambda: server.backend.running == 0)


def test_a_held_call_leaves_the_stream_alive_and_comes_whole(open_server: Open):
    server = open_server(limits={"keep_alive_seconds": 0.05})
    server.say(Reply(text="</think>" + block(call(command="word " * 40)), delay=0.005))
    with server.client.stream(
        "POST",
        "/v1/chat/completions",
        json={"messages": MESSAGES, "tools": [BASH], "stream": True},
    ) as response:
        pieces = list(response.iter_text())
    text = "".join(pieces)
    at = text.index('"tool_calls":[')
    assert text.index(": keep-alive") < at
    parts = [
        p for e in events(text) for c in e["choices"] for p in c["delta"].get("tool_calls", [])
    ]
    assert len(parts) == 1


def test_pieces_never_split_a_character(server: Server):
    said = "caf\u00e9 \U0001f600 \u4f60\u597d \u2028 end"
    server.say(f"x</think>{said}")
    found = events(server.chat(stream=True).text)
    assert "".join(c["delta"].get("content") or "" for e in found for c in e["choices"]) == said
    assert "\ufffd" not in server.messages(stream=True).text


def test_a_stream_in_small_network_pieces_is_the_same(server: Server):
    body = {**BODIES["/v1/chat/completions"], "stream": True}
    with open_request(server, "/v1/chat/completions", body) as connection:
        data = b""
        while b"[DONE]" not in data:
            data += connection.recv(5)
    assert b'"finish_reason":"stop"' in data
