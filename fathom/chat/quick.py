"""Quick instructions: one token that asks the model for a small auxiliary answer.

Each reuses the conversation's KV cache instead of a second prompt, and its answer carries no think
block in any mode.

Paper: §5.1.1 (quick instruction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.chat.protocol import SPECIAL_TOKENS
from fathom.errors import ChatError


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickInstruction:
    """Where a task's token goes: on messages of `role`, behind an assistant header or not."""

    token: str
    role: str
    header: bool = False


TASKS: dict[str, QuickInstruction] = {
    "action": QuickInstruction(token=SPECIAL_TOKENS["action"], role="user", header=True),
    "query": QuickInstruction(token=SPECIAL_TOKENS["query"], role="user"),
    "authority": QuickInstruction(token=SPECIAL_TOKENS["authority"], role="user"),
    "domain": QuickInstruction(token=SPECIAL_TOKENS["domain"], role="user"),
    "read_url": QuickInstruction(token=SPECIAL_TOKENS["read_url"], role="user"),
    "title": QuickInstruction(token=SPECIAL_TOKENS["title"], role="assistant"),
}


def task_message(messages: Sequence[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """The conversation with `task` on the last message that it belongs on, and nothing behind it.

    Raises ChatError for an unknown task, or when no such message is there yet.
    """
    if task not in TASKS:
        raise ChatError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    role = TASKS[task].role
    for at in range(len(messages) - 1, -1, -1):
        if messages[at].get("role") == role:
            return [*map(dict, messages[:at]), {**messages[at], "task": task}]
    raise ChatError(f"task {task!r} needs a message of role {role}: there is none yet")


def find_task(task: str | None, role: str) -> QuickInstruction | None:
    """Return the instruction of a message, None without one.

    Raises ChatError for an unknown task or one that does not belong on `role`. A developer message
    counts as a user message.
    """
    if task is None:
        return None
    instruction = TASKS.get(task)
    if instruction is None:
        raise ChatError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    if instruction.role != ("user" if role == "developer" else role):
        raise ChatError(f"task {task!r} belongs on a message of role {instruction.role}")
    return instruction
