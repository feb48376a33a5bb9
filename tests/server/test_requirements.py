"""The ranked requirements of real clients, one test each; the first is in test_recorded."""

from __future__ import annotations

import json

import pytest

from fathom.chat.requests import pack_reasoning
from fathom.server.scripted import Reply
from tests.server.conftest import BASH, D, Open, Server, block, call, events

ANTHROPIC_BASH = {"name": "bash", "input_schema": BASH["function"]["parameters"]}
RESPONSES_BASH = {"type": "function", **BASH["function"]}
CALLED = "thought</think>" + block(call(command="ls"))


def answered(arguments: str = '{"command": "ls"}', **assistant):
    """A chat history with one finished call."""
    return [
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "bash", "arguments": arguments},
                }
            ],
            **assistant,
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "notes.txt"},
    ]


def test_2_every_reply_ends_with_a_known_reason(server: Server):
    replies = {"a</think>b": "stop", CALLED: "tool_calls"}
    for text, reason in replies.items():
        server.say(text)
        for stream in (False, True):
            response = server.chat(tools=[BASH], stream=stream)
            if stream:
                choices = [c for e in events(response.text) for c in e["choices"]]
                reasons = [c["finish_reason"] for c in choices if c["finish_reason"]]
                assert reasons == [reason]
            else:
                assert response.json()["choices"][0]["finish_reason"] == reason
    server.say("a</think>" + "word " * 100)
    assert server.chat(max_tokens=5).json()["choices"][0]["finish_reason"] == "length"
    assert server.messages(max_tokens=5).json()["stop_reason"] == "max_tokens"
    assert server.responses(max_output_tokens=5).json()["status"] == "incomplete"


def test_2_engine_trouble_is_an_error_never_a_reason(server: Server):
    server.say(Reply(text="a</think>b", fail_after=0))
    for send in (server.chat, server.messages, server.responses):
        for stream in (False, True):
            assert send(stream=stream).status_code == 502
    server.say(Reply(text="one two three</think>four five six", fail_after=6))
    chat = server.chat(stream=True)
    assert chat.status_code == 200
    last = json.loads(chat.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "backend_failed"
    assert '"finish_reason":"' not in chat.text
    assert events(server.messages(stream=True).text)[-1]["type"] == "error"
    assert events(server.responses(stream=True).text)[-1]["type"] == "response.failed"


@pytest.mark.parametrize("stream", [False, True])
def test_3_a_call_cut_by_the_token_limit_cannot_be_executed(server: Server, stream: bool):
    server.say(CALLED)
    whole = server.backend.tokenizer.encode(CALLED, special=True)
    delivered = 0
    for limit in range(1, len(whole) + 2):
        text = server.chat(tools=[BASH], stream=stream, max_tokens=limit).text
        found = events(text) if stream else [json.loads(text)]
        calls = [
            part
            for event in found
            for choice in event["choices"]
            for part in (choice.get("delta") or choice.get("message") or {}).get("tool_calls", [])
        ]
        for part in calls:  # all or nothing
            assert json.loads(part["function"]["arguments"]) == {"command": "ls"}
        delivered += bool(calls)
        if not calls and limit > 30:
            assert found[-1]["fathom"]["withheld_calls"][0]["partial"]
    assert delivered >= 1


def test_3_streaming_arguments_is_a_setting_of_server_and_request(
    server: Server, open_server: Open
):
    eager = open_server(stream_arguments=True)
    for chosen, fields in ((server, {"stream_arguments": True}), (eager, {})):
        chosen.say(CALLED)
        found = events(chosen.chat(tools=[BASH], stream=True, **fields).text)
        parts = [p for e in found for c in e["choices"] for p in c["delta"].get("tool_calls", [])]
        assert len(parts) > 3
        assert parts[0]["function"] == {"name": "bash", "arguments": ""}
        joined = "".join(part["function"]["arguments"] for part in parts)
        assert json.loads(joined) == {"command": "ls"}
        assert all(part["index"] == 0 for part in parts)
    eager.say(CALLED)
    found = events(eager.chat(tools=[BASH], stream=True, stream_arguments=False).text)
    parts = [p for e in found for c in e["choices"] for p in c["delta"].get("tool_calls", [])]
    assert len(parts) == 1


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_4_chat_reasoning_comes_back_under_both_names(server: Server, field: str):
    server.say("first thought</think>ok")
    reply = server.chat(tools=[BASH]).json()["choices"][0]["message"]
    assert reply["reasoning_content"] == reply["reasoning"] == "first thought"
    server.chat(answered(**{field: "I want to see"}), tools=[BASH])
    assert "<think>I want to see</think>" in server.prompt


@pytest.mark.parametrize("lost", [{}, {"reasoning_content": None}, {"reasoning_content": ""}])
def test_4_absent_and_empty_reasoning_is_accepted(server: Server, lost: dict[str, str | None]):
    assert server.chat(answered(**lost), tools=[BASH]).status_code == 200


def test_4_strictness_is_an_option(open_server: Open):
    strict = open_server(require_reasoning=True)
    response = strict.chat(answered(), tools=[BASH])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[1].reasoning_content"
    assert strict.chat(answered(reasoning_content="x"), tools=[BASH]).status_code == 200


@pytest.mark.parametrize("signature", [{}, {"signature": ""}, {"signature": "anything"}])
def test_4_thinking_blocks_with_any_signature_or_none(server: Server, signature: dict[str, str]):
    said = server.messages().json()["content"][0]
    assert said["type"] == "thinking"
    assert said["signature"]
    content = [
        {"type": "thinking", "thinking": "I want to see", **signature},
        {"type": "tool_use", "id": "toolu_1", "name": "bash", "input": {"command": "ls"}},
    ]
    history = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": content},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "notes.txt"}]},
    ]  # fmt: skip
    assert server.messages(history, tools=[ANTHROPIC_BASH]).status_code == 200
    assert "<think>I want to see</think>" in server.prompt


