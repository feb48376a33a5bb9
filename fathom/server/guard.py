"""Who may talk to the server, and how slowly.

`Guard` stands before every route: host names, origins, keys. `GuardedProtocol` is uvicorn's HTTP
protocol with three bounds that it lacks: a number of connections, a time for the request's head,
and a way to drop a client that never reads.

A server on loopback without a key is open to every program of this machine, but must not be to web
pages in its browser. A page cannot send JSON to another origin without asking, so only JSON is
taken; it could make its own name point here, so names other than this machine's are refused.

Paper: none (security).
"""

from __future__ import annotations

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

from fathom.server.problems import Problem, api_of, as_problem, error_body, status_for
from fathom.server.render import Json, new_id
from fathom.server.settings import Settings, is_loopback

log = logging.getLogger(__name__)

_OPEN_PATHS = ("/", "/health")  # no secret, no work; the page asks for the key itself
_PAGE = "/page/"


class Guard:
    """ASGI middleware that lets through what may reach the routes."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
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
        """Counts connections, times request heads, and can drop a client that never reads."""

        _head_timer: TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self.app_state = {**self.app_state, "abort": self._drop}
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._head_timer is None:
                self._start_timer()
            super().data_received(data)

        def on_headers_complete(self) -> None:
            self._stop_timer()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            self._head_timer = self.loop.call_later(limits.header_seconds, self._drop)

        def _drop(self) -> None:
            # Without lingering, or the kernel would keep what the client does not read.
            connection = self.transport.get_extra_info("socket")
            if connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return GuardedProtocol
