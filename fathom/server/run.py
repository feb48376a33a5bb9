"""Running the server: in this process until it is told to stop, or beside a test.

Paper: none (operations).
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from fathom.errors import ServerError
from fathom.server.app import create_app
from fathom.server.backend import Backend
from fathom.server.guard import guarded_protocol
from fathom.server.record import Record
from fathom.server.settings import Settings, check_settings


def serve(
    backend: Backend,
    settings: Settings,
    on_start: Callable[[str], None] | None = None,
    record: Path | None = None,
) -> None:
    """Serve until interrupted; `on_start` is told the address.

    Requests, prompts and replies are written to `record`. Raises ServerError for unsafe settings,
    a port in use or a record that cannot be written.
    """
    notes = Record(record) if record is not None else None
    listener = open_listener(settings)
    if on_start is not None:
        on_start(address_of(listener))
    app: ASGIApp = create_app(notes.engine(backend) if notes else backend, settings)
    try:
        make_server(notes.around(app) if notes else app, settings).run(sockets=[listener])
    finally:
        listener.close()
        if notes is not None:
            notes.close()


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
        port_taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise ServerError(
            f"cannot listen on {host}:{settings.port}: {error.strerror}; choose another "
            f"{'--port' if port_taken else '--host: an address or name of this machine'}"
        ) from None
    listener.listen(min(1024, settings.limits.connections))
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: ASGIApp, settings: Settings) -> uvicorn.Server:
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
