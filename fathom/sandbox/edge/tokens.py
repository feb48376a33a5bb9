"""Tokens of clients that come over TLS: random text that is shown once and kept as a digest alone.

A token has 256 random bits, so its SHA-256 says nothing about it and no slower digest is needed.

Paper: none (access control).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from fathom.errors import PolicyDenied, SandboxError

Scope = Literal["use", "look"]
SCOPES: tuple[Scope, ...] = ("use", "look")
_PREFIX = "fathom_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REFUSED = "the token is not known, has expired or was revoked: ask for another one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token. `scope`: "use" for everything, "look" for lists, figures and logs.

    `created`, `expires`, `revoked`: times of the wall clock in seconds, None for never.
    """

    name: str
    digest: str
    scope: Scope
    created: float
    expires: float | None = None
    revoked: float | None = None

    def is_good(self, now: float) -> bool:
        """Whether it opens anything now."""
        return self.revoked is None and (self.expires is None or now < self.expires)


def digest_of(token: str) -> str:
    """Return what is kept of a token."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()


class Tokens:
    """The tokens of one daemon, in a file that only its user can read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._known: list[Token] = []
        self._lock = threading.Lock()

    def new(self, name: str, *, scope: Scope = "use", days: float | None = None) -> str:
        """Make a token and return it; it can never be shown again. Raises SandboxError."""
        if not _NAME.fullmatch(name):
            raise SandboxError(f"{name!r} cannot name a token: use letters, digits and . _ -")
        if scope not in SCOPES:
            raise SandboxError(f"scope is {scope!r}: choose {' or '.join(SCOPES)}")
        if days is not None and not 0 < days < 1e5:
            raise SandboxError(f"days is {days:g}: give a number above 0")
        text = _PREFIX + secrets.token_urlsafe(32)
        now = time.time()
        expires = None if days is None else now + days * 86400
        made = Token(name=name, digest=digest_of(text), scope=scope, created=now, expires=expires)
        with self._changing() as tokens:
            if any(token.name == name and token.is_good(now) for token in tokens):
                raise SandboxError(f"there is a token {name!r} already: revoke it first")
            tokens[:] = [token for token in tokens if token.name != name]
            tokens.append(made)
        return text

    def revoke(self, name: str) -> None:
        """Have a token open nothing from now on. Raises SandboxError."""
        with self._changing() as tokens:
            found = [at for at, token in enumerate(tokens) if token.name == name]
            if not found:
                raise SandboxError(f"there is no token {name!r}: see `fathom sandbox token ls`")
            for at in found:
                tokens[at] = replace(tokens[at], revoked=tokens[at].revoked or time.time())

    def list(self) -> list[Token]:
        """Return all of them, what they are good for or not. Raises SandboxError."""
        try:
            with self.path.open("rb") as file:
                return self._read(file.fileno(), file.read())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SandboxError(f"the tokens cannot be read: {error}") from error

    def find(self, digest: str) -> Token:
        """Return the token of this digest, where it is good now. Raises PolicyDenied.

        The file is read again when it changes, so what was revoked is refused at once.
        """
        with self._lock:
            try:
                found = self.path.stat()
                seen = found.st_ino, found.st_mtime_ns, found.st_size
            except OSError:
                seen = None
            if seen is None or seen != self._seen:
                self._known = self.list()
                self._seen = seen
            known = list(self._known)
        good: Token | None = None
        for token in known:  # all of them, so that time tells nothing
            if hmac.compare_digest(token.digest, digest):
                good = token
        if good is None or not good.is_good(time.time()):
            raise PolicyDenied(_REFUSED)
        return good

    def _read(self, fd: int, data: bytes) -> list[Token]:
        mode = os.fstat(fd)
        if mode.st_uid != os.geteuid() or stat.S_IMODE(mode.st_mode) & 0o077:
            raise SandboxError(
                f"others may read or write {self.path}: make it this user's, with mode 600"
            )
        try:
            return [Token(**values) for values in json.loads(data)["tokens"]]
        except (ValueError, TypeError, KeyError) as error:
            raise SandboxError(f"{self.path} is damaged ({error}): mend or remove it") from error

    @contextlib.contextmanager
    def _changing(self) -> Generator[list[Token]]:
        """Give the tokens to be changed; they are written whole or not at all."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(
                self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                tokens = self.list()
                yield tokens
                fresh = self.path.with_suffix(".new")
                fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "w") as file:
                    json.dump({"tokens": [asdict(token) for token in tokens]}, file)
                    file.flush()
                    os.fsync(fd)
                fresh.rename(self.path)
            finally:
                os.close(lock)
        except OSError as error:
            raise SandboxError(f"the tokens cannot be kept in {self.path}: {error}") from error
