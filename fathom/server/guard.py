"""Who may talk to the server, and how slowly.

`Guard` stands before every route: host names, origins, keys. `GuardedProtocol` is uvicorn's HTTP
protocol with bounds that it lacks: a number of connections, a time and a size for the request's
head, and a time for reading the answer.

A server on loopback without a key is open to every program of this machine, but must not be to web
pages in its browser. A page cannot send JSON to another origin without asking, so only JSON is
taken; it could make its own name point here, so names other than this machine's are refused.

Paper: none (security).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import socket
import struct
from asyncio import TimerHandle
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fathom.server.metrics import Metrics
from fathom.server.problems import Problem, api_of, as_problem, error_body, status_for
from fathom.server.render import Json, new_id
from fathom.server.settings import Settings, is_loopback

log = logging.getLogger(__name__)

_OPEN_PATHS = ("/", "/health")  # no secret, no work; the page asks for the key itself
_PAGE = "/page/"
_SEND_BUFFER = 256 << 10  # in a larger one the kernel would hide how slowly a client reads
_LOOKS = 8  # at what waits for a client that does not read, before it is dropped


class Guard:
    """ASGI middleware that lets through what may reach the routes."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._settings = settings
        self._keys = [_digest(key) for key in settings.api_keys]
        self._local_only = is_loopback(settings.host) and not self._keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on, with its id and owner in the scope's state."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["send"] = send  # for bodies of streams, which need none of what lies between
        state["request_id"] = request_id = new_id("req_")
        origin = headers.get("origin")
        started = False

        async def send_with_id(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.answered(scope["path"], message["status"])
                extra = [
                    (b"x-request-id", request_id.encode()),
                    (b"request-id", request_id.encode()),
                ]
                if origin is not None and origin in self._settings.origins:
                    extra += [(b"access-control-allow-origin", origin.encode("latin-1")),
                              (b"vary", b"origin")]  # fmt: skip
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        try:
            self._check_names(headers, origin)
            if scope["method"] == "OPTIONS" and origin in self._settings.origins:
                await _preflight(scope, receive, send_with_id)
                return
            state["owner"] = self._owner(scope["path"], headers)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            problem = as_problem(error)
            if problem.code == "internal_error":
                log.error("path=%s request=%s", scope["path"], request_id, exc_info=error)
            if started:
                raise  # nothing can be said any more: the connection ends
            api = api_of(scope["path"])
            body = error_body(problem, api, request_id)
            response = Json(body, status_for(problem, api), problem.headers)
            await response(scope, receive, send_with_id)

    def _check_names(self, headers: Headers, origin: str | None) -> None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname if _is_host(host) else None
        if self._local_only and not (name and is_loopback(name)):
            raise Problem(
                403,
                f"host {host[:100]!r} is not this machine: a server without an API key answers "
                "only to localhost",
                code="host_refused",
            )
        if origin is None or origin in self._settings.origins:
            return
        if origin != f"http://{host}" and origin != f"https://{host}":
            raise Problem(
                403,
                f"pages of {origin[:100]!r} may not call this server: allow them with --origin",
                code="origin_refused",
            )

    def _owner(self, path: str, headers: Headers) -> str:
        """Whose request it is: the digest of its key. Raises Problem without a valid key."""
        if not self._keys:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given)
        # All keys are compared, and digests of equal length: the time tells nothing about any.
        valid = [hmac.compare_digest(digest, key) for key in self._keys]
        if any(valid):
            return digest.hex()
        if path in _OPEN_PATHS or path.startswith(_PAGE):
            return ""
        said = "is not valid" if given else "is missing"
        raise Problem(
            401,
            f"the API key {said}: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


async def _preflight(scope: Scope, receive: Receive, send: Send) -> None:
    allowed = {
        "access-control-allow-methods": "GET, POST, DELETE",
        "access-control-allow-headers": "authorization, content-type, x-api-key, anthropic-version",
        "access-control-max-age": "600",
    }
    await Json({}, 200, allowed)(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _is_host(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname is not None
    except ValueError:
        return False


def guarded_protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """uvicorn's protocol class with this server's bounds on connections."""
    limits = settings.limits

    class GuardedProtocol(HttpToolsProtocol):
        """Bounds the number of connections, and what one may send and leave unread.

        No state of a connection lasts for ever: a head has a time, a body another one, an answer
        that is not read a third, and what lies between two requests a fourth.
        """

        _head_timer: TimerHandle | None = None
        _write_timer: TimerHandle | None = None
        _unread = 0  # bytes that waited for the client when that was last looked at
        _taken = 0  # bytes that it took since the count of looks began
        _looks = 0
        _framing = 0  # bytes of this request that are not its body
        _deaf = False  # what comes in is thrown away: the connection ends with the present answer

        def connection_made(self, transport: Any) -> None:
            self._stopping = asyncio.Event()
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            connection = transport.get_extra_info("socket")
            if connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            self.app_state = {**self.app_state, "abort": self._drop, "stopping": self._stopping}
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._head_timer is None:
                self._start_timer()
            self._framing += len(data)
            if not self._deaf:
                super().data_received(data)
            if self._framing > limits.header_bytes and not self.transport.is_closing():
                self._refuse()

        def on_message_begin(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                # Answers to requests that do not wait for one another would pile up unread.
                self._deaf = True
                self.cycle.keep_alive = False
                return
            super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            if not self._deaf:
                super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self._deaf:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            if self._deaf:
                return
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > limits.header_bytes:
                self._deaf = True  # more came with it in one piece: `data_received` refuses it
                self._framing = max(self._framing, size)
                return
            self._stop_timer()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self._deaf:
                return
            # A length stands before every chunk, and a line's end behind it.
            self._framing -= len(body) + 16
            super().on_body(body)

        def on_message_complete(self) -> None:
            if self._deaf:
                return
            self._framing = 0
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_writing()  # also what is less than the transport complains about

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_writing()

        def resume_writing(self) -> None:
            self._taken += limits.write_bytes  # the transport's buffer is nearly empty
            super().resume_writing()

        def shutdown(self) -> None:
            super().shutdown()
            self._stopping.set()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            if self._write_timer is not None:
                self._write_timer.cancel()
            super().connection_lost(exc)

        def _refuse(self) -> None:
            """Answer a request whose head, or what frames its body, is too large."""
            if self.cycle is None or self.cycle.response_complete:
                body = b"the head of the request is larger than %d bytes" % limits.header_bytes
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
                    b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n\r\n%b"
                    % (len(body), body)
                )
                self._deaf = True
                self.transport.close()
                self._watch_writing()
            else:
                self._drop()

        def _watch_writing(self) -> None:
            if self._write_timer is None:
                self._unread = self.transport.get_write_buffer_size()
                self._taken = self._looks = 0
                self._look_later()

        def _look_later(self) -> None:
            wait = limits.write_seconds / _LOOKS
            self._write_timer = self.loop.call_later(wait, self._check_writing)

        def _check_writing(self) -> None:
            """Drop a client that took too little of what waits for it, time after time."""
            self._write_timer = None
            left = self.transport.get_write_buffer_size()
            answering = self.cycle is not None and not self.cycle.response_complete
            if not left or (answering and not self.flow.write_paused):
                return
            self._looks += 1
            self._taken += max(0, self._unread - left)
            self._unread = left
            if self._looks < _LOOKS:
                self._look_later()
            elif self._taken < limits.write_bytes:
                self._drop()
            else:
                self._watch_writing()

        def _start_timer(self) -> None:
            self._head_timer = self.loop.call_later(limits.header_seconds, self._drop)

        def _drop(self) -> None:
            if self.cycle is not None:
                self.cycle.disconnected = True  # or its next write would fail with a trace
            # Without lingering, or the kernel would keep what the client does not read.
            connection = self.transport.get_extra_info("socket")
            if connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _unsupported_upgrade_warning(self) -> None:
            log.info("a client asked for another protocol: answered as HTTP")

    return GuardedProtocol
