"""Refusals name the field and have the type that clients expect, and every answer is counted."""

from __future__ import annotations

import gzip
import json
import logging
from typing import Any

import pytest
from typer.testing import CliRunner

from fathom.cli.main import app as cli
from fathom.errors import ServerError
from fathom.server.bounds import decode_json
from fathom.server.problems import Problem
from fathom.server.run import open_listener
from fathom.server.scripted import Reply
from fathom.server.settings import Limits, Settings
from tests.server.conftest import BASH, Open, Server

USER = {"role": "user", "content": "x"}


def called(name: str) -> dict[str, list[dict[str, Any]]]:
    """The same past call in the shape of each API."""
    return {
        "/v1/chat/completions": [
            USER,
            {"role": "assistant", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": name, "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "y"},
        ],
        "/v1/messages": [
            USER,
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "c1", "name": name, "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "y"}]},
        ],
        "/v1/responses": [
            USER,
            {"type": "function_call", "call_id": "c1", "name": name, "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "y"},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_past_call_that_cannot_be_written_is_named(server: Server, path: str):
    field = "input" if path == "/v1/responses" else "messages"
    body = {field: called('x"y')[path], "max_tokens": 5}
    response = server.client.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.get("param", error["message"]).startswith(f"{field}[1]")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_what_cannot_be_rendered_at_all_names_the_conversation(server: Server, path: str):
    past = called("bash")[path]
    odd = json.dumps({'a" string="true">': 1})
    broken = json.loads(json.dumps(past).replace('"{}"', json.dumps(odd)))
    field = "input" if path == "/v1/responses" else "messages"
    response = server.client.post(path, json={field: broken})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_messages_errors_have_types_that_its_clients_know(server: Server, open_server: Open):
    text = {"content-type": "text/plain"}
    assert server.client.post("/v1/messages", content="x", headers=text).status_code == 415
    for response in (
        server.client.post("/v1/messages", content="x", headers=text),
        server.client.get("/v1/messages"),
    ):
        assert response.json()["error"]["type"] == "invalid_request_error"
    broken = open_server()
    broken.say(lambda prompt: [][0])
    assert broken.messages().json()["error"]["type"] == "api_error"


@pytest.mark.parametrize(("path", "fields", "param"), [
    ("responses", {"metadata": 5}, "metadata"), ("responses", {"store": "x"}, "store"),
    ("responses", {"include": 5}, "include"), ("chat", {"metadata": [1]}, "metadata"),
    ("chat", {"store": 1}, "store"), ("messages", {"metadata": "x"}, "metadata"),
    ("chat", {"tool_choice": "required"}, "tool_choice"),
    ("responses", {"tool_choice": "required"}, "tool_choice"),
    ("messages", {"tool_choice": {"type": "any"}}, "tool_choice"),
])  # fmt: skip
def test_fields_of_the_wrong_kind_are_named(
    server: Server, path: str, fields: dict[str, Any], param: str
):
    send = {"chat": server.chat, "messages": server.messages, "responses": server.responses}[path]
    response = send(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.get("param", error["message"].split(":")[0]) == param


@pytest.mark.parametrize("token", [-1, 10**12, 2048, True, "a", 1.5])
def test_detokenize_takes_only_tokens(server: Server, token: Any):
    response = server.client.post("/detokenize", json={"tokens": [5, token]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens"
    assert server.client.post("/detokenize", json={"tokens": [2047]}).status_code == 200


def test_a_schema_that_fails_while_it_is_enforced_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fathom.server.constrain._Grammar._failed", lambda self: "too complex")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    response = server.chat(response_format=form, thinking={"type": "disabled"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"
    response = server.chat(tools=[BASH], tool_choice="required", thinking={"type": "disabled"})
    assert response.json()["error"]["param"] == "tools"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_only_utf_8_is_json(server: Server, encoding: str):
    """In another encoding no bracket would be seen by the check of depth."""
    deep = '{"messages": ' + "[" * 1000 + "]" * 1000 + "}"
    response = server.client.post(
        "/v1/chat/completions",
        content=deep.encode(encoding),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert "nested" in response.text or "JSON" in response.text
    with pytest.raises(Problem) as refused:
        decode_json('{"a": [[["x"]]]}'.encode(encoding), Limits())
    assert refused.value.code == "invalid_json"


def test_a_small_bound_on_depth_holds_for_few_brackets():
    decode_json(b'{"a": [[1]]}', Limits(json_depth=3))
    with pytest.raises(Problem) as refused:
        decode_json(b'{"a": [[[1]]]}', Limits(json_depth=3))
    assert refused.value.code == "json_too_deep"


def test_a_trailing_slash_leads_nowhere(server: Server):
    """A redirect would go to whatever name the client called the server by."""
    for path in ("/v1/chat/completions/", "/health/", "/v1/models/"):
        response = server.client.get(path, headers={"host": "localhost:1"}, follow_redirects=False)
        assert response.status_code in (404, 405)
        assert "location" not in response.headers


def test_an_address_that_is_not_here_is_told_apart_from_a_port_in_use():
    with pytest.raises(ServerError, match="--host") as refused:
        open_listener(Settings(host="nowhere.invalid", api_keys=("a-long-secret",), port=0))
    assert "--port" not in str(refused.value)
    taken = open_listener(Settings(port=0))
    try:
        with pytest.raises(ServerError, match="--port"):
            open_listener(Settings(port=taken.getsockname()[1]))
    finally:
        taken.close()


@pytest.mark.parametrize("option", ["--model", "--device"])
def test_options_of_a_local_model_are_refused_with_an_upstream(option: str):
    arguments = ["serve", "--upstream", "http://127.0.0.1:1", option, "cpu"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code != 0
    assert f"{option} and --upstream" in str(result.exception) + result.output


def test_another_protocol_is_answered_as_http_without_advice(
    server: Server, caplog: pytest.LogCaptureFixture
):
    headers = {"upgrade": "websocket", "connection": "upgrade", "sec-websocket-key": "eA==",
               "sec-websocket-version": "13"}  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        assert server.client.get("/health", headers=headers).status_code == 200
    assert "pip install" not in caplog.text


def test_every_answer_is_counted_by_its_status(open_server: Open):
    server = open_server(key="a-long-secret-key")
    count = {}

    def counted(name: str, **labels: str) -> float:
        text = ",".join(f'{k}="{v}"' for k, v in labels.items())
        lines = server.client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"{name}{{{text}}} ")]
        return float(found[0].split()[-1]) if found else 0.0

    server.chat()
    server.chat(stream=True)
    server.chat(n=-1)
    server.client.post("/v1/chat/completions", json={}, headers={"authorization": "Bearer x"})
    server.client.get("/v1/models", headers={"host": "x", "authorization": "Bearer x"})
    server.say(lambda prompt: [][0])
    server.chat()
    server.say(Reply(text="a b c d e f", fail_after=3))
    server.chat(stream=True, thinking={"type": "disabled"})
    for status, times in (("200", 3), ("400", 1), ("401", 1), ("500", 1)):
        count[status] = counted("fathom_requests_total", api="chat", status=status)
        assert count[status] == times, (status, count)
    assert counted("fathom_requests_total", api="other", status="401") == 1
    assert counted("fathom_streams_total", api="chat", outcome="done") == 1
    assert counted("fathom_streams_total", api="chat", outcome="failed") == 1


@pytest.mark.parametrize(("coding", "status"), [("gzip", 415), ("identity", 200), ("", 200)])
def test_a_compressed_body_is_called_so(server: Server, coding: str, status: int):
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    headers = {"content-type": "application/json", "content-encoding": coding}
    sent = gzip.compress(body) if coding == "gzip" else body
    reply = server.client.post("/v1/chat/completions", content=sent, headers=headers)
    assert reply.status_code == status
    assert status == 200 or "uncompressed" in reply.json()["error"]["message"]


def test_a_stored_response_is_not_streamed_again(server: Server):
    made = server.responses("x").json()
    assert server.client.get(f"/v1/responses/{made['id']}?stream=false").json() == made
    refused = server.client.get(f"/v1/responses/{made['id']}?stream=true")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")
