"""What a client of the proxy asks for, read with suspicion, and what is asked in its name.

Whoever reads a request next must see the same one: what two readers could take for two different
requests is refused rather than repaired (RFC 9112, sections 2 to 5).

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_HOST = r"(?P<host>[A-Za-z0-9_.-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])"
_AUTHORITY = re.compile(_HOST + r":(?P<port>[0-9]{1,5})")
_ABSOLUTE = re.compile(
    r"http://(?:[^/?#@]*@)?" + _HOST + r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#.*)?",
    re.IGNORECASE,
)
_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
# A line that begins with a blank would continue the one before it, which may be ours.
_FIELD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*")
_WORDS = {
    "400 Bad Request": "the request cannot be understood",
    "403 Forbidden": "not allowed by this sandbox's network policy",
    "408 Request Timeout": "the request did not come in time",
    "431 Request Header Fields Too Large": "the head of the request is above 64 KiB",
    "502 Bad Gateway": "the name was not found, may not be reached, or does not answer",
    "504 Gateway Timeout": "the name was not found in time: look up fewer at once",
}
# Of this connection alone, or said anew; with them goes what a Connection line names.
_DROPPED = frozenset(
    "host connection proxy-connection proxy-authorization keep-alive te trailer upgrade "
    "content-length transfer-encoding".split()
)


class Refused(Exception):
    """A request that is not carried out; `status` is its HTTP answer."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status

    def answer(self) -> bytes:
        """Return the whole answer."""
        body = f"{self.status}: {_WORDS.get(self.status, 'refused')}\n"
        return (
            f"HTTP/1.1 {self.status}\r\nContent-Length: {len(body)}\r\n"
            f"Connection: close\r\n\r\n{body}"
        ).encode()


@dataclass(frozen=True, slots=True)
class Head:
    """The first line and the other lines of a request, each `name: value`."""

    method: str
    target: str
    version: str
    headers: list[str]

    def values(self, name: str) -> list[str]:
        """Return the values of every line of this name, written in small letters."""
        split = (line.partition(":") for line in self.headers)
        return [value.strip(" \t") for key, _, value in split if key.lower() == name]


@dataclass(frozen=True, slots=True)
class Framing:
    """How the end of a body is found: after `length` bytes or by its chunks; else there is none."""

    length: int | None = None
    chunked: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes: `host` as it is judged, `named` as the Host line has it."""

    host: str
    port: int
    named: str = ""
    path: str = ""


def read_head(data: bytes) -> Head:
    """Read a head, its last empty line included. Raises Refused."""
    first, *headers = data.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    method, _, rest = first.partition(" ")
    target, _, version = rest.rpartition(" ")
    # A line that hides a second one would be a second request to whoever reads it next.
    if not all(_FIELD.fullmatch(line) for line in headers):
        raise Refused("400 Bad Request")
    if any(c <= " " or c == "\x7f" for c in target) or not _METHOD.fullmatch(method):
        raise Refused("400 Bad Request")
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise Refused("400 Bad Request")
    return Head(method, target, version, headers)


def framing(head: Head) -> Framing:
    """Return how the body of a request ends. Raises Refused where two answers are possible."""
    lengths, codings = head.values("content-length"), head.values("transfer-encoding")
    if codings:
        known = [coding.lower() for coding in codings] == ["chunked"]
        if lengths or not known or head.version != "HTTP/1.1":
            raise Refused("400 Bad Request")
        return Framing(chunked=True)
    if not lengths:
        return Framing()
    if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
        raise Refused("400 Bad Request")
    return Framing(length=int(lengths[0]))


def _number(text: str) -> int:
    port = int(text)
    if not 0 < port < 1 << 16:
        raise Refused("400 Bad Request")
    return port


def tunnel(target: str) -> Target:
    """Read the target of a CONNECT. Raises Refused."""
    found = _AUTHORITY.fullmatch(target)
    if found is None:
        raise Refused("400 Bad Request")
    return Target(found["host"].strip("[]"), _number(found["port"]))


def forward(target: str) -> Target:
    """Read the target of any other request. A user's name in it is left out. Raises Refused."""
    found = _ABSOLUTE.fullmatch(target)
    if found is None:
        raise Refused("400 Bad Request")
    port = _number(found["port"] or "80")
    named = found["host"] if port == 80 else f"{found['host']}:{port}"
    path = (found["path"] or "/") + (found["query"] or "")
    return Target(found["host"].strip("[]"), port, named, path)


def ask(head: Head, path: str, named: str, body: Framing) -> bytes:
    """Return the head for the other side: one request per connection."""
    of_connection = {
        word.strip(" \t").lower()
        for value in head.values("connection")
        for word in value.split(",")
    }
    dropped = _DROPPED | of_connection
    kept = [line for line in head.headers if line.partition(":")[0].lower() not in dropped]
    lines = [f"{head.method} {path} HTTP/1.1", f"Host: {named}", *kept]
    if body.chunked:
        lines.append("Transfer-Encoding: chunked")
    elif body.length is not None:
        lines.append(f"Content-Length: {body.length}")
    lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
