"""Reading requests: what the vectors leave open, field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.chat import CallFinished, CallStarted, ContentDelta
from fathom.chat.protocol import DSML, THINK, THINK_END
from fathom.chat.requests import (
    RequestOptions,
    ToolChoice,
    pack_reasoning,
    read_chat,
    read_messages,
    read_responses,
    resolve_effort,
    sign_reasoning,
    unpack_reasoning,
)
from fathom.errors import RequestError
from tests.chat import samples
from tests.chat.samples import block, invoke, parameter

Q = {"role": "user", "content": "Q"}
LOW = {"reasoning": {"effort": "low"}}


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [Q, *messages], **fields}


def agent_round(**fields: Any) -> list[dict[str, Any]]:
    call = samples.call(call_id="a", command="ls")
    return [
        {"role": "assistant", "content": "", "tool_calls": [call], **fields},
        {"role": "tool", "tool_call_id": "a", "content": "12"},
    ]


# Errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": "Q"}, "messages"),
        ({"messages": ["Q"]}, "messages[0]"),
        ({"messages": [{"content": "Q"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "Q"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "song"}]}]},
            "messages[0].content[0].type",
        ),
        (chat({"role": "tool", "content": "x"}), "messages[1].tool_call_id"),
        (chat({"role": "assistant", "tool_calls": [{}]}), "messages[1].tool_calls[0].id"),
        (
            chat({"role": "assistant", "tool_calls": [{"id": "a"}]}),
            "messages[1].tool_calls[0].function",
        ),
        (chat(*agent_round()[:1]), "messages[1].tool_calls"),
        (chat({"role": "assistant", "content": "A", "prefix": True}, Q), "messages[1].prefix"),
        (chat(temperature="hot"), "temperature"),
        (chat(temperature=float("nan")), "temperature"),
        (chat(top_p=0), "top_p"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=True), "max_tokens"),
        (chat(seed=-1), "seed"),
        (chat(n=9), "n"),
        (chat(stop=["a"] * 17), "stop"),
        (chat(stop=[1]), "stop"),
        (chat(stream="yes"), "stream"),
        (chat(top_logprobs=21), "top_logprobs"),
        (chat(reasoning_effort="bogus"), "reasoning_effort"),
        (chat(thinking={"type": "bogus"}), "thinking.type"),
        (chat(tools=[{"type": "function"}]), "tools[0].function"),
        (chat(tools=[{"function": {}}]), "tools[0].function.name"),
        (
            chat(tools=[{"function": {"name": "f", "parameters": {"type": "string"}}}]),
            "tools[0].function.parameters",
        ),
        (chat(tool_choice="maybe"), "tool_choice"),
        (chat(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice"),
        (chat(response_format={"type": "xml"}), "response_format.type"),
        (chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    ],
)
def test_an_error_names_the_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as failure:
        read_chat(body)
    assert failure.value.param == param
    assert str(failure.value) == f"{param}: {failure.value.message}"
    assert failure.value.code == "request_invalid"


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (read_messages, {"messages": [Q], "thread": {"type": "create"}}, "thread"),
        (
            read_messages,
            {"messages": [Q], "output_config": {"effort": "odd"}},
            "output_config.effort",
        ),
        (read_messages, {"messages": [Q], "tools": [{"name": "f"}]}, "tools[0].input_schema"),
        (read_responses, {"input": []}, "input"),
        (read_responses, {"input": [{"type": "odd"}]}, "input[0].type"),
        (read_responses, {"input": "Q", "background": True}, "background"),
        (read_responses, {"input": "Q", "reasoning": {"effort": 5}}, "reasoning.effort"),
    ],
)
def test_errors_of_the_other_apis(read: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as failure:
        read(body)
    assert failure.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "tools", "id", "name", "function"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FIELDS = ["messages", "input", "system", "tools", "tool_choice", "thinking", "stop", "text"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5))
def test_any_json_is_read_or_refused(body: dict[str, Any]) -> None:
    for read in (read_chat, read_messages, read_responses):
        try:
            request = read(body)
        except RequestError as error:
            assert error.message  # noqa: PT017 (either outcome is fine)
        else:
            assert request.prompt()


# Effort


@pytest.mark.parametrize(
    ("revision", "modes"),
    [
        ("0424", ["off", "high", "high", "high", "high", "max", "max", "max"]),
        ("0731", ["off", "low", "low", "high", "high", "high", "max", "max"]),
    ],
)
def test_every_spelling_of_effort(revision: str, modes: list[str]) -> None:
    efforts = ["none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"]
    assert [resolve_effort(effort, revision) for effort in efforts] == modes
    for effort, mode in zip(efforts, modes, strict=True):
        request = read_chat(chat(reasoning_effort=effort), RequestOptions(revision=revision))
        assert (request.thinking, request.effort) == (mode, effort)


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "high"),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, "off"),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, "high"),
        ({"thinking": False}, "off"),
        ({"enable_thinking": False}, "off"),
        ({"chat_template_kwargs": {"thinking": False}}, "off"),
        ({"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "max"}}, "max"),
    ],
)
def test_switches_of_thinking(fields: dict[str, Any], mode: str) -> None:
    assert read_chat(chat(**fields)).thinking == mode


def test_thinking_can_be_off_by_default() -> None:
    options = RequestOptions(default_effort="none")
    assert read_chat(chat(), options).thinking == "off"
    assert read_chat(chat(thinking={"type": "enabled"}), options).thinking == "high"


# Reasoning


def test_dropped_reasoning_is_recalled_by_call() -> None:
    body = chat(*agent_round(), tools=samples.TOOLS)
    assert f"{THINK}{THINK_END}\n\n" in read_chat(body).prompt()
    found = read_chat(body, RequestOptions(recall={"a": "I remember."}.get))
    assert f"{THINK}I remember.{THINK_END}" in found.prompt()
    assert found.restored == 1
    kept = read_chat(
        chat(*agent_round(reasoning_content="Mine."), tools=samples.TOOLS),
        RequestOptions(recall={"a": "I remember."}.get),
    )
    assert "Mine." in kept.prompt()
    assert kept.restored == 0


def test_missing_reasoning_can_be_refused() -> None:
    strict = RequestOptions(require_reasoning=True)
    body = chat(*agent_round(), tools=samples.TOOLS)
    with pytest.raises(RequestError, match=r"messages\[1\]\.reasoning_content"):
        read_chat(body, strict)
    assert read_chat(chat(*agent_round(reasoning_content="")), strict)
    known = RequestOptions(require_reasoning=True, recall={"a": "R"}.get)
    assert read_chat(body, known).restored == 1


@given(samples.hostile_text)
def test_packed_reasoning_comes_back(reasoning: str) -> None:
    packed = pack_reasoning(reasoning)
    assert packed.isascii()
    assert unpack_reasoning(packed) == reasoning
    assert sign_reasoning(reasoning) == sign_reasoning(reasoning) != ""


@given(st.text(max_size=40), st.integers(0, 60))
def test_foreign_or_damaged_reasoning_is_recognised(text: str, at: int) -> None:
    assert unpack_reasoning(text) is None
    packed = pack_reasoning(text)
    assert unpack_reasoning(packed[: at % len(packed)]) is None
    assert unpack_reasoning("fr1." + text) is None


def test_packed_reasoning_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_reasoning("a" * 100_000)
    assert len(packed) < 1_000
    monkeypatch.setattr("fathom.chat.requests.carrier._LARGEST", 50_000)
    assert unpack_reasoning(packed) is None


@pytest.mark.parametrize("api", ["responses", "messages"])
def test_packed_reasoning_of_one_request_does_not_add_up_without_bound(api: str):
    packed = pack_reasoning("0" * (6 << 20))
    if api == "responses":
        item = {"type": "reasoning", "summary": [], "encrypted_content": packed}
        request = read_responses({"input": [item] * 8 + [{"role": "user", "content": "x"}]})
    else:
        content = [{"type": "redacted_thinking", "data": packed}]
        turns = [{"role": "assistant", "content": content}, {"role": "user", "content": "x"}]
        request = read_messages({"messages": turns * 8})
    assert sum(len(message.reasoning) for message in request.carried) < 16 << 20
    assert sum("another server" in warning for warning in request.warnings) == 6


@pytest.mark.parametrize(
    ("item", "reasoning"),
    [
        ({"content": [{"type": "reasoning_text", "text": "T"}]}, "T"),
        ({"content": None, "encrypted_content": pack_reasoning("P"), "summary": []}, "P"),
        ({"encrypted_content": "foreign", "summary": [{"type": "summary_text", "text": "S"}]}, "S"),
        ({"encrypted_content": "foreign", "summary": []}, ""),
        ({"summary": []}, ""),
    ],
)
def test_reasoning_items_by_text_own_token_or_summary(item: dict[str, Any], reasoning: str) -> None:
    items = [
        Q,
        {"type": "reasoning", **item},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "ok"},
    ]
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    request = read_responses({"input": items, "tools": [tool], **LOW})
    assert f"{THINK}{reasoning}{THINK_END}\n\n<" in request.prompt()
    assert any("another server" in warning for warning in request.warnings) == (
        item.get("encrypted_content") == "foreign" and not reasoning
    )


def test_think_tags_in_the_content_of_an_answer_stay_text() -> None:
    def special(text: str) -> list[str]:
        request = read_chat(chat({"role": "assistant", "content": text}, Q, tools=samples.TOOLS))
        assert f"{text}<" in request.prompt()
        return [segment.text for segment in request.segments() if segment.special]

    assert special(f"{THINK}old{THINK_END}new") == special("new")


# Tools


def test_namespaces_and_custom_tools_and_the_way_back() -> None:
    function = {"type": "function", "name": "go", "parameters": {"type": "object"}}
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /x+/"}
    search = {"type": "tool_search", "execution": "client", "parameters": {"type": "object"}}
    tools = [
        {"type": "namespace", "name": "disk", "tools": [function]},
        {"type": "custom", "name": "patch", "description": "Edit.", "format": grammar},
        search,
        {"type": "web_search"},
    ]
    found = {"type": "namespace", "name": "late", "tools": [function]}
    items = [
        Q,
        {"type": "custom_tool_call", "call_id": "a", "name": "patch", "input": "xx\n"},
        {"type": "custom_tool_call_output", "call_id": "a", "output": "ok"},
        {"type": "tool_search_call", "call_id": "b", "arguments": {"query": "late"}},
        {"type": "tool_search_output", "call_id": "b", "tools": [found]},
        {
            "type": "function_call",
            "call_id": "c",
            "namespace": "late",
            "name": "go",
            "arguments": "{}",
        },
        {"type": "function_call_output", "call_id": "c", "output": "went"},
    ]
    request = read_responses({"input": items, "tools": tools, **LOW})
    assert [tool.name for tool in request.tools] == ["disk__go", "patch", "tool_search"]
    assert any("web_search" in warning for warning in request.warnings)
    disk, patch = request.find_tool("disk__go"), request.find_tool("patch")
    late = request.find_tool("late__go")
    assert disk is not None
    assert (disk.namespace, disk.local_name) == ("disk", "go")
    assert patch is not None
    assert patch.grammar is not None
    assert patch.grammar.definition == "start: /x+/"
    assert late is not None
    assert (late.namespace, late.local_name) == ("late", "go")
    prompt = request.prompt()
    assert parameter("input", "xx\n") in prompt
    assert "start: /x+/" in prompt
    assert f'<{DSML}invoke name="late__go">' in prompt
    assert '<tool_result>[{"name": "late__go"' in prompt


def test_choices_of_tools() -> None:
    both = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]

    def read(choice: Any, **fields: Any) -> Any:
        return read_chat(chat(tools=both, tool_choice=choice, **fields))

    named = {"type": "function", "function": {"name": "g"}}
    off = {"thinking": {"type": "disabled"}}
    assert read("auto").tool_choice == ToolChoice()
    assert read("none").tools == []
    kept = RequestOptions(keep_tools_when_none=True)
    assert len(read_chat(chat(tools=both, tool_choice="none"), kept).tools) == 2
    thinking = read(named)
    assert (thinking.tool_choice.mode, thinking.tool_choice.names) == ("required", ("g",))
    assert (thinking.start, len(thinking.tools)) == ("reasoning", 2)
    direct = read(named, **off)
    assert (direct.start, [tool.name for tool in direct.tools]) == ("tool_calls", ["g"])
    assert direct.prompt().endswith(f"\n\n<{DSML}tool_calls>\n")
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}
    some = read({"type": "allowed_tools", "allowed_tools": allowed})
    assert (some.tool_choice, len(some.tools)) == (ToolChoice(names=("f",)), 2)
    assert read("auto", parallel_tool_calls=False).tool_choice.parallel is False
    with pytest.raises(RequestError, match="no tool to call"):
        read_chat(chat(tool_choice="required"))


def test_choices_of_messages() -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}}

    def read(choice: Any) -> ToolChoice:
        return read_messages({"messages": [Q], "tools": [tool], "tool_choice": choice}).tool_choice

    assert read({"type": "any"}).mode == "required"
    assert read({"type": "tool", "name": "f"}) == ToolChoice(mode="required", names=("f",))
    assert read({"type": "auto", "disable_parallel_tool_use": True}) == ToolChoice(parallel=False)
    assert read({"type": "none"}).mode == "none"
    with pytest.raises(RequestError, match="not among the tools"):
        read({"type": "tool", "name": "g"})


# Conversations


def test_a_turn_of_responses_is_put_together_from_its_items() -> None:
    items = [
        Q,
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "R"}]},
        {"type": "message", "role": "assistant", "content": "Wait."},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "b", "output": "2"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
    ]
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    request = read_responses({"input": items, "tools": [tool], **LOW})
    roles = [message.role for message in request.messages]
    assert roles == ["user", "assistant", "tool", "tool"]
    turn = request.messages[1]
    assert (turn.reasoning, turn.content, len(turn.tool_calls)) == ("R", "Wait.", 2)
    assert "<tool_result>1</tool_result>\n\n<tool_result>2" in request.prompt()


def test_a_stored_conversation_goes_on() -> None:
    """Instructions are those of the new request; everything else is carried on."""
    first = read_responses({"instructions": "One.", "input": "Q", **LOW})
    answer = samples.Message(content="A", reasoning="R")
    later = read_responses(
        {"instructions": "Two.", "input": "Q2", "previous_response_id": "r", **LOW},
        history=[*first.carried, answer],
    )
    assert later.previous_response_id == "r"
    whole = [Q, {"type": "message", "role": "assistant", "content": "A"}, Q | {"content": "Q2"}]
    assert (
        later.prompt() == read_responses({"instructions": "Two.", "input": whole, **LOW}).prompt()
    )
    assert [message.content for message in later.carried] == ["Q", "A", "Q2"]


def test_messages_continues_an_answer_only_without_thinking() -> None:
    body = {"messages": [Q, {"role": "assistant", "content": "pre"}]}
    off = read_messages(body | {"thinking": {"type": "disabled"}})
    assert off.prefix
    assert off.prompt().endswith(f"{THINK_END}pre")
    thinking = read_messages(body)
    assert not thinking.prefix
    assert any("not continued" in warning for warning in thinking.warnings)


def test_what_has_no_effect_is_said() -> None:
    request = read_chat(chat(logit_bias={"5": 1}, prediction={"a": 1}, user="u", verbosity="low"))
    assert request.warnings == (
        "field 'prediction' was ignored: it has no effect here",
        "field 'verbosity' was ignored: it has no effect here",
    )
    assert request.metadata == {"user": "u"}


# The parser that fits


def test_the_parser_begins_where_the_prompt_ends() -> None:
    call = block(invoke("f", parameter("a", "x")))
    inside = call.split("tool_calls>\n", 1)[1]
    tools = [{"type": "function", "function": {"name": "f"}}]
    off = {"thinking": {"type": "disabled"}}

    def read(text: str, *messages: dict[str, Any], **fields: Any) -> Any:
        parser = read_chat(chat(*messages, tools=tools, **fields)).parser()
        parser.feed(text)
        parser.close()
        return parser.message

    assert read(f"R{THINK_END}A").reasoning == "R"
    assert read(f"A{call}", **off).tool_calls
    assert read(inside, tool_choice="required", **off).tool_calls[0].name == "f"
    half = {"role": "assistant", "content": "", "reasoning_content": "ha", "prefix": True}
    assert read(f"lf{THINK_END}\n\nA", half).reasoning == "lf"
    assert (
        read("swer\n", {"role": "assistant", "content": "An", "prefix": True}).content == "swer\n"
    )


def test_stop_texts_reach_the_parser() -> None:
    parser = read_chat(chat(stop="END", thinking=False)).parser()
    events = [event for piece in ("one E", "ND two") for event in parser.feed(piece)]
    events += parser.close()
    assert "".join(e.text for e in events if isinstance(e, ContentDelta)) == "one "
    assert parser.stopped == "END"


@pytest.mark.parametrize("streams", [True, False])
def test_calls_are_held_unless_the_request_wants_them_streamed(streams: bool) -> None:
    parser = read_chat(chat(tools=samples.TOOLS, stream_arguments=streams)).parser()
    begun = THINK_END + block(invoke("bash", parameter("command", "rm -r build"))).split("build")[0]
    events = parser.feed(begun)
    assert any(isinstance(event, CallStarted) for event in events) == streams
    last = parser.close(truncated=True)
    assert not any(isinstance(event, CallStarted) for event in last)
    cut = [event.call for event in last if isinstance(event, CallFinished)]
    assert [(c.partial, json.loads(c.arguments)) for c in cut] == [(True, {"command": "rm -r "})]
