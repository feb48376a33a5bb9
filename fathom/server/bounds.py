"""Reading a request body without trusting it: size, time, JSON depth, and the shape of schemas.

Paper: none (security).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import anyio
from starlette.requests import ClientDisconnect, Request

from fathom.chat.requests import PromptRequest
from fathom.server.problems import Problem
from fathom.server.settings import Limits

_BRACKETS = re.compile(rb'[\[\]{}]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises Problem when it is too large, too slow or not said to be JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # A web page of another origin may post text without asking the browser's leave first.
        raise Problem(415, "the content type must be application/json", code="unsupported_media")
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


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The body as a JSON object. Raises Problem."""
    return decode_json(await read_body(request, limits), limits)


def decode_json(data: bytes, limits: Limits) -> dict[str, Any]:
    """Decode a JSON object of bounded depth. Raises Problem."""
    if _depth(data) > limits.json_depth:
        raise Problem(400, f"the JSON is nested deeper than {limits.json_depth} levels",
                      code="json_too_deep")  # fmt: skip
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body must be a JSON object", code="invalid_json")
    return cast("dict[str, Any]", value)


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
        check_schema(request.response_format.schema, "response_format", limits)
    for at, tool in enumerate(request.tools):
        check_schema(tool.parameters, f"tools[{at}]", limits)


def check_stops(stops: Sequence[str], limits: Limits) -> None:
    """Every end of the reply is compared with them, so they must be short. Raises Problem."""
    if len(stops) > limits.stop_strings or any(len(s) > limits.stop_length for s in stops):
        raise Problem(400, f"at most {limits.stop_strings} stop strings of {limits.stop_length} "
                      "characters are allowed", code="too_many_items", param="stop")  # fmt: skip


def check_schema(schema: Any, param: str, limits: Limits) -> None:
    """Raises Problem for a schema that is too deep or too long."""
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > limits.schema_depth:
            raise Problem(400, f"the schema is nested deeper than {limits.schema_depth} levels",
                          code="schema_too_deep", param=param)  # fmt: skip
        level = [child for node in level for child in _children(node)]
    size = len(json.dumps(schema))
    if size > limits.schema_bytes:
        raise Problem(400, f"the schema has {size} bytes; at most {limits.schema_bytes} are "
                      "allowed", code="schema_too_large", param=param)  # fmt: skip


def _children(node: Any) -> list[Any]:
    if isinstance(node, Mapping):
        return list(cast("Mapping[str, Any]", node).values())
    return cast("list[Any]", node) if isinstance(node, list) else []


def _depth(data: bytes) -> int:
    """How deep brackets nest outside strings; whether it is JSON is not asked here."""
    depth = deepest = 0
    if data.count(b"[") + data.count(b"{") < 64:
        return 0
    for found in _BRACKETS.finditer(data):
        character = found[0][:1]
        if character in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in b"]}":
            depth -= 1
    return deepest


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _too_large(limits: Limits) -> NoReturn:
    raise Problem(
        413,
        f"the request body is larger than {limits.request_bytes} bytes",
        code="request_too_large",
        headers={"connection": "close"},
    )
