"""The record of requests: what it holds, what it must not, and who may read it."""

from __future__ import annotations

import json
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fathom.chat import Tokenizer
from fathom.errors import ServerError
from fathom.server.app import create_app
from fathom.server.record import Record
from fathom.server.run import address_of, make_server, open_listener
from fathom.server.scripted import Reply, ScriptedBackend
from fathom.server.sessions import Session
from fathom.server.settings import Settings
from tests.server.conftest import BASH, NANO

KEY = "sesame-open-sesame"


@contextmanager
def recorded(path: Path, script: Any) -> Iterator[httpx2.Client]:
    """A client of a server that writes to `path`."""
    settings = Settings(port=0, api_keys=(KEY,))
    record = Record(path)
    backend = record.engine(ScriptedBackend(script, Tokenizer.load(NANO)))
    listener = open_listener(settings)
    server = make_server(record.around(create_app(backend, settings)), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    headers = {"authorization": f"Bearer {KEY}"}
    try:
        url = address_of(listener)
        with httpx2.Client(base_url=url, headers=headers, trust_env=False, timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        record.close()


def lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` lines, once they are there."""
    for _ in range(100):
        found = path.read_text().splitlines()
        if len(found) >= count:
            return [json.loads(line) for line in found]
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} lines, not {count}")


def test_a_request_its_prompt_and_its_reply(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    body = {"messages": [{"role": "user", "content": "[[one]] Look."}], "tools": [BASH]}
    with recorded(path, Session()) as client:
        assert client.head("/").status_code == 200
        answer = client.post("/v1/chat/completions", json=body)
        assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 400
    assert answer.status_code == 200
    head, asked, refused = lines(path, 3)
    assert (head["method"], head["path"], head["completions"]) == ("HEAD", "/", [])
    assert (asked["n"], asked["status"], asked["whole"], asked["body"]) == (2, 200, True, body)
    (completion,) = asked["completions"]
    tokenizer = Tokenizer.load(NANO)
    assert tokenizer.decode(completion["prompt"]) == completion["text"]
    assert "[[one]] Look." in completion["text"]
    assert answer.json()["choices"][0]["message"]["reasoning"] in completion["output"]
    assert completion["end"] == "stop"
    assert refused["status"] == 400
    assert not refused["completions"]


def test_a_reply_that_nobody_waits_for(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    script = lambda prompt: Reply(text="word " * 2000, delay=0.01)  # noqa: E731
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    with recorded(path, script) as client:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_raw())
        left = time.time()
        (entry,) = lines(path, 1)
    assert entry["completions"][0]["end"] == "left"
    assert entry["completions"][0]["ended"] - left < 2
    assert not entry["whole"]


def test_keys_stay_out_and_others_too(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    with recorded(path, Session()) as client:
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        client.get("/v1/models", headers={"authorization": "Bearer another-key-of-someone"})
    assert "sesame" not in path.read_text()
    assert "another-key" not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_record_that_cannot_be_written() -> None:
    with pytest.raises(ServerError, match="cannot record"):
        Record(Path("/no/such/folder/record.jsonl"))
