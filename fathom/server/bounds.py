"""Reading a request body without trusting it: size, time, JSON depth, and how much it holds.

Counts and sizes are looked at first, and whatever takes long runs outside the event loop, so that
no body keeps the server from answering others.

Paper: none (security).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request

from fathom.chat.requests import PromptRequest
from fathom.chat.tokenizer import Tokenizer
from fathom.server.problems import Problem
from fathom.server.schemas import check_schema
from fathom.server.settings import Limits

T = TypeVar("T")

_PARTS = re.compile(rb'[\[\]{}]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_LARGE = 16 << 10  # bytes: a smaller body is dealt with in less time than a thread takes to wake
_READERS = 2  # large bodies at the same time: each takes time from the event loop
_readers: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("readers")


class Body(dict[str, Any]):
    """A decoded body that knows how many bytes it came in."""

    size = 0


async def off_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)`, outside the event loop if it is about a body of many bytes."""
    if size < _LARGE:
        return work(*arguments)
    try:
        readers = _readers.get()
    except LookupError:
        readers = anyio.CapacityLimiter(_READERS)
        _readers.set(readers)
    return await anyio.to_thread.run_sync(partial(work, *arguments), limiter=readers)


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises Problem if it is too large, slow, compressed or not named JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # A web page of another origin may post text without asking the browser's leave first.
        raise Problem(415, "the content type must be application/json", code="unsupported_media")
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise Problem(415, f"bodies in the coding {coding:.40} are not read: send it uncompressed",
                      code="unsupported_media")  # fmt: skip
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > limits.request_bytes:
        _too_large(limits)
    chunks: list[bytes] = []
    size = 0
    try:
        with anyio.fail_after(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.request_bytes:
                    _too_large(limits)
                chunks.append(chunk)
    except TimeoutError:
        raise Problem(
            408,
            f"the request body took longer than {limits.body_seconds:g} s",
            code="body_timeout",
            headers={"connection": "close"},
        ) from None
    except ClientDisconnect:
        raise Problem(400, "the client left while it sent its request", code="cut_off") from None
    return b"".join(chunks)


async def read_json(request: Request, limits: Limits) -> Body:
    """The body as a JSON object. Raises Problem."""
    data = await read_body(request, limits)
    return await off_loop(len(data), decode_json, data, limits)


def decode_json(data: bytes, limits: Limits) -> Body:
    """Decode a JSON object of bounded depth and number of parts, in UTF-8. Raises Problem."""
    _measure(data, limits)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is not UTF-8, as JSON must be: byte {error.start}",
                      code="invalid_json") from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body must be a JSON object", code="invalid_json")
    body = Body(cast("dict[str, Any]", value))
    body.size = len(data)
    return body


def check_body(body: Mapping[str, Any], limits: Limits) -> None:
    """Bounds on what is in a body, before anything reads it closer. Raises Problem."""
    for name, most in (("messages", limits.messages), ("input", limits.messages),
                       ("tools", limits.tools)):  # fmt: skip
        value = body.get(name)
        if isinstance(value, list) and len(cast("list[Any]", value)) > most:
            raise Problem(400, f"{name} holds {len(cast('list[Any]', value))} items; at most "
                          f"{most} are allowed", code="too_many_items", param=name)  # fmt: skip


def check_request(request: PromptRequest, limits: Limits) -> None:
    """Bounds on schemas and stop strings, which the reply is held to. Raises Problem."""
    check_stops(request.stop, limits)
    if request.response_format.schema is not None:
        check_schema(request.response_format.schema, "response_format", limits, enforced=True)
    for at, tool in enumerate(request.tools):
        check_schema(tool.parameters, f"tools[{at}]", limits, enforced=tool.strict)


def check_stops(stops: Sequence[str], limits: Limits) -> None:
    """Every end of the reply is compared with them, so they must be short. Raises Problem."""
    if len(stops) > limits.stop_strings or any(len(s) > limits.stop_length for s in stops):
        raise Problem(400, f"at most {limits.stop_strings} stop strings of {limits.stop_length} "
                      "characters are allowed", code="too_many_items", param="stop")  # fmt: skip


def check_biases(biases: Mapping[int, float], tokenizer: Tokenizer | None) -> None:
    """Raises Problem for a bias on a token that there is not, where the tokens are known."""
    token = max(biases, default=0)
    if tokenizer is not None and token >= tokenizer.vocab_size:
        raise Problem(400, f"logit_bias: {token} is not a token of this model",
                      code="request_invalid", param="logit_bias")  # fmt: skip


def _measure(data: bytes, limits: Limits) -> None:
    """Raises Problem for too deep nesting or too many parts; whether it is JSON is not asked here.

    Lists and objects take a hundred times the memory of their bytes, and the decoder cannot be
    interrupted.
    """
    commas = data.count(b",")
    many = commas > limits.json_values  # unless most of them are in strings
    depth = parts = 0
    for found in _PARTS.finditer(data):
        character = found[0][:1]
        parts += 1
        if character in b"[{":
            depth += 1
            if depth > limits.json_depth:
                raise Problem(400, f"the JSON is nested deeper than {limits.json_depth} levels",
                              code="json_too_deep")  # fmt: skip
        elif character in b"]}":
            depth -= 1
            parts -= 1
        elif many:
            commas -= data.count(b",", found.start(), found.end())
        if parts > limits.json_parts:
            raise Problem(400, f"the JSON holds more than {limits.json_parts} strings, lists and "
                          "objects", code="too_many_items")  # fmt: skip
    if commas > limits.json_values:
        raise Problem(400, f"the JSON holds more than {limits.json_values} values",
                      code="too_many_items")  # fmt: skip


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _too_large(limits: Limits) -> NoReturn:
    raise Problem(
        413,
        f"the request body is larger than {limits.request_bytes} bytes",
        code="request_too_large",
        headers={"connection": "close"},
    )
