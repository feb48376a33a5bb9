"""`fathom chat`: talk with a model, its thoughts shown dim as they come.

Paper: §5.1.1 (reasoning efforts; thoughts of earlier turns are dropped without tools).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import typer
from anyio.from_thread import BlockingPortal, start_blocking_portal
from rich.console import Console
from rich.text import Text

from fathom.agent import Model
from fathom.chat.quick import TASKS, task_message
from fathom.chat.reply import Piece, Reply, Sampling
from fathom.cli.engine_options import Device, DiskCache
from fathom.cli.models import THINKING, check_thinking, default_sampling, open_model
from fathom.cli.terminal import console, visible
from fathom.cli.trace import COMMAND, REASONING, call_lines, speed
from fathom.errors import ChatError

HELP = (
    "/new starts again, /thinking off|high|max changes the mode, /task NAME [TEXT] asks a quick "
    f"instruction ({', '.join(TASKS)}), /exit leaves; Ctrl-C stops a reply"
)
NOT_RUN = "not run: there are no tools in this chat"


def chat(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint or preset; with --url the server's name for the model."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Any OpenAI-compatible server.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key for --url (default: FATHOM_API_KEY).")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    thinking: Annotated[str, typer.Option(help="off, high or max.")] = "high",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens in one reply.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    device: Device = None,
    disk_cache: DiskCache = None,
) -> None:
    """Talk with a model; without a terminal, each line of standard input is one message."""
    check_thinking(thinking)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    sampling = default_sampling(model, url, sampling)
    opened = open_model(model, url, api_key, disk_cache, device)
    with start_blocking_portal() as portal:
        session = Session(opened, portal, console(), system, thinking, max_tokens, sampling)
        session.talk(_lines(session.live))


def _lines(live: bool) -> Iterator[str]:
    if not live:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history and editing)
    while True:
        try:
            yield input("\n> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


class Session:
    """One conversation on a terminal, or with a pipe."""

    def __init__(
        self,
        model: Model,
        portal: BlockingPortal,
        out: Console,
        system: str | None,
        thinking: str,
        max_tokens: int | None,
        sampling: Sampling,
    ) -> None:
        self.live = out.is_terminal and sys.stdin.isatty()
        self._model, self._portal, self._out = model, portal, out
        self._thinking, self._max_tokens, self._sampling = thinking, max_tokens, sampling
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, Any]] = list(self._opening)
        self._kind = ""

    def talk(self, lines: Iterator[str]) -> None:
        """Answer line by line until there are no more."""
        if self.live:
            self._note(f"{self._model.name}, thinking {self._thinking}; {HELP}")
        for line in lines:
            if line.startswith("/"):
                if not self._command(line.split(maxsplit=2)):
                    return
            elif line.strip():
                self._turn(line)

    def _command(self, words: list[str]) -> bool:
        match words:
            case ["/exit" | "/quit"]:
                return False
            case ["/new"]:
                self._messages = list(self._opening)
                self._note("a new conversation")
            case ["/task", name, *text]:
                self._task(name, *text)
            case ["/thinking", mode] if mode in THINKING:
                self._thinking = mode
                self._note(f"thinking {mode}")
            case _:
                self._note(HELP)
        return True

    def _task(self, name: str, text: str | None = None) -> None:
        """Ask a quick instruction about the conversation, or `text` as its next message.

        Neither it nor its answer becomes part of the conversation.
        """
        more = [] if text is None else [{"role": "user", "content": text}]
        try:
            messages = task_message([*self._messages, *more], name)
        except ChatError as error:
            self._note(str(error))
            return
        reply = self._ask(messages)
        if reply is None:
            self._note("stopped")
        elif reply.finish_reason == "context":
            self._note("the conversation does not fit the model any more; /new starts again")
        else:
            self._out.print()

    def _turn(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        reply = self._ask(self._messages)
        if reply is None:
            self._note("stopped; this message is forgotten")
            self._messages.pop()
            return
        self._finish(reply)

    def _ask(self, messages: list[dict[str, Any]]) -> Reply | None:
        """The model's reply, shown while it comes; None when it was stopped."""
        self._kind = ""
        ask = partial(
            self._model.complete,
            messages,
            thinking=self._thinking,
            max_tokens=self._max_tokens,
            sampling=self._sampling,
            on_piece=self._show,
        )
        future = self._portal.start_task_soon(ask)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            self._out.print()
            return None

    def _finish(self, reply: Reply) -> None:
        self._out.print()
        if reply.finish_reason == "context":
            self._messages.pop()
            self._note("the conversation does not fit the model any more; /new starts again")
            return
        self._messages.append(reply.message.to_dict())
        for call in reply.message.tool_calls:
            for line in call_lines(call):
                self._note(line, style=COMMAND)
            self._note(NOT_RUN)
            answer = {"role": "tool", "tool_call_id": call.id, "content": NOT_RUN}
            self._messages.append(answer)  # servers refuse a call without a result
        cut = "cut off at the token limit; " if reply.finish_reason == "length" else ""
        if cut or self.live:
            self._note(f"{cut}{speed(reply)}")

    def _show(self, piece: Piece) -> None:
        # Thoughts are for people; a pipe gets the answers alone.
        if piece.kind == "notice":
            self._note(piece.text)
        elif piece.kind == "content" or (piece.kind == "reasoning" and self._out.is_terminal):
            if self._kind and self._kind != piece.kind:
                self._out.print("\n")
            self._kind = piece.kind
            style = "" if piece.kind == "content" else REASONING
            text = visible(piece.text) if self._out.is_terminal else piece.text
            self._out.print(Text(text, style=style), end="", soft_wrap=True)

    def _note(self, text: str, style: str = "dim") -> None:
        said = visible(text) if style == COMMAND else f"[{visible(text)}]"
        console(stderr=True).print(Text(said, style=style), soft_wrap=True)
