"""Models behind an OpenAI-compatible URL.

Paper: none (client side of a serving interface).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2

from fathom.agent.model import API_KEY_VARIABLE, api_key_from_environment
from fathom.agent.wire import (
    ReplyBuilder,
    UnreadableReply,
    endpoint,
    is_overflow,
    request_body,
    unwanted_field,
)
from fathom.chat import Message
from fathom.chat.reply import OnPiece, Piece, Reply, Sampling, Timings
from fathom.errors import ModelUnreachable

log = logging.getLogger(__name__)

LONGEST_WAIT = 60.0


class _TryAgain(Exception):
    """A request failed in a way that may pass; `wait` is how long the server asked to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class HTTPModel:
    """A model behind an OpenAI-compatible chat-completions URL.

    `url` is a server's root, its `/v1` or the full address. Without `model` the first one that the
    server lists is used. `timeout` is the longest silence in seconds while a reply is awaited or
    streams in. Connection errors, 429 and 5xx are tried again `retries` times, waiting `backoff`
    seconds at first and twice as long each time, or as long as the server asks. `socket`: a Unix
    socket that leads to the server, for those who have no network.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        context_tokens: int | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        backoff: float = 1.0,
        socket: str | None = None,
    ) -> None:
        self._base = endpoint(url)
        self._model = model
        self._key = api_key or api_key_from_environment()
        self._context_tokens = context_tokens
        self._timeout = httpx2.Timeout(timeout, connect=15.0, pool=15.0)
        self._retries, self._backoff = retries, backoff
        self._tls: Any = httpx2.create_ssl_context() if self._base.startswith("https") else True
        self._reasoning_field = "reasoning_content"
        self._left_out: set[str] = set()
        self._socket = socket

    @property
    def name(self) -> str:
        """The model's name, or the URL while the server has not been asked for one."""
        return self._model or self._base

    @property
    def context_tokens(self) -> int | None:
        """The limit that was given, or that the server listed with the model."""
        return self._context_tokens

    def count_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: str = "high",
    ) -> int | None:
        """Always None: only the server knows its tokenizer."""
        return None

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: str = "high",
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        on_piece: OnPiece | None = None,
    ) -> Reply:
        """Ask for the next message.

        A conversation that no longer fits gives a reply with the finish reason "context". When a
        stream breaks off and is tried again, `on_piece` gets a notice and then the new reply from
        its start. Raises ModelUnreachable when the server cannot be reached, refuses, or answers
        something that is not a completion.
        """
        tell = on_piece or _nobody
        for attempt in range(self._retries + 1):
            try:
                await self._find_model()
                body = request_body(
                    self._model or "",
                    messages,
                    tools=tools,
                    thinking=thinking,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    reasoning_field=self._reasoning_field,
                )
                return await self._ask(body, tell)
            except _TryAgain as failure:
                if attempt == self._retries:
                    raise self._unreachable(f"{failure} ({attempt + 1} attempts)") from failure
                wait = self._backoff * 2**attempt if failure.wait is None else failure.wait
                wait = min(wait, LONGEST_WAIT)
                log.warning("model request failed reason=%s retry_in=%.1f", failure, wait)
                tell(Piece(kind="notice", text=f"{failure}; trying again in {wait:g} s"))
                await anyio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _ask(self, body: dict[str, Any], tell: OnPiece) -> Reply:
        while True:
            self._adapt(body)
            started = time.perf_counter()
            async with self._client() as client, self._open(client, "POST", body) as response:
                if response.status_code in (400, 422):
                    refusal = (await response.aread()).decode(errors="replace")
                    if is_overflow(refusal):
                        return Reply(message=Message(), finish_reason="context")
                    if field := unwanted_field(body, refusal):
                        log.warning("server refuses field=%s", field)
                        tell(Piece(kind="notice", text=f"the server does not take {field}"))
                        self._left_out.add(field)
                        continue
                await self._check(response)
                return await self._read(response, started, tell)

    def _adapt(self, body: dict[str, Any]) -> None:
        for field in self._left_out & body.keys():
            value = body.pop(field)
            if field == "max_tokens":
                body["max_completion_tokens"] = value

    async def _read(self, response: httpx2.Response, started: float, tell: OnPiece) -> Reply:
        builder = ReplyBuilder()
        first_piece: float | None = None
        whole = False
        try:
            async for chunk in _chunks(response):
                for piece in builder.add(chunk):
                    first_piece = first_piece or time.perf_counter() - started
                    tell(piece)
                whole = whole or builder.finish_reason is not None
        except UnreadableReply as error:
            raise self._unreachable(str(error)) from error
        if not whole:
            raise _TryAgain("the reply broke off before its end")
        self._reasoning_field = builder.reasoning_field or self._reasoning_field
        return builder.reply(Timings(first_piece=first_piece, total=time.perf_counter() - started))

    async def _find_model(self) -> None:
        """Take the first listed model, and its context length where the server tells it."""
        if self._model is not None:
            return
        async with self._client() as client, self._open(client, "GET") as response:
            await self._check(response)
            try:
                listed = json.loads(await response.aread())["data"][0]
                self._model = str(listed["id"])
            except (ValueError, LookupError, TypeError) as error:
                raise self._unreachable("it lists no models; name one with --model") from error
            length = listed.get("max_model_len")
            if self._context_tokens is None and isinstance(length, int):
                self._context_tokens = length

    def _client(self) -> httpx2.AsyncClient:
        # One client per request: nothing to close, and it works in whichever event loop runs.
        # A proxy from the environment can never reach this machine's own loopback.
        if self._socket is not None:
            way = httpx2.AsyncHTTPTransport(uds=self._socket, verify=self._tls)
            return httpx2.AsyncClient(timeout=self._timeout, transport=way, trust_env=False)
        loopback = httpx2.URL(self._base).host in ("localhost", "127.0.0.1", "::1")
        return httpx2.AsyncClient(timeout=self._timeout, verify=self._tls, trust_env=not loopback)

    @asynccontextmanager
    async def _open(
        self, client: httpx2.AsyncClient, method: str, body: dict[str, Any] | None = None
    ) -> AsyncGenerator[httpx2.Response]:
        path = "/models" if body is None else "/chat/completions"
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        content = None
        if body is not None:
            headers["content-type"] = "application/json"
            # ASCII escapes, because a lone surrogate in a model's text has no UTF-8 form.
            content = json.dumps(body).encode("ascii")
        try:
            async with client.stream(
                method, self._base + path, headers=headers, content=content
            ) as response:
                yield response
        except httpx2.ReadTimeout as error:
            raise self._unreachable(f"it was silent for {self._timeout.read:g} s") from error
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.SSEError) as error:
            raise self._unreachable(str(error)) from error
        except httpx2.TransportError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        except httpx2.HTTPError as error:  # such as an answer in a coding that it is not in
            raise self._unreachable(f"{type(error).__name__}: {error}") from error

    async def _check(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        said = _message((await response.aread()).decode(errors="replace"))
        if status == 429 or status >= 500:
            raise _TryAgain(f"HTTP {status}: {said}", _retry_after(response))
        advice = {
            401: f"give its key with --api-key or {API_KEY_VARIABLE}",
            403: f"give its key with --api-key or {API_KEY_VARIABLE}",
            404: "check the address and the model's name",
        }.get(status, "")
        raise self._unreachable(f"HTTP {status}: {said}", advice)

    def _unreachable(self, reason: str, advice: str = "") -> ModelUnreachable:
        advice = advice or "check that the server runs and that the address is right"
        return ModelUnreachable(f"the model at {self._base} did not answer: {reason}; {advice}")


async def _chunks(response: httpx2.Response) -> AsyncIterator[Any]:
    if "event-stream" not in response.headers.get("content-type", ""):
        # A server that does not stream answers with one whole completion.
        yield _decode((await response.aread()).decode(errors="replace"))
        return
    async for event in httpx2.EventSource(response):
        if event.data == "[DONE]":
            return
        if event.data:
            yield _decode(event.data)


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UnreadableReply(f"not JSON: {text[:200]!r}") from error


def _message(body: str) -> str:
    """What an error body says, whichever of the usual shapes it has."""
    said: Any = body
    try:
        said = json.loads(body)
        said = said.get("error", said)
        said = said.get("message", said)
    except (ValueError, AttributeError):
        pass  # what was found so far is as far as the usual shapes go
    return str(said)[:300] or "no explanation"


def _retry_after(response: httpx2.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _nobody(piece: Piece) -> None:
    """Take a piece and do nothing."""
