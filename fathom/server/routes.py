"""The routes of the four generating APIs and of what belongs to them.

Each reads its body, prepares its turns and hands the rest to its API's writer.

Paper: none (API conventions).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import Response

from fathom.chat import Message
from fathom.server import chat_api, documents, messages_api, responses_api
from fathom.server.bounds import read_json
from fathom.server.chat_api import ChatWriter
from fathom.server.completions_api import CompletionsWriter, read_completions
from fathom.server.messages_api import MessagesWriter
from fathom.server.problems import Problem
from fathom.server.render import Json, logprob_entry
from fathom.server.responses_api import ResponsesWriter, echo
from fathom.server.service import Prepared, Service, notice_header
from fathom.server.sse import EventStream, until_disconnect
from fathom.server.store import StoredResponse
from fathom.server.turn import TokenRecord

log = logging.getLogger(__name__)


def add_routes(app: FastAPI, service: Service) -> None:
    """Add all of them."""
    _add_chat(app, service)
    _add_messages(app, service)
    _add_responses(app, service)
    _add_stored(app, service)
    _add_completions(app, service)


class Writer(Protocol):
    """What an API's replies are written by."""

    async def complete(self) -> Any:
        """The whole reply."""
        ...

    def stream(self) -> AsyncGenerator[bytes, None]:
        """The reply as events."""
        ...

    def fail(self, error: Exception) -> bytes:
        """The event that tells a failure."""
        ...


async def reply(
    service: Service,
    request: Request,
    writer: Writer,
    *,
    api: str,
    keep_alive: bytes,
    streams: bool,
    headers: dict[str, str],
) -> Response:
    """The reply as the request wants it: whole, or as a stream."""
    if not streams:
        return await whole_response(request, writer.complete, headers)
    return stream_response(
        service,
        writer.stream(),
        api=api,
        keep_alive=keep_alive,
        fail=writer.fail,
        headers=headers,
    )


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

    def first() -> None:
        service.metrics.first_token.observe(time.perf_counter() - started)

    def failed(error: Exception) -> bytes:
        trace = None if isinstance(error, Problem) else error
        log.error("api=%s stream failed: %s", api, type(error).__name__, exc_info=trace)
        return fail(error)

    return EventStream(
        source,
        keep_alive=keep_alive,
        interval=limits.keep_alive_seconds,
        patience=limits.write_seconds,
        fail=failed,
        headers=headers,
        on_first=first,
        on_end=lambda outcome: service.metrics.streams.labels(api, outcome).inc(),
    )


async def whole_response(
    request: Request, work: Callable[[], Any], headers: dict[str, str]
) -> Response:
    """The JSON that `work` makes, unless the client leaves first."""
    body = await until_disconnect(request, work)
    if body is None:
        return Response(status_code=499)  # nobody reads it
    return Json(body, headers=headers)


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", **documents.CHAT)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, in the form of OpenAI's and DeepSeek's Chat Completions."""
        body = await read_json(request, service.settings.limits)
        owner: str = request.state.owner
        prepared = await service.prepare("chat", body, owner)
        turns = service.start(prepared, owner)
        asked = prepared.request
        writer = ChatWriter(asked, _model(service, prepared), turns, service.backend.tokenizer)
        return await reply(
            service,
            request,
            writer,
            api="chat",
            keep_alive=chat_api.KEEP_ALIVE,
            streams=prepared.request.stream,
            headers=prepared.headers(),
        )


