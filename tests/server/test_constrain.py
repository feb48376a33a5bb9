"""Replies that are held to a schema: whatever the model prefers, the result fits."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fathom.chat import StreamParser, Tokenizer
from fathom.chat.requests import PromptRequest, read_chat
from fathom.server.backend import TokenMask
from fathom.server.constrain import Constrainer
from fathom.server.problems import Problem
from tests.server.conftest import BASH

STRICT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "odd",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string", "enum": ["left", "right </x>"]},
                "count": {"type": "integer", "minimum": 3, "maximum": 5},
                "maybe": {"type": ["string", "null"], "maxLength": 4},
                "code": {"type": "string", "pattern": "^[a-c]{2,3}$"},
                "both": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "boolean"}]},
                "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
                "inner": {"$ref": "#/$defs/Inner"},
                "extra": {"type": "boolean"},
            },
            "required": ["word", "count", "maybe", "code", "both", "flags", "inner"],
            "additionalProperties": False,
            "$defs": {
                "Inner": {
                    "type": "object",
                    "properties": {"deep": {"type": "boolean"}},
                    "required": ["deep"],
                    "additionalProperties": False,
                }
            },
        },
    },
}


@pytest.fixture(scope="module")
def constrainer(tokenizer: Tokenizer) -> Constrainer:
    return Constrainer(tokenizer)


def request(**fields: Any) -> PromptRequest:
    return read_chat({"messages": [{"role": "user", "content": "Go, json"}], **fields})


def tokens_of(bits: bytes) -> list[int]:
    return [8 * at + i for at, byte in enumerate(bits) if byte for i in range(8) if byte >> i & 1]


def draw(
    mask: TokenMask, tokenizer: Tokenizer, generator: random.Random, thought: Sequence[int] = ()
) -> list[int]:
    """Random tokens among those allowed, as from a model that knows nothing.

    Short closing pieces are drawn more often, or most strings would never end.
    """
    closing = {i for t in ('"', "}", "]", "</", ">", "\n") for i in tokenizer.encode(t)}
    closing |= {tokenizer.token_id("dsml"), tokenizer.eos_id}
    ids = list(thought)
    for token in thought:
        mask.accept(token)
    for _ in range(3000):
        bits = mask.allowed()
        assert bits is not None
        allowed = tokens_of(bits)
        assert allowed, "a dead end"
        ending = [token for token in allowed if token in closing]
        token = generator.choice(ending if ending and generator.random() < 0.7 else allowed)
        mask.accept(token)
        ids.append(token)
        if token == tokenizer.eos_id:
            return ids[:-1]
    raise AssertionError(f"no end: {tokenizer.decode(ids)[-300:]!r}")


def parsed(asked: PromptRequest, tokenizer: Tokenizer, ids: list[int]) -> Any:
    parser: StreamParser = asked.parser()
    decoder = tokenizer.incremental_decoder()
    for token in ids:
        parser.feed(decoder.push(token), token in tokenizer.special_ids)
    parser.close()
    return parser.message


def fits_odd(arguments: dict[str, Any]) -> None:
    required = STRICT["function"]["parameters"]["required"]
    assert [key for key in arguments if key != "extra"] == required
    assert arguments["word"] in ("left", "right </x>")
    assert arguments["count"] in (3, 4, 5)
    assert arguments["maybe"] is None or len(arguments["maybe"]) <= 4
    assert set(arguments["code"]) <= set("abc")
    assert 2 <= len(arguments["code"]) <= 3
    assert isinstance(arguments["both"], bool) or len(arguments["both"]) <= 3
    assert all(isinstance(flag, bool) for flag in arguments["flags"])
    assert len(arguments["flags"]) <= 3
    assert list(arguments["inner"]) == ["deep"]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_random_tokens_under_a_mask_make_a_strict_call(
    constrainer: Constrainer, tokenizer: Tokenizer, seed: int, thinking: str
):
    asked = request(
        tools=[BASH, STRICT],
        tool_choice={"type": "function", "function": {"name": "odd"}},
        thinking={"type": thinking},
    )
    mask = constrainer.mask(asked)
    assert mask is not None
    thought = tokenizer.encode("well</think>", special=True) if thinking == "enabled" else []
    ids = draw(mask, tokenizer, random.Random(seed), thought)
    message = parsed(asked, tokenizer, ids)
    assert message.reasoning == ("well" if thought else "")
    assert not message.content
    assert message.tool_calls
    for made in message.tool_calls:
        assert made.name == "odd"
        assert not made.repaired
        assert not made.partial
        fits_odd(json.loads(made.arguments))


@pytest.mark.parametrize("seed", range(6))
def test_required_calls_are_canonical_without_being_strict(
    constrainer: Constrainer, tokenizer: Tokenizer, seed: int
):
    asked = request(tools=[BASH], tool_choice="required", parallel_tool_calls=False)
    mask = constrainer.mask(asked)
    assert mask is not None
    thought = tokenizer.encode("</think>", special=True)
    message = parsed(asked, tokenizer, draw(mask, tokenizer, random.Random(seed), thought))
    (made,) = message.tool_calls
    assert made.name == "bash"
    assert not made.partial
    assert isinstance(json.loads(made.arguments), dict)


@pytest.mark.parametrize("seed", range(8))
def test_voluntary_calls_of_strict_tools_fit_too(
    constrainer: Constrainer, tokenizer: Tokenizer, seed: int
):
    asked = request(tools=[STRICT], thinking={"type": "disabled"})
    mask = constrainer.mask(asked)
    assert mask is not None
    opening = tokenizer.encode("Text first.\n\n<\uff5cDSML\uff5ctool_calls>\n", special=True)
    message = parsed(asked, tokenizer, draw(mask, tokenizer, random.Random(seed), opening))
    assert message.content == "Text first."
    assert message.tool_calls
    for made in message.tool_calls:
        fits_odd(json.loads(made.arguments))


def test_text_alone_is_free_where_tools_are_strict_but_voluntary(
    constrainer: Constrainer, tokenizer: Tokenizer
):
    mask = constrainer.mask(request(tools=[STRICT], thinking={"type": "disabled"}))
    assert mask is not None
    for token in tokenizer.encode("Just { text </ and >\n\n< no call."):
        bits = mask.allowed()
        assert bits is not None
        assert bits[token // 8] >> token % 8 & 1
        mask.accept(token)
    bits = mask.allowed()
    assert bits is not None
    assert bits[tokenizer.eos_id // 8] >> tokenizer.eos_id % 8 & 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_json_formats(constrainer: Constrainer, tokenizer: Tokenizer, seed: int, kind: str):
    form: dict[str, Any] = {"type": kind}
    if kind == "json_schema":
        schema = STRICT["function"]["parameters"]
        form["json_schema"] = {"name": "x", "strict": True, "schema": schema}
    asked = request(response_format=form, thinking={"type": "disabled"})
    mask = constrainer.mask(asked)
    assert mask is not None
    value = json.loads(tokenizer.decode(draw(mask, tokenizer, random.Random(seed))))
    assert isinstance(value, dict)
    if kind == "json_schema":
        fits_odd(value)


def test_the_thought_is_free_but_can_neither_call_nor_end_the_reply(
    constrainer: Constrainer, tokenizer: Tokenizer
):
    mask = constrainer.mask(request(tools=[BASH], tool_choice="required"))
    assert mask is not None
    forbidden = {tokenizer.eos_id, tokenizer.token_id("dsml")}
    for token in tokenizer.encode("Any thought { at all"):
        bits = mask.allowed()
        assert bits is not None
        assert set(range(tokenizer.vocab_size)) - set(tokens_of(bits)) == forbidden
        mask.accept(token)
    mask.accept(tokenizer.token_id("think_end"))
    bits = mask.allowed()
    assert bits is not None
    assert len(tokens_of(bits)) < 20


def test_without_tools_no_call_can_come_and_everything_else_can(
    constrainer: Constrainer, tokenizer: Tokenizer
):
    for fields in ({}, {"tools": [BASH], "tool_choice": "none"}):
        mask = constrainer.mask(request(**fields))
        assert mask is not None
        bits = mask.allowed()
        assert bits is not None
        missing = set(range(tokenizer.vocab_size)) - set(tokens_of(bits))
        assert missing == {tokenizer.token_id("dsml")}
    assert constrainer.mask(request(tools=[BASH])) is None


def test_masks_of_one_request_are_independent(constrainer: Constrainer, tokenizer: Tokenizer):
    asked = request(response_format={"type": "json_object"}, thinking={"type": "disabled"})
    one, other = constrainer.mask(asked), constrainer.mask(asked)
    assert one is not None
    assert other is not None
    before = other.allowed()
    one.accept(tokenizer.encode("{")[0])
    assert other.allowed() == before


def test_schemas_that_cannot_be_enforced_are_refused(constrainer: Constrainer):
    for schema in ({"type": "wat"}, {"type": "object", "properties": {"a": {"pattern": "("}}}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(Problem) as refused:
            constrainer.mask(replace(request(response_format=form), thinking="off"))
        assert refused.value.status == 400
        assert refused.value.code == "unsupported_schema"


def strict_tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}


def arguments_drawn(
    constrainer: Constrainer, tokenizer: Tokenizer, seed: int, form: Any, **more: Any
) -> Any:
    """What random tokens make of a strict tool's one argument, required."""
    schema = {"type": "object", "properties": {"a": form}, "required": ["a"], **more}
    tools = [strict_tool(schema)]
    asked = request(tools=tools, tool_choice="required", thinking={"type": "disabled"})
    mask = constrainer.mask(asked)
    assert mask is not None
    opening = tokenizer.encode('<\uff5cDSML\uff5cinvoke name="f">\n', special=True)
    drawn = draw(mask, tokenizer, random.Random(seed), opening)
    made = parsed(asked, tokenizer, drawn).tool_calls[0]
    assert not made.repaired
    assert not made.partial
    return json.loads(made.arguments)["a"]


