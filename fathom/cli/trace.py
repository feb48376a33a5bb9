"""Show a run of the agent while it happens: live on a terminal, as plain lines elsewhere.

Paper: none (command line).
"""

from __future__ import annotations

import json

from rich.console import Console
from rich.text import Text

from fathom.agent.loop import Episode
from fathom.agent.tool import arguments_of
from fathom.agent.trace import (
    CallEnded,
    CallStarted,
    Event,
    PieceArrived,
    ReplyEnded,
    RunEnded,
    RunStarted,
    StepStarted,
)
from fathom.agent.types import ToolResult
from fathom.chat import ToolCall
from fathom.chat.reply import Piece, Reply
from fathom.cli.terminal import shortened, visible

REASONING, COMMAND, OUTPUT, FAILED, NOTE = "dim italic", "bold cyan", "dim", "red", "dim"

ENDINGS = {
    "answered": "answered",
    "no_answer": "ended without an answer",
    "step_limit": "stopped at the step limit",
    "token_limit": "stopped at the token limit",
    "context_limit": "stopped because the context is full",
}


class Trace:
    """Writes the events of a run to a console, piece by piece when it is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._streaming: str | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case RunStarted():
                self._line(Text.assemble(("task  ", "bold"), visible(event.task)))
                self._line(Text(f"      {visible(event.model)}, thinking {event.thinking}", NOTE))
            case StepStarted():
                size = "" if event.prompt_tokens is None else f"  prompt {event.prompt_tokens}"
                self._line(Text())
                self._line(Text.assemble((f"step {event.step}", "bold"), (size, NOTE)))
            case PieceArrived():
                if self._live or event.piece.kind == "notice":
                    self._piece(event.piece)
            case ReplyEnded():
                self._reply(event.reply)
            case CallStarted():
                self._call(event.call)
            case CallEnded():
                self._result(event.result)
            case RunEnded():
                self._line(Text())
                style = "bold green" if event.episode.answered else "bold red"
                self._line(Text(summary(event.episode), style=style))

    def begins(self, id_: str, resumed: int | None, *, replaced: bool) -> None:
        """Name the run, and say what a resumed one has to go through first."""
        self._line(Text(f"run   {id_}", NOTE))
        if resumed is not None:
            box = ", in a fresh sandbox" if replaced else ""
            self._line(Text(f"      resumed: {resumed} recorded before{box}", NOTE))

    def _piece(self, piece: Piece) -> None:
        if piece.kind == "notice":
            self._end_stream()
            self._line(Text(f"  [{visible(piece.text)}]", style="yellow"))
        elif piece.kind in ("reasoning", "content"):
            if self._streaming != piece.kind:
                self._end_stream()
                self._console.print("  ", end="")
                self._streaming = piece.kind
            style = REASONING if piece.kind == "reasoning" else ""
            text = visible(piece.text).replace("\n", "\n  ")
            self._console.print(Text(text, style=style), end="", soft_wrap=True)

    def _end_stream(self) -> None:
        if self._streaming is not None:
            self._console.print()
            self._streaming = None

    def _reply(self, reply: Reply) -> None:
        if not self._live:
            if reply.message.reasoning:
                self._piece(Piece(kind="reasoning", text=reply.message.reasoning))
            if reply.message.content:
                self._piece(Piece(kind="content", text=str(reply.message.content)))
        self._end_stream()
        if reply.finish_reason == "length":
            self._line(Text("  [cut off: no room for more tokens]", style=FAILED))
        self._line(Text(f"  {speed(reply)}", style=NOTE))

    def _call(self, call: ToolCall) -> None:
        for line in call_lines(call):
            self._line(Text(f"  {line}", style=COMMAND))

    def _result(self, result: ToolResult) -> None:
        refused = result.failed and result.exit_code is None
        for line in shortened(result.text):
            self._line(Text(f"    {line}", style=FAILED if refused else OUTPUT))
        if result.executed:
            style = FAILED if result.failed else NOTE
            self._line(Text(f"    ({result.seconds:.2f} s)", style=style))

    def _line(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


def call_lines(call: ToolCall) -> list[str]:
    """A tool call the way a person would type it: `$ command`, or a name and its arguments."""
    arguments = arguments_of(call) or {}
    command = arguments.get("command")
    if call.name == "bash" and isinstance(command, str) and len(arguments) == 1:
        first, *rest = shortened(command)
        return [f"$ {first}", *(f"> {line}" for line in rest)]
    if call.name == "edit" and all(isinstance(arguments.get(k), str) for k in ("path", "old")):
        lines = [f"edit {visible(arguments['path'])}"]
        for sign, key in (("-", "old"), ("+", "new")):
            text = str(arguments.get(key, "")).removesuffix("\n")
            lines += [f"{sign} {line}" for line in shortened(text, lines=8)] if text else []
        return lines
    return [f"{visible(call.name)} {visible(json.dumps(arguments, ensure_ascii=False))}"]


def speed(reply: Reply) -> str:
    """How long a reply took and how fast it came."""
    tokens, seconds = reply.usage.completion_tokens, reply.timings.total
    if tokens is None:
        return f"{seconds:.1f} s"
    # The first token is the prompt's price; the others show how fast the model writes.
    writing = seconds - (reply.timings.first_piece or 0.0)
    rate = f", {(tokens - 1) / writing:.0f}/s" if tokens > 1 and writing > 0.01 else ""
    cached = f", {reply.usage.cached_tokens} cached" if reply.usage.cached_tokens else ""
    return f"{tokens} tokens in {seconds:.1f} s{rate}{cached}"


def summary(episode: Episode) -> str:
    """One line on how a run went."""
    model = sum(step.reply.timings.total for step in episode.steps)
    results = [result for _, _, result in episode.calls()]
    tools = sum(result.seconds for result in results)
    tokens = sum(step.reply.usage.completion_tokens or 0 for step in episode.steps)
    return (
        f"{ENDINGS[episode.status]}: {_count(len(episode.steps), 'step')}, "
        f"{_count(len(results), 'call')}, {_count(tokens, 'token')}, {episode.seconds:.1f} s "
        f"(model {model:.1f} s, tools {tools:.1f} s)"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
