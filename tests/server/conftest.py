"""A server in a thread, with an engine that says what a test tells it to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import fathom
from fathom.chat import Tokenizer
from fathom.server.run import running
from fathom.server.scripted import Reply, Script, ScriptedBackend
from fathom.server.sessions import Session
from fathom.server.settings import Limits, Settings

NANO = Path(fathom.__file__).parent / "assets" / "nano"
D = "\uff5cDSML\uff5c"

BASH = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}, "limit": {"type": "integer"}},
            "required": ["command"],
        },
    },
}


def call(name: str = "bash", **arguments: Any) -> str:
    """One canonical invoke."""
    parts = [
        f'<{D}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</{D}parameter>\n"
        for key, value in arguments.items()
    ]
    return f'<{D}invoke name="{name}">\n{"".join(parts)}</{D}invoke>'


def block(*calls: str) -> str:
    """One canonical block of calls."""
    return f"\n\n<{D}tool_calls>\n" + "\n".join(calls) + f"\n</{D}tool_calls>"


def events(text: str) -> list[dict[str, Any]]:
    """The objects of an event stream; each event's name must be that of its object."""
    found: list[dict[str, Any]] = []
    for chunk in text.split("\n\n"):
        lines = [line for line in chunk.split("\n") if line and not line.startswith(":")]
        data = [line[6:] for line in lines if line.startswith("data: ")]
        names = [line[7:] for line in lines if line.startswith("event: ")]
        if not data or data[0] == "[DONE]":
            continue
        item = json.loads(data[0])
        assert not names or names[0] == item["type"], chunk
        found.append(item)
    return found


class Told:
    """The script of a test server: the session script, until a test says something else."""

    def __init__(self) -> None:
        self.script: Script = Session()

    def __call__(self, prompt: str) -> Reply | str:
        return self.script(prompt)


class Server:
    """A running server, a client for it, and the engine behind it."""

    def __init__(self, url: str, backend: ScriptedBackend, told: Told, key: str | None) -> None:
        self.url = url
        self.backend = backend
        self._told = told
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.client = httpx2.Client(base_url=url, timeout=30, headers=headers, trust_env=False)

    def say(self, said: Reply | str | Callable[[str], Reply | str]) -> None:
        """Answer every request with this from now on."""
        self._told.script = said if callable(said) else lambda prompt: said

    def chat(self, content: Any = "Hello", **fields: Any) -> httpx2.Response:
        """Post to Chat Completions; `content` is a user's text or a whole list of messages."""
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return self.client.post("/v1/chat/completions", json={"messages": messages, **fields})

    def messages(self, content: Any = "Hello", **fields: Any) -> httpx2.Response:
        """Post to Messages."""
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        body = {"messages": messages, "max_tokens": 1000, **fields}
        return self.client.post("/v1/messages", json=body)

    def responses(self, content: Any = "Hello", **fields: Any) -> httpx2.Response:
        """Post to Responses."""
        return self.client.post("/v1/responses", json={"input": content, **fields})

    @property
    def prompt(self) -> str:
        """The text of the prompt that the engine saw last."""
        return self.backend.requests[-1].text


Open = Callable[..., Server]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(NANO)


@pytest.fixture(scope="module")
def open_server(tokenizer: Tokenizer) -> Iterator[Open]:
    """Starts servers; `limits` and the fields of Settings as keywords."""
    opened: list[Any] = []

    def start(
        limits: dict[str, Any] | None = None,
        key: str | None = None,
        backend: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Server:
        told = Told()
        engine = ScriptedBackend(told, tokenizer, **(backend or {}))
        keys = settings.pop("api_keys", (key,) if key else ())
        made = Settings(port=0, limits=Limits(**(limits or {})), api_keys=keys, **settings)
        context = running(engine, made)
        server = Server(context.__enter__(), engine, told, key)
        opened.append((context, server))
        return server

    yield start
    for context, server in opened:
        server.client.close()
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def shared_server(open_server: Open) -> Server:
    return open_server()


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.say(Session())
    shared_server.client.cookies.clear()
    return shared_server
