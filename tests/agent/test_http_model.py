"""HTTPModel against a real server on loopback."""

from __future__ import annotations

import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import anyio
import pytest

from fathom.agent import Agent, HTTPModel, ToolSet
from fathom.chat.reply import Piece, Reply, Sampling
from fathom.errors import ModelUnreachable
from tests.agent.chat_server import answer, serving, status, stream, tool_call, whole
from tests.agent.doubles import FakeSandbox

ASK = [{"role": "user", "content": "q"}]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FATHOM_API_KEY", raising=False)


def ask(url: str, *, pieces: list[Piece] | None = None, **settings: Any) -> Reply:
    model = HTTPModel(url, **({"model": "m", "backoff": 0.01} | settings))
    log = [] if pieces is None else pieces
    return anyio.run(lambda: model.complete(ASK, on_piece=log.append))


def test_a_streamed_reply() -> None:
    pieces: list[Piece] = []
    with serving(answer("42", reasoning_content="hm")) as server:
        reply = ask(server.url, pieces=pieces)
    assert (reply.message.content, reply.message.reasoning) == ("42", "hm")
    assert [(piece.kind, piece.text) for piece in pieces] == [
        ("reasoning", "hm"),
        ("content", "42"),
    ]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 3)
    assert reply.timings.first_piece is not None
    assert 0 < reply.timings.first_piece <= reply.timings.total
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies[0]["stream"] is True
    assert server.bodies[0]["model"] == "m"
    assert "authorization" not in server.headers[0]


def test_pieces_arrive_while_the_stream_is_open() -> None:
    arrived: list[float] = []

    def slow(handler: BaseHTTPRequestHandler) -> None:
        first = stream({"choices": [{"delta": {"content": "a"}}]}, done=False)
        first(handler)
        time.sleep(0.3)
        handler.wfile.write(b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n')

    with serving(slow) as server:
        model = HTTPModel(server.url, model="m")
        anyio.run(lambda: model.complete(ASK, on_piece=lambda _: arrived.append(time.monotonic())))
    assert time.monotonic() - arrived[0] > 0.2


def test_the_key_comes_from_the_argument_or_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(answer("a"), answer("b")) as server:
        ask(server.url, api_key="secret-1")
        monkeypatch.setenv("FATHOM_API_KEY", "secret-2")
        ask(server.url)
    keys = [headers["authorization"] for headers in server.headers]
    assert keys == ["Bearer secret-1", "Bearer secret-2"]


def test_the_first_listed_model_is_used_and_its_length_known() -> None:
    with serving(answer("a")) as server:
        server.models = [{"id": "first", "max_model_len": 4096}, {"id": "second"}]
        model = HTTPModel(server.url)
        anyio.run(model.complete, ASK)
    assert (model.name, model.context_tokens) == ("first", 4096)
    assert server.bodies[0]["model"] == "first"
    assert server.paths == ["/v1/models", "/v1/chat/completions"]


def test_a_server_without_models_asks_for_a_name() -> None:
    with serving() as server:
        server.models = []
        with pytest.raises(ModelUnreachable, match="--model"):
            ask(server.url, model=None)


def test_a_server_that_does_not_stream() -> None:
    choice = {"message": {"content": "whole"}, "finish_reason": "stop"}
    with serving(whole({"choices": [choice]})) as server:
        assert ask(server.url).message.content == "whole"


@pytest.mark.parametrize("code", [429, 500, 502, 503])
def test_passing_failures_are_tried_again(code: int) -> None:
    pieces: list[Piece] = []
    busy = status(code, {"error": {"message": "busy"}})
    with serving(busy, busy, answer("at last")) as server:
        reply = ask(server.url, pieces=pieces)
    assert reply.message.content == "at last"
    assert [piece.text for piece in pieces if piece.kind == "notice"] == [
        f"HTTP {code}: busy; trying again in 0.01 s",
        f"HTTP {code}: busy; trying again in 0.02 s",
    ]


def test_the_server_says_how_long_to_wait() -> None:
    with serving(status(429, "", retry_after="0.2"), answer("a")) as server:
        started = time.monotonic()
        ask(server.url, backoff=0.0)
        assert time.monotonic() - started >= 0.2


def test_giving_up_says_why_and_how_often() -> None:
    with (
        serving(*[status(503, "down")] * 3) as server,
        pytest.raises(ModelUnreachable, match=r"HTTP 503: down \(3 attempts\)"),
    ):
        ask(server.url, retries=2)
    assert len(server.bodies) == 3


def test_nobody_listening() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ModelUnreachable, match=r"check that the server runs"):
        ask(url, retries=1)


