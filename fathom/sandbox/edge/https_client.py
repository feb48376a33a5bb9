"""A daemon elsewhere, over TLS with a token: requests share connections, a line has one of its own.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from fathom.errors import DaemonLost, SandboxError
from fathom.sandbox.edge import LOOKING
from fathom.sandbox.edge.client import EdgeHost
from fathom.sandbox.line import Line
from fathom.sandbox.nodelink import raise_error

_CHUNK = 1 << 18
_HEAD_LIMIT = 1 << 16
_ANSWER_LIMIT = 64 << 20
_CONNECT = 20.0
# The daemon ends a connection that waits for a minute.
_KEPT = 30.0
_MOST_KEPT = 16
_REPEATABLE = LOOKING | {"attach", "oom"}
_FINGERPRINT = re.compile(r"(sha256:)?([0-9a-fA-F]{2}:?){31}[0-9a-fA-F]{2}")


class HttpsHost(EdgeHost):
    """The daemon at `url`. `ca`: a file of certificates to trust instead of the system's own.

    `fingerprint`: the SHA-256 of the one certificate to trust, as the daemon prints it.
    Raises SandboxError for values that cannot be used.
    """

    def __init__(
        self, url: str, token: str, ca: str | Path | None = None, fingerprint: str | None = None
    ) -> None:
        super().__init__()
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.path.strip("/"):
            raise SandboxError(f"{url!r} is not the address of a daemon: give https://HOST:PORT")
        if not token or not token.isascii() or not token.isprintable():
            raise SandboxError("a daemon elsewhere needs token=, see `fathom sandbox token new`")
        if fingerprint is not None and not _FINGERPRINT.fullmatch(fingerprint):
            raise SandboxError(
                "fingerprint is no SHA-256 of a certificate, as the daemon prints it"
            )
        self.url = url
        self._host, self._port = parts.hostname, parts.port or 443
        self._token = token
        self._pinned = _plain(fingerprint) if fingerprint is not None else None
        try:
            self._tls = ssl.create_default_context(cafile=str(ca) if ca is not None else None)
        except (OSError, ssl.SSLError) as error:
            raise SandboxError(f"{ca} holds no certificates: {error}") from error
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_3
        if self._pinned is not None:
            # The one certificate is compared as a whole, before anything is sent.
            self._tls.check_hostname = False
            self._tls.verify_mode = ssl.CERT_NONE
        self._kept: list[tuple[float, _Connection]] = []

    async def ask(self, op: str, values: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer, which may be an error. Raises DaemonLost."""
        kept = self._take()
        connection = kept or await self._dial()
        try:
            try:
                _, answer, stays = await connection.request(op, values, self._token)
            except DaemonLost:
                # It may have ended since the last request; what changes nothing is asked again.
                if kept is None or op not in _REPEATABLE:
                    raise
                connection.close()
                connection = await self._dial()
                _, answer, stays = await connection.request(op, values, self._token)
        except BaseException:
            connection.close()
            raise
        if stays and len(self._kept) < _MOST_KEPT:
            self._kept.append((time.monotonic(), connection))
        else:
            connection.close()
        return answer

    async def open(self, name: str) -> Line:
        """Open a line to an agent. Raises SandboxLost, DaemonLost."""
        connection = await self._dial()
        try:
            status, answer, _ = await connection.request(
                "open", {"id": name}, self._token, line=True
            )
            raise_error(answer)
            if status != 101:
                raise DaemonLost(f"{self.url} gave no line")
            return Line(connection.sock, early=connection.early)
        except BaseException:
            connection.close()
            raise

    async def oom_count(self, name: str) -> int:
        """Return how many processes of the sandbox were killed for memory so far."""
        try:
            answer = await self.ask("oom", {"id": name})
        except DaemonLost:
            return 0  # a command that has come to its end is not lost for that
        return int(answer.get("count", 0))

    def _take(self) -> _Connection | None:
        while self._kept:
            since, connection = self._kept.pop()
            if time.monotonic() - since < _KEPT and connection.is_quiet():
                return connection
            connection.close()
        return None

    async def _dial(self) -> _Connection:
        sock: socket.socket | None = None
        try:
            with anyio.fail_after(_CONNECT):
                # Threads for looking up the name; the connection itself waits on the loop.
                sock = await anyio.to_thread.run_sync(self._connect, abandon_on_cancel=True)
                tls = self._tls.wrap_socket(
                    sock, server_hostname=self._host, do_handshake_on_connect=False
                )
                sock = tls
                await _shake(tls)
            self._check(tls)
            return _Connection(tls, f"{self._host}:{self._port}")
        except TimeoutError as error:
            _close(sock)
            raise DaemonLost(f"{self.url} does not answer within {_CONNECT:g} s") from error
        except ssl.SSLCertVerificationError as error:
            _close(sock)
            raise DaemonLost(
                f"the certificate of {self.url} is not trusted ({error.verify_message}): "
                "give ca= or fingerprint="
            ) from error
        except OSError as error:
            _close(sock)
            raise DaemonLost(f"no daemon answers at {self.url}: {error}") from error
        except BaseException:
            _close(sock)
            raise

    def _connect(self) -> socket.socket:
        made = socket.create_connection((self._host, self._port), _CONNECT)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setblocking(False)
        return made

    def _check(self, tls: ssl.SSLSocket) -> None:
        if self._pinned is None:
            return
        shown = hashlib.sha256(tls.getpeercert(binary_form=True) or b"").hexdigest()
        if not hmac.compare_digest(shown, self._pinned):
            raise DaemonLost(
                f"{self.url} shows the certificate sha256:{shown}, which is not the one expected: "
                "somebody else answers there, or the daemon has another one now"
            )

    def close_at_exit(self) -> None:
        """Let go of the daemon; its sandboxes go on."""
        while self._kept:
            self._kept.pop()[1].close()


