"""Calls reach clients exactly as they were written, and whole or not at all, in every API."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from fathom.chat.protocol import SPECIAL_TOKENS
from fathom.server.scripted import Reply
from tests.server.conftest import BASH, D, Open, Server, block, call, events
from tests.server.test_sdks import ANTHROPIC_BASH, RESPONSES_BASH

HOLE = SPECIAL_TOKENS["fim_hole"]
APIS = ("chat", "messages", "responses")
TOOLS = {"chat": BASH, "messages": ANTHROPIC_BASH, "responses": RESPONSES_BASH}
LIMITS = {"chat": "max_tokens", "messages": "max_tokens", "responses": "max_output_tokens"}

WHOLE = block(call(command="rm -rf /tmp/x"))
DUBIOUS = {
    "from the start": WHOLE.replace("tool_calls", "toolcalls"),
    "later": WHOLE.replace(f"</{D}parameter>", ""),
    "at the very end": WHOLE.replace(f"\n</{D}invoke>", f"junk\n</{D}invoke>"),
}


def ask(server: Server, api: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, or the one object of a reply."""
    limit = fields.pop("limit", None)
    fields |= {LIMITS[api]: limit} if limit else {}
    response = getattr(server, api)(tools=[TOOLS[api]], **fields)
    assert response.status_code == 200
    return events(response.text) if fields.get("stream") else [response.json()]


def arguments_of(found: list[dict[str, Any]], api: str) -> list[str]:
    """The arguments of each call that reached the client, as text."""
    texts: dict[Any, str] = {}
    for event in found:
        if api == "chat":
            choices = event["choices"]
            parts = [c.get("delta") or c.get("message") or {} for c in choices]
            called = [one for part in parts for one in part.get("tool_calls", [])]
            for number, part in enumerate(called):
                key = part.get("index", number)
                texts[key] = texts.get(key, "") + part["function"]["arguments"]
        elif event.get("type") == "message":
            uses = [part for part in event["content"] if part["type"] == "tool_use"]
            texts |= {part["id"]: json.dumps(part["input"]) for part in uses}
        elif event.get("delta", {}) and event["type"] == "content_block_delta":
            key = event["index"]
            texts[key] = texts.get(key, "") + event["delta"].get("partial_json", "")
        elif event.get("type") == "response.function_call_arguments.delta":
            key = event["output_index"]
            texts[key] = texts.get(key, "") + event["delta"]
        elif event.get("object") == "response":
            calls = [item for item in event["output"] if item["type"] == "function_call"]
            texts |= {item["id"]: item["arguments"] for item in calls}
    return [text for text in texts.values() if text]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def report_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    holders = [event for event in found if "fathom" in event]
    holders += [event["response"] for event in found if "fathom" in event.get("response", {})]
    return holders[-1]["fathom"]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_in_an_argument_stay_in_it(server: Server, api: str, stream: bool):
    """Leaving one out made another command of it, delivered as if it were exact."""
    command = f"echo '<think>x</think>' > a; rm -rf {HOLE}/tmp"
    server.say("Thought.</think>" + block(call(command=command)))
    for streams in (False, True):
        found = ask(server, api, stream=stream, stream_arguments=streams)
        assert [json.loads(text) for text in arguments_of(found, api)] == [{"command": command}]
        assert "diagnostics" not in json.dumps(found)


def test_think_in_content_is_content(server: Server):
    server.say("x</think>A <think> tag.")
    body = server.chat().json()
    assert body["choices"][0]["message"]["content"] == "A <think> tag."
    assert "fathom" not in body
    found = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in found) == "A <think> tag."


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("streams", [False, True])
def test_a_call_cut_by_the_limit_never_gets_an_end(server: Server, api: str, streams: bool):
    """Clients run whatever is complete JSON, whatever the finish reason says."""
    server.say("x</think>" + WHOLE)
    begun = 0
    for limit in range(4, 60):
        found = ask(server, api, stream=True, stream_arguments=streams, limit=limit)
        told = arguments_of(found, api)
        cut = "withheld_calls" in json.dumps(found)
        if not cut:
            assert all(json.loads(text) == {"command": "rm -rf /tmp/x"} for text in told)
            continue
        assert report_of(found)["withheld_calls"][0]["partial"]
        assert told == [] or streams
        begun += len(told)
        assert not any(is_json(text) for text in told), told
        ends(found, api, begun=bool(told), cut=True)
    assert bool(begun) == streams


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("kind", DUBIOUS)
def test_a_repaired_call_never_gets_an_end(server: Server, api: str, kind: str):
    server.say("x</think>" + DUBIOUS[kind])
    found = ask(server, api, stream=True, stream_arguments=True)
    told = arguments_of(found, api)
    assert bool(told) == (kind != "from the start")
    assert not any(is_json(text) for text in told), told
    (held,) = report_of(found)["withheld_calls"]
    assert held["repaired"]
    assert "rm -rf" in json.loads(held["arguments"])["command"]
    ends(found, api, begun=bool(told), cut=False)


