"""Prompts: byte for byte against the reference encoders, and the rules behind the bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.chat import Message, encode, encode_segments, render
from fathom.chat.protocol import (
    ASSISTANT,
    BOS,
    DSML,
    EFFORT_ABSOLUTE,
    EFFORT_BEYOND,
    EOS,
    THINK,
    THINK_END,
    USER,
)
from fathom.errors import ChatError
from tests.chat import samples
from tests.chat.conftest import Vector

Read = Callable[[str], list[Vector]]


def outcome(vector: Vector, revision: str, effort: str | None) -> dict[str, Any]:
    given = vector["input"]
    thinking = "off" if given["thinking_mode"] == "chat" else (effort or "low")
    try:
        prompt = encode(
            given["messages"],
            thinking=thinking,
            revision=revision,
            context=given.get("context", ()),
            add_bos=given.get("add_default_bos_token", True),
        )
    except ChatError:
        return {"error": True}
    return {"prompt": prompt}


@pytest.mark.parametrize(("revision", "column"), [("0424", "A"), ("0731", "B")])
def test_common_vectors(read_vectors: Read, revision: str, column: str) -> None:
    for vector in read_vectors("encode_common"):
        effort = vector["input"]["reasoning_effort"][column]
        assert outcome(vector, revision, effort) == vector["expected"], vector["name"]


@pytest.mark.parametrize(("revision", "column"), [("0424", "a"), ("0731", "b")])
def test_vectors_of_one_revision(read_vectors: Read, revision: str, column: str) -> None:
    for vector in read_vectors(f"encode_rev_{column}"):
        effort = vector["input"]["reasoning_effort"]
        assert outcome(vector, revision, effort) == vector["expected"], vector["name"]


@pytest.mark.parametrize(
    ("revision", "column", "oracle"), [("0424", "A", "ref_A"), ("0731", "B", "vllm_0.33")]
)
def test_each_revision_follows_its_own_oracle_where_they_differ(
    read_vectors: Read, revision: str, column: str, oracle: str
) -> None:
    for vector in read_vectors("encode_divergent"):
        effort = vector["input"]["reasoning_effort"][column]
        assert outcome(vector, revision, effort) == vector["expected"][oracle], vector["name"]


@pytest.mark.parametrize("revision", ["0424", "0731"])
@pytest.mark.parametrize("case", [1, 2, 3, 4])
def test_official_cases(dsml: Path, case: int, revision: str) -> None:
    folder = dsml / "official" / "ds4rs"
    given = json.loads((folder / f"test_input_{case}.json").read_text(encoding="utf-8"))
    expected = (folder / f"test_output_{case}.txt").read_text(encoding="utf-8")
    messages, tools = (given["messages"], given["tools"]) if case == 1 else (given, None)
    thinking = "off" if case == 4 else "low"
    assert encode(messages, tools, thinking=thinking, revision=revision) == expected


def test_official_case_with_images(dsml: Path) -> None:
    folder = dsml / "official" / "vllm"
    given = json.loads((folder / "test_input_5.json").read_text(encoding="utf-8"))
    expected = (folder / "test_output_5.chat_mode.txt").read_text(encoding="utf-8")
    assert encode(given["messages"], thinking="off", images=True) == expected


def test_tools_of_the_call_join_the_first_system_message() -> None:
    messages = samples.conversation()
    carried = [messages[0] | {"tools": samples.TOOLS}, *messages[1:]]
    assert encode(messages, samples.TOOLS) == encode(carried)
    assert "tools" not in messages[0]
    without_system = encode(messages[1:], samples.TOOLS)
    assert without_system == encode(
        [{"role": "system", "content": ""}, *carried[1:]], samples.TOOLS
    )
    assert without_system.startswith(BOS + "\n\n## Tools")


def test_bare_functions_are_tools_too() -> None:
    bare = [samples.TOOLS[0]["function"]]
    assert encode(samples.conversation(), bare) == encode(samples.conversation(), samples.TOOLS)


def test_response_format_of_the_call_joins_the_system_message() -> None:
    schema = {"type": "json_schema"}
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    carried = [messages[0] | {"response_format": schema}, messages[1]]
    assert encode(messages, response_format=schema) == encode(carried)


def test_message_objects_and_dictionaries_give_the_same_prompt() -> None:
    dictionaries = samples.conversation()
    objects = [Message.from_dict(message) for message in dictionaries]
    assert encode(objects, samples.TOOLS) == encode(dictionaries, samples.TOOLS)
    again = [message.to_dict() for message in objects]
    assert encode(again, samples.TOOLS) == encode(dictionaries, samples.TOOLS)


def test_both_names_of_the_reasoning_field_are_read() -> None:
    def prompt(key: str) -> str:
        return encode([{"role": "assistant", "content": "A", key: "R"}])

    assert prompt("reasoning") == prompt("reasoning_content") == f"{BOS}R{THINK_END}A{EOS}"


def test_a_mode_changes_only_prefix_and_think_tokens() -> None:
    messages = samples.conversation()[:2]
    off = encode(messages, thinking="off")
    body = off.removeprefix(BOS).removesuffix(THINK_END)
    high = BOS + body + THINK
    assert encode(messages, thinking="low") == encode(messages, thinking="high") == high
    assert encode(messages, thinking="max") == BOS + EFFORT_ABSOLUTE + body + THINK
    newer = {
        mode: encode(messages, thinking=mode, revision="0731") for mode in ("low", "high", "max")
    }
    assert newer["low"] == high
    assert newer["high"] == BOS + EFFORT_ABSOLUTE + body + THINK
    assert newer["max"] == BOS + EFFORT_BEYOND + body + THINK


def test_reasoning_stays_with_tools_and_goes_without() -> None:
    messages = samples.conversation()
    assert "I count them." in encode(messages, samples.TOOLS)
    assert "I count them." not in encode(messages)
    assert "12 it is." not in encode(messages)
    assert "I count them." in encode(messages, drop_thinking=False)
    assert "I count them." not in encode(messages, samples.TOOLS, thinking="off")


def test_a_merged_tool_result_counts_as_a_user_turn() -> None:
    prompt = encode(samples.conversation()[:4])
    assert "I count them." not in prompt
    assert prompt.endswith(f"</tool_result>{ASSISTANT}{THINK}")


def test_results_take_the_order_of_their_calls_and_text_keeps_its_place() -> None:
    calls = [samples.call(call_id=name, command=name) for name in "abc"]
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "third"},
        {"role": "user", "content": "text"},
        {"role": "tool", "tool_call_id": "a", "content": "first"},
        {"role": "tool", "tool_call_id": "b", "content": "second"},
    ]
    expected = (
        f"{USER}<tool_result>first</tool_result>\n\ntext\n\n<tool_result>second</tool_result>"
        f"\n\n<tool_result>third</tool_result>{ASSISTANT}"
    )
    assert expected in encode(messages, samples.TOOLS)


def test_a_task_survives_a_merge() -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": "two", "task": "query"},
        {"role": "assistant", "content": "words"},
    ]
    assert encode(messages, thinking="off") == (
        f"{BOS}{USER}one\n\ntwo<\uff5cquery\uff5c>words{EOS}"
    )


def test_url_extraction() -> None:
    message = {"role": "user", "content": "Q", "extracted_url": "http://x", "task": "read_url"}
    assert encode([message]) == (
        f"{BOS}{USER}Q<\uff5cextracted_url\uff5c>http://x<\uff5cread_url\uff5c>"
    )


@pytest.mark.parametrize(
    ("thinking", "fields", "ending"),
    [
        ("low", {"content": "pre"}, f"{THINK}{THINK_END}pre"),
        ("low", {"content": "", "reasoning_content": "half"}, f"{THINK}half"),
        ("low", {"content": "pre", "reasoning_content": "R"}, f"{THINK}R{THINK_END}pre"),
        ("off", {"content": "pre"}, f"{THINK_END}pre"),
    ],
)
def test_prefix_continuation(thinking: str, fields: dict[str, str], ending: str) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "prefix": True, **fields}]
    assert encode(messages, thinking=thinking) == f"{BOS}{USER}Q{ASSISTANT}{ending}"


def test_opening_the_calls() -> None:
    messages = samples.conversation()
    closed = encode(messages, samples.TOOLS, thinking="off")
    opened = encode(messages, samples.TOOLS, thinking="off", open_calls=True)
    assert opened == f"{closed}\n\n<{DSML}tool_calls>\n"
    with pytest.raises(ChatError, match="thinking off"):
        encode(messages, samples.TOOLS, open_calls=True)


@pytest.mark.parametrize("revision", ["0424", "0731"])
def test_an_object_as_arguments_is_written_like_its_text(revision: str) -> None:
    def prompt(arguments: Any) -> str:
        function = {"name": "f", "arguments": arguments}
        return encode(
            [{"role": "assistant", "tool_calls": [{"function": function}]}], revision=revision
        )

    assert prompt({"a": 1, "b": "x"}) == prompt('{"a": 1, "b": "x"}')


def test_arguments_that_are_no_json_depend_on_the_revision() -> None:
    for text in ('{"x":', "NaN", '{"x": 1e999}', "9" * 5000, "[" * 100_000):
        messages = [
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}
        ]
        assert samples.parameter("arguments", text) in encode(messages)
        with pytest.raises(ChatError, match="not JSON"):
            encode(messages, revision="0731")


def test_a_value_with_the_closing_tag_is_escaped_not_cut() -> None:
    closing = f"</{DSML}parameter>"
    message = {"tool_calls": [samples.call("f", s=f"a{closing}b", o=[closing])]}
    text = render({"role": "assistant", **message})
    assert text.count(closing) == 2
    assert 'name="s" string="false">"a\\u003c/' in text


@pytest.mark.parametrize(
    "messages",
    [
        "text",
        [1],
        [{"role": "robot", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "x", "task": "dance"}],
        [{"role": "user", "content": "x", "task": "title"}],
        [{"role": "user", "content": "x", "task": ["title"]}],
        [{"role": "assistant", "content": "x", "task": "action"}],
        [{"role": "assistant", "content": "x", "reasoning_content": 1}],
        [{"role": "assistant", "tool_calls": 1}],
        [{"role": "assistant", "tool_calls": [1]}],
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "5"}}]}],
        [{"role": "assistant", "tool_calls": [samples.call('a"b')]}],
        [{"role": "assistant", "tool_calls": [samples.call("a>b")]}],
        [{"role": "assistant", "tool_calls": [samples.call(DSML)]}],
        [{"role": "assistant", "tool_calls": [samples.call("")]}],
        [{"role": "assistant", "tool_calls": [samples.call("f", **{DSML: 1})]}],
        [{"role": "assistant", "tool_calls": [samples.call("f", **{'a" string="true">': 1})]}],
        [{"role": "system", "content": "x", "tools": [{"type": "function"}]}],
        [{"role": "system", "content": "x", "tools": "bash"}],
        [{"role": "system", "content": "x", "tools": [{"name": "f", "parameters": {1, 2}}]}],
        [{"role": "developer", "content": ""}],
    ],
)
def test_what_cannot_be_rendered_is_refused(messages: Any) -> None:
    with pytest.raises(ChatError):
        encode(messages)


def test_wrong_options_are_refused() -> None:
    messages = samples.conversation()
    carried = [messages[0] | {"tools": samples.TOOLS}]
    with pytest.raises(ChatError, match="revision"):
        encode(messages, revision="0101")
    with pytest.raises(ChatError, match="thinking mode"):
        encode(messages, thinking="huge")
    with pytest.raises(ChatError, match="twice"):
        encode(carried, samples.TOOLS)
    with pytest.raises(ChatError, match="context"):
        encode(messages, samples.TOOLS, context=messages)
    with pytest.raises(ChatError, match="completion"):
        render({"role": "user", "content": "x"})


# Properties


@st.composite
def agent_conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(samples.hostile_text)}]
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(samples.hostile_text)})
        for step in range(draw(st.integers(0, 2))):
            count = draw(st.integers(1, 3))
            calls = [
                samples.call(call_id=f"{step}.{at}", text=draw(samples.hostile_text))
                for at in range(count)
            ]
            messages.append(
                {
                    "role": "assistant",
                    "content": draw(samples.hostile_text),
                    "reasoning_content": draw(samples.hostile_text),
                    "tool_calls": calls,
                }
            )
            for at in draw(st.permutations(range(count))):
                result = {"role": "tool", "tool_call_id": f"{step}.{at}", "content": f"r{at}"}
                messages.append(result)
        messages.append({"role": "assistant", "content": "A", "reasoning_content": "R"})
    return messages


@given(agent_conversations())
def test_a_context_leaves_out_exactly_what_was_sent(messages: list[dict[str, Any]]) -> None:
    carried = [messages[0] | {"tools": samples.TOOLS}, *messages[1:]]
    ends = [at for at, message in enumerate(carried) if message["role"] == "assistant"]
    for end in ends:
        past, new = carried[: end + 1], carried[end + 1 :]
        assert encode(past) + encode(new, context=past) == encode(carried)


def test_generated_segments_are_what_the_model_wrote() -> None:
    messages = samples.conversation()
    generated = "".join(
        segment.text for segment in encode_segments(messages, samples.TOOLS) if segment.generated
    )
    written = [render(message) for message in messages if message["role"] == "assistant"]
    assert generated == "".join(written)
