"""A finished run as one object: what `fathom agent --json` writes.

Paper: none (command line).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fathom.agent.loop import Episode
from fathom.agent.recorded import Remembers
from fathom.agent.tool import arguments_of

REPORT = "report"


def report(episode: Episode, model: str, thinking: str) -> dict[str, Any]:
    """The run as plain values; every duration is in seconds."""
    replies = [step.reply for step in episode.steps]
    calls: list[dict[str, Any]] = [
        {
            "step": number,
            "name": call.name,
            "arguments": arguments_of(call) or {},
            "result": result.text,
            "executed": result.executed,
            "exit_code": result.exit_code,
            "timed_out": result.timed_out,
            "seconds": round(result.seconds, 4),
        }
        for number, call, result in episode.calls()
    ]
    per_step = [
        {
            "model": round(step.reply.timings.total, 4),
            "first_piece": _rounded(step.reply.timings.first_piece),
            "tools": round(sum(result.seconds for _, result in step.results), 4),
        }
        for step in episode.steps
    ]
    return {
        "answer": episode.answer if episode.answered else None,
        "status": episode.status,
        "task": episode.task,
        "model": model,
        "thinking": thinking,
        "steps": len(episode.steps),
        "tool_calls": calls,
        "timings": {
            "total": round(episode.seconds, 4),
            "model": round(sum(reply.timings.total for reply in replies), 4),
            "tools": round(sum(call["seconds"] for call in calls), 4),
            "per_step": per_step,
        },
        "usage": {
            "prompt_tokens": _total(reply.usage.prompt_tokens for reply in replies),
            "cached_tokens": _total(reply.usage.cached_tokens for reply in replies),
            "completion_tokens": _total(reply.usage.completion_tokens for reply in replies),
        },
    }


async def keep_report(told: Mapping[str, Any], session: Remembers) -> None:
    """Write a report into the log of its run, for whoever asks when the run has ended.

    A later loop that finds one there keeps that: the times are not the same.
    """
    if await session.recall(REPORT, bytes(32)) is None:
        await session.remember(REPORT, bytes(32), {}, {REPORT: json.dumps(told).encode()})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _total(counts: Any) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