# Each schema with what tells whether a value fits it.
HELD: dict[str, tuple[Any, Any]] = {
    "enum and length": (
        {"type": "string", "enum": ["a", "abcdef"], "maxLength": 3}, lambda v: v == "a"),
    "enum and pattern": (
        {"type": "string", "enum": ["a/b", "x", "y"], "pattern": "^[a-x]"},
        lambda v: v in ("a/b", "x")),
    "enum and const": ({"enum": ["a", "b", 5], "const": "b"}, lambda v: v == "b"),
    "two strings": (
        {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "string", "pattern": "^[xyz]+$"}]},
        lambda v: len(v) <= 2 or set(v) <= set("xyz")),
    "slashes": ({"type": "string", "pattern": "^\\/a/b$"}, lambda v: v == "/a/b"),
    "newline": ({"type": "string", "pattern": "^a\nb$"}, lambda v: v == "a\nb"),
    "dollar": ({"type": "string", "pattern": "^a\\$"}, lambda v: v.startswith("a$")),
    "pattern and kinds": (
        {"type": ["string", "integer"], "pattern": "^[ab]$"},
        lambda v: v in ("a", "b") or isinstance(v, int)),
    "length without a kind": ({"maxLength": 2}, lambda v: not isinstance(v, str) or len(v) <= 2),
    "allOf of one": (
        {"allOf": [{"$ref": "#/$defs/s"}], "description": "x"}, lambda v: v in ("p", "q")),
    "a string in two schemas": (
        {"allOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 2}]},
        lambda v: 2 <= len(v) <= 3),
    "reference written with escapes": ({"$ref": "#/$defs/%73"}, lambda v: v in ("p", "q")),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HELD)