@pytest.mark.parametrize("carrier", ["content", "summary", "encrypted_content"])
def test_4_reasoning_items_by_text_summary_or_our_own_token(server: Server, carrier: str):
    server.say("I want to see</think>" + block(call(command="ls")))
    made = server.responses("Look.", tools=[RESPONSES_BASH]).json()["output"]
    reasoning, function = made[0], made[1]
    assert reasoning["encrypted_content"] == pack_reasoning("I want to see")
    item = {"type": "reasoning", "id": reasoning["id"], "summary": []}
    kept = {
        "content": {"content": reasoning["content"]},
        "summary": {"summary": [{"type": "summary_text", "text": "I want to see"}]},
        "encrypted_content": {"encrypted_content": reasoning["encrypted_content"]},
    }[carrier]
    # Under another id, so that the server cannot simply remember it.
    known = {**function, "call_id": "call_other"}
    output = {"type": "function_call_output", "call_id": "call_other", "output": "notes.txt"}
    history = [{"role": "user", "content": "Look."}, {**item, **kept}, known, output]
    assert server.responses(history, tools=[RESPONSES_BASH]).status_code == 200
    assert "<think>I want to see</think>" in server.prompt


def test_4_think_tags_in_assistant_content_stay_ordinary_text(server: Server):
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>quoted</think> text"},
        {"role": "user", "content": "Go on"},
    ]
    server.chat(history, tools=[BASH])
    ids = list(server.backend.requests[-1].prompt)
    ends = ids.count(server.backend.tokenizer.token_id("think_end"))
    assert (
        ends == 1 + server.prompt.split("## Tools")[1].split("### Avail")[0].count("</think>") + 0
    )
    assert "<think>quoted</think> text" in server.prompt


