"""Streams: markup by token id, and what must hold for any text in any pieces."""

from __future__ import annotations

import json
import re

import pytest

from fathom.chat import (
    ArgumentsDelta,
    CallStarted,
    Message,
    StreamParser,
    ToolCall,
    parse,
)
from fathom.chat.protocol import DSML, EOS, SPECIAL_TOKENS, THINK, THINK_END
from tests.chat.samples import block, invoke, is_clean, parameter

# Markup by token id


def feed_ids(parts: list[tuple[str, bool]]) -> Message:
    parser = StreamParser()
    for text, special in parts:
        parser.feed(text, special=special)
    parser.close()
    return parser.message


def test_with_ids_only_special_tokens_are_markup() -> None:
    quoted = f"{THINK_END} {EOS}" + block(invoke("f", parameter("a", "x")))
    message = feed_ids([(quoted, False), (THINK_END, True), (quoted, False), (EOS, True)])
    assert message == Message(reasoning=quoted, content=quoted)
    assert is_clean(message)


def test_with_ids_a_value_may_quote_its_own_closing_tag() -> None:
    closing = f"</{DSML}parameter>"
    parts: list[tuple[str, bool]] = [("", False), (THINK_END, True), ("\n\n<", False)]
    for text in (
        "tool_calls>\n<",
        'invoke name="f">\n<',
        f'parameter name="a" string="true">{closing}</',
        "parameter>\n</",
        "invoke>\n</",
    ):
        parts += [(DSML, True), (text, False)]
    parts += [(DSML, True), ("tool_calls>", False), (EOS, True)]
    message = feed_ids(parts)
    assert [json.loads(call.arguments) for call in message.tool_calls] == [{"a": closing}]
    assert is_clean(message)


def test_with_ids_a_forgotten_closing_tag_is_seen_at_once() -> None:
    parts: list[tuple[str, bool]] = [(THINK_END, True), ("<", False)]
    for text in ("tool_calls>\n<", 'invoke name="f">\n<', 'parameter name="a" string="true">x</'):
        parts += [(DSML, True), (text, False)]
    parts += [(DSML, True), ("invoke>\n</", False), (DSML, True), ("tool_calls>", False)]
    message = feed_ids(parts)
    assert message.tool_calls == [ToolCall(name="f", arguments='{"a": "x"}', repaired=True)]


def test_with_ids_a_parameter_ends_where_the_next_one_begins() -> None:
    parts: list[tuple[str, bool]] = [(THINK_END, True), ("<", False)]
    for text in (
        "tool_calls>\n<",
        'invoke name="f">\n<',
        'parameter name="a" string="true">x<',
        'parameter name="b" string="true">y</',
        "parameter>\n</",
        "invoke>\n</",
        "tool_calls>",
    ):
        parts += [(DSML, True), (text, False)]
    message = feed_ids(parts)
    assert message.tool_calls == [
        ToolCall(name="f", arguments='{"a": "x", "b": "y"}', repaired=True)
    ]


# Special tokens that are no markup

HOLE = SPECIAL_TOKENS["fim_hole"]


def test_special_tokens_inside_a_value_are_part_of_it() -> None:
    """A token left out would make another command of it, delivered as exact."""
    command = f"echo '{THINK}x{THINK_END}' > a; rm -rf {HOLE}/tmp"
    text = THINK_END + block(invoke("f", parameter("a", command)))
    pieces = re.split(f"({THINK}|{THINK_END}|{HOLE}|{DSML})", text)
    by_ids = feed_ids([(piece, at % 2 == 1) for at, piece in enumerate(pieces)])
    assert [json.loads(call.arguments) for call in by_ids.tool_calls] == [{"a": command}]
    assert by_ids == parse(text)
    assert is_clean(by_ids)


def test_think_by_id_in_prose_is_text() -> None:
    parts = [("a", False), (THINK, True), ("b", False), (THINK_END, True), (THINK, True)]
    message = feed_ids([*parts, ("c", False)])
    assert message == Message(reasoning=f"a{THINK}b", content=f"{THINK}c")
    assert message == parse("".join(text for text, _ in parts) + "c")
    assert is_clean(message)


