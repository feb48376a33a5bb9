"""A page that shows sandboxes, the trees of their copies, and recorded runs: `fathom sandbox page`.

It listens on this machine's loopback alone and only shows. What it shows may hold secrets, and
other users of this machine can reach the port, so every request for data must bring the key that
stands in the address after `#`, which browsers send to nobody.

Paper: none (user interface).
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fathom.errors import FathomError, SandboxError

FOLDER = Path(__file__).resolve().parent / "page"
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
_RUN = re.compile(r"/runs/([A-Za-z0-9._-]{1,100})")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# Answers as JSON: the overview, and one run by its name.
Overview = Callable[[], dict[str, Any]]
Run = Callable[[str], dict[str, Any]]


class Pages:
    """The page's server. `overview` and `run` are called from several threads.

    Raises SandboxError where the port is taken.
    """

    def __init__(self, overview: Overview, run: Run, *, port: int = 0) -> None:
        self.key = secrets.token_urlsafe(24)
        self.overview = overview
        self.run = run
        self.files = {f"/{path.name}": path for path in FOLDER.glob("*.*") if path.suffix in _TYPES}
        handler = type("Handler", (_Handler,), {"pages": self})
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError as error:
            raise SandboxError(f"port {port} cannot be listened on: {error}") from error
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        """The page's address, its key included."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/#{self.key}"

    def serve(self) -> None:
        """Answer until `close` is called from another thread."""
        self._server.serve_forever()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    pages: Pages
    server_version = "fathom"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        # A page elsewhere that has its own name lead here must not be answered.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            self._send(403, "text/plain", b"this page answers to 127.0.0.1 alone\n")
            return
        path = self.path.partition("?")[0]
        file = self.pages.files.get("/index.html" if path == "/" else path)
        if file is not None:
            self._send(200, _TYPES[file.suffix], file.read_bytes())
            return
        said = self.headers.get("Authorization", "")
        if not hmac.compare_digest(said.encode(), f"Bearer {self.pages.key}".encode()):
            self._json(401, {"error": "the key after # in the page's address is missing"})
            return
        try:
            if path == "/overview":
                self._json(200, self.pages.overview())
            elif found := _RUN.fullmatch(path):
                self._json(200, self.pages.run(found[1]))
            else:
                self._json(404, {"error": "there is nothing here"})
        except (FathomError, OSError) as error:
            self._json(400, {"error": str(error)})

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
