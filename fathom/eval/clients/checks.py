"""What the server's record says about a client's session.

The main loop of a client are those requests that offer the same tools as most others do; the rest
are side requests (titles, memory).

Paper: §3.6.2 (prefixes that are computed once).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fathom.chat.protocol import DSML
from fathom.chat.tokenizer import Tokenizer
from fathom.eval.clients.namespace import StepResult
from fathom.eval.clients.plans import STEPS

NAMES = ("answers", "status", "loops", "doubles", "reasoning", "append-only", "prefix", "cancel")
_SIDE_REQUESTS = 4  # per step, at most
_FREED_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A recorded request with its completion, empty where it asked for none.

    user, assistant: the ids of the tokens that open their messages.
    """

    n: int
    began: float
    ended: float
    line: str
    status: int | None
    body: Any
    restored: int
    prompt: tuple[int, ...]
    text: str
    output: str
    end: str
    freed: float
    user: int
    assistant: int

    @property
    def generates(self) -> bool:
        """Whether a completion was made for it."""
        return bool(self.prompt)

    @property
    def head(self) -> tuple[int, ...]:
        """The prompt up to the first user: system text and tools."""
        return self.prompt[: self.prompt.index(self.user)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was found: a list of failures for each name of NAMES, and numbers."""

    failures: dict[str, list[str]]
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(self.failures.values())


def read_record(path: Path, tokenizer: Tokenizer) -> list[Entry]:
    """The requests of a record, in the order in which they came."""
    opens = {name: tokenizer.token_id(name) for name in ("user", "assistant")}
    entries = [_entry(json.loads(line), opens) for line in path.read_text().splitlines()]
    own = ("GET /health", "GET /metrics")  # our own questions
    return sorted((e for e in entries if e.line not in own), key=lambda e: e.n)


def _entry(raw: dict[str, Any], opens: dict[str, int]) -> Entry:
    first = raw["completions"][0] if raw["completions"] else {}
    return Entry(
        n=raw["n"],
        began=raw["began"],
        ended=raw["ended"],
        line=f"{raw['method']} {raw['path']}",
        status=raw["status"],
        body=raw["body"],
        restored=int(raw["headers"].get("x-fathom-restored-reasoning", 0)),
        prompt=tuple(first.get("prompt", ())),
        text=first.get("text", ""),
        output=first.get("output", ""),
        end=first.get("end", ""),
        freed=first.get("ended", 0.0),
        **opens,
    )


def check(results: list[StepResult], entries: list[Entry]) -> Outcome:
    """Judge a session by what the client showed and what the server recorded."""
    main = main_loop(entries)
    failures: dict[str, list[str]] = {
        "answers": _answers(results),
        "status": [
            f"{e.line} was answered {e.status}"
            for e in entries
            if e.status != 200 and e.end != "left"  # nobody waits for that answer any more
        ]
        or ([] if entries else ["the client never called"]),
        "loops": _loops(results, entries, main),
        "doubles": _doubles(entries),
        "reasoning": [],
        "append-only": [],
        "prefix": [],
        "cancel": _cancel(results, main),
    }
    conversations = _conversations(results, main)
    for conversation in conversations:
        failures["reasoning"] += _reasoning(conversation)
        failures["append-only"] += _append_only(conversation)
    shared = _shared(conversations)
    if shared is None:
        failures["prefix"].append("there are no two conversations")
    elif shared["tokens"] < shared["of_head"]:
        failures["prefix"].append(
            f"two conversations share {shared['tokens']} tokens of the {shared['of_head']} before "
            "the first user"
        )
    stops = [r.interrupted for r in results if r.interrupted is not None]
    left = [e for e in main if e.end == "left"]
    return Outcome(
        failures=failures,
        numbers={
            "requests": dict(Counter(e.line for e in entries)),
            "main": len(main),
            "side": sum(e.generates for e in entries) - len(main),
            "longest_prompt": max((len(e.prompt) for e in main), default=0),
            "shared_prefix": shared,
            "restored_reasoning": sum(e.restored for e in entries),
            "freed_after_s": round(left[0].freed - stops[0], 3) if left and stops else None,
            "rewritten_by_client": sum(
                not _extends(a, b) and _rewritten(a, b)
                for c in conversations
                for a, b in pairwise(c)
            ),
            "thoughts_returned": sum(len(_thoughts(c)) for c in conversations),
        },
    )


def main_loop(entries: list[Entry]) -> list[Entry]:
    """The requests of the client's main loop."""
    made = [e for e in entries if e.generates]
    offered = [json.dumps(_plain(e.body.get("tools") or []), sort_keys=True) for e in made]
    counted = Counter(tools for tools in offered if tools != "[]")
    if not counted:
        return []
    main = counted.most_common(1)[0][0]
    return [e for e, tools in zip(made, offered, strict=True) if tools == main]


def _answers(results: list[StepResult]) -> list[str]:
    found: list[str] = []
    for step, result in zip(STEPS, results, strict=True):
        if step.expect not in result.output:
            found.append(f"{step.name}: shows no {step.expect!r} but {result.output[-300:]!r}")
        if not step.cancel and result.exit_code not in (0, None):
            found.append(f"{step.name}: ended with exit code {result.exit_code}")
    return found


def _within(result: StepResult, entries: list[Entry]) -> list[Entry]:
    return [e for e in entries if result.began <= e.began <= result.ended]


def _loops(results: list[StepResult], entries: list[Entry], main: list[Entry]) -> list[str]:
    found: list[str] = []
    for step, result in zip(STEPS, results, strict=True):
        made = len(_within(result, main))
        side = sum(e.generates for e in _within(result, entries)) - made
        if made != step.requests or side > _SIDE_REQUESTS:
            found.append(
                f"{step.name}: {made} requests of the main loop, not {step.requests}; {side} others"
            )
    return found


def _doubles(entries: list[Entry]) -> list[str]:
    found: list[str] = []
    seen: dict[tuple[int, ...], Entry] = {}
    for entry in entries:
        if not entry.generates:
            continue
        before = seen.setdefault(entry.prompt, entry)
        if before is not entry:
            found.append(f"request {entry.n} has the same prompt as request {before.n}")
    return found


def _conversations(results: list[StepResult], main: list[Entry]) -> list[list[Entry]]:
    found: list[list[Entry]] = []
    for step, result in zip(STEPS, results, strict=True):
        if not step.again:
            found.append([])
        found[-1] += _within(result, main)
    return found


def _thoughts(conversation: list[Entry]) -> list[tuple[int, str]]:
    """The thoughts that led to calls, each with its place in the conversation."""
    found: list[tuple[int, str]] = []
    for at, entry in enumerate(conversation):
        thought, ended, rest = entry.output.partition("</think>")
        later = at + 1 < len(conversation)
        if ended and f"<{DSML}tool_calls>" in rest and later:
            found.append((at, thought))
    return found


def _reasoning(conversation: list[Entry]) -> list[str]:
    return [
        f"the thought {thought!r} of request {conversation[at].n} is not in the prompt of request "
        f"{later.n}"
        for at, thought in _thoughts(conversation)
        for later in conversation[at + 1 :]
        if f"{thought}</think>" not in later.text
    ]


def _append_only(conversation: list[Entry]) -> list[str]:
    return [
        f"the prompt of request {b.n} goes on from {_common(a.prompt, b.prompt)} of the "
        f"{len(a.prompt)} tokens of request {a.n}: {_difference(a.text, b.text)}"
        for a, b in pairwise(conversation)
        if not _extends(a, b) and not _rewritten(a, b)
    ]


def _extends(a: Entry, b: Entry) -> bool:
    """Whether prompt `b` goes on from prompt `a`.

    A reply that was cancelled is no part of what follows, nor is the token that opened it.
    """
    kept = len(a.prompt)
    if a.end == "left":
        kept -= a.prompt[::-1].index(a.assistant) + 1
    return b.prompt[:kept] == a.prompt[:kept]


def _rewritten(a: Entry, b: Entry) -> bool:
    """Whether the client itself changed, after a cancel, what it had said before."""
    said, later = _history(a.body), _history(b.body)
    return a.end == "left" and later[: len(said)] != said


def _history(body: Any) -> list[Any]:
    return _plain(body.get("messages") or body.get("input") or [])


def _plain(value: Any) -> Any:
    """Without what may change and means nothing: cache marks, lists of a single text."""
    if isinstance(value, list):
        items = [_plain(item) for item in value]
        only = items[0] if len(items) == 1 else None
        return only["text"] if isinstance(only, dict) and only.get("type") == "text" else items
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k != "cache_control"}
    return value


def _difference(a: str, b: str) -> str:
    at = _common(a, b)
    start = max(0, at - 40)
    return f"{a[start : at + 60]!r} became {b[start : at + 60]!r}"


def _shared(conversations: list[list[Entry]]) -> dict[str, int] | None:
    if len(conversations) < 2 or not all(conversations):
        return None
    first, second = (c[0] for c in conversations[:2])
    of_head = len(first.head)
    return {"tokens": min(_common(first.prompt, second.prompt), of_head), "of_head": of_head}


def _common(a: Any, b: Any) -> int:
    pairs = zip(a, b, strict=False)
    return next((at for at, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _cancel(results: list[StepResult], main: list[Entry]) -> list[str]:
    found: list[str] = []
    for step, result in zip(STEPS, results, strict=True):
        if not step.cancel:
            continue
        if result.interrupted is None:
            found.append("the model never began to speak")
            continue
        for entry in _within(result, main):
            late = entry.freed - result.interrupted
            if entry.end != "left" or late > _FREED_SECONDS:
                found.append(f"the engine went on for {late:.1f} s, to the end {entry.end!r}")
    return found
