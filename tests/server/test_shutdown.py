"""The end of a server while it is at work: clients are told, and the log stays quiet."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest
import uvicorn

from fathom.chat import Tokenizer
from fathom.server.app import create_app
from fathom.server.run import address_of, make_server, open_listener
from fathom.server.scripted import Reply, ScriptedBackend
from fathom.server.settings import Settings
from tests.server.conftest import events

Ending = tuple[str, uvicorn.Server, threading.Thread]


@pytest.fixture
def ending(tokenizer: Tokenizer) -> Iterator[Ending]:
    """A server that answers for minutes; the test ends it as Ctrl-C does."""
    backend = ScriptedBackend(lambda prompt: Reply(text="word " * 10_000, delay=0.02), tokenizer)
    settings = Settings(port=0)
    listener = open_listener(settings)
    server = make_server(create_app(backend, settings), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield address_of(listener), server, thread
    server.should_exit = server.force_exit = True
    thread.join(timeout=10)
    listener.close()
    assert not backend.running


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses",
                                  "/v1/completions"])  # fmt: skip
def test_streams_get_an_error_event_when_the_server_ends(
    ending: Ending, path: str, caplog: pytest.LogCaptureFixture
):
    url, server, thread = ending
    user = [{"role": "user", "content": "x"}]
    body = {"stream": True, "messages": user, "max_tokens": 1000}
    if path == "/v1/responses":
        body = {"stream": True, "input": "x"}
    if path == "/v1/completions":
        body = {"stream": True, "prompt": "x", "max_tokens": 1000}
    text = ""
    with httpx2.Client(timeout=20, trust_env=False) as client:
        with client.stream("POST", url + path, json=body) as response:
            for part in response.iter_text():
                text += part
                if not server.should_exit:
                    server.should_exit = True
                    started = time.perf_counter()
    last = events(text)[-1]
    assert "shutting down" in json.dumps(last)
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert time.perf_counter() - started < 3
    assert not [record for record in caplog.records if record.exc_info]


def test_whole_replies_get_a_503_when_the_server_ends(
    ending: Ending, caplog: pytest.LogCaptureFixture
):
    url, server, thread = ending
    answers: list[httpx2.Response] = []

    def ask() -> None:
        with httpx2.Client(timeout=20, trust_env=False) as client:
            body = {"messages": [{"role": "user", "content": "x"}]}
            answers.append(client.post(f"{url}/v1/chat/completions", json=body))

    asking = threading.Thread(target=ask)
    asking.start()
    with httpx2.Client(timeout=20, trust_env=False) as client:
        deadline = time.perf_counter() + 10
        while "fathom_running 1.0" not in client.get(f"{url}/metrics").text:
            assert time.perf_counter() < deadline
            time.sleep(0.01)
    server.should_exit = True
    asking.join()
    thread.join(timeout=10)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "shutting_down"
    assert not [r for r in caplog.records if r.exc_info and r.levelno >= logging.WARNING]
