"""The routes: each reads its body, runs completions and hands the rest to its API's renderer.

Paper: none (API conventions).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from fathom import __version__
from fathom.errors import FathomError
from fathom.server import documents
from fathom.server.backend import Backend
from fathom.server.bounds import read_json
from fathom.server.chat_api import KEEP_ALIVE, ChatWriter
from fathom.server.guard import Guard
from fathom.server.metrics import CONTENT_TYPE
from fathom.server.page import add_page
from fathom.server.problems import Problem, api_of, as_problem, error_body, status_for
from fathom.server.service import Service
from fathom.server.settings import Settings
from fathom.server.sse import EventStream, until_disconnect

log = logging.getLogger(__name__)


def create_app(backend: Backend, settings: Settings | None = None) -> FastAPI:
    """The server as an ASGI application in front of `backend`."""
    settings = settings or Settings()
    service = Service(backend, settings)
    app = FastAPI(
        title="fathom",
        version=__version__,
        description="DeepSeek-V4 behind the APIs that existing clients speak.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=settings)
    _add_errors(app, service)
    _add_chat(app, service)
    _add_small(app, service)
    add_page(app)
    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            problem = _http_problem(request, error)
        else:
            problem = as_problem(error)
        if problem.status >= 500:
            log.error("path=%s code=%s", request.url.path, problem.code, exc_info=error)
        api = api_of(request.url.path)
        status = status_for(problem, api)
        service.metrics.requests.labels(_label(request.url.path), status).inc()
        body = error_body(problem, api, request.state.request_id)
        return JSONResponse(body, status, problem.headers)

    for kind in (Problem, FathomError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _http_problem(request: Request, error: HTTPException) -> Problem:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Problem(404, f"there is no {request.url.path[:200]!r}", code="not_found")
    if error.status_code == 405:
        message = f"{request.method} is not a method of {request.url.path[:200]!r}"
        return Problem(405, message, code="method_not_allowed", headers=headers)
    return Problem(error.status_code, str(error.detail), code="http_error", headers=headers)


_LABELS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/messages": "messages",
    "/v1/responses": "responses",
}


def _label(path: str) -> str:
    return _LABELS.get(path, "other")


def stream_response(
    service: Service,
    source: AsyncGenerator[bytes, None],
    *,
    api: str,
    keep_alive: bytes,
    fail: Callable[[Exception], bytes],
    headers: dict[str, str],
) -> EventStream:
    """An event stream with this server's patience."""
    limits, started = service.settings.limits, time.perf_counter()

    async def timed() -> AsyncGenerator[bytes, None]:
        first = True
        try:
            async for data in source:
                if first:
                    first = False
                    service.metrics.first_token.observe(time.perf_counter() - started)
                yield data
        finally:
            await source.aclose()

    def failed(error: Exception) -> bytes:
        log.error("api=%s stream failed", api, exc_info=error)
        return fail(error)

    return EventStream(
        timed(),
        keep_alive=keep_alive,
        interval=limits.keep_alive_seconds,
        patience=limits.write_seconds,
        fail=failed,
        headers=headers,
        on_end=lambda outcome: service.metrics.requests.labels(api, outcome).inc(),
    )


async def whole_response(
    service: Service, request: Request, api: str, work: Callable[[], Any], headers: dict[str, str]
) -> Response:
    """The JSON that `work` makes, unless the client leaves first."""
    body = await until_disconnect(request.receive, work)
    if body is None:
        service.metrics.requests.labels(api, "left").inc()
        return Response(status_code=499)  # nobody reads it
    service.metrics.requests.labels(api, 200).inc()
    return JSONResponse(body, headers=headers)


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", **documents.CHAT)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, in the form of OpenAI's and DeepSeek's Chat Completions."""
        body = await read_json(request, service.settings.limits)
        owner: str = request.state.owner
        prepared = await service.prepare(service.read("chat", body), owner, body)
        turns = service.start(prepared, owner)
        model = prepared.request.model or service.backend.info.name
        writer = ChatWriter(prepared.request, model, turns, service.backend.tokenizer)
        if not prepared.request.stream:
            return await whole_response(
                service, request, "chat", writer.complete, prepared.headers()
            )
        return stream_response(
            service,
            writer.stream(),
            api="chat",
            keep_alive=KEEP_ALIVE,
            fail=writer.fail,
            headers=prepared.headers(),
        )


def _add_small(app: FastAPI, service: Service) -> None:
    @app.get("/health", **documents.HEALTH)
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok", "version": __version__}

    @app.get("/metrics", **documents.METRICS)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return PlainTextResponse(service.metrics.render(), media_type=CONTENT_TYPE)
