"""Which reasoning stays in the prompt.

With tools in the conversation every thought is kept across turns, so each prompt extends the last
one; without tools only the thoughts after the last user message are, because old ones no longer
help and cost context.

Paper: §5.1.1 (interleaved thinking, figure of thinking management).
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.chat.turns import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingRule:
    """Answers, for positions in a list of turns, whether reasoning is shown there."""

    enabled: bool
    keep_all: bool
    last_user: int

    def opens(self, index: int) -> bool:
        """Whether the assistant header behind turn `index` ends with the opening think token."""
        return self.enabled and (self.keep_all or index >= self.last_user)

    def shows(self, index: int) -> bool:
        """Whether the assistant turn `index` shows its reasoning."""
        return self.enabled and (self.keep_all or index > self.last_user)


def apply_thinking(
    turns: list[Turn], thinking: str, drop_thinking: bool, *, answers_only: bool = False
) -> tuple[list[Turn], ThinkingRule]:
    """Return the turns that stay and the rule for their reasoning.

    With `answers_only` dropping takes the reasoning of every finished answer, not only of those
    before the last user turn: just a continued one keeps it.
    Dropping also removes developer turns before the last user turn: they belong to the internal
    search pipeline of an answer that is already given.
    """
    enabled = thinking != "off"
    keep_all = not drop_thinking or any(turn.message.tools for turn in turns)
    if enabled and not keep_all:
        last = _last_user(turns)
        turns = [turn for at, turn in enumerate(turns) if turn.role != "developer" or at >= last]
    last = _last_user(turns)
    if answers_only:
        last = len(turns) - (2 if turns and turns[-1].message.prefix else 1)
    return turns, ThinkingRule(enabled=enabled, keep_all=keep_all, last_user=last)


def _last_user(turns: list[Turn]) -> int:
    users = (at for at, turn in enumerate(turns) if turn.role in ("user", "developer"))
    return max(users, default=-1)