@dataclass(slots=True)
class _Connection:
    """One connection past its handshake. `early`: what came after the last answer."""

    sock: ssl.SSLSocket
    host: str
    early: bytes = field(default=b"")

    async def request(
        self, op: str, values: dict[str, Any], token: str, *, line: bool = False
    ) -> tuple[int, dict[str, Any], bool]:
        """Send one request; return status, answer and whether another may follow.

        Raises DaemonLost.
        """
        body = json.dumps(values).encode()
        head = f"POST /v1/{op} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {token}\r\n"
        head += "Upgrade: fathom-line\r\nConnection: Upgrade\r\n" if line else ""
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            await self._send(head.encode() + body)
            return await self._answer()
        except OSError as error:
            raise DaemonLost(f"the daemon at {self.host} went away: {error}") from error
        except (ValueError, LookupError, RecursionError) as error:
            raise DaemonLost(f"what answers at {self.host} is no daemon: {error}") from error

    async def _answer(self) -> tuple[int, dict[str, Any], bool]:
        data = b""
        while b"\r\n\r\n" not in data:
            if len(data) > _HEAD_LIMIT:
                raise ValueError("its answer has no end")
            data += await self._receive()
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if status == 101:
            self.early = data
            return status, {}, False
        length = int(headers["content-length"])
        if not 0 <= length <= _ANSWER_LIMIT:
            raise ValueError("its answer is too long")
        while len(data) < length:
            data += await self._receive()
        found = json.loads(data[:length])
        if not isinstance(found, dict):
            raise ValueError("its answer is no object")
        return status, cast("dict[str, Any]", found), headers.get("connection") != "close"

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except ssl.SSLWantWriteError:
                await anyio.wait_writable(self.sock)

    async def _receive(self) -> bytes:
        while True:
            try:
                data = self.sock.recv(_CHUNK)
            except ssl.SSLWantReadError:
                await anyio.wait_readable(self.sock)
                continue
            if not data:
                raise ConnectionResetError("it closed the connection")
            return data

    def is_quiet(self) -> bool:
        """Whether nothing has come, the connection's end included."""
        try:
            self.sock.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()


async def _shake(tls: ssl.SSLSocket) -> None:
    while True:
        try:
            tls.do_handshake()
            return
        except ssl.SSLWantReadError:
            await anyio.wait_readable(tls)
        except ssl.SSLWantWriteError:
            await anyio.wait_writable(tls)


def _plain(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:").replace(":", "").lower()


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()