def ends(found: list[dict[str, Any]], api: str, *, begun: bool, cut: bool) -> None:
    """Check the end of a stream in which a call was withheld, maybe after it began."""
    if api == "chat":
        assert found[-1]["choices"][0]["finish_reason"] == ("length" if cut else "stop")
    elif api == "messages":
        last = [event for event in found if event["type"] == "message_delta"][-1]
        assert last["delta"]["stop_reason"] == ("max_tokens" if cut else "end_turn")
        assert found[-1]["type"] == ("error" if begun else "message_stop")
        begins = [e["index"] for e in found if e["type"] == "content_block_start"]
        stops = [e["index"] for e in found if e["type"] == "content_block_stop"]
        assert stops == begins[: len(begins) - begun]  # the call's block has no end
    else:
        status = "incomplete" if begun or cut else "completed"
        assert found[-1]["type"] == f"response.{status}"
        assert not any(e["type"] == "response.function_call_arguments.done" for e in found)
        done = [e["item"] for e in found if e["type"] == "response.output_item.done"]
        assert done == found[-1]["response"]["output"]
        calls = [item for item in done if item["type"] == "function_call"]
        assert [item["status"] for item in calls] == ["incomplete"] * begun


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("kind", DUBIOUS)
def test_a_repaired_call_that_is_allowed_is_told_to_its_end(server: Server, api: str, kind: str):
    server.say("x</think>" + DUBIOUS[kind])
    for streams in (False, True):
        fields = {"stream_arguments": streams, "repaired_calls": True}
        (text,) = arguments_of(ask(server, api, stream=True, **fields), api)
        (whole,) = arguments_of(ask(server, api, **fields), api)
        assert json.loads(text) == json.loads(whole)
        assert "rm -rf" in json.loads(text)["command"]


@pytest.mark.parametrize("api", APIS)
def test_a_good_call_behind_a_withheld_one_is_delivered(server: Server, api: str):
    bad = call(command="first").replace(f"</{D}parameter>", "")
    server.say("x</think>" + block(bad, call(command="second")))
    found = ask(server, api, stream=True, stream_arguments=True)
    told = arguments_of(found, api)
    assert [json.loads(text) for text in told if is_json(text)] == [{"command": "second"}]


def test_sdk_openai_responses_survives_a_cut_call(server: Server):
    server.say("x</think>" + WHOLE)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for limit in (18, 22, 26):
        with client.responses.stream(
            model="x", input="Go.", tools=[RESPONSES_BASH], max_output_tokens=limit,
            extra_body={"stream_arguments": True},
        ) as stream:  # fmt: skip
            kinds = [event.type for event in stream]
        assert kinds[-1] == "response.incomplete"
        assert "response.function_call_arguments.done" not in kinds


def test_sdk_anthropic_makes_no_input_of_a_cut_call(server: Server):
    """It makes an object of any beginning, so only an error keeps its caller from running it."""
    server.say("x</think>" + block(call(limit=5, command="rm -rf /tmp/x")))
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    raised: list[str] = []
    for limit in range(14, 44, 3):
        with client.messages.stream(
            model="x", max_tokens=limit, tools=[ANTHROPIC_BASH],
            messages=[{"role": "user", "content": "Go."}],
            extra_body={"stream_arguments": True},
        ) as stream:  # fmt: skip
            try:
                message = stream.get_final_message()
            except anthropic.APIStatusError as error:
                raised.append(str(error))
            else:
                inputs = [part.input for part in message.content if part.type == "tool_use"]
                assert inputs in ([], [{"limit": 5, "command": "rm -rf /tmp/x"}])
    assert raised
    assert all("run nothing of it" in error for error in raised)


@pytest.mark.parametrize("said", ["x</think>Hi <\uff5cUser\uff5c>", "x</think>" + DUBIOUS["later"]])
def test_every_chunk_has_a_choice_unless_usage_was_asked_for(server: Server, said: str):
    """Clients look at `choices[0]` of every chunk."""
    server.say(said)
    found = ask(server, "chat", stream=True)
    assert all(event["choices"] for event in found)
    assert found[-1]["fathom"]
    assert found[-1]["choices"][0]["finish_reason"] == "stop"
    found = ask(server, "chat", stream=True, stream_options={"include_usage": True}, n=2)
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]
    assert sum("fathom" in event for event in found) == 2


