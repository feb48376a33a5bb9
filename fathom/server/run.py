"""Running the server: in this process until it is told to stop, or beside a test.

Paper: none (operations).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from fathom.errors import ServerError
from fathom.server.app import create_app
from fathom.server.backend import Backend
from fathom.server.guard import guarded_protocol
from fathom.server.settings import Settings, check_settings


def serve(
    backend: Backend, settings: Settings, on_start: Callable[[str], None] | None = None
) -> None:
    """Serve until interrupted; `on_start` is told the address.

    Raises ServerError for unsafe settings or a port in use.
    """
    listener = open_listener(settings)
    if on_start is not None:
        on_start(address_of(listener))
    try:
        make_server(create_app(backend, settings), settings).run(sockets=[listener])
    finally:
        listener.close()


@contextmanager
def running(backend: Backend, settings: Settings | None = None) -> Iterator[str]:
    """A server in a thread of this process, on a free loopback port; yields its address."""
    settings = settings or Settings(port=0)
    app = create_app(backend, settings)
    listener = open_listener(settings)
    server = make_server(app, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield address_of(listener)
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(timeout=10)
        listener.close()


def open_listener(settings: Settings) -> socket.socket:
    """The listening socket. Raises ServerError when the address cannot be had."""
    check_settings(settings)
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, settings.port))
    except OSError as error:
        listener.close()
        raise ServerError(
            f"cannot listen on {host}:{settings.port}: {error.strerror}; choose another --port"
        ) from None
    listener.listen(min(1024, settings.limits.connections))
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """uvicorn, set up with the bounds of `settings`."""
    config = uvicorn.Config(
        app,
        http=guarded_protocol(settings),
        ws="none",
        loop="auto",
        lifespan="off",
        access_log=False,  # query strings and addresses are nobody's business
        log_config=None,
        log_level=settings.log_level,
        server_header=False,
        date_header=False,
        backlog=min(1024, settings.limits.connections),
        timeout_keep_alive=int(settings.limits.idle_seconds),
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)