def test_5_messages_stream_has_names_usage_and_every_part(server: Server):
    server.say(CALLED)
    response = server.messages(tools=[ANTHROPIC_BASH], stream=True)
    found = events(response.text)
    assert response.text.count("event: ") == len(found)
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert found[0]["message"]["usage"]["input_tokens"] > 0
    assert found[-2]["usage"]["output_tokens"] > 0
    start = next(e for e in found if e.get("content_block", {}).get("type") == "tool_use")
    assert start["content_block"]["input"] == {}
    deltas = [e["delta"] for e in found if e["type"] == "content_block_delta"]
    partial = "".join(d.get("partial_json", "") for d in deltas)
    assert json.loads(partial) == {"command": "ls"}
    assert any(d["type"] == "signature_delta" and d["signature"] for d in deltas)


def test_5_a_system_message_inside_messages_stays_in_its_place(server: Server):
    history = [
        {"role": "user", "content": "One"},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Two"},
    ]
    assert server.messages(history, system="You are a tool.").status_code == 200
    at = [server.prompt.index(text) for text in ("You are", "One", "Be brief", "Yes", "Two")]
    assert at == sorted(at)


def test_5_extras_are_accepted_and_the_billing_line_is_no_prompt(server: Server):
    response = server.messages(
        [{"role": "user", "content": [
            {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}],
        system=[{"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=abc"},
                {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        thinking={"type": "adaptive"},
        context_management={"edits": []},
        output_config={"effort": "high"},
        metadata={"user_id": '{"device":"x"}'},
        tools=[],
    )  # fmt: skip
    assert response.status_code == 200
    assert "billing" not in server.prompt
    assert "Be kind." in server.prompt


def test_6_responses_stream_has_the_full_sequence(server: Server):
    server.say("why</think>Let me see." + block(call(command="ls")))
    found = events(server.responses(tools=[RESPONSES_BASH], stream=True).text)
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    assert kinds.count("response.output_item.added") == 3
    assert kinds.count("response.output_item.done") == 3
    for name in ("content_part.added", "content_part.done"):
        assert kinds.count(f"response.{name}") == 2
    output = found[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
    done = [e["item"] for e in found if e["type"] == "response.output_item.done"]
    assert done == output
    assert found[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_6_namespaces_and_custom_tools_and_searches_find_their_way_back(server: Server):
    tools = [
        {"type": "namespace", "name": "files", "tools": [
            {"type": "function", "name": "read", "parameters": {"type": "object"}}]},
        {"type": "custom", "name": "apply_patch", "format": {
            "type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
        {"type": "tool_search", "execution": "client", "description": "Find tools.",
         "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}},
        {"type": "web_search"},
    ]  # fmt: skip
    patch = "*** Begin Patch\n*** End Patch"
    server.say(
        "x</think>"
        + block(
            call("files__read", path="a"),
            call("apply_patch", input=patch),
            call("tool_search", query="mail"),
        )
    )
    response = server.responses(tools=tools, stream=True)
    assert "web_search" in response.headers["x-fathom-notice"]
    output = events(response.text)[-1]["response"]["output"]
    assert [i["type"] for i in output[1:]] == [
        "function_call", "custom_tool_call", "tool_search_call"]  # fmt: skip
    assert (output[1]["namespace"], output[1]["name"]) == ("files", "read")
    assert output[2]["input"] == patch
    assert output[3]["arguments"] == {"query": "mail"}
    # And what comes back is the same prompt text as the model wrote.
    results = [
        {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "1"},
        {"type": "custom_tool_call_output", "call_id": output[2]["call_id"], "output": "2"},
        {"type": "tool_search_output", "call_id": output[3]["call_id"], "tools": []},
    ]
    again = [{"role": "user", "content": "Hello"}, *output, *results]
    assert server.responses(again, tools=tools).status_code == 200
    assert f'{D}invoke name="files__read">' in server.prompt
    assert patch in server.prompt


def test_7_chat_stream_has_role_index_usage_and_valid_arguments(server: Server):
    server.say("x</think>" + block(call("empty"), call(command="ls")))
    empty = {"type": "function", "function": {"name": "empty", "parameters": {"type": "object"}}}
    text = server.chat(
        tools=[BASH, empty], stream=True, stream_options={"include_usage": True}
    ).text
    found = events(text)
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    parts = [p for e in found for c in e["choices"] for p in c["delta"].get("tool_calls", [])]
    assert [p["index"] for p in parts] == [0, 1]
    assert [json.loads(p["function"]["arguments"]) for p in parts] == [{}, {"command": "ls"}]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] > 10
    assert "usage" not in server.chat(stream=True).text


def test_8_what_cannot_be_honoured_is_refused(server: Server):
    thread = server.messages(thread={"type": "continue", "previous_message_id": "msg_1"})
    assert thread.status_code == 400
    assert "thread" in thread.json()["error"]["message"]
    response = server.responses(previous_response_id="resp_unknown")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "previous_response_id"


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "bash"}},
        {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "bash"}}]}},
    ],
    ids=["required", "named", "allowed_tools"],
)  # fmt: skip
def test_9_tool_choice_is_obeyed_whatever_the_model_would_say(server: Server, choice: object):
    server.say("I would rather talk.</think>No.")
    choice_of = server.chat(tools=[BASH], tool_choice=choice).json()["choices"][0]
    assert choice_of["finish_reason"] == "tool_calls"
    assert choice_of["message"]["tool_calls"][0]["function"]["name"] == "bash"
    assert choice_of["message"]["reasoning_content"] == "I would rather talk."