LONG = "9" * 5_000
NUMBERS = f"""<{D}invoke name="bash">
<{D}parameter name="limit" string="false">{LONG}</{D}parameter>
<{D}parameter name="command" string="false">[1e999, -0, 1.50]</{D}parameter>
</{D}invoke>"""


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("stream", [False, True])
def test_numbers_that_python_cannot_hold_go_out_as_written(server: Server, api: str, stream: bool):
    server.say("x</think>" + block(NUMBERS))
    limit = {LIMITS[api]: 9_000}
    response = getattr(server, api)(tools=[TOOLS[api]], stream=stream, **limit)
    assert response.status_code == 200
    assert "Infinity" not in response.text
    assert "1e999" in response.text
    assert "1.50" in response.text
    assert response.text.replace('"}}', "").count("9") >= 5_000
    assert LONG in response.text or stream


def test_numbers_that_python_cannot_hold_for_custom_tools_and_searches(server: Server):
    custom = {"type": "custom", "name": "bash", "description": "Run."}
    search = {"type": "tool_search", "execution": "client", "description": "Find tools.",
              "parameters": {"type": "object", "properties": {"limit": {}}}}  # fmt: skip
    for tool, name in ((custom, "bash"), (search, "tool_search")):
        server.say("x</think>" + block(NUMBERS.replace("bash", name)))
        response = server.responses(tools=[tool])
        assert response.status_code == 200
        assert LONG in response.text
        stored = server.client.get(
            f"/v1/responses/{json.loads(response.text, parse_int=str)['id']}"
        )
        assert stored.text == response.text


@pytest.mark.parametrize("field", ["metadata", "tools", "schema"])
def test_a_number_that_is_none_is_refused(server: Server, field: str):
    bad = '{"type": "object", "properties": {"a": {"default": 1e999}}}'
    tool = {"type": "function", "name": "f", "parameters": "BAD"}
    given = {"metadata": {"metadata": "BAD"}, "tools": {"tools": [{"type": "x", "n": "BAD"}]},
             "schema": {"tools": [tool]}}[field]  # fmt: skip
    body = json.dumps({"input": "Hello", **given}).replace('"BAD"', bad)
    response = server.client.post(
        "/v1/responses", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("fails", [True, False])
def test_a_failure_behind_signs_of_life_is_a_whole_response(open_server: Open, fails: bool):
    server = open_server(limits={"keep_alive_seconds": 0.05})
    server.say(Reply(text="x</think>y", first_delay=0.3, fail_after=0 if fails else None))
    response = server.responses(stream=True)
    assert ": keep-alive" in response.text
    found = events(response.text)
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    assert found[-1]["type"] == ("response.failed" if fails else "response.completed")
    assert [event["sequence_number"] for event in found] == list(range(len(found)))


def test_tools_found_by_a_search_keep_their_namespace_in_later_turns(server: Server):
    search = {
        "type": "tool_search",
        "execution": "client",
        "description": "Find tools.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    }
    server.say("x</think>" + block(call("tool_search", query="mail")))
    first = server.responses("Send it.", tools=[search]).json()
    asked = next(item for item in first["output"] if item["type"] == "tool_search_call")
    inner = {"type": "function", "name": "send", "parameters": {"type": "object"}}
    found = {"type": "namespace", "name": "mail", "description": "Mail.", "tools": [inner]}
    result = {"type": "tool_search_output", "call_id": asked["call_id"], "tools": [found]}
    server.say("x</think>" + block(call("mail__send")))
    previous = first["id"]
    given: Any = [result]
    for _ in range(3):
        reply = server.responses(given, tools=[search], previous_response_id=previous).json()
        sent = next(item for item in reply["output"] if item["type"] == "function_call")
        assert (sent["namespace"], sent["name"]) == ("mail", "send")
        previous = reply["id"]
        given = [{"type": "function_call_output", "call_id": sent["call_id"], "output": "done"}]


def test_a_response_repeats_what_was_asked(server: Server, open_server: Open):
    choice = {"type": "function", "name": "bash"}
    server.say("x</think>" + WHOLE)
    fields = {"tools": [RESPONSES_BASH], "tool_choice": choice, "instructions": "Be brief."}
    found = events(server.responses(stream=True, **fields).text)
    bodies = [found[0]["response"], found[-1]["response"]]
    bodies.append(server.client.get(f"/v1/responses/{bodies[-1]['id']}").json())
    for body in bodies:
        assert {name: body[name] for name in fields} == fields
    small = open_server(backend={"context_tokens": 100_000})
    small.say("x</think>y")
    reply = small.responses(reasoning={"effort": "max"})
    assert reply.json()["reasoning"]["effort"] == "high"
    assert "effort max became high" in reply.headers["x-fathom-notice"]


def test_a_task_survives_two_user_messages_in_a_row(server: Server):
    server.say("Search")
    history = [{"role": "user", "content": "a"}, {"role": "user", "content": "b", "task": "action"}]
    assert server.chat(history).status_code == 200
    assert server.prompt.endswith(SPECIAL_TOKENS["action"])
    assert "a\n\nb" in server.prompt