def _add_messages(app: FastAPI, service: Service) -> None:
    @app.post("/v1/messages", **documents.MESSAGES)
    async def messages(request: Request) -> Response:
        """Answer a conversation, in the form of Anthropic's Messages."""
        body = await read_json(request, service.settings.limits)
        owner: str = request.state.owner
        prepared = await service.prepare("messages", body, owner)
        (turn,) = service.start(prepared, owner)
        writer = MessagesWriter(turn, _model(service, prepared), request.state.request_id)
        return await reply(
            service,
            request,
            writer,
            api="messages",
            keep_alive=messages_api.KEEP_ALIVE,
            streams=prepared.request.stream,
            headers=prepared.headers(),
        )

    @app.post("/v1/messages/count_tokens", **documents.COUNT_TOKENS)
    async def count_tokens(request: Request) -> dict[str, int]:
        """The number of tokens of a Messages request's prompt."""
        body = await read_json(request, service.settings.limits)
        prepared = await service.prepare("messages", body, request.state.owner)
        return {"input_tokens": len(prepared.prompt)}


def _add_responses(app: FastAPI, service: Service) -> None:
    @app.post("/v1/responses", **documents.RESPONSES)
    async def responses(request: Request) -> Response:
        """Answer a conversation, in the form of OpenAI's Responses."""
        body = await read_json(request, service.settings.limits)
        owner: str = request.state.owner
        prepared = await service.prepare("responses", body, owner)
        (turn,) = service.start(prepared, owner)

        def keep(response_id: str, messages: list[Message], made: dict[str, Any]) -> None:
            found = prepared.request.found_tools
            stored = StoredResponse(messages=messages, body=made, found_tools=found)
            service.store.keep_response(owner, response_id, stored)

        def record(found: TokenRecord) -> dict[str, Any]:
            return logprob_entry(
                service.backend.tokenizer, found, prepared.request.top_logprobs or 0
            )

        model = _model(service, prepared)
        writer = ResponsesWriter(prepared.request, turn, model, keep, record, echo(body))
        return await reply(
            service,
            request,
            writer,
            api="responses",
            keep_alive=responses_api.KEEP_ALIVE,
            streams=prepared.request.stream,
            headers=prepared.headers(),
        )

    @app.post("/v1/responses/input_tokens", **documents.INPUT_TOKENS)
    async def input_tokens(request: Request) -> dict[str, Any]:
        """The number of tokens of a Responses request's prompt."""
        body = await read_json(request, service.settings.limits)
        prepared = await service.prepare("responses", body, request.state.owner)
        return {"object": "response.input_tokens", "input_tokens": len(prepared.prompt)}


def _add_stored(app: FastAPI, service: Service) -> None:
    def missing(response_id: str) -> Problem:
        message = f"response {response_id[:100]!r} is not known here (any more)"
        return Problem(404, message, code="response_not_found", param="response_id")

    @app.get("/v1/responses/{response_id}", **documents.STORED)
    async def get_response(request: Request, response_id: str) -> Response:
        """A response that was made before, as long as the server remembers it."""
        stored = service.store.response(request.state.owner, response_id)
        if stored is None:
            raise missing(response_id)
        if request.query_params.get("stream", "false").lower() != "false":
            message = "a stored response is not streamed again: ask for it without stream"
            raise Problem(400, message, param="stream")
        return Json(stored.body)

    @app.delete("/v1/responses/{response_id}", **documents.STORED)
    async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
        """Forget a response."""
        if not service.store.forget_response(request.state.owner, response_id):
            raise missing(response_id)
        return {"id": response_id, "object": "response.deleted", "deleted": True}


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", **documents.COMPLETIONS)
    async def completions(request: Request) -> Response:
        """Go on from a prompt, given as text or token ids."""
        body = await read_json(request, service.settings.limits)
        raw = await read_completions(service, body)
        service.check_queue(len(raw.prompts) * raw.choices)
        writer = CompletionsWriter(service, raw, request.state.owner)
        return await reply(
            service,
            request,
            writer,
            api="completions",
            keep_alive=chat_api.KEEP_ALIVE,
            streams=raw.stream,
            headers=notice_header(raw.notices),
        )


def _model(service: Service, prepared: Prepared) -> str:
    """The name that the client used: some look their answers up by it."""
    return prepared.request.model or service.backend.info.name