def test_9_json_schemas_are_obeyed(server: Server):
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
        "additionalProperties": False,
    }
    server.say("thinking</think>No JSON today.")
    form = {"type": "json_schema", "json_schema": {"name": "t", "strict": True, "schema": schema}}
    content = server.chat(response_format=form).json()["choices"][0]["message"]["content"]
    assert list(json.loads(content)) == ["title"]
    config = {"format": {"type": "json_schema", "schema": schema}}
    text = server.messages(output_config=config).json()["content"][-1]["text"]
    assert list(json.loads(text)) == ["title"]
    form = {"format": {"type": "json_schema", "name": "t", "schema": schema}}
    output = server.responses(text=form).json()["output"][-1]
    assert list(json.loads(output["content"][0]["text"])) == ["title"]


def test_10_the_follow_up_of_a_cancelled_turn_is_accepted(server: Server):
    """What each client sends behind a turn that its user stopped."""
    opencode = [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": "", "reasoning_content": ""},
        {"role": "user", "content": "Stop"},
    ]
    assert server.chat(opencode).status_code == 200
    joined = [{"role": "user", "content": "Count"}, {"role": "user", "content": "Stop"}]
    assert server.chat(joined).status_code == 200
    printed = [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": [{"type": "text", "text": "No response requested."}]},
        {"role": "user", "content": [{"type": "text", "text": "Stop"}]},
    ]
    assert server.messages(printed).status_code == 200
    codex = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Count"}]},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "<turn_aborted> interrupted"}]},
    ]  # fmt: skip
    assert server.responses(codex).status_code == 200


def test_11_errors_have_the_shape_of_their_api(server: Server, open_server: Open):
    chat = server.chat([]).json()["error"]
    assert chat["type"] == "invalid_request_error"
    assert chat["param"] == "messages"
    anthropic = server.messages([]).json()
    assert anthropic["type"] == "error"
    assert anthropic["error"]["type"] == "invalid_request_error"
    assert anthropic["request_id"].startswith("req_")
    small = open_server(backend={"context_tokens": 50})
    long = small.messages("word " * 200)
    assert long.status_code == 400
    message = long.json()["error"]["message"]
    assert "prompt is too long: 2" in message
    assert "tokens > 49 maximum" in message


def test_12_head_models_and_count_tokens(server: Server):
    assert server.client.head("/").status_code == 200
    models = server.client.get("/v1/models").json()["data"]
    assert models[0]["id"] == "scripted"
    assert server.client.get("/v1/models/scripted").json() == models[0]
    assert server.client.get("/v1/models/other").status_code == 404
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    counted = server.client.post("/v1/messages/count_tokens", json=body).json()
    server.messages("Hello")
    assert counted["input_tokens"] == len(server.backend.requests[-1].prompt)
