"""Attacks on the server: each does what an attacker would, and the server must hold."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
import zlib
from base64 import urlsafe_b64encode
from typing import Any

import httpx2
import pytest

from fathom.errors import ServerError
from fathom.server.bounds import decode_json
from fathom.server.problems import Problem
from fathom.server.scripted import Reply
from fathom.server.settings import Limits, Settings, check_settings, is_loopback
from tests.server.conftest import BASH, Open, Server

# One client for all: making one takes longer than most requests here.
WEB = httpx2.Client(timeout=20, trust_env=False, limits=httpx2.Limits(max_keepalive_connections=0))
KEY = "a-very-secret-key-4711"
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/responses/input_tokens"),
    ("GET", "/v1/responses/resp_1"),
    ("DELETE", "/v1/responses/resp_1"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/render"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
]


def raw(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def closed_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the server ends the connection in time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.fixture(scope="module")
def guarded(open_server: Open) -> Server:
    return open_server(key=KEY)


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("headers", [
    {}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"},
    {"authorization": f"Bearer {KEY[:-1]}"}, {"x-api-key": KEY.upper()}, {"x-api-key": ""},
], ids=["none", "wrong", "scheme", "prefix", "case", "empty"])  # fmt: skip
def test_every_route_needs_the_key(
    guarded: Server, method: str, path: str, headers: dict[str, str]
):
    response = WEB.request(method, guarded.url + path, headers=headers, json={})
    assert response.status_code == 401
    assert KEY not in response.text


def test_both_ways_to_send_the_key_work_and_open_paths_stay_open(guarded: Server):
    for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
        assert WEB.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200
    assert WEB.get(f"{guarded.url}/health").status_code == 200
    assert WEB.head(guarded.url).status_code == 200


def test_the_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, open_server: Open):
    """Every configured key is compared, by the function that takes the same time for all."""
    import hmac

    compared: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return original(a, b)

    monkeypatch.setattr("fathom.server.guard.hmac.compare_digest", spy)
    server = open_server(api_keys=("first-key-1234", "second-key-1234"))
    for given in ("first-key-1234", "second-key-1234", "x", "y" * 5000):
        compared.clear()
        WEB.get(f"{server.url}/v1/models", headers={"x-api-key": given})
        assert compared == [(32, 32), (32, 32)]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_address_without_a_key_is_refused(host: str):
    with pytest.raises(ServerError, match="no API key"):
        check_settings(Settings(host=host))
    check_settings(Settings(host=host, api_keys=(KEY,)))


@pytest.mark.parametrize(
    "key", ["", "short", "with blank in it", "umlaut-\u00e4\u00f6\u00fc\u00df", "a\nb\nc\nd\ne"]
)
def test_keys_that_are_none_are_refused(key: str):
    with pytest.raises(ServerError, match="at least 8"):
        check_settings(Settings(host="0.0.0.0", api_keys=(key,)))


def test_the_default_address_is_loopback():
    assert Settings().host == "127.0.0.1"
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    for name in ("0.0.0.0", "localhost.evil.org", "127.0.0.1.evil.org", "2130706433", ""):
        assert not is_loopback(name)


@pytest.mark.parametrize(
    "host", ["evil.org", "evil.org:8000", "127.0.0.1.evil.org", "localhost@evil.org", "", "[", "0"]
)
def test_dns_rebinding_is_refused(server: Server, host: str):
    """A page whose name was pointed at this machine sends its own name along."""
    body = {"messages": [{"role": "user", "content": "x"}]}
    response = WEB.post(f"{server.url}/v1/chat/completions", json=body, headers={"host": host})
    assert response.status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None,
                                  "multipart/form-data; boundary=x"])  # fmt: skip
def test_a_web_page_cannot_post_without_asking(server: Server, kind: str | None):
    """These types are sent to any origin without a question; JSON is not."""
    before = len(server.backend.requests)
    headers = {"content-type": kind} if kind else {}
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    response = WEB.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 415
    assert len(server.backend.requests) == before


@pytest.mark.parametrize("origin", ["https://evil.org", "null", "http://127.0.0.1:1", "\u00e4"])
def test_other_origins_are_refused_and_no_cors_header_is_sent(server: Server, origin: str):
    headers = {b"origin": origin.encode()}
    for method in ("GET", "OPTIONS", "POST"):
        response = WEB.request(
            method,
            f"{server.url}/v1/models",
            headers=headers,  # type: ignore[arg-type]
        )
        assert response.status_code == 403
        assert not [name for name in response.headers if name.startswith("access-control")]
    own = {"origin": server.url}
    assert WEB.get(f"{server.url}/v1/models", headers=own).status_code == 200


def test_an_allowed_origin_is_allowed_and_no_other(open_server: Open):
    server = open_server(origins=("https://mine.org",))
    response = WEB.options(f"{server.url}/v1/models", headers={"origin": "https://mine.org"})
    assert response.headers["access-control-allow-origin"] == "https://mine.org"
    for other in ("https://mine.org.evil.org", "http://mine.org", "https://mine.org:444"):
        response = WEB.get(f"{server.url}/v1/models", headers={"origin": other})
        assert response.status_code == 403


@pytest.fixture(scope="module")
def small(open_server: Open) -> Server:
    return open_server(
        limits={
            "request_bytes": 20_000, "messages": 10, "tools": 3, "schema_depth": 10,
            "schema_bytes": 2000, "json_depth": 32, "prompt_tokens": 500, "max_tokens": 50,
            "choices": 2, "header_seconds": 0.3, "body_seconds": 0.3, "write_seconds": 0.3,
            "connections": 8, "running": 1, "waiting": 1, "keep_alive_seconds": 0.2,
        }
    )  # fmt: skip


def test_a_large_body_is_refused_before_it_is_read(small: Server):
    with raw(small) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in connection.recv(65536).split(b"\r\n")[0]
        assert closed_within(connection, 5)


def test_a_large_body_without_stated_length_is_cut_off(small: Server):
    def endless() -> Any:
        yield b'{"messages": ['
        for _ in range(100):
            yield b" " * 1000

    response = WEB.post(
        f"{small.url}/v1/chat/completions",
        content=endless(),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"messages": [{"role": "user", "content": "x"}] * 11}, "too_many_items"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [BASH] * 4}, "too_many_items"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x"}], "n": 3}, "request_invalid"),
        ({"messages": [{"role": "user", "content": "x"}], "stop": ["x" * 300]}, "too_many_items"),
        ({"messages": [{"role": "user", "content": "x"}], "top_k": -5}, "request_invalid"),
    ],
)
def test_counts_are_bounded(small: Server, body: dict[str, Any], code: str):
    response = small.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_deep_and_long_schemas_are_refused(small: Server):
    for schema in (nested(12), {"type": "object", "description": "x" * 3000}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        for fields in ({"response_format": form}, {"tools": [tool]}):
            response = small.chat(**fields)
            assert response.status_code == 400
            assert response.json()["error"]["code"].startswith("schema_too_")


@pytest.mark.parametrize("unit", [b"[", b'{"a":', b"[[1],"])
def test_deep_json_is_refused_in_no_time(unit: bytes):
    body = b'{"messages":' + unit * 100_000
    started = time.perf_counter()
    with pytest.raises(Problem) as refused:
        decode_json(body, Limits())
    assert refused.value.code == "json_too_deep"
    assert time.perf_counter() - started < 5


def test_checking_the_depth_takes_linear_time():
    """An unclosed string of escaped quotes would make a careless expression quadratic."""

    def seconds(size: int) -> float:
        body = b"[" * 64 + b'"' + b'\\"' * size
        times: list[float] = []
        for _ in range(5):
            started = time.thread_time()  # what others compute beside it does not count
            with pytest.raises(Problem):
                decode_json(body, Limits())
            times.append(time.thread_time() - started)
        return min(times)  # of the least disturbed run

    assert seconds(400_000) < 30 * max(seconds(40_000), 1e-4)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": NaN}',
        b'{"max_tokens": ' + b"1" * 5000 + b"}", b'{"messages": [{"role": "user"', b"\x00",
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_a_400(server: Server, body: bytes):
    response = server.client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("invalid_json", "request_invalid")


def test_lone_surrogates_and_nul_do_no_harm(server: Server):
    body = b'{"model": "\\ud800", "messages": [{"role": "user", "content": "\\udfff \\u0000 x"}]}'
    for path in ("/v1/chat/completions", "/v1/render"):
        response = server.client.post(
            path, content=body, headers={"content-type": "application/json"}
        )
        assert response.status_code == 200
        assert response.json()
    streamed = server.client.post(
        "/v1/chat/completions",
        content=body.replace(b'{"model', b'{"stream": true, "model'),
        headers={"content-type": "application/json"},
    )
    assert streamed.text.endswith("[DONE]\n\n")


def test_a_zip_bomb_as_encrypted_reasoning_is_no_bomb(server: Server):
    bomb = "fr1." + urlsafe_b64encode(b"x" * 8 + zlib.compress(b"0" * (64 << 20), 1)).decode()
    item = {"type": "reasoning", "summary": [], "encrypted_content": bomb}
    started = time.perf_counter()
    history = [{"role": "user", "content": "x"}, item, {"role": "user", "content": "y"}]
    assert server.responses(history).status_code in (200, 400)
    assert time.perf_counter() - started < 5


def test_header_values_cannot_be_injected(server: Server):
    """What a client wrote may be told in a header: it must not become a second one."""
    body = {"x\r\nset-cookie: a=b": 1, "unknown\n\n\ud83d": 1, "messages": [
        {"role": "user", "content": "x"}]}  # fmt: skip
    response = server.client.post(
        "/v1/chat/completions",
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200
    assert "set-cookie" not in response.headers


def test_tool_names_cannot_break_out_of_their_tag(server: Server):
    for name in ('a"b', "a>b", "a\nb", "\uff5cDSML\uff5c", "", "x" * 300):
        tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
        assert server.chat(tools=[tool]).status_code == 400
    odd = {"type": "object", "properties": {'a" string="true">x': {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": odd}}
    assert server.chat(tools=[tool]).status_code == 400


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd",
                                  "/page/..%2fapp.py", "/../../etc/passwd"])  # fmt: skip
def test_no_path_leads_out_of_the_page(server: Server, path: str):
    with raw(server) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
        )
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert b" 404 " in answer.split(b"\r\n")[0]
    assert b"import" not in answer
    assert b"root:" not in answer


def test_a_slow_head_is_cut_off(small: Server):
    with raw(small) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: loc")
        assert closed_within(connection, 3)
    with raw(small) as silent:
        assert closed_within(silent, 3)


def test_a_slow_head_of_a_second_request_is_cut_off(small: Server):
    with raw(small) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 " in connection.recv(65536)
        connection.sendall(b"GET /hea")
        assert closed_within(connection, 3)


def test_a_slow_body_is_cut_off(small: Server):
    with raw(small) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(65536).split(b"\r\n")[0]
        assert closed_within(connection, 3)


def test_a_client_that_never_reads_is_cut_off(open_server: Open):
    server = open_server(limits={"write_seconds": 0.3, "keep_alive_seconds": 0.2})
    server.say("word " * 200_000)
    body = json.dumps(
        {"stream": True, "messages": [{"role": "user", "content": "x"}], "max_tokens": 300_000}
    ).encode()
    with raw(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
            b"application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        deadline = time.perf_counter() + 10
        while server.backend.running or not server.backend.requests:
            assert time.perf_counter() < deadline, "it still generates for nobody"
            time.sleep(0.02)
        assert closed_within(connection, 5)
    assert server.client.get("/health").status_code == 200


def test_watchers_may_ask_for_the_head_alone(server: Server):
    answer = server.client.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_too_many_connections_leave_room_for_the_others(small: Server):
    hoard = [raw(small) for _ in range(20)]
    try:
        time.sleep(0.1)
        ended = sum(closed_within(connection, 0.01) for connection in hoard)
        assert ended >= 12
    finally:
        for connection in hoard:
            connection.close()
    time.sleep(0.1)
    assert small.client.get("/health").status_code == 200


def test_too_many_completions_are_refused_as_overload(small: Server):
    small.say(Reply(text="word " * 1000, delay=0.1))
    answers: list[int] = []

    def ask() -> None:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 25}
        answers.append(WEB.post(f"{small.url}/v1/chat/completions", json=body).status_code)

    def begin(gauge: str) -> threading.Thread:
        """Ask in a thread, and wait until the server counts it."""
        thread = threading.Thread(target=ask)
        thread.start()
        deadline = time.perf_counter() + 10
        while f"fathom_{gauge} 1.0" not in WEB.get(f"{small.url}/metrics").text:
            assert time.perf_counter() < deadline
            time.sleep(0.01)
        return thread

    threads = [begin("running"), begin("waiting")]
    ask()
    busy = small.messages()
    for thread in threads:
        thread.join()
    assert busy.status_code == 529  # as Anthropic's clients know it
    assert busy.headers["retry-after"]
    assert answers == [503, 200, 200]


def test_no_secret_reaches_the_log(open_server: Open, caplog: pytest.LogCaptureFixture):
    secret = "the user's private question 0815"
    with caplog.at_level(logging.DEBUG):
        server = open_server(key=KEY, log_level="info")
        server.chat(secret)
        server.say(Reply(text=secret, fail_after=1))
        server.chat(secret)
        server.chat(secret, stream=True)
        server.client.post("/v1/chat/completions?key=" + KEY, json={"messages": secret})
        WEB.get(f"{server.url}/v1/models", headers={"x-api-key": KEY + "x"})
    ours = [r for r in caplog.records if not r.name.startswith(("http", "asyncio"))]
    text = "\n".join(logging.Formatter().format(record) for record in ours)
    assert "backend_failed" in text  # the log does work
    assert KEY not in text
    assert secret not in text
    assert KEY not in repr(Settings(api_keys=(KEY,)))


def test_a_bug_answers_without_its_details(open_server: Open):
    server = open_server()

    def broken(prompt: str) -> str:
        raise RuntimeError("the password is hunter2")

    server.say(broken)
    for send in (server.chat, server.messages, server.responses):
        response = send()
        assert response.status_code == 500
        assert "hunter2" not in response.text
        assert "Traceback" not in response.text
    assert server.client.get("/health").status_code == 200
