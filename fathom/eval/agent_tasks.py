"""Runs the agent on tasks in a real sandbox and says how many it solved.

Decoding is greedy and every task has a container of its own, so that nothing which one leaves
running or lying about meets the next. The outcome of a task is what its checker says about the
final message and the files that are left.

Paper: §5.3.1 (evaluation of agents with tools).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.agent import Agent, Limits, Model
from fathom.agent.types import Sandbox
from fathom.chat.reply import Sampling
from fathom.errors import DaemonLost, SandboxError, SandboxLost
from fathom.eval.tasks import Task
from fathom.sandbox import Client, Container

TIMEOUT = 20.0
GREEDY = Sampling(temperature=0.0, top_p=1.0)
_UNREADABLE = "\0"
LIMITS = Limits(max_steps=8, reply_tokens=512, command_seconds=TIMEOUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One task's result; `messages` is the whole conversation."""

    task: Task
    solved: bool
    status: str
    answer: str
    steps: int
    seconds: float
    messages: tuple[dict[str, Any], ...]

    def to_json(self, transcript: bool) -> dict[str, Any]:
        """The result as plain data, with the conversation if wanted."""
        data: dict[str, Any] = {
            "name": self.task.name,
            "family": self.task.family,
            "kind": self.task.kind,
            "solved": self.solved,
            "status": self.status,
            "expected": self.task.answer,
            "answer": self.answer,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
        }
        if transcript:
            data["prompt"] = self.task.prompt
            data["files"] = self.task.files
            data["messages"] = list(self.messages)
        return data


async def set_files(sandbox: Sandbox, files: dict[str, str]) -> None:
    """Make the working folder hold exactly these files. Raises SandboxError."""
    await sandbox.exec("find /work -mindepth 1 -delete", timeout=TIMEOUT)
    for path, text in files.items():
        await sandbox.files.write(path, text.encode())


async def get_files(sandbox: Sandbox) -> dict[str, str]:
    """All files below the working folder. Raises SandboxError when the sandbox failed.

    A file that cannot be read, for its size or its name, counts as one that no task wants.
    """
    found = await sandbox.exec("find . -type f -print0", timeout=TIMEOUT)
    paths = [path.removeprefix("./") for path in found.stdout.split("\0") if path]
    return {path: await _read(sandbox, path) for path in paths}


async def _read(sandbox: Sandbox, path: str) -> str:
    try:
        return (await sandbox.files.read(path)).decode(errors="replace")
    except (SandboxLost, DaemonLost):
        raise
    except (OSError, SandboxError):
        return _UNREADABLE


async def run_task(agent: Agent, task: Task, sandbox: Sandbox) -> Outcome:
    """Let the agent work on one task. Raises FathomError if the model or the sandbox fails."""
    await set_files(sandbox, task.files)
    episode = await agent.run(task.prompt, sandbox)
    try:
        left = await get_files(sandbox)
    except (SandboxLost, DaemonLost):
        raise
    except SandboxError:
        left = {}  # the model took its folder away
    solved = episode.answered and task.check(episode.answer, left)
    return Outcome(
        task=task,
        solved=solved,
        status=episode.status,
        answer=episode.answer,
        steps=len(episode.steps),
        seconds=episode.seconds,
        messages=episode.messages,
    )


async def run_tasks(
    model: Model,
    tasks: Sequence[Task],
    *,
    thinking: str = "high",
    limits: Limits = LIMITS,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run all tasks one after the other; `on_outcome` hears of each as it ends.

    Raises FathomError if the model or the sandbox fails, never for what the model writes.
    """
    agent = Agent(model=model, thinking=thinking, sampling=GREEDY, limits=limits)
    outcomes = []
    async with Client("local") as client:
        for task in tasks:
            sandbox = await client.create(Container())
            try:
                outcome = await run_task(agent, task, sandbox)
            finally:
                await sandbox.stop()
            outcomes.append(outcome)
            on_outcome(outcome)
    return outcomes


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Scores in total, per family and per kind, and the failures with their conversations."""

    def score(chosen: list[Outcome]) -> dict[str, Any]:
        solved = sum(outcome.solved for outcome in chosen)
        return {"tasks": len(chosen), "solved": solved, "score": round(solved / len(chosen), 4)}

    def group(key: Callable[[Outcome], str]) -> dict[str, Any]:
        names = dict.fromkeys(map(key, outcomes))
        return {name: score([o for o in outcomes if key(o) == name]) for name in names}

    total = score(list(outcomes)) if outcomes else {"tasks": 0, "solved": 0, "score": 0.0}
    return {
        **total,
        "families": group(lambda outcome: outcome.task.family),
        "kinds": group(lambda outcome: f"{outcome.task.family}/{outcome.task.kind}"),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 3),
        "failures": [outcome.to_json(True) for outcome in outcomes if not outcome.solved],
    }
