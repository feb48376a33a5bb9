"""A record of what clients send and what becomes of it, one JSON line per request.

It answers questions that no client can: which requests an agent really makes, what prompt each
became, what the model said to it, and when the engine was free again after a client had gone. The
lines hold whole conversations, so nothing is recorded unless asked for, and only the owner of the
file may read it. Keys are never recorded.

Paper: none (operations).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fathom.chat.tokenizer import Tokenizer
from fathom.errors import ServerError
from fathom.server.backend import (
    Backend,
    BackendInfo,
    GenerationEnd,
    GenerationRequest,
    Output,
    Prefilled,
    TokenOutput,
)

_current: ContextVar[dict[str, Any] | None] = ContextVar("request", default=None)
_TOLD = ("x-fathom-restored-reasoning", "x-fathom-notice")


class Record:
    """The file; `around` records requests, `engine` the completions that they lead to."""

    def __init__(self, path: Path) -> None:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o600)
            os.fchmod(self._file, 0o600)  # also where the file was there before
        except OSError as error:
            raise ServerError(f"cannot record to {path}: {error.strerror}") from None
        self._count = 0

    def around(self, app: ASGIApp) -> ASGIApp:
        """`app`, recorded."""

        async def recorded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            entry = self._begin(scope)
            _current.set(entry)
            try:
                await app(scope, _hearing(entry, receive), _watching(entry, send))
            finally:
                self._end(entry)

        return recorded

    def engine(self, backend: Backend) -> Backend:
        """`backend`, recorded."""
        return _RecordedBackend(backend)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _begin(self, scope: Scope) -> dict[str, Any]:
        self._count += 1
        return {
            "n": self._count,
            "began": time.time(),
            "method": scope["method"],
            "path": scope["path"],
            "body": bytearray(),
            "status": None,
            "whole": False,
            "headers": {},
            "completions": [],
        }

    def _end(self, entry: dict[str, Any]) -> None:
        raw = bytes(entry["body"])
        try:
            entry["body"] = json.loads(raw) if raw else None
        except ValueError:
            entry["body"] = raw.decode("utf-8", "replace")
        entry["ended"] = time.time()
        for completion in entry["completions"]:
            completion["output"] = "".join(completion["output"])
        os.write(self._file, json.dumps(entry).encode() + b"\n")


def _hearing(entry: dict[str, Any], receive: Receive) -> Receive:
    async def hear() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            entry["body"] += message.get("body", b"")
        return message

    return hear


def _watching(entry: dict[str, Any], send: Send) -> Send:
    async def watch(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.start":
            entry["status"] = message["status"]
            headers = {k.decode(): v.decode("latin-1") for k, v in message.get("headers", [])}
            entry["headers"] = {name: headers[name] for name in _TOLD if name in headers}
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            entry["whole"] = True

    return watch


class _RecordedBackend:
    """Passes everything on and takes notes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def info(self) -> BackendInfo:
        return self._backend.info

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._backend.tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Output, None]:
        notes: dict[str, Any] = {
            "began": time.time(),
            "prompt": list(request.prompt),
            "text": request.text,
            "cached": None,
            "output": [],
            "tokens": 0,
            "end": "left",  # unless an end comes: its client went away
        }
        entry = _current.get()
        if entry is not None:
            entry["completions"].append(notes)
        try:
            async with aclosing(self._backend.generate(request)) as outputs:
                async for output in outputs:
                    _note(notes, output)
                    yield output
        except Exception:
            notes["end"] = "failed"
            raise
        finally:
            notes["ended"] = time.time()

    async def aclose(self) -> None:
        await self._backend.aclose()


def _note(notes: dict[str, Any], output: Output) -> None:
    if isinstance(output, TokenOutput):
        notes["output"].append(output.text)
        notes["tokens"] += 1
    elif isinstance(output, Prefilled):
        notes["cached"] = output.cached_tokens
    elif isinstance(output, GenerationEnd):
        notes["end"] = output.finish_reason
