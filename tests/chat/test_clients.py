"""Recorded requests of real clients: all are served, and prompts only grow as histories do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fathom.chat.protocol import ASSISTANT
from fathom.chat.requests import PromptRequest, read_chat, read_messages, read_responses
from fathom.errors import RequestError

Body = dict[str, Any]
READERS: dict[str, Callable[[Body], PromptRequest]] = {
    "/v1/chat/completions": read_chat,
    "/chat/completions": read_chat,
    "/v1/messages": read_messages,
    "/v1/responses": read_responses,
}
# The prompt of each of these ends where the client's own text begins to differ from what it sent
# before; aider and smolagents rewrite their history, which the record says.
AGENTS = ("claude-code", "codex", "opencode", "qwen-code", "mini-swe-agent")


@pytest.fixture(scope="session")
def clients(vectors: Path) -> Path:
    return vectors / "clients"


def sessions(clients: Path) -> Iterator[tuple[str, list[tuple[str, Body]]]]:
    """Each recorded session: its name, and its requests to the three APIs in order."""
    for file in sorted(clients.glob("*/*.jsonl")):
        if file.stem == "outcomes":
            continue
        found: list[tuple[str, Body]] = []
        for line in file.read_text(encoding="utf-8").split("\n"):
            record = json.loads(line) if line else {}
            path, body = record.get("path", "").split("?")[0], record.get("body")
            if record.get("method") != "POST" or path not in READERS or not isinstance(body, dict):
                continue
            if isinstance(body.get("tools"), dict):
                tools = file.parent / body["tools"]["$tools"]
                body["tools"] = json.loads(tools.read_text(encoding="utf-8"))
            found.append((path, body))
        yield f"{file.parent.name}/{file.stem}", found


def test_every_recorded_request_is_served(clients: Path) -> None:
    served = 0
    for name, requests in sessions(clients):
        for path, body in requests:
            if "thread" in body:  # only a server that keeps threads could answer it rightly
                with pytest.raises(RequestError, match="thread"):
                    READERS[path](body)
                continue
            request = READERS[path](body)
            assert request.prompt().endswith(("<think>", "</think>")) or request.prefix, name
            served += 1
    assert served > 800


def reasoning_of(body: Body) -> Iterator[str]:
    """Reasoning that the client sent back, wherever its API puts it."""
    for item in [*body.get("messages", []), *(body.get("input") or [])]:
        if not isinstance(item, dict):
            continue
        yield from [item[key] for key in ("reasoning_content", "reasoning") if item.get(key)]
        parts = item.get("content")
        for part in parts if isinstance(parts, list) else []:
            if part.get("type") in ("thinking", "reasoning_text"):
                yield part.get("thinking") or part.get("text")


def test_reasoning_that_clients_return_reaches_the_prompt(clients: Path) -> None:
    seen = 0
    for name, requests in sessions(clients):
        for path, body in requests:
            if "thread" in body or not body.get("tools"):
                continue
            request = READERS[path](body)
            if request.thinking == "off" or not request.tools:
                continue
            prompt = request.prompt()
            for reasoning in reasoning_of(body):
                assert reasoning in prompt, (name, reasoning)
                seen += 1
    assert seen > 500


def canonical(item: Any) -> Any:
    """An item of a history without what clients change and no prompt shows."""
    if isinstance(item, list):
        if len(item) == 1 and isinstance(item[0], dict):
            if item[0].keys() - {"cache_control"} == {"type", "text"}:
                return item[0]["text"]
        return [canonical(part) for part in item]
    if isinstance(item, dict):
        return {key: canonical(value) for key, value in item.items() if key != "cache_control"}
    return item


def history(body: Body) -> list[Any]:
    items = body.get("messages") or body.get("input")
    return canonical(items) if isinstance(items, list) else [items]


def frame(body: Body) -> Any:
    """What stands before the history, without the billing line."""
    system = body.get("system")
    if isinstance(system, list):
        system = [part["text"] for part in system if "billing-header" not in part["text"]]
    kept = ("tools", "instructions", "thinking", "reasoning", "output_config", "reasoning_effort")
    return [system, *(canonical(body.get(key)) for key in kept)]


def test_prompts_grow_where_histories_grow(clients: Path) -> None:
    """Anthropic's system messages in place, moving cache marks and the like included."""
    grown = dict.fromkeys(AGENTS, 0)
    for name, requests in sessions(clients):
        agent = name.split("/")[0]
        if agent not in AGENTS:
            continue
        for earlier, later in itertools.pairwise(requests):
            old, new = history(earlier[1]), history(later[1])
            if frame(earlier[1]) != frame(later[1]) or new[: len(old)] != old or new == old:
                continue
            short, long = READERS[earlier[0]](earlier[1]), READERS[later[0]](later[1])
            # A client that was cut off adds to its question without an answer in between.
            body = short.prompt().rpartition(ASSISTANT)[0]
            assert long.prompt().startswith(body), name
            if new[len(old)].get("type") == "reasoning" or new[len(old)].get("role") == "assistant":
                assert long.prompt().startswith(short.prompt()), name
                grown[agent] += 1
    assert min(grown.values()) > 1, grown


def test_the_billing_line_is_no_part_of_the_prompt(clients: Path) -> None:
    found: set[str] = set()
    for name, requests in sessions(clients):
        if not name.startswith("claude-code/"):
            continue
        for path, body in requests:
            request = READERS[path](body)
            assert "billing-header" not in request.prompt(), name
            found.update(request.metadata.get("billing", ()))
    assert len(found) > 1  # the line does change between conversations
