"""The small parts by themselves."""

from __future__ import annotations

import json
import threading
import time

import httpx2
import pytest

from fathom.chat import Tokenizer
from fathom.cli.main import app as cli
from fathom.errors import ServerError
from fathom.server.load import Load, measure
from fathom.server.render import RawJson, dumps, finite
from fathom.server.run import open_listener, running
from fathom.server.scripted import ScriptedBackend
from fathom.server.sessions import Session
from fathom.server.settings import Settings
from fathom.server.store import Bounded, StoredResponse, TurnStore


def test_a_bounded_store_forgets_what_was_used_longest_ago():
    store: Bounded[str] = Bounded(3, 100)
    for name in "abc":
        store.put(name, name, 10)
    assert store.get("a") == "a"
    store.put("d", "d", 10)
    assert [store.get(name) for name in "abcd"] == ["a", None, "c", "d"]
    store.put("large", "x", 95)
    assert len(store) == 1
    store.put("too large", "x", 101)
    assert store.get("too large") is None
    assert store.get("large") == "x"
    store.put("large", "y", 1)
    assert (store.get("large"), len(store)) == ("y", 1)
    assert store.pop("large") == "y"
    assert store.pop("large") is None


def test_the_store_keeps_owners_apart():
    store = TurnStore(10, 10_000)
    store.keep_reasoning("one", ["call_1", "call_2"], "because")
    assert store.recall("one", "call_2") == "because"
    assert store.recall("two", "call_2") is None
    assert store.recall("one", "") is None
    store.keep_response("one", "resp_1", StoredResponse(messages=[], body={"id": "resp_1"}))
    assert store.response("two", "resp_1") is None
    assert not store.forget_response("two", "resp_1")
    assert store.forget_response("one", "resp_1")


def test_a_store_of_nothing_keeps_nothing():
    store = TurnStore(0, 0)
    store.keep_reasoning("", ["call_1"], "because")
    assert store.recall("", "call_1") is None


def test_a_port_in_use_is_said(tokenizer: Tokenizer):
    with running(ScriptedBackend(Session(), tokenizer)) as url:
        port = int(url.rsplit(":", 1)[1])
        with pytest.raises(ServerError, match="choose another --port"):
            open_listener(Settings(port=port))


def test_servers_leave_no_thread_behind(tokenizer: Tokenizer):
    before = threading.active_count()
    with running(ScriptedBackend(Session(), tokenizer)) as url:
        httpx2.get(f"{url}/health")
    deadline = time.perf_counter() + 3
    while threading.active_count() > before and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_the_load_measurement_counts_every_token():
    report = measure(Load(streams=3, tokens=20, step=0.002))
    assert report["tokens_per_s"] > 0
    assert 0 < report["first_byte_ms"]["median"] < 1000


def test_the_command_refuses_an_open_door(capsys: pytest.CaptureFixture[str]):
    from typer.testing import CliRunner

    result = CliRunner().invoke(cli, ["serve", "--model", "scripted", "--host", "0.0.0.0"])
    assert result.exit_code == 2
    assert "no API key" in result.output + capsys.readouterr().err


@pytest.mark.parametrize("logprob", [float("-inf"), float("inf"), float("nan"), -1e5])
def test_log_probabilities_are_numbers_of_json(logprob: float):
    assert json.loads(dumps(finite(logprob)), parse_constant=pytest.fail) == -9999.0
    assert finite(-0.5) == -0.5


def test_json_holds_raw_json_and_no_infinity():
    value = {"a": RawJson('{"x": 1e999}'), "b": ["x", RawJson("1.50")], "c": "\ud800"}
    assert dumps(value) == '{"a":{"x": 1e999},"b":["x",1.50],"c":"\ud800"}'
    with pytest.raises(ValueError, match="Out of range"):
        dumps({"a": float("inf")})
    with pytest.raises(TypeError, match="object"):
        dumps({"a": object()})
