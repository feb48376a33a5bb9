"""Training episodes: a fresh world, fresh tools, a worded task and the oracle's conversation.

Paper: §5.2 (agentic training data).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fathom.errors import TrainError
from fathom.eval.tasks import BUILDERS, FAMILIES
from fathom.eval.tasks.draw import Draw
from fathom.eval.tasks.task import Scenario, Task

from . import auxiliary
from .oracle import SCRIPTS, Play
from .prompt import wording
from .shell import Shell
from .toolsets import ToolNames, draw_tools, system_prompt
from .wide import WideDraw

SHARES = {
    "read": 0.24,
    "count": 0.22,
    "write": 0.23,
    "arithmetic": 0.10,
    "direct": 0.12,
    "report": 0.09,
}
# Builders whose tasks look at all files: another task's files would change the outcome.
_ALONE = frozenset(
    "setting_anywhere fact_anywhere topic which_file extension all_files size list note".split()
)
_SEVERAL = 0.4  # share of conversations with more than one task: they repay the long prompt


@dataclass(slots=True)
class Episode:
    """One finished conversation.

    `files` is the folder before it, `final_files` after it, `names` the words of its two tools.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking: str
    family: str
    kind: str
    files: dict[str, str] = field(default_factory=dict)
    final_files: dict[str, str] = field(default_factory=dict)
    names: ToolNames | None = None

    def to_tokens(self, tokenizer: Any) -> tuple[list[int], list[float]]:
        """The conversation's token ids, and the loss weight of each; see `tokens.py`."""
        from .tokens import episode_tokens

        return episode_tokens(self, tokenizer)


_WEIGHTED = {
    family: [(make, weight) for make, weight in BUILDERS[family].values()] for family in FAMILIES
}
_COMPANIONS = {
    family: [pair for name, pair in BUILDERS[family].items() if name not in _ALONE]
    for family in FAMILIES
}
_FAMILIES = list(SHARES.items())


def _choose(d: Draw, weighted: list[tuple[Any, float]]) -> Any:
    roll = d.rng.random() * sum(weight for _, weight in weighted)
    for item, weight in weighted:
        roll -= weight
        if roll < 0:
            return item
    return weighted[-1][0]


def _scenario(d: Draw, weighted: dict[str, list[tuple[Any, float]]] = _WEIGHTED) -> Scenario:
    family = _choose(d, _FAMILIES)
    return _choose(d, weighted[family])(d, {})


def training_task(seed: int | str) -> Task:
    """One task of the training distribution with its wording. Equal seeds give equal tasks."""
    d = Draw(seed, evaluation=False)
    scenario = _scenario(d)
    prompt, _ = wording(d, scenario)
    return Task(
        f"train-{seed}",
        scenario.family,
        prompt,
        dict(scenario.files),
        scenario.check,
        scenario.kind,
        scenario.answer,
    )


def tool_episode(d: Draw) -> Episode:
    """A conversation of one to four tasks in one folder.

    Raises TrainError when an oracle's outcome fails the task's own checker: that is a defect.
    """
    if d.chance(_SEVERAL):
        scenarios = [_scenario(d, _COMPANIONS) for _ in range(d.pick((2, 2, 3, 3, 4)))]
    else:
        scenarios = [_scenario(d)]
    files: dict[str, str] = {}
    for scenario in scenarios:
        files.update(scenario.files)
    tools = draw_tools(d)
    thinks = d.chance(0.8)
    shell = Shell(files)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system_prompt(d)}]
    play = Play(messages, tools, shell, thinks)
    for scenario in scenarios:
        scenario.files = dict(shell.files)
        prompt, play.bare = wording(d, scenario)
        messages.append({"role": "user", "content": prompt})
        SCRIPTS[scenario.kind](play, scenario)
        answer = messages[-1]["content"]
        if not scenario.check(answer, shell.files):
            raise TrainError(
                f"the oracle of {scenario.kind} answered {answer!r} for {prompt!r}, which its "
                "own checker refuses; correct the script or the checker"
            )
    first = scenarios[0]
    return Episode(
        messages,
        tools.schemas,
        "high" if thinks else "off",
        first.family,
        "+".join(scenario.kind for scenario in scenarios),
        files,
        shell.files,
        tools,
    )


def chat_episode(d: Draw) -> Episode:
    """A short conversation that needs no tool: small talk, or a direct task without any tools."""
    thinking = "high" if d.chance(0.6) else "off"
    talk = d.chance(0.5)
    tools = draw_tools(d) if d.chance(0.5) else None
    messages: list[dict[str, Any]] = []
    if tools or d.chance(0.4):
        messages.append({"role": "system", "content": system_prompt(d)})
    if talk:
        question, answer = auxiliary.small_talk(d)
        messages.append({"role": "user", "content": question})
        reply: dict[str, Any] = {"role": "assistant", "content": answer}
        if thinking == "high":
            reply["reasoning_content"] = "This is no task. No tool is needed."
        messages.append(reply)
        kind = "small_talk"
    else:
        scenario = _choose(d, _WEIGHTED["direct"])(d, {})
        names = tools or draw_tools(d)
        play = Play(messages, names, Shell({}), thinking == "high")
        prompt, play.bare = wording(d, scenario)
        messages.append({"role": "user", "content": prompt})
        SCRIPTS[scenario.kind](play, scenario)
        kind = scenario.kind
    return Episode(messages, tools.schemas if tools else None, thinking, "chat", kind)


def episode(seed: int | str, stage: float = 0.5, texts: Sequence[str] = ()) -> Episode:
    """The episode of a seed; early in training (`stage` near 0) more of them are plain recall.

    `stage` from 0 to 1; `texts` are what made-up names are built of (`wide.letter_texts`). Equal
    arguments give equal episodes.
    """
    d = WideDraw(seed, texts)
    if d.chance(0.25 - 0.2 * stage):
        return Episode(auxiliary.conversation(d), None, "off", "auxiliary", "recall")
    if d.chance(0.05):
        return chat_episode(d)
    return tool_episode(d)
