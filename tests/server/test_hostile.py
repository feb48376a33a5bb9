"""Attacks that would take the server, or all of its connections, away from everybody else."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from fathom.chat import Tokenizer
from fathom.chat.requests import read_chat
from fathom.server.bounds import decode_json
from fathom.server.constrain import Constrainer
from fathom.server.problems import Problem
from fathom.server.schemas import check_schema, pattern_size
from fathom.server.settings import Limits
from tests.server.conftest import BASH, Open, Server

SLACK = 4.0  # seconds that /health may take here; 0.5 on a machine with nothing else to do


def chain(links: int) -> dict[str, Any]:
    """A flat schema whose references lead deep."""
    definitions: dict[str, Any] = {}
    for at in range(links):
        further = {"$ref": f"#/$defs/a{at + 1}"}
        definitions[f"a{at}"] = {"anyOf": [further, {"type": "array", "items": further}]}
    return {"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{links}": {"type": "string"}}}


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def strict(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}


@pytest.fixture(scope="module")
def wide(open_server: Open) -> Server:
    """A server with the default bounds and a model of a million tokens."""
    return open_server(backend={"context_tokens": 1 << 20})


def test_a_chain_of_references_does_not_kill_the_server(wide: Server):
    """It is flat, small, and leads the compiler of grammars beyond the end of its stack."""
    attack = chain(2000)
    assert len(json.dumps(attack)) < Limits().schema_bytes
    wide.say("Hello.")
    for fields in (
        {"response_format": json_schema(attack)},
        {"tools": [strict({"type": "object", "properties": {"a": attack}})]},
    ):
        refused = wide.chat(**fields)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["code"] == "schema_too_deep"
        behind = wide.chat("Is anybody there?", thinking={"type": "disabled"})
        assert behind.json()["choices"][0]["message"]["content"] == "Hello."


def test_references_are_counted_whatever_they_are_called():
    """Equal references lead to different places where parts of a schema have their own names."""
    node: Any = {"type": "string"}
    links: dict[str, Any] = {}
    for at in range(2000):
        links[f"a{at}"] = {"$id": f"http://x/{at}/", "items": {"$ref": "b/"}}
    with pytest.raises(Problem) as refused:
        check_schema({"$defs": links, **node}, "x", Limits(schema_bytes=1 << 20), enforced=True)
    assert refused.value.code == "schema_too_deep"
    many = {f"a{at}": {"$ref": "#/$defs/one"} for at in range(1000)}
    fine = {"type": "object", "properties": many, "$defs": {"one": {"type": "integer"}}}
    check_schema(fine, "x", Limits(), enforced=True)


def test_the_compiler_has_stack_far_beyond_the_bounds(tokenizer: Tokenizer):
    """Twice the links that end a thread of ordinary size, and more than the bounds let through."""
    body = {"messages": [{"role": "user", "content": "json"}], "thinking": {"type": "disabled"}}
    asked = read_chat({**body, "response_format": json_schema(chain(2400))})
    with pytest.raises(Problem):
        check_schema(chain(2400), "x", Limits(schema_bytes=1 << 20), enforced=True)
    mask = Constrainer(tokenizer).mask(asked)
    assert mask is not None
    assert mask.allowed() is not None


# --- one body must not stop the others --------------------------------------------------------


def body_of(name: str) -> tuple[str, bytes, int]:
    """Path, body and the status that it gets."""
    user = {"role": "user", "content": "x"}
    half = Limits().json_parts // 2
    match name:
        case "empty messages":
            data = b'{"messages":[' + b"[]," * 2_500_000 + b"[]]}"
            return "/v1/chat/completions", data, 400
        case "lists in a tool":
            lists = b"[" + b"[]," * half + b"[]]"
            tool = json.dumps(strict({"type": "object", "a": 0})).encode()
            data = b'{"messages":[%b],"tools":[%b]}' % (
                json.dumps(user).encode(), tool.replace(b'"a": 0', b'"a":' + lists))  # fmt: skip
            return "/v1/chat/completions", data, 400
        case "names":
            names = {f"k{at}": 1 for at in range(half // 2)}
            return "/v1/chat/completions", json.dumps({"messages": [user], **names}).encode(), 200
        case "long text":
            text = "The quick brown fox, jumps over 12 lazy dogs.\n" * 40_000
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 5}
            return "/v1/messages/count_tokens", json.dumps(body).encode(), 200
        case "token ids":
            return "/v1/completions", b'{"prompt":[' + b"900," * 999_999 + b"9]}", 200
        case "too many ids":
            return "/v1/completions", b'{"prompt":[' + b"9," * 3_900_000 + b"9]}", 400
        case "pattern":
            form = json_schema({"type": "string", "pattern": "^(a{1000}){1000}$"})
            return "/v1/chat/completions", json.dumps(
                {"messages": [user], "response_format": form}).encode(), 400  # fmt: skip
        case _:
            raise AssertionError(name)


@pytest.mark.parametrize("name", ["empty messages", "lists in a tool", "names", "long text",
                                  "token ids", "too many ids", "pattern"])  # fmt: skip
def test_health_answers_while_a_large_body_is_read(wide: Server, name: str):
    path, data, status = body_of(name)
    assert len(data) <= Limits().request_bytes
    server = wide
    server.say("a</think>b")
    answers: list[httpx2.Response] = []

    def send() -> None:
        headers = {"content-type": "application/json"}
        with httpx2.Client(timeout=60, trust_env=False) as client:
            answers.append(client.post(server.url + path, content=data, headers=headers))

    thread = threading.Thread(target=send)
    thread.start()
    waits: list[float] = []  # from answer to answer: this thread stands still with the server's
    last = time.perf_counter()
    while thread.is_alive():
        assert server.client.get("/health").status_code == 200
        waits.append(time.perf_counter() - last)
        last = time.perf_counter()
        time.sleep(0.005)
    thread.join()
    (answer,) = answers
    assert answer.status_code == status, answer.text[:300]
    assert max(waits) < SLACK


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    open_server: Open, monkeypatch: pytest.MonkeyPatch
):
    server = open_server(backend={"context_tokens": 1000})
    tokenizer = server.backend.tokenizer
    seen: list[int] = []
    original = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch",
                        lambda texts: [seen.append(len(texts[0])), original(texts)][1])  # fmt: skip
    response = server.chat("word " * 100_000)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert not seen


def test_patterns_are_measured_with_their_repetitions():
    assert pattern_size("abc") == 3
    assert pattern_size(r"^[a-z(]{3}\)$") == 6
    assert pattern_size("(ab{10}){100}") == 1100
    assert pattern_size("(a{1000}){1000}") == 1_000_000
    assert pattern_size("((((") == 0
    assert pattern_size("(" * 50_000 + "a" + ")" * 50_000) == 1
    assert pattern_size("a{5") == 3


def test_values_are_counted_and_commas_in_text_are_not():
    limits = Limits(json_values=10)
    decode_json(b'{"a": [' + b"1," * 9 + b'1], "b": "' + b"," * 100 + b'"}', limits)
    with pytest.raises(Problem) as refused:
        decode_json(b'{"a": [' + b"1," * 11 + b"1]}", limits)
    assert refused.value.code == "too_many_items"


# --- connections that never end ---------------------------------------------------------------


@contextmanager
def unread(server: Server, request: bytes, window: int = 4096) -> Iterator[socket.socket]:
    """A connection with a small window that sent `request`."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.settimeout(10)
    connection.connect((host, int(port)))
    with connection:
        connection.sendall(request)
        yield connection


