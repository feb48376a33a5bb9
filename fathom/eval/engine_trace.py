"""A coding agent's conversation, replayed turn by turn: how much of every prompt is known already.

The conversation reads and edits fathom's own source files through tools, in the chat format of the
model. Every prompt is what a client would send: the whole conversation so far, encoded anew. The
assistant's words are fixed, and a mask makes the engine say them.

Paper: §3.5.2 (prefix reuse); §5.1.1 (tool calls).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fathom.chat.encode import encode
from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.llm import LLM
from fathom.engine.sampler import SamplingParams

_FILES = Path(__file__).parents[1]
SYSTEM = "You are a careful engineer. Read before you write, and say what you found."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": text,
            "parameters": {
                "type": "object",
                "properties": {field: {"type": "string"} for field in fields},
                "required": fields,
            },
        },
    }
    for name, text, fields in (
        ("bash", "Run a command in the sandbox and return what it prints.", ["command"]),
        ("edit", "Replace one passage of a file by another.", ["path", "old", "new"]),
    )
]


class Forced:
    """A mask that allows exactly the given tokens, one after another."""

    def __init__(self, tokens: Sequence[int], vocab: int) -> None:
        self._tokens, self._vocab, self._at = tokens, vocab, 0

    def allowed(self) -> bytes:
        """The one token that may come next."""
        bits = bytearray(-(-self._vocab // 8))
        if self._at < len(self._tokens):
            token = self._tokens[self._at]
            bits[token // 8] |= 1 << token % 8
        return bytes(bits)

    def accept(self, token: int) -> None:
        """Go on to the next."""
        self._at += 1


def conversation(turns: int, lines: int = 12) -> list[dict[str, Any]]:
    """Messages: a task, then `turns` tool calls and their results; each result is `lines` lines."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Find every place where the cache may lose an entry."},
    ]
    files = sorted((_FILES / "engine").glob("*.py"))
    for turn in range(turns):
        path = files[turn % len(files)]
        first = turn // len(files) * lines
        text = "\n".join(path.read_text().splitlines()[first : first + lines])
        command = f"sed -n {first + 1},{first + lines}p {path.name}"
        call = {
            "id": f"call_{turn}",
            "type": "function",
            "function": {"name": "bash", "arguments": f'{{"command": "{command}"}}'},
        }
        messages.append(
            {
                "role": "assistant",
                "content": f"Next I read lines {first + 1} and following of {path.name}.",
                "tool_calls": [call],
            }
        )
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
    return messages


def replay(llm: LLM, turns: int = 80) -> dict[str, Any]:
    """Serve the conversation; what was found of all prompts' tokens, and of those seen before."""
    engine = Engine(llm.model, EngineConfig())
    messages = conversation(turns)
    seen: list[int] = []
    prompts = cached = known = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _tokens(llm, messages[:i])
        answer = _tokens(llm, messages[: i + 1])[len(prompt) :]
        same = next(
            (n for n, pair in enumerate(zip(seen, prompt, strict=False)) if pair[0] != pair[1]),
            min(len(seen), len(prompt)),
        )
        request = engine.submit(
            prompt,
            SamplingParams(temperature=0.0, max_tokens=len(answer)),
            mask=Forced(answer, llm.config.vocab_size),
        )
        engine.run([request])
        if request.error is not None:
            raise request.error
        seen = request.tokens
        prompts, cached, known = (
            prompts + len(prompt),
            cached + request.cached_tokens,
            known + same,
        )
    return {
        "turns": turns,
        "prompt_tokens": prompts,
        "last_prompt": len(seen),
        "cached_tokens": cached,
        "hit_rate": cached / prompts,
        "of_tokens_seen_before": cached / known,
    }


def _tokens(llm: LLM, messages: Sequence[dict[str, Any]]) -> list[int]:
    return llm.tokenizer.encode(encode(messages, TOOLS, "off"), special=True)
