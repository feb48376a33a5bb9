"""What the fields of a request do, whichever API they come through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fathom.chat.quick import TASKS
from fathom.server.settings import MAX_THINKING_FLOOR
from tests.server.conftest import BASH, Open, Server, block, call, events

ANTHROPIC_BASH = {"name": "bash", "input_schema": BASH["function"]["parameters"]}


def test_one_conversation_is_one_prompt_in_all_three_apis(server: Server):
    parameters = BASH["function"]["parameters"]
    history = [{"role": "user", "content": "Hi"}]
    server.chat([{"role": "system", "content": "Be brief."}, *history], tools=[BASH])
    chat = server.prompt
    tool = {"name": "bash", "description": "Run a command.", "input_schema": parameters}
    server.messages(history, system="Be brief.", tools=[tool])
    assert server.prompt == chat
    tool = {"type": "function", **BASH["function"]}
    server.responses(history, instructions="Be brief.", tools=[tool])
    assert server.prompt == chat


def test_render_shows_the_exact_prompt_and_ids(server: Server):
    fields = {"tools": [BASH], "reasoning_effort": "high"}
    body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
    shown = server.client.post("/v1/render", json=body).json()
    server.chat("Hello", **fields)
    request = server.backend.requests[-1]
    assert shown["prompt"] == request.text
    assert shown["token_ids"] == list(request.prompt)
    assert shown["thinking"] == "high"
    ids = server.client.post("/tokenize", json={"prompt": request.text, "special": True}).json()
    assert ids["tokens"] == shown["token_ids"]
    back = server.client.post("/detokenize", json={"tokens": ids["tokens"]}).json()
    assert back["prompt"] == request.text
    plain = server.client.post("/tokenize", json={"prompt": "<think>"}).json()["tokens"]
    assert not set(plain) & server.backend.tokenizer.special_ids


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "high"),
        ({"thinking": {"type": "disabled"}}, "off"),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, "off"),
        ({"reasoning_effort": "none"}, "off"),
        ({"reasoning_effort": "none", "thinking": {"type": "enabled"}}, "high"),
        ({"reasoning_effort": "ultra"}, "max"),
        ({"reasoning_effort": "medium"}, "high"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "off"),
        ({"chat_template_kwargs": {"thinking": True}}, "high"),
    ],
)
def test_every_spelling_of_effort(server: Server, fields: dict[str, Any], mode: str):
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    assert server.client.post("/v1/render", json=body).json()["thinking"] == mode
    assert server.chat(**fields).status_code == 200


def test_think_max_below_its_floor_is_high_and_says_so(server: Server, open_server: Open):
    small = open_server(backend={"context_tokens": MAX_THINKING_FLOOR - 1})
    lowered = small.chat(reasoning_effort="max")
    assert f"needs a context of {MAX_THINKING_FLOOR}" in lowered.headers["x-fathom-notice"]
    assert "Absolute maximum" not in small.prompt
    kept = server.chat(reasoning_effort="max")
    assert "x-fathom-notice" not in kept.headers
    assert "Absolute maximum" in server.prompt


@pytest.mark.parametrize("pieces", ["STOP", "one STOP", "wo ST", " two"])
def test_stop_strings_end_the_visible_answer(server: Server, pieces: str):
    server.say("thought STOP here</think>one two STOP three")
    whole = server.chat(stop=[pieces, "never"]).json()["choices"][0]
    expected = "one two STOP three".split(pieces)[0]
    assert whole["message"]["content"] == expected
    assert whole["message"]["reasoning_content"] == "thought STOP here"
    assert whole["finish_reason"] == "stop"
    found = events(server.chat(stop=pieces, stream=True).text)
    deltas = [c["delta"].get("content") or "" for e in found for c in e["choices"]]
    assert "".join(deltas) == expected


def test_a_stop_string_in_an_argument_stops_nothing(server: Server):
    server.say("x</think>" + block(call(command="echo STOP now")))
    choice = server.chat(tools=[BASH], stop=["STOP"]).json()["choices"][0]
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"command": "echo STOP now"}


def test_parallel_calls_can_be_refused(server: Server):
    server.say("x</think>" + block(call(command="one"), call(command="two")))
    both = server.chat(tools=[BASH]).json()["choices"][0]["message"]["tool_calls"]
    assert len(both) == 2
    one = server.chat(tools=[BASH], parallel_tool_calls=False).json()["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1
    assert one["finish_reason"] == "tool_calls"
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    reply = server.messages(tools=[ANTHROPIC_BASH], tool_choice=choice).json()
    assert [part["type"] for part in reply["content"]].count("tool_use") == 1


def test_several_choices_are_streamed_with_their_index(server: Server):
    server.say("a</think>b c d")
    response = server.chat(n=3, stream=True, stream_options={"include_usage": True})
    found = events(response.text)
    said = {0: "", 1: "", 2: ""}
    ends: list[int] = []
    for event in found:
        for choice in event["choices"]:
            said[choice["index"]] += choice["delta"].get("content") or ""
            if choice["finish_reason"]:
                ends.append(choice["index"])
    assert said == {0: "b c d", 1: "b c d", 2: "b c d"}
    assert sorted(ends) == [0, 1, 2]
    single = server.chat().json()["usage"]["completion_tokens"]
    assert found[-1]["usage"]["completion_tokens"] == 3 * single


def test_seed_and_sampling_reach_the_engine(server: Server):
    server.chat(seed=7, n=2, temperature=0.3, top_p=0.5, top_k=4)
    first, second = sorted(server.backend.requests[-2:], key=lambda r: r.seed or 0)
    assert (first.seed, second.seed) == (7, 8)  # the same seed twice would say the same twice
    assert (first.temperature, first.top_p, first.shaping.top_k) == (0.3, 0.5, 4)
    server.messages(top_k=3)
    assert server.backend.requests[-1].shaping.top_k == 3


def test_usage_counts_cached_and_reasoning_tokens(server: Server):
    server.say("one two three</think>four")
    text = "tell me about " + "many things " * 20
    server.chat(text)
    usage = server.chat(text).json()["usage"]
    prompt = len(server.backend.requests[-1].prompt)
    assert usage["prompt_tokens"] == prompt
    assert usage["prompt_tokens_details"]["cached_tokens"] == prompt - 1
    tokenizer = server.backend.tokenizer
    thought = len(tokenizer.encode("one two three</think>", special=True))
    assert usage["completion_tokens_details"]["reasoning_tokens"] == thought
    assert usage["completion_tokens"] == thought + len(tokenizer.encode("four")) + 1
    reply = server.messages(text).json()["usage"]
    assert reply["input_tokens"] + reply["cache_read_input_tokens"] == prompt


def test_logprobs_cover_what_is_shown_and_nothing_else(server: Server):
    server.say("some thought</think>An answer." + block(call(command="ls")))
    choice = server.chat(tools=[BASH], logprobs=True, top_logprobs=1).json()["choices"][0]
    found = choice["logprobs"]
    assert "".join(t["token"] for t in found["content"]) == "An answer."
    assert "".join(t["token"] for t in found["reasoning_content"]) == "some thought"
    streamed = events(server.chat(tools=[BASH], logprobs=True, stream=True).text)
    tokens = [
        t["token"]
        for e in streamed
        for c in e["choices"]
        for t in (c["logprobs"] or {}).get("content", [])
    ]
    assert "".join(tokens) == "An answer."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "said", ["x</think>\n\n4", "\n\nx\n\n</think>\n\n\n4", "x</think>4", "x\n</think>\n4\n\ny"]
)
def test_logprobs_leave_out_line_breaks_that_are_not_shown(server: Server, said: str, stream: bool):
    server.say(said)
    reply = server.chat(logprobs=True, stream=stream)
    bodies = events(reply.text) if stream else [reply.json()]
    found = [c["logprobs"] for body in bodies for c in body["choices"] if c["logprobs"]]
    for name, text in (("content", said.split("</think>")[1].strip()), ("reasoning_content", "x")):
        assert "".join(t["token"] for one in found for t in one[name]) == text


def test_a_last_assistant_message_is_continued(server: Server):
    server.say(" two three")
    history = [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": "one", "prefix": True},
    ]
    reply = server.chat(history, thinking={"type": "disabled"}).json()["choices"][0]["message"]
    assert server.prompt.endswith("</think>one")
    assert reply["content"] == " two three"


def test_the_reply_is_bounded_by_the_context(open_server: Open):
    small = open_server(backend={"context_tokens": 64})
    small.say("word " * 500)
    choice = small.chat("Hi", thinking={"type": "disabled"}, max_tokens=1000).json()
    assert choice["choices"][0]["finish_reason"] == "length"
    assert choice["usage"]["total_tokens"] == 64


def test_previous_response_id_goes_on_and_belongs_to_its_key(open_server: Open):
    server = open_server(api_keys=("key-number-one", "key-number-two"))
    one = {"authorization": "Bearer key-number-one"}
    two = {"x-api-key": "key-number-two"}
    first = server.client.post("/v1/responses", json={"input": "My name is Ada."}, headers=one)
    body = {"input": "And?", "previous_response_id": first.json()["id"]}
    assert server.client.post("/v1/responses", json=body, headers=one).status_code == 200
    assert "My name is Ada." in server.prompt
    assert "Short title" in server.prompt
    refused = server.client.post("/v1/responses", json=body, headers=two)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "previous_response_not_found"
    stored = f"/v1/responses/{first.json()['id']}"
    assert server.client.get(stored, headers=two).status_code == 404
    unstored = server.client.post(
        "/v1/responses", json={"input": "x", "store": False}, headers=one
    ).json()
    assert server.client.get(f"/v1/responses/{unstored['id']}", headers=one).status_code == 404


def test_restored_reasoning_belongs_to_its_key(open_server: Open):
    server = open_server(api_keys=("key-number-one", "key-number-two"))
    server.say("my secret thought</think>" + block(call(command="ls")))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Look."}], "tools": [BASH]}
    path, one = "/v1/chat/completions", {"authorization": "Bearer key-number-one"}
    reply = server.client.post(path, json=body, headers=one).json()["choices"][0]["message"]
    lost = {"role": "assistant", "tool_calls": reply["tool_calls"], "content": ""}
    result = {"role": "tool", "tool_call_id": reply["tool_calls"][0]["id"], "content": "x"}
    body["messages"] += [lost, result]
    two = {"authorization": "Bearer key-number-two"}
    assert (
        "x-fathom-restored-reasoning"
        not in server.client.post(path, json=body, headers=two).headers
    )
    assert "my secret thought" not in server.prompt
    restored = server.client.post(path, json=body, headers=one)
    assert restored.headers["x-fathom-restored-reasoning"] == "1"


def test_completions_take_text_ids_suffixes_and_lists(server: Server):
    server.say("abc")
    tokenizer = server.backend.tokenizer
    post = server.client.post
    both = post("/v1/completions", json={"prompt": ["one", "two"], "n": 2, "max_tokens": 9}).json()
    assert [c["index"] for c in both["choices"]] == [0, 1, 2, 3]
    ids = tokenizer.encode("Once")
    made = post("/v1/completions", json={"prompt": ids, "return_token_ids": True}).json()
    assert made["choices"][0]["prompt_token_ids"] == ids
    shown = tokenizer.decode(made["choices"][0]["token_ids"], skip_special=True)
    assert shown == made["choices"][0]["text"] == "abc"
    post("/v1/completions", json={"prompt": "def f(", "suffix": "return x"})
    assert "fim" in server.prompt
    assert server.prompt.count("<\uff5cfim") == 3
    echoed = post("/v1/completions", json={"prompt": "Once", "echo": True}).json()
    assert echoed["choices"][0]["text"] == "Onceabc"
    for bad in (None, [], [[]], [1.5], [-1], [10**9], {"a": 1}):
        assert post("/v1/completions", json={"prompt": bad}).status_code == 400


def test_metrics_count_what_happened(open_server: Open):
    server = open_server()
    server.chat("[[one]]", tools=[BASH])
    server.chat([])
    text = server.client.get("/metrics").text
    assert 'fathom_requests_total{api="chat",status="200"} 1.0' in text
    assert 'fathom_requests_total{api="chat",status="400"} 1.0' in text
    assert 'fathom_calls_total{fate="delivered"} 1.0' in text
    assert 'fathom_completions_total{reason="tool_calls"} 1.0' in text
    assert "fathom_running 0.0" in text


def test_quick_instructions(server: Server):
    """`task` ends the prompt with its token, and the reply has no thoughts in any mode."""
    server.say("Short title")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
    titled = [talk[0], {**talk[1], "task": "title"}]
    for body in ({}, {"thinking": {"type": "disabled"}}, {"reasoning_effort": "max"}):
        message = server.chat(titled, **body).json()["choices"][0]["message"]
        assert message["content"] == "Short title"
        assert "reasoning" not in message
        assert server.prompt.endswith(TASKS["title"].token)
    assert server.chat([{**talk[0], "task": "query"}]).status_code == 200
    assert server.prompt.endswith("hi" + TASKS["query"].token)
    for wrong in ([{**talk[0], "task": "title"}], [{**talk[0], "task": "poem"}]):
        answer = server.chat(wrong)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages[0].task"
