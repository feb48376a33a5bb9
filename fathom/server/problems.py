"""Errors as each API states them: the right status, the right shape, the field at fault.

    OpenAI     {"error": {"message", "type", "param", "code"}}
    Anthropic  {"type": "error", "error": {"type", "message"}, "request_id"}

Paper: none (API conventions).
"""

from __future__ import annotations

from typing import Any, Literal

from fathom.errors import (
    BackendError,
    ChatError,
    FathomError,
    GenerationError,
    ThreadUnsupported,
    TokenizerError,
)

Api = Literal["openai", "anthropic"]

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class Problem(Exception):
    """A request that gets an error for an answer.

    `param` is the path of the offending field, as "messages[2].content". `code` is stable.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "invalid_value",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}


def as_problem(error: BaseException) -> Problem:
    """The problem that an exception stands for; anything unexpected is a 500 without details."""
    match error:
        case Problem():
            return error
        case ChatError() | GenerationError() | TokenizerError():
            param = getattr(error, "param", None) or getattr(error, "field", None)
            return Problem(400, str(error), code=error.code, param=param)
        case BackendError():
            return Problem(502, str(error), code=error.code)
        case FathomError():
            return Problem(500, str(error), code=error.code)
        case _:
            return Problem(500, "the server failed; its log says why", code="internal_error")


def api_of(path: str) -> Api:
    """Which API's error shape the clients of `path` expect."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def error_body(problem: Problem, api: Api, request_id: str) -> dict[str, Any]:
    """The error in the shape of `api`."""
    if api == "anthropic":
        default = "invalid_request_error" if problem.status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(problem.status, default)
        message = problem.message
        if problem.param and problem.param not in message:
            message = f"{problem.param}: {message}"
        error: dict[str, Any] = {"type": kind, "message": message}
        if problem.code == ThreadUnsupported.code:  # its clients then go on without
            error["details"] = {"error_code": problem.code, "unsupported": [problem.param]}
        return {"type": "error", "error": error, "request_id": request_id}
    default = "invalid_request_error" if problem.status < 500 else "server_error"
    return {
        "error": {
            "message": problem.message,
            "type": _OPENAI_TYPES.get(problem.status, default),
            "param": problem.param,
            "code": problem.code,
        }
    }


def status_for(problem: Problem, api: Api) -> int:
    """The HTTP status: Anthropic's clients know an overloaded server as 529."""
    return 529 if api == "anthropic" and problem.status == 503 else problem.status