def dropped_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the server resets the connection, though nobody reads from it."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def hasty(open_server: Open) -> Server:
    return open_server(
        key="a-long-secret-key",
        limits={"write_seconds": 0.4, "header_seconds": 0.5, "request_bytes": 8 << 20},
        backend={"context_tokens": 1 << 20},
    )


def post(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST %b HTTP/1.1\r\nhost: localhost\r\nx-api-key: a-long-secret-key\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (path.encode(), len(data), data)
    )


def test_an_answer_that_is_never_read_is_cut_off(hasty: Server, caplog: pytest.LogCaptureFixture):
    """Larger than what the kernel takes for the client, and written in one go."""
    body = {"messages": [{"role": "user", "content": "word " * 100_000}]}
    with unread(hasty, post("/v1/render", body)) as connection:
        assert dropped_within(connection, 20)
    assert not [r for r in caplog.records if r.exc_info]


def test_a_slow_reader_gets_its_whole_answer(hasty: Server):
    """One that reads little by little, for twice the patience, is no attacker."""
    body = {"messages": [{"role": "user", "content": "word " * 100_000}]}
    with unread(hasty, post("/v1/render", body), window=1 << 16) as connection:
        got, steps = b"", 0
        while b"\r\n\r\n" not in got:
            got += connection.recv(65536)
        head, _, rest = got.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        have = len(rest)
        while have < length:
            part = connection.recv(65536)
            assert part, "cut off"
            have += len(part)
            steps += 1
            if steps <= 40:
                time.sleep(0.02)
    assert have == length