def test_a_strict_argument_is_held_to_all_that_its_schema_says(
    constrainer: Constrainer, tokenizer: Tokenizer, name: str, seed: int
):
    form, fits = HELD[name]
    definitions = {"s": {"type": "string", "enum": ["p", "q"]}}
    value = arguments_drawn(constrainer, tokenizer, seed, form, **{"$defs": definitions})
    assert fits(value), value


@pytest.mark.parametrize("form", [{}, True, {"description": "Anything."}], ids=json.dumps)
def test_a_strict_argument_may_be_anything(
    constrainer: Constrainer, tokenizer: Tokenizer, form: Any
):
    kinds = {
        type(arguments_drawn(constrainer, tokenizer, seed, form)).__name__ for seed in range(6)
    }
    assert len(kinds) > 1


def test_a_strict_schema_may_be_a_reference(constrainer: Constrainer, tokenizer: Tokenizer):
    inner = {"type": "object", "properties": {"a": {"const": "z"}}, "required": ["a"]}
    schema = {"$ref": "#/$defs/all", "$defs": {"all": inner}}
    tools = [strict_tool(schema)]
    asked = request(tools=tools, tool_choice="required", thinking={"type": "disabled"})
    mask = constrainer.mask(asked)
    assert mask is not None
    (made, *_) = parsed(asked, tokenizer, draw(mask, tokenizer, random.Random(1))).tool_calls
    assert json.loads(made.arguments) == {"a": "z"}


@pytest.mark.parametrize("more", [
    {"allOf": [{"required": ["a"]}, {"minProperties": 1}]}, {"anyOf": [{"required": ["a"]}]},
    {"oneOf": [{"required": ["a"]}]}, {"not": {"required": ["a"]}}, {"$ref": "#/$defs/x"},
    {"additionalProperties": {"type": "string"}}, {"additionalProperties": True},
    {"required": ["b"]}, {"patternProperties": {"^x": {}}}, {"minProperties": 1},
    {"properties": {"a": False}, "required": ["a"]},
    {"properties": {"a": {"type": "string", "not": {"const": "x"}}}},
    {"properties": {"a": {"type": "string", "if": {"const": "x"}}}},
    {"properties": {"a": {"type": "string", "enum": ["abc"], "maxLength": 2}}},
    {"properties": {"a": {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}}},
], ids=json.dumps)  # fmt: skip
def test_strict_schemas_that_cannot_be_enforced_are_refused(
    constrainer: Constrainer, more: dict[str, Any]
):
    """None of them is taken for something weaker, or for a tool without arguments."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, **more}
    tools = [strict_tool(schema)]
    with pytest.raises(Problem) as refused:
        constrainer.mask(request(tools=tools, tool_choice="required"))
    assert refused.value.status == 400
    assert refused.value.code == "unsupported_schema"
    assert refused.value.param == "tools"


def test_a_required_custom_call_has_its_text(tokenizer: Tokenizer, constrainer: Constrainer):
    asked = request(
        tools=[{"type": "custom", "custom": {"name": "run"}}],
        tool_choice="required",
        thinking={"type": "disabled"},
    )
    for seed in range(5):
        mask = constrainer.mask(asked)
        assert mask is not None
        ids = draw(mask, tokenizer, random.Random(seed))
        for call in parsed(asked, tokenizer, ids).tool_calls:
            assert list(json.loads(call.arguments)) == ["input"]
