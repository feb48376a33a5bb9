"""Completions to messages: against the oracles, and what must hold for any text at all."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from fathom.chat import (
    CallStarted,
    ContentDelta,
    Message,
    StreamParser,
    ToolCall,
    parse,
)
from fathom.chat.protocol import DSML, EOS, THINK_END
from fathom.errors import ChatError
from tests.chat.conftest import Vector
from tests.chat.samples import block, invoke, is_clean, parameter, read_stream

Read = Callable[[str], list[Vector]]


def test_no_text_of_any_vector_raises_or_gives_invalid_arguments(read_vectors: Read) -> None:
    for name in ("parse_api", "parse_strict", "parse_observed"):
        for vector in read_vectors(name):
            message = parse(vector["input"]["text"])
            for call in message.tool_calls:
                assert isinstance(json.loads(call.arguments), dict), vector["name"]


# Malformed output, case by case


@pytest.mark.parametrize(
    ("completion", "arguments"),
    [
        (f'<{DSML}parameter name="a">x</{DSML}parameter>', '{"a": "x"}'),
        (f'<{DSML}parameter name="a">5</{DSML}parameter>', '{"a": 5}'),
        (f"<{DSML}parameter name='a' string='true'>x</{DSML}parameter>", '{"a": "x"}'),
        (f'<{DSML}parameter string="true" name="a">x</{DSML}parameter>', '{"a": "x"}'),
        (f'<{DSML}parameter name="a" string="True">5</{DSML}parameter>', '{"a": "5"}'),
        (parameter("a", "{x", "false"), '{"a": "{x"}'),
        (parameter("a", "", "false"), '{"a": ""}'),
        (parameter("a", "True", "false"), '{"a": "True"}'),
        (parameter("a", "NaN", "false"), '{"a": "NaN"}'),
        (parameter("a", "1") + parameter("a", "2"), '{"a": "1", "a": "2"}'),
        (f'<{DSML}parameter name="a" string="true">x', '{"a": "x\\n"}'),
        ('{"a": [1, 2]}', '{"a": [1, 2]}'),
        (parameter("a", "x") + "oops", '{"a": "x"}'),
    ],
)
def test_repaired_calls_are_marked(completion: str, arguments: str) -> None:
    message = parse(f"R{THINK_END}" + block(invoke("f", completion)))
    assert message.tool_calls == [ToolCall(name="f", arguments=arguments, repaired=True)]
    assert message.content == ""


@pytest.mark.parametrize(
    "text",
    [
        f"The tag <{DSML}tool_calls> is used.",
        f"The tag </{DSML}tool_calls> is used.",
        f"The marker {DSML} is used.",
        f'Write <{DSML}invoke name="f"> first.',
        f"Write <{DSML}tool_calls>\n and <{DSML}tool_calls>\n again.",
        f"<{DSML}tool_calls></{DSML}tool_calls>",
        f"Ends in <{DSML}tool_calls>",
        f"Ends in <{DSML}tool_cal",
        f"Ends in <{DSML}",
        f"Ends in\n\n</{DSML}",
        "Ends in <\uff5cDS",
        "Ends in <",
        f"EOS is {EOS} in text",
        '<tool_calls>\n<invoke name="f">\n</invoke>\n</tool_calls>',
        f"< {DSML}tool_calls>",
    ],
)
@pytest.mark.parametrize("in_reasoning", [True, False])
def test_quoted_markup_stays_text(text: str, in_reasoning: bool) -> None:
    completion = f"{text}{THINK_END}A" if in_reasoning else f"R{THINK_END}{text}"
    message = parse(completion)
    assert message.tool_calls == []
    assert (message.reasoning, message.content) == ((text, "A") if in_reasoning else ("R", text))


def test_a_tag_cut_by_the_end_of_thinking_does_not_hide_it() -> None:
    message = parse(f"the <{DSML}invoke{THINK_END}answer")
    assert (message.reasoning, message.content) == (f"the <{DSML}invoke", "answer")


def test_a_call_inside_open_reasoning_is_marked() -> None:
    message = parse("R" + block(invoke("f", parameter("a", "x"))))
    assert message.reasoning == "R"
    assert message.tool_calls == [ToolCall(name="f", arguments='{"a": "x"}', repaired=True)]


@pytest.mark.parametrize("name", ["function_calls", "toolcalls"])
def test_a_block_with_another_name_is_marked(name: str) -> None:
    message = parse(f"R{THINK_END}" + block(invoke("f", parameter("a", "x")), name=name))
    assert message.tool_calls == [ToolCall(name="f", arguments='{"a": "x"}', repaired=True)]
    opening = f"<{DSML}{name}>"
    assert [diagnostic.text for diagnostic in message.diagnostics] == [opening]


@pytest.mark.parametrize("header", ["invoke name='f'>", 'invoke name="f" id="1">'])
def test_a_call_with_an_unusual_tag_is_marked(header: str) -> None:
    message = parse(THINK_END + block(f"<{DSML}{header}\n</{DSML}invoke>"))
    assert message.tool_calls == [ToolCall(name="f", repaired=True)]
    message = parse(THINK_END + block(f'<{DSML}invoke name="f"/>', invoke("g", "")))
    assert message.tool_calls == [ToolCall(name="f", repaired=True), ToolCall(name="g")]


def test_a_call_without_block_is_marked() -> None:
    message = parse(f"R{THINK_END}C\n\n" + invoke("f", parameter("a", "x")))
    assert message.content == "C"
    assert message.tool_calls == [ToolCall(name="f", arguments='{"a": "x"}', repaired=True)]


def test_a_forgotten_closing_tag_does_not_swallow_the_next_call() -> None:
    broken = f'<{DSML}invoke name="f">\n<{DSML}parameter name="a" string="true">x\n</{DSML}invoke>'
    message = parse(f"R{THINK_END}" + block(broken, invoke("g", "")))
    assert [call.name for call in message.tool_calls] == ["f", "g"]
    assert message.tool_calls[0].repaired


def test_a_value_may_hold_the_markup_of_a_whole_block() -> None:
    text = block(f'<{DSML}invoke name="g">\n</{DSML}invoke>')
    message = parse(THINK_END + block(invoke("f", parameter("a", text))))
    assert [json.loads(call.arguments) for call in message.tool_calls] == [{"a": text}]
    assert not message.tool_calls[0].repaired


def test_text_around_calls_is_reported_not_lost() -> None:
    stray = parameter("a", "between")
    completion = block(invoke("f", ""), stray, invoke("g", "")) + "behind"
    message = parse(THINK_END + completion)
    assert [call.name for call in message.tool_calls] == ["f", "g"]
    reported = "".join(diagnostic.text for diagnostic in message.diagnostics)
    assert stray in reported
    assert "behind" in reported


def test_a_second_block_is_marked() -> None:
    message = parse(THINK_END + block(invoke("f", "")) + block(invoke("g", "")))
    assert [(call.name, call.repaired) for call in message.tool_calls] == [
        ("f", False),
        ("g", True),
    ]


def test_a_call_behind_its_block_is_marked() -> None:
    message = parse(THINK_END + block(invoke("f", "")) + "\n" + invoke("g", ""))
    assert [(call.name, call.repaired) for call in message.tool_calls] == [
        ("f", False),
        ("g", True),
    ]


@pytest.mark.parametrize("behind", ["invoke and then\nmore", "a" * 100 + "more", " more"])
def test_text_that_only_begins_like_a_tag_is_not_held_back(behind: str) -> None:
    parser = StreamParser("off")
    events = parser.feed(f"Say <{DSML}{behind}")
    assert "".join(e.text for e in events if isinstance(e, ContentDelta)).endswith("more")


def test_both_forms_of_empty_arguments_are_canonical() -> None:
    for inside in ("\n\n", "\n"):
        call = f'<{DSML}invoke name="f">{inside}</{DSML}invoke>'
        message = parse(THINK_END + block(call) + EOS)
        assert message.tool_calls == [ToolCall(name="f")]
        assert is_clean(message)


def test_truncation_gives_partial_calls_and_no_markup() -> None:
    whole = (
        f"R{THINK_END}C"
        + block(
            invoke("f", parameter("a", "xy"), parameter("n", "56", "false")),
            invoke("g", parameter("b", "z")),
        )
        + EOS
    )
    finished = [whole.index(f"</{DSML}invoke>") + len(f"</{DSML}invoke>")]
    finished.append(whole.rindex(f"</{DSML}invoke>") + len(f"</{DSML}invoke>"))
    for size in range(len(whole)):
        message = parse(whole[:size])
        for at, call in enumerate(message.tool_calls):
            assert isinstance(json.loads(call.arguments), dict)
            assert call.partial == (size < finished[at]), (size, call)
            assert not call.repaired, (size, call)
        assert DSML not in message.content, size
        if message.tool_calls:
            assert (message.reasoning, message.content) == ("R", "C")


# Stages and options


def test_starting_in_the_middle() -> None:
    assert parse("text", start="content") == Message(content="text")
    assert parse(f"more{THINK_END}text", "off", start="reasoning").reasoning == "more"
    inside = block(invoke("f", "")).split("tool_calls>\n", 1)[1]
    assert parse(inside, "off", start="tool_calls") == Message(tool_calls=[ToolCall(name="f")])


def test_ids_are_ours_to_give() -> None:
    text = THINK_END + block(invoke("f", ""), invoke("g", ""))
    assert [call.id for call in parse(text).tool_calls] == ["call_0", "call_1"]
    message, events = read_stream([text], make_id="turn3-{}".format)
    assert [call.id for call in message.tool_calls] == ["turn3-0", "turn3-1"]
    assert [event.id for event in events if isinstance(event, CallStarted)] == [
        "turn3-0",
        "turn3-1",
    ]


def test_a_stray_end_of_thinking_is_removed_and_reported() -> None:
    message = parse(f"a{THINK_END}b", "off")
    assert message.content == "ab"
    assert [diagnostic.text for diagnostic in message.diagnostics] == [THINK_END]


def test_misuse_is_refused() -> None:
    with pytest.raises(ChatError, match="thinking mode"):
        StreamParser("on")
    with pytest.raises(ChatError, match="stage"):
        StreamParser(start="end")
    parser = StreamParser()
    with pytest.raises(ChatError, match="close"):
        _ = parser.message
    parser.close()
    assert parser.close() == []
    with pytest.raises(ChatError, match="closed"):
        parser.feed("x")