def test_role_tokens_by_id_in_prose_are_reported_and_not_shown() -> None:
    parts = [("a", False), (HOLE, True), (THINK_END, True), ("b<", False), (HOLE, True)]
    message = feed_ids([*parts, ("c", False), (EOS, True), ("d", False)])
    assert message == Message(reasoning="a", content="b<cd")
    assert [(d.code, d.text) for d in message.diagnostics] == [
        ("special_token", HOLE),
        ("special_token", HOLE),
        ("special_token", EOS),
    ]


def test_a_role_token_between_the_tags_of_a_call_puts_it_in_doubt() -> None:
    text = THINK_END + block(invoke("f", parameter("a", "x")))
    for at in (text.index(f"\n<{DSML}invoke"), text.index(f"\n<{DSML}param")):
        pieces = re.split(f"({THINK_END}|{HOLE}|{DSML})", text[:at] + HOLE + text[at:])
        message = feed_ids([(piece, at % 2 == 1) for at, piece in enumerate(pieces)])
        assert [call.repaired for call in message.tool_calls] == [True]
        assert HOLE in "".join(d.text for d in message.diagnostics)


# Arguments while they come


def told(text: str, *, truncated: bool = False) -> tuple[list[str], list[ToolCall]]:
    """The arguments that the events tell, for each call that began, and all calls."""
    parser = StreamParser(stream_arguments=True)
    events = [event for piece in text for event in parser.feed(piece)]
    events += parser.close(truncated=truncated)
    deltas = {event.index: "" for event in events if isinstance(event, CallStarted)}
    for event in events:
        if isinstance(event, ArgumentsDelta):
            deltas[event.index] += event.text
    return list(deltas.values()), parser.message.tool_calls


CALLED = THINK_END + block(invoke("f", parameter("a", "rm -rf /tmp/x")))


@pytest.mark.parametrize("truncated", [True, False])
def test_a_cut_call_is_never_told_to_its_end(truncated: bool) -> None:
    for size in range(len(CALLED) - len(f"</{DSML}invoke>\n</{DSML}tool_calls>")):
        deltas, calls = told(CALLED[:size], truncated=truncated)
        assert all(call.partial for call in calls)
        for text in deltas:
            assert text.startswith("{")  # an empty text would pass for no arguments
            with pytest.raises(json.JSONDecodeError):
                json.loads(text)
    assert told(CALLED) == (['{"a": "rm -rf /tmp/x"}'], parse(CALLED).tool_calls)


@pytest.mark.parametrize(
    "said",
    [
        CALLED.replace(" string=", " strong="),
        CALLED.replace(f"</{DSML}parameter>", ""),
        CALLED.replace(f"\n</{DSML}invoke>", f"junk\n</{DSML}invoke>"),
        CALLED.replace(f"\n</{DSML}invoke>", f"\n{parameter('a', 'y')}\n</{DSML}invoke>"),
        CALLED.replace("tool_calls", "function_calls"),
        CALLED.removeprefix(THINK_END),
        THINK_END + block(f'<{DSML}invoke name="f">\n{{"a": 1}}\n</{DSML}invoke>'),
    ],
    ids=["attribute", "no closing", "junk", "key twice", "block", "thinking", "direct JSON"],
)
def test_a_repaired_call_is_never_told_to_its_end(said: str) -> None:
    deltas, calls = told(said)
    assert [call.repaired for call in calls] == [True]
    for text in deltas:
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)


def test_a_call_in_doubt_from_its_opening_is_not_begun() -> None:
    assert told(CALLED.replace("tool_calls", "function_calls"))[0] == []
    assert told(CALLED.replace('name="f"', "name='f'"))[0] == []


def test_the_stage_is_known_while_a_call_is_written() -> None:
    parser = StreamParser()
    seen = [parser.stage]
    for piece in (f"thought{THINK_END}", "text", f"\n\n<{DSML}tool_calls>", CALLED.split("\n")[3]):
        parser.feed(piece)
        seen.append(parser.stage)
    assert seen == ["reasoning", "content", "content", "content", "tool_calls"]
