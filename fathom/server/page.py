"""The page at `/`: static files that lie beside this module, and nothing else.

Paper: none (user interface).
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

from fathom.server.render import Json

FOLDER = Path(__file__).resolve().parent / "page"
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page, or a short hint where it is not installed."""
    files = {f"/page/{path.name}": path for path in FOLDER.glob("*.*") if path.suffix in _TYPES}
    index = files.get("/page/index.html")

    async def root() -> Response:
        if index is None:
            return Json({"name": "fathom", "apis": ["/v1/chat/completions",
                                 "/v1/messages", "/v1/responses", "/v1/completions"]})  # fmt: skip
        return _file(index)

    app.add_api_route("/", root, methods=["GET", "HEAD"], include_in_schema=False)
    for address, path in files.items():
        app.add_api_route(address, _endpoint(path), methods=["GET", "HEAD"],
                          include_in_schema=False)  # fmt: skip


def _endpoint(path: Path):
    async def serve() -> Response:
        return _file(path)

    return serve


def _file(path: Path) -> Response:
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)
