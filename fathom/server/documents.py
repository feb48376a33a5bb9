"""What the OpenAPI document says about the routes; the readers of the APIs check the fields.

Paper: none (API conventions).
"""

from __future__ import annotations

from typing import Any

_MESSAGE = {"type": "object", "additionalProperties": True}
_TOOL = {"type": "object", "additionalProperties": True}
_EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"]
_THINKING = {
    "type": "object",
    "properties": {"type": {"enum": ["enabled", "disabled", "adaptive"]}},
    "required": ["type"],
}
_SAMPLING: dict[str, Any] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "object"}},
    "required": ["error"],
}
_STATUSES = {
    400: "A field is missing, wrong or cannot be served; `param` names it.",
    401: "The API key is missing or not valid.",
    403: "This host name or origin may not be used here.",
    404: "There is no such thing.",
    405: "There is no such method.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    500: "The server failed.",
    502: "The engine failed.",
    503: "Too many completions are waiting.",
}


def _errors(*statuses: int, overloaded: int = 503) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        description = _STATUSES[status]
        content = {"application/json": {"schema": _ERROR}}
        found[overloaded if status == 503 else status] = {
            "description": description,
            "content": content,
        }
    return found


def _body(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": True,
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
    }


def _route(
    tag: str, extra: dict[str, Any] | None, statuses: tuple[int, ...], **rest: Any
) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": "The answer; an event stream if asked for."}
    if extra is not None and "requestBody" in extra and tag != "tools":
        ok["content"] = {"application/json": {}, "text/event-stream": {}}
    return {
        "tags": [tag],
        "openapi_extra": extra,
        "response_model": None,
        "responses": {200: ok, **_errors(*statuses, **rest)},
    }


_POST = (400, 401, 403, 408, 413, 415, 500, 502, 503)
_GET = (401, 403)

CHAT = _route(
    "chat",
    _body(
        {
            "model": {"type": "string"},
            "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
            "tools": {"type": "array", "items": _TOOL},
            "tool_choice": {},
            "parallel_tool_calls": {"type": "boolean"},
            "thinking": _THINKING,
            "reasoning_effort": {"enum": _EFFORTS},
            "response_format": {"type": "object"},
            "stop": {},
            "n": {"type": "integer", "minimum": 1, "maximum": 16},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": 393_216},
            "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 393_216},
            "logprobs": {"type": "boolean"},
            "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
            "stream": {"type": "boolean"},
            "stream_options": {"type": "object"},
            "stream_arguments": {"type": "boolean"},
            "repaired_calls": {"type": "boolean"},
            **_SAMPLING,
        },
        ["messages"],
    ),
    _POST,
)
HEALTH = _route("service", None, (403,))
METRICS = _route("service", None, _GET)
