"""Streams: markup by token id, and what must hold for any text in any pieces."""

from __future__ import annotations

import json

from fathom.chat import (
    Message,
    StreamParser,
    ToolCall,
)
from fathom.chat.protocol import DSML, EOS, THINK_END
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
