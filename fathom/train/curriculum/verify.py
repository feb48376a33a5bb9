"""Proof that the simulated shell tells the truth: episodes played again in the real sandbox.

Every tool call of an episode goes through the agent's own tools, under the episode's names, into a
container. Each observation and every final file must be equal byte for byte.

Paper: §5.2.5 (sandbox), §5.3.1 (tools of code agents).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from fathom.agent.tool import BASH, EDIT, ToolSet
from fathom.chat import Tokenizer, ToolCall
from fathom.eval.agent_tasks import get_files, set_files
from fathom.sandbox import Client, Container

from .episodes import Episode, episode
from .toolsets import ToolNames
from .wide import letter_texts

TIMEOUT = 20.0


@dataclass(slots=True)
class Outcome:
    """What a verification found; `differences` describes every inequality."""

    episodes: int = 0
    calls: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def tool_set(names: ToolNames) -> ToolSet:
    """The agent's two tools under an episode's names."""
    keys = [key for key, _ in names.parameters]
    return ToolSet(
        [
            BASH.renamed(names.shell, parameters={"command": names.line}),
            EDIT.renamed(names.editor, parameters=dict(names.parameters), order=keys),
        ]
    )


async def replay(sandbox: Any, drawn: Episode, outcome: Outcome) -> None:
    """Play one episode's calls and note every difference in `outcome`."""
    if drawn.names is None:
        return
    outcome.episodes += 1
    outcome.kinds.update(drawn.kind.split("+"))
    tools = tool_set(drawn.names)
    await set_files(sandbox, drawn.files)
    observed = {m["tool_call_id"]: m["content"] for m in drawn.messages if m["role"] == "tool"}
    for message in drawn.messages:
        for call in message.get("tool_calls", ()):
            wanted = ToolCall(id=call["id"], **call["function"])
            result = await tools.run(wanted, sandbox, timeout=TIMEOUT)
            outcome.calls += 1
            if result.text != observed[call["id"]]:
                outcome.differences.append(
                    f"{drawn.kind}: {wanted.arguments}: simulated {observed[call['id']]!r}, "
                    f"real {result.text!r}"
                )
    final = await get_files(sandbox)
    if final != drawn.final_files:
        outcome.differences.append(f"{drawn.kind}: files {final!r}, not {drawn.final_files!r}")


async def verify(episodes: int, seed: int = 0, texts: Sequence[str] = ()) -> Outcome:
    """Replay this many episodes with tools in one container. Raises SandboxError."""
    outcome = Outcome()
    async with Client("local") as client:
        sandbox = await client.create(Container())
        try:
            number = 0
            while outcome.episodes < episodes:
                await replay(sandbox, episode(f"verify/{seed}/{number}", 1.0, texts), outcome)
                number += 1
        finally:
            await sandbox.stop()
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: exit code 0 if nothing differs, else 1."""
    parser = argparse.ArgumentParser(description="Replay episodes in the sandbox.")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="names over its vocabulary, as in training")
    options = parser.parse_args(argv)
    texts = letter_texts(Tokenizer.load(options.tokenizer)) if options.tokenizer else ()
    outcome = anyio.run(verify, options.episodes, options.seed, texts)
    for line in outcome.differences[:20]:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(
        f"{outcome.episodes} episodes, {len(outcome.kinds)} kinds, {outcome.calls} calls, "
        f"{len(outcome.differences)} differences\n"
    )
    return 1 if outcome.differences else 0


if __name__ == "__main__":
    sys.exit(main())
