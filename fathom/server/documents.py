"""What the OpenAPI document says about the routes; the readers of the APIs check the fields.

Paper: none (API conventions).
"""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string"}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}, "minItems": 1}]}


def _message(*roles: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"role": {"enum": list(roles)}, "content": _TEXT},
        "required": ["role", "content"],
        "description": "Content may also be a list of parts; see the API for further fields.",
    }


_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_PARAMETERS = {
    "type": "object",
    "properties": {"type": {"const": "object"}, "properties": {"type": "object"}},
    "required": ["type"],
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": _NAME,
                "description": _TEXT,
                "parameters": _PARAMETERS,
                "strict": {"type": "boolean"},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_CHOICE = {"anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}]}
_STOP = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 16}]}
_FORMAT = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
    "required": ["type"],
}
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
_SHAPING: dict[str, Any] = {
    "top_k": {"type": "integer", "minimum": -1, "maximum": 2**31 - 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 100},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": 1024,
        "description": "Token ids of this model, as text, and what is added to their logits.",
    },
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
    415: "The body is not declared as JSON, or is compressed.",
    429: "The upstream has too much to do; `retry-after` says for how long, if it did.",
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
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


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


_POST = (400, 401, 403, 408, 413, 415, 429, 500, 502, 503)
_GET = (401, 403)

CHAT = _route(
    "chat",
    _body(
        {
            "model": {"type": "string"},
            "messages": {
                "type": "array",
                "items": _message("system", "developer", "user", "assistant"),
                "minItems": 1,
            },
            "tools": {"type": "array", "items": _TOOL},
            "tool_choice": _CHOICE,
            "parallel_tool_calls": {"type": "boolean"},
            "thinking": _THINKING,
            "reasoning_effort": {"enum": _EFFORTS},
            "response_format": _FORMAT,
            "stop": _STOP,
            "n": {"type": "integer", "minimum": 1, "maximum": 16},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": 393_216},
            "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 393_216},
            "logprobs": {"type": "boolean"},
            "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
            "stream": {"type": "boolean"},
            "stream_options": {
                "type": "object",
                "properties": {"include_usage": {"type": "boolean"}},
            },
            "stream_arguments": {"type": "boolean"},
            "repaired_calls": {"type": "boolean"},
            **_SAMPLING,
            **_SHAPING,
        },
        ["messages"],
    ),
    _POST,
)
_COMMON: dict[str, Any] = {
    "model": {"type": "string"},
    "stream": {"type": "boolean"},
    "stream_arguments": {"type": "boolean"},
    "repaired_calls": {"type": "boolean"},
    "temperature": _SAMPLING["temperature"],
    "top_p": _SAMPLING["top_p"],
    **_SHAPING,
}
_MESSAGES_BODY = _body(
    {
        "messages": {
            "type": "array",
            "items": _message("user", "assistant", "system"),
            "minItems": 1,
        },
        "system": _CONTENT,
        "tools": {"type": "array", "items": {"type": "object"}},
        "tool_choice": {"type": "object"},
        "thinking": _THINKING,
        "output_config": {"type": "object"},
        "stop_sequences": {"type": "array", "items": {"type": "string"}},
        "max_tokens": {"type": "integer", "minimum": 1},
        **_COMMON,
    },
    ["messages"],
)
_RESPONSES_BODY = _body(
    {
        "input": {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _message("user", "assistant"), "minItems": 1},
            ]
        },
        "instructions": _TEXT,
        "tools": {"type": "array", "items": {"type": "object"}},
        "tool_choice": _CHOICE,
        "parallel_tool_calls": {"type": "boolean"},
        "reasoning": {"type": "object", "properties": {"effort": {"enum": _EFFORTS}}},
        "text": {"type": "object"},
        "previous_response_id": {"type": "string"},
        "store": {"type": "boolean"},
        "include": {"type": "array", "items": {"type": "string"}},
        "max_output_tokens": {"type": "integer", "minimum": 1, "maximum": 393_216},
        **_COMMON,
    },
    ["input"],
)
MESSAGES = _route("messages", _MESSAGES_BODY, _POST, overloaded=529)
COUNT_TOKENS = _route("tools", _MESSAGES_BODY, _POST, overloaded=529)
RESPONSES = _route("responses", _RESPONSES_BODY, _POST)
INPUT_TOKENS = _route("tools", _RESPONSES_BODY, _POST)
STORED = _route("responses", None, (400, 401, 403, 404))
COMPLETIONS = _route(
    "completions",
    _body(
        {
            "model": {"type": "string"},
            "prompt": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                ]
            },
            "suffix": {"type": "string"},
            "max_tokens": {"type": "integer", "minimum": 0, "maximum": 393_216},
            "n": {"type": "integer", "minimum": 1, "maximum": 16},
            "stop": _STOP,
            "stop_token_ids": {"type": "array", "items": {"type": "integer"}},
            "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
            "echo": {"type": "boolean"},
            "stream": {"type": "boolean"},
            "skip_special_tokens": {"type": "boolean"},
            "return_token_ids": {"type": "boolean"},
            **_SAMPLING,
            **_SHAPING,
        },
        ["prompt"],
    ),
    _POST,
)
MODELS = _route("models", None, _GET)
MODEL = _route("models", None, (401, 403, 404))
RENDER = _route(
    "tools",
    _body({"api": {"enum": ["chat", "messages", "responses"]}, "messages": {}, "input": {}}, []),
    _POST,
)
TOKENIZE = _route(
    "tools",
    _body({"prompt": {"type": "string"}, "special": {"type": "boolean"}}, ["prompt"]),
    _POST,
)
DETOKENIZE = _route(
    "tools",
    _body({"tokens": {"type": "array", "items": {"type": "integer"}}}, ["tokens"]),
    _POST,
)
HEALTH = _route("service", None, (403,))
METRICS = _route("service", None, _GET)
