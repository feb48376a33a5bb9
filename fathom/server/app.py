"""The server as an application: its routes, its guard, and errors in the shape of each API.

Paper: none (API conventions).
"""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from fathom.errors import FathomError
from fathom.server.backend import Backend
from fathom.server.guard import Guard
from fathom.server.inspect_api import add_inspection
from fathom.server.page import add_page
from fathom.server.problems import Problem, api_of, as_problem, error_body, status_for
from fathom.server.render import Json
from fathom.server.routes import add_routes
from fathom.server.service import Service
from fathom.server.settings import VERSION, Settings

log = logging.getLogger(__name__)


def create_app(backend: Backend, settings: Settings | None = None) -> FastAPI:
    """The server as an ASGI application in front of `backend`."""
    settings = settings or Settings()
    service = Service(backend, settings)
    app = FastAPI(
        title="fathom",
        version=VERSION,
        description="DeepSeek-V4 behind the APIs that existing clients speak.",
        redirect_slashes=False,  # a redirect would lead to whatever the Host header names
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    _add_errors(app)
    add_routes(app, service)
    add_inspection(app, service)
    add_page(app)
    return app


def _add_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            problem = _http_problem(request, error)
        else:
            problem = as_problem(error)
        if problem.status >= 500:
            trace = error if problem.status == 500 else None
            log.error(
                "path=%s code=%s: %s", request.url.path, problem.code, problem, exc_info=trace
            )
        api = api_of(request.url.path)
        status = status_for(problem, api)
        body = error_body(problem, api, request.state.request_id)
        return Json(body, status, problem.headers)

    for kind in (Problem, FathomError, HTTPException):
        app.add_exception_handler(kind, answer)


def _http_problem(request: Request, error: HTTPException) -> Problem:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Problem(404, f"there is no {request.url.path[:200]!r}", code="not_found")
    if error.status_code == 405:
        message = f"{request.method} is not a method of {request.url.path[:200]!r}"
        return Problem(405, message, code="method_not_allowed", headers=headers)
    return Problem(error.status_code, str(error.detail), code="http_error", headers=headers)
