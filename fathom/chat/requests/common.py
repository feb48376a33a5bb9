"""Wishes that all three APIs spell the same way, or nearly.

Paper: none (a matter of the APIs).
"""

from __future__ import annotations

import re
from typing import Any

from fathom.chat.generation import Shaping
from fathom.chat.messages import as_mapping
from fathom.chat.reply import Sampling
from fathom.chat.requests.fields import Fields
from fathom.chat.requests.types import ResponseFormat

_LARGEST_SEED = (1 << 63) - 1
_LARGEST_TOP_K = (1 << 31) - 1
_MOST_STOPS = 16
_MOST_BIASES = 1024
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def read_sampling(body: Fields) -> Sampling:
    """Return temperature, top_p and seed."""
    return Sampling(
        temperature=body.number("temperature", 0, 2),
        top_p=body.number("top_p", 0, 1, above=True),
        seed=body.integer("seed", 0, _LARGEST_SEED),
    )


def read_shaping(body: Fields) -> Shaping:
    """Return what else the request says of drawing; whether its tokens exist is not known here."""

    def number(name: str, low: float, high: float, default: float) -> float:
        value = body.number(name, low, high)
        return default if value is None else value

    top_k = None
    if body.take("top_k") != -1:  # some clients' way to say "all"
        top_k = body.integer("top_k", 0, _LARGEST_TOP_K)
    return Shaping(
        top_k=top_k or 0,
        min_p=number("min_p", 0, 1, 0.0),
        # A smaller one would take logits out of the range of float32.
        repetition_penalty=number("repetition_penalty", 0.01, 100, 1.0),
        frequency_penalty=number("frequency_penalty", -2, 2, 0.0),
        presence_penalty=number("presence_penalty", -2, 2, 0.0),
        logit_bias=_read_biases(body),
    )


def _read_biases(body: Fields) -> dict[int, float]:
    name = "logit_bias"
    given = body.object(name)
    if given is None:
        return {}
    if len(given.mapping) > _MOST_BIASES:
        body.fail(name, f"holds {len(given.mapping)} tokens: at most {_MOST_BIASES} are allowed")
    biases: dict[int, float] = {}
    for token, bias in given.mapping.items():
        if not _TOKEN_ID.fullmatch(token):
            body.fail(name, f"must have token ids as names: got {token!r:.40}")
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not number or not -100 <= bias <= 100:
            body.fail(name, f"must give token {token} a number from -100 to 100: got {bias!r:.40}")
        if bias:
            biases[int(token)] = float(bias)
    return biases


def read_stop(body: Fields, name: str) -> tuple[str, ...]:
    """Return the stop texts: one text or up to 16, none of them empty."""
    value = body.take(name)
    if value is None:
        return ()
    stops: list[Any] = [value] if isinstance(value, str) else (body.items(name) or [])
    if len(stops) > _MOST_STOPS:
        body.fail(name, f"holds {len(stops)} texts: at most {_MOST_STOPS} are allowed")
    for stop in stops:
        if not isinstance(stop, str):
            body.fail(name, "must be a text or a list of texts")
    return tuple(stop for stop in stops if stop)


def read_format(form: Fields | None, schema_name: str = "json_schema") -> ResponseFormat:
    """Return the form of the answer; `schema_name` is where a json_schema keeps its fields."""
    if form is None:
        return ResponseFormat()
    kind = form.choice("type", ("text", "json_object", "json_schema")) or "text"
    if kind == "json_object":
        return ResponseFormat(kind="json_object")
    if kind == "text":
        return ResponseFormat()
    inner = form.object(schema_name) if schema_name else form
    if inner is None:
        form.fail(schema_name, "is missing: an object with name and schema")
    schema = inner.take("schema")
    if as_mapping(schema) is None:
        inner.fail("schema", "must be an object, a JSON Schema")
    return ResponseFormat(
        kind="json_schema",
        name=inner.text("name") or "",
        schema=schema,
        strict=inner.boolean("strict") or False,
    )


def warn_unknown(body: Fields, warnings: list[str]) -> None:
    """Say which fields of the body were ignored."""
    warnings += [f"field {name!r} was ignored: it has no effect here" for name in body.unknown()]


def take_metadata(body: Fields, names: tuple[str, ...]) -> dict[str, Any]:
    """Return those of the named fields that are there. Raises RequestError for a wrong kind."""
    found: dict[str, Any] = {}
    for name in names:
        match _KINDS.get(name):
            case "object":
                inner = body.object(name)
                value = None if inner is None else inner.mapping
            case "list":
                value = body.items(name)
            case "truth":
                value = body.boolean(name)
            case "text":
                value = body.text(name)
            case _:
                value = body.take(name)
        if value is not None:
            found[name] = value
    return found


_KINDS = {
    "metadata": "object",
    "client_metadata": "object",
    "include": "list",
    "store": "truth",
    "user": "text",
    "safety_identifier": "text",
    "prompt_cache_key": "text",
    "service_tier": "text",
    "truncation": "text",
}
