"""As much of HTTP/1.1 as the daemon speaks: small heads, bodies of a stated length, plain answers.

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any

from fathom.errors import DaemonLost, PolicyDenied, SandboxLost, Unsupported
from fathom.sandbox.edge import MESSAGE_LIMIT

HEAD_LIMIT = 16 << 10
_REASONS = {
    101: "Switching Protocols",
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    410: "Gone",
    413: "Content Too Large",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    503: "Service Unavailable",
}
# What errors of the sandbox's own look like to whoever knows HTTP alone.
_STATUS = {
    PolicyDenied.code: 403,
    Unsupported.code: 501,
    SandboxLost.code: 410,
    DaemonLost.code: 503,
}
_FIRST = re.compile(r"([A-Z]{1,16}) (/[!-~]{0,1000}) HTTP/1\.1")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}):[ \t]*([ -~\t]*)")
_HEADERS = (
    "Cache-Control: no-store\r\n"
    "Content-Security-Policy: default-src 'self'; frame-ancestors 'none'; base-uri 'none'\r\n"
    "X-Content-Type-Options: nosniff\r\n"
    "Referrer-Policy: no-referrer\r\n"
)


class Malformed(Exception):
    """A request that is answered with `status` and nothing else; the connection ends."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Asked:
    """The head of a request; names of headers in lower case."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def length(self) -> int:
        """How many bytes of body follow. Raises Malformed."""
        text = self.headers.get("content-length", "0")
        if "transfer-encoding" in self.headers or not (text.isascii() and text.isdigit()):
            raise Malformed(400, "a body needs its length in Content-Length")
        if len(text) > 9 or int(text) > MESSAGE_LIMIT:
            raise Malformed(413, f"a request has at most {MESSAGE_LIMIT} bytes")
        return int(text)

    @property
    def token(self) -> str:
        """The bearer token, or nothing."""
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token.strip() if kind.lower() == "bearer" else ""


async def read_head(reader: asyncio.StreamReader) -> Asked | None:
    """Read a request's head; None at the end of the connection. Raises Malformed, OSError."""
    try:
        data = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial.strip():
            raise Malformed(400, "the request ended early") from error
        return None
    except asyncio.LimitOverrunError as error:
        raise Malformed(431, f"a head has at most {HEAD_LIMIT} bytes") from error
    first, *lines = data.decode("latin-1")[:-4].split("\r\n")
    found = _FIRST.fullmatch(first)
    if found is None:
        raise Malformed(400, "this is no request of HTTP/1.1")
    asked = Asked(found[1], found[2])
    for line in lines:
        header = _HEADER.fullmatch(line)
        name = header[1].lower() if header is not None else ""
        if header is None or name in asked.headers:
            raise Malformed(400, "a header is malformed, or there twice")
        asked.headers[name] = header[2].strip()
    return asked


def answer(
    status: int, data: bytes, kind: str = "application/json", *more: str, last: bool = False
) -> bytes:
    """Return a whole answer. `more`: further header lines; `last`: the connection ends with it."""
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Type: {kind}; charset=utf-8"]
    lines += [f"Content-Length: {len(data)}", *more]
    lines += ["Connection: close"] if last else []
    return ("\r\n".join(lines) + "\r\n" + _HEADERS + "\r\n").encode() + data


def json_answer(found: dict[str, Any]) -> bytes:
    """Return an answer of the daemon's own form, an error or what was asked for."""
    code = found.get("error")
    return answer(200 if code is None else _STATUS.get(str(code), 400), json.dumps(found).encode())


def refusal(status: int, code: str, message: str, *more: str) -> bytes:
    """Return an answer after which the connection ends."""
    data = json.dumps({"error": code, "message": message}).encode()
    return answer(status, data, "application/json", *more, last=True)