@pytest.mark.parametrize(
    ("code", "advice"), [(401, "FATHOM_API_KEY"), (403, "--api-key"), (404, "name"), (400, "")]
)
def test_refusals_are_final(code: int, advice: str) -> None:
    with serving(status(code, {"error": {"message": "no such thing"}})) as server:
        with pytest.raises(ModelUnreachable, match="no such thing") as failure:
            ask(server.url, api_key="secret")
        assert len(server.bodies) == 1
    assert advice in str(failure.value)
    assert "secret" not in str(failure.value)


def test_redirects_are_refused() -> None:
    with (
        serving(status(307, "", location="http://127.0.0.1:1/")) as server,
        pytest.raises(ModelUnreachable, match="HTTP 307"),
    ):
        ask(server.url)


def test_a_stream_that_breaks_off_is_asked_for_again() -> None:
    pieces: list[Piece] = []
    broken = stream({"choices": [{"delta": {"content": "half"}}]}, done=False)
    with serving(broken, answer("whole")) as server:
        reply = ask(server.url, pieces=pieces)
    assert reply.message.content == "whole"
    assert [piece.kind for piece in pieces] == ["content", "notice", "content"]


def test_silence_ends_in_an_error() -> None:
    def silent(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.5)

    with (
        serving(silent) as server,
        pytest.raises(ModelUnreachable, match=r"silent for 0\.1 s"),
    ):
        ask(server.url, timeout=0.1)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "garbage",
    [
        stream("{not json"),
        stream({"error": {"message": "overloaded"}}),
        whole("hello"),
        whole([]),
        status(200, "no gzip", content_encoding="gzip", content_type="application/json"),
    ],
)
def test_unreadable_answers(garbage: Any) -> None:
    with serving(garbage) as server, pytest.raises(ModelUnreachable):
        ask(server.url)


def test_fields_that_a_server_refuses_are_left_out_from_then_on() -> None:
    model_settings = {"model": "m", "backoff": 0.01}
    with serving(
        status(400, {"error": {"message": "Unrecognized request argument: thinking"}}),
        status(400, {"error": {"message": "unsupported 'max_tokens', use max_completion_tokens"}}),
        answer("a"),
        answer("b"),
    ) as server:
        model = HTTPModel(server.url, **model_settings)

        async def twice() -> None:
            await model.complete(ASK, max_tokens=5)
            await model.complete(ASK, max_tokens=6)

        anyio.run(twice)
    assert len(server.bodies) == 4
    assert "thinking" not in server.bodies[3]
    assert "max_tokens" not in server.bodies[3]
    assert server.bodies[3]["max_completion_tokens"] == 6


def test_a_full_context_is_a_reply_not_an_error() -> None:
    refusal = {"error": {"code": "context_length_exceeded", "message": "too long"}}
    with serving(status(400, refusal)) as server:
        assert ask(server.url).finish_reason == "context"


def test_the_agent_runs_over_the_wire() -> None:
    with serving(tool_call("bash", command="ls"), answer("two files")) as server:
        agent = Agent(model=HTTPModel(server.url, model="m"), sampling=Sampling(temperature=0.0))
        episode = anyio.run(agent.run, "how many files?", FakeSandbox())
    assert episode.answer == "two files"
    first, second = server.bodies
    assert first["tools"] == ToolSet().schemas()
    assert first["temperature"] == 0.0
    assistant, result = second["messages"][2:]
    assert assistant["reasoning_content"] == "thinking"
    assert assistant["tool_calls"][0]["function"]["name"] == "bash"
    assert result == {"role": "tool", "tool_call_id": "call_x", "content": "ok"}


def test_reasoning_goes_back_under_the_name_it_came_with() -> None:
    with serving(answer("a", reasoning="r"), answer("b")) as server:
        model = HTTPModel(server.url, model="m")

        async def twice() -> None:
            reply = await model.complete(ASK)
            await model.complete([*ASK, reply.message.to_dict(), *ASK])

        anyio.run(twice)
    assert server.bodies[1]["messages"][1]["reasoning"] == "r"
    assert "reasoning_content" not in server.bodies[1]["messages"][1]