def test_requests_sent_without_waiting_do_not_pile_up_unread(hasty: Server):
    """Without a key: the page's files, again and again, and none is read."""
    one = b"GET /page/app.js HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with unread(hasty, one) as connection:
        connection.setblocking(False)
        deadline = time.perf_counter() + 10
        ended = False
        while time.perf_counter() < deadline and not ended:
            try:
                connection.send(one * 100)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                ended = True
        assert ended


def test_the_answer_before_requests_sent_at_once_arrives_whole(hasty: Server):
    one = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with unread(hasty, one * 3) as connection:
        got = b""
        while part := connection.recv(65536):
            got += part
    assert got.count(b"HTTP/1.1 200") == 1
    assert got.endswith(b"}")


@pytest.mark.parametrize("kind", ["one header", "many headers", "address", "trailer", "chunks"])
def test_a_head_without_end_is_refused(hasty: Server, kind: str):
    host = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    chunked = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-api-key: a-long-secret-key\r\n"
        b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n"
    )
    start, unit = {
        "one header": (host + b"a: ", b"x" * 1000),
        "many headers": (host, b"a: b\r\n" * 100),
        "address": (b"GET /", b"x" * 1000),
        "trailer": (chunked + b"0\r\na: ", b"x" * 1000),
        "chunks": (chunked + b"1;", b"x" * 1000),
    }[kind]
    sent = 0
    with unread(hasty, start) as connection:
        try:
            while sent < 8 << 20:
                sent += connection.send(unit)
        except OSError:
            pass
    assert sent < 6 << 20  # what the kernel holds, and no more


def test_a_large_head_in_one_piece_is_a_431_and_an_ordinary_one_is_not(hasty: Server):
    for size, status in ((40_000, b"200"), (70_000, b"431")):
        head = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\na: "
        with unread(hasty, head + b"x" * size + b"\r\n\r\n") as connection:
            assert connection.recv(65536).split(b" ")[1] == status


# --- values that no reader expects ------------------------------------------------------------


@pytest.mark.parametrize("number", ["1" * 401, "-" + "1" * 401, "1e999", "-1e999"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/completions"])
def test_numbers_beyond_every_float_are_a_400(server: Server, path: str, number: str):
    for field in ("temperature", "top_p"):
        start = '{"prompt": "x",' if path == "/v1/completions" else (
            '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 5,')  # fmt: skip
        response = server.client.post(
            path,
            content=f'{start} "{field}": {number}}}'.encode(),
            headers={"content-type": "application/json"},
        )
        assert response.status_code == 400, response.text
        assert field in response.text


@pytest.mark.parametrize("odd", [
    {"required": 5}, {"required": [5]}, {"$defs": [1]}, {"$defs": 5}, {"$defs": {"a": 5}},
    {"definitions": "x"}, {"properties": 5}, {"properties": {"a": 5}},
    {"properties": {"a": {"$ref": 5}}}, {"properties": {"a": {"enum": 5}}},
    {"properties": {"a": {"type": 5}}}, {"properties": {"a": {"type": [5]}}},
    {"properties": {"a": {"anyOf": 5}}}, {"properties": {"a": {"anyOf": []}}},
    {"properties": {"a": {"anyOf": [5]}}}, {"properties": {"a": {"type": "string", "pattern": 5}}},
    {"properties": {"a": {"type": "string", "maxLength": "x"}}},
    {"properties": {"a": {"type": "string", "maxLength": -1}}},
    {"properties": {"a": {"type": "string", "maxLength": 10**30}}},
    {"properties": {"a": {"$ref": "#/$defs/%"}}}, {"$ref": 5},
], ids=json.dumps)  # fmt: skip
def test_malformed_schemas_are_a_400(server: Server, odd: dict[str, Any]):
    for fields in (
        {"tools": [BASH, strict({"type": "object", **odd})]},
        {"response_format": json_schema({"type": "object", **odd})},
    ):
        response = server.chat(**fields)
        assert response.status_code == 400, (odd, response.text)
        error = response.json()["error"]
        assert error["param"] in ("tools[1]", "tools", "response_format"), error
