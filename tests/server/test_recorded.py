"""Every recorded request of 24 real client configurations, posted to a running server."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server, events

Body = dict[str, Any]
PATHS = {
    "/v1/chat/completions": "chat",
    "/chat/completions": "chat",
    "/v1/messages": "messages",
    "/v1/responses": "responses",
}
# These keep their history as it was; aider and smolagents rewrite theirs, which the record says.
AGENTS = ("claude-code", "codex", "opencode", "qwen-code", "mini-swe-agent")
ENDS = ("message_stop", "response.completed", "response.incomplete")


@pytest.fixture(scope="session")
def sessions(vectors: Path) -> dict[str, list[tuple[str, str, Body | None]]]:
    """Method, path and body of each request, by session."""
    found: dict[str, list[tuple[str, str, Body | None]]] = {}
    for file in sorted((vectors / "clients").glob("*/*.jsonl")):
        if file.stem == "outcomes":
            continue
        requests = found.setdefault(f"{file.parent.name}/{file.stem}", [])
        for line in file.read_text(encoding="utf-8").split("\n"):
            if not line:
                continue
            record = json.loads(line)
            body = record.get("body")
            if isinstance(body, dict) and isinstance(body.get("tools"), dict):
                tools = file.parent / body["tools"]["$tools"]
                body["tools"] = json.loads(tools.read_text(encoding="utf-8"))
            requests.append((record["method"], record["path"], body))
    return found


def is_invalid(body: Body) -> str | None:
    """What the record's own README says cannot be honoured here."""
    if "thread" in body:
        return "thread"
    return "previous_response_id" if body.get("previous_response_id") else None


def unique(sessions: dict[str, Any]) -> Iterator[tuple[str, str, Body]]:
    """Each different body once: the sessions of a client share their first requests."""
    seen: set[str] = set()
    for name, requests in sessions.items():
        for _, path, body in requests:
            if not isinstance(body, dict):
                continue
            key = path + json.dumps(body, sort_keys=True)
            if key not in seen:
                seen.add(key)
                yield name, path, body


def test_every_recorded_request_is_answered(server: Server, sessions: dict[str, Any]):
    """200, and for streams an end that the client knows, without a broken event before it."""
    server.say("</think>ok")
    counts = dict.fromkeys(PATHS, 0)
    for name, path, body in unique(sessions):
        response = server.client.post(path, json=body)
        field = is_invalid(body)
        if field is not None:
            assert response.status_code == 400, name
            assert field in response.text
            continue
        if path.endswith("/compact"):
            assert response.status_code == 405, name  # no such thing here
            continue
        assert response.status_code == 200, (name, path, response.text[:300])
        counts[path.split("?")[0]] = counts.get(path.split("?")[0], 0) + 1
        if body.get("stream"):
            assert_ends(path, events(response.text), response.text)
    assert sum(counts.values()) > 350, counts
    assert all(counts[path] > 60 for path in ("/v1/chat/completions", "/v1/messages"))


def assert_ends(path: str, found: list[Body], text: str) -> None:
    if "completions" in path:
        assert text.endswith("data: [DONE]\n\n")
        reasons = [c["finish_reason"] for e in found for c in e["choices"] if c["finish_reason"]]
        assert reasons in (["stop"], ["length"], ["tool_calls"])
    else:
        assert found[-1]["type"] in ENDS


def test_recorded_gets_and_heads(server: Server, sessions: dict[str, Any]):
    asked = {(m, p) for requests in sessions.values() for m, p, b in requests if m != "POST"}
    assert ("HEAD", "/") in asked
    for method, path in asked:
        expected = 404 if "resp_" in path else 200
        assert server.client.request(method, path).status_code == expected, (method, path)


def test_agent_sessions_are_append_only_in_tokens(server: Server, sessions: dict[str, Any]):
    """Where a client's history grows, the token ids of each prompt continue those of the last."""
    grown = dict.fromkeys(AGENTS, 0)
    for name, requests in sessions.items():
        agent, kind = name.split("/")
        if agent not in AGENTS or not kind.startswith(("main", "cancel", "var-parallel", "ns-")):
            continue
        bodies = [(p, b) for _, p, b in requests if isinstance(b, dict) and not is_invalid(b)]
        for (path, earlier), (_, later) in itertools.pairwise(bodies):
            if not continues(earlier, later):
                continue
            old, new = render(server, path, earlier), render(server, path, later)
            assert new[: len(old)] == old, name
            grown[agent] += 1
    assert min(grown.values()) >= 1, grown


def render(server: Server, path: str, body: Body) -> list[int]:
    api = PATHS[path.split("?")[0]]
    response = server.client.post("/v1/render", json={**body, "api": api, "stream": False})
    return response.json()["token_ids"]


def continues(earlier: Body, later: Body) -> bool:
    """Whether `later` holds the history of `earlier` and goes on with the model's turn."""
    old, new = canonical(history(earlier)), canonical(history(later))
    kept = ("tools", "instructions", "thinking", "reasoning", "output_config", "reasoning_effort")
    same = all(canonical(earlier.get(k)) == canonical(later.get(k)) for k in kept)
    if not same or new[: len(old)] != old or len(new) == len(old):
        return False
    first = new[len(old)]
    return first.get("role") == "assistant" or first.get("type") in ("reasoning", "function_call")


def history(body: Body) -> list[Any]:
    items = body.get("messages") or body.get("input")
    return items if isinstance(items, list) else [items]


def canonical(item: Any) -> Any:
    """Without cache marks, and with a list of one text as that text, as no prompt shows either."""
    if isinstance(item, list):
        if len(item) == 1 and isinstance(item[0], dict):
            if item[0].keys() - {"cache_control"} == {"type", "text"}:
                return item[0]["text"]
        return [canonical(part) for part in item]
    if isinstance(item, dict):
        return {key: canonical(value) for key, value in item.items() if key != "cache_control"}
    return item


def test_reasoning_that_clients_return_reaches_the_prompt(server: Server, sessions: dict[str, Any]):
    seen = 0
    for name, path, body in unique(sessions):
        if is_invalid(body) or not body.get("tools") or path.split("?")[0] not in PATHS:
            continue
        returned = list(reasoning_of(body))
        if not returned or "main" not in name:
            continue
        api = PATHS[path.split("?")[0]]
        made = server.client.post("/v1/render", json={**body, "api": api}).json()
        if made["thinking"] == "off":
            continue
        for reasoning in returned:
            assert reasoning in made["prompt"], (name, reasoning)
            seen += 1
    assert seen > 60


def reasoning_of(body: Body) -> Iterator[str]:
    for item in history(body):
        if not isinstance(item, dict):
            continue
        yield from [item[key] for key in ("reasoning_content", "reasoning") if item.get(key)]
        parts = item.get("content")
        for part in parts if isinstance(parts, list) else []:
            if part.get("type") in ("thinking", "reasoning_text"):
                yield part.get("thinking") or part.get("text")


def test_claude_codes_system_text_and_tools_are_shared_between_conversations(
    server: Server, sessions: dict[str, Any]
):
    """Its billing line differs, so only a prompt without it can share anything."""
    first = [
        next(b for _, p, b in sessions[f"claude-code/{name}"] if b and "tools" in b and b["tools"])
        for name in ("main", "cancel")
    ]
    lines = [body["system"][0]["text"] for body in first]
    assert lines[0] != lines[1]
    one, other = (render(server, "/v1/messages", body) for body in first)
    pairs = zip(one, other, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert shared > 0.9 * min(len(one), len(other))
