"""Biases, penalties and cut-offs of a request, by a real engine that drafts as well."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from fathom.chat import Tokenizer
from fathom.engine import LLM
from fathom.engine.backend import LocalBackend
from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.sampler import SamplingParams
from fathom.server.run import running
from tests.engine.helpers import model, prompt
from tests.server.conftest import BASH, Server

PROMPT = prompt(30, 5)
TALK = [{"role": "user", "content": "some words"}]
PENALTIES = [
    {"repetition_penalty": 1.8},
    {"frequency_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0, "presence_penalty": -2.0, "repetition_penalty": 1.1},
    {"logit_bias": {"7": 2.5, "9": -100, "11": 100}, "frequency_penalty": 2},
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    """A model of random weights with a block that drafts."""
    letters = random.Random(1).choices("abcdefgh ", k=5000)
    tokenizer = Tokenizer.train(["".join(letters)], 400)
    assert tokenizer.vocab_size == 400
    config = EngineConfig(drafts=2, drafts_adaptive=False, cache_tokens=2048)
    return LLM(model(num_nextn_predict_layers=1), tokenizer, engine=config)


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[httpx2.Client]:
    with running(LocalBackend(llm)) as url, httpx2.Client(base_url=url, timeout=60) as client:
        yield client


def complete(client: httpx2.Client, **fields: Any) -> list[int]:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    response = client.post("/v1/completions", json=body | fields)
    assert response.status_code == 200, response.text
    assert "x-fathom-notice" not in response.headers
    return response.json()["choices"][0]["token_ids"]


def chat(client: httpx2.Client, **fields: Any) -> Any:
    body = {"messages": TALK, "max_tokens": 8, "thinking": {"type": "disabled"}, **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert "x-fathom-notice" not in response.headers
    return response.json()["choices"][0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_bias_forces_a_token(client: httpx2.Client, llm: LLM, temperature: int):
    (token,) = llm.tokenizer.encode("w")
    bias = {"logit_bias": {str(token): 100}, "temperature": temperature}
    assert complete(client, max_tokens=5, **bias) == [token] * 5
    assert chat(client, **bias)["message"]["content"] == "w" * 8
    body = {"messages": TALK, "max_tokens": 8, **bias}
    assert client.post("/v1/messages", json=body).json()["content"][0]["thinking"] == "w" * 8
    body = {"input": "some words", "max_output_tokens": 16, **bias}
    assert "w" * 8 in client.post("/v1/responses", json=body).text


def test_a_bias_forbids_a_token(client: httpx2.Client):
    forbidden = dict.fromkeys(map(str, complete(client)), -100)
    assert not set(complete(client, logit_bias=forbidden)) & set(map(int, forbidden))


@pytest.mark.parametrize("shaping", PENALTIES, ids=lambda s: "+".join(s))
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 4}])
def test_a_request_gives_what_the_engine_gives(
    client: httpx2.Client, llm: LLM, shaping: dict[str, Any], sampling: dict[str, Any]
):
    biases = {int(token): float(bias) for token, bias in shaping.get("logit_bias", {}).items()}
    direct = {**shaping, "logit_bias": biases, **sampling, "max_tokens": 24}
    plain = Engine(llm.model, EngineConfig(cache_tokens=2048))  # without drafts
    stop = (llm.config.eos_token_id,)
    expected = plain.submit(PROMPT, SamplingParams(stop_token_ids=stop, **direct))
    plain.run([expected])
    found = complete(client, **shaping, **sampling)
    assert found == [drawn.token for drawn in expected.output]
    assert found != complete(client, **sampling)
    assert llm.engine.metrics.drafted_tokens > 0


def test_cut_offs(client: httpx2.Client):
    greedy, free = complete(client), {"temperature": 1, "seed": 3}
    assert complete(client, min_p=1, **free) == greedy
    assert complete(client, top_k=1, **free) == greedy
    assert complete(client, **free) != greedy


def test_defaults_change_nothing(client: httpx2.Client):
    plain = {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "frequency_penalty": 0.0,
             "presence_penalty": 0, "logit_bias": {}}  # fmt: skip
    nothing = dict.fromkeys(plain)
    sampling = {"temperature": 1, "seed": 3}
    expected = complete(client, **sampling)
    for fields in (plain, nothing, {"top_k": -1, "logit_bias": {"5": 0}}):
        assert complete(client, **fields, **sampling) == expected


@pytest.mark.parametrize("word", ["w", "l"])
def test_a_schema_holds_against_a_bias(client: httpx2.Client, llm: LLM, word: str):
    """A bias chooses among what the schema allows, and gets nothing that it does not."""
    names = {"type": "string", "enum": ["w", "l"]}
    schema = {"type": "object", "properties": {"a": names}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    (wanted,) = llm.tokenizer.encode(word)
    (other,) = llm.tokenizer.encode("f")
    biases = {str(wanted): 90, str(other): 100, str(llm.tokenizer.eos_id): 100}
    penalties = {"presence_penalty": -2, "repetition_penalty": 0.5}
    said = chat(client, response_format=form, max_tokens=60, logit_bias=biases, **penalties)
    assert json.loads(said["message"]["content"]) == {"a": word}


def test_a_bias_cannot_make_a_call_that_was_not_allowed(client: httpx2.Client, llm: LLM):
    bias = {"logit_bias": {str(llm.tokenizer.token_id("dsml")): 100}}
    made = chat(client, tools=[BASH], tool_choice="none", **bias)
    assert "tool_calls" not in made["message"]
    assert not made.get("fathom", {}).get("withheld_calls")


BAD = [
    *(("top_k", value) for value in ("5", 1.5, True, -2, 2**31, 10**400, [1])),
    *(("min_p", value) for value in ("0.5", True, -0.1, 1.1, 10**400)),
    *(("repetition_penalty", value) for value in ("1", False, 0, -1, 1e-9, 101, 10**400)),
    *(("frequency_penalty", value) for value in ("0", True, 2.1, -2.1, -(10**400), {})),
    *(("presence_penalty", value) for value in ("0", True, 2.1, -2.1, 10**400, [])),
    *(("logit_bias", value) for value in ([], [[5, 1]], "5", 5, True)),
    *(
        ("logit_bias", {token: 1})
        for token in ("", "a", "-1", "1.0", " 5", "5\n", "05", "1_0", "\u0665", "9" * 4000,
                      "400", str(2**31), str(2**64))
    ),
    *(("logit_bias", {"5": bias}) for bias in ("1", None, True, 100.5, -101, 10**400, [1], {})),
    ("logit_bias", {str(token): 1 for token in range(1025)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x)[:20])
def test_wrong_values_are_refused_by_name(client: httpx2.Client, name: str, value: Any):
    bodies = {
        "/v1/chat/completions": {"messages": TALK},
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": TALK, "max_tokens": 1},
    }
    for path, body in bodies.items():
        response = client.post(path, json={**body, name: value})
        assert response.status_code == 400, (path, response.text)
        error = response.json()["error"]
        if path == "/v1/messages":
            assert error["message"].startswith(f"{name}: ")
        else:
            assert error["param"] == name
        assert len(response.content) < 500


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "Infinity", '{"5": 1e999}'])
@pytest.mark.parametrize("name", ["min_p", "frequency_penalty", "top_k", "logit_bias"])
def test_numbers_that_are_none_are_refused(client: httpx2.Client, name: str, value: str):
    body = f'{{"prompt": "x", "{name}": {value}}}'
    headers = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name or value in ("NaN", "Infinity")


def test_an_engine_that_chooses_no_tokens_says_so(server: Server):
    server.say("x</think>y")
    asked = {"min_p": 0.5, "logit_bias": {"5": 1}}
    for response in (
        server.chat(**asked),
        server.client.post("/v1/completions", json={"prompt": "x", **asked}),
    ):
        assert response.status_code == 200
        assert response.headers["x-fathom-notice"] == (
            "min_p has no effect: this engine chooses no tokens; "
            "logit_bias has no effect: this engine chooses no tokens"
        )
    assert "x-fathom-notice" not in server.chat(min_p=0, presence_penalty=0).headers
