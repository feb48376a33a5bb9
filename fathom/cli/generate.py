"""`fathom generate`: complete one prompt, or answer one message.

Paper: none (command line).
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from fathom.chat.quick import TASKS, task_message
from fathom.chat.reply import Piece, Sampling
from fathom.cli.engine_options import Device, DiskCache
from fathom.cli.models import (
    SHIPPED_MODEL,
    check_thinking,
    default_sampling,
    load_local,
)
from fathom.cli.output import print_json
from fathom.cli.terminal import console, visible

if TYPE_CHECKING:
    from fathom.engine import LLM


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from; - reads standard input.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or shipped model.")] = SHIPPED_MODEL,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take the prompt as a user's message and answer it.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(
            help=f"Take the prompt as a user's message and ask one quick instruction: "
            f"{', '.join(TASKS)}. For a title the message is answered first."
        ),
    ] = None,
    thinking: Annotated[
        str, typer.Option(help="With --chat or --task: off, high or max.")
    ] = "high",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    device: Device = None,
    disk_cache: DiskCache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate once.

    The prompt is plain text for the model to continue, in which special tokens are recognised;
    --chat makes a conversation of it, in which they are not.
    """
    check_thinking(thinking)
    if task not in (None, *TASKS):
        raise typer.BadParameter(f"--task is {task!r}; choose one of {', '.join(TASKS)}")
    text = sys.stdin.read() if prompt == "-" else prompt
    wanted = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    sampling = default_sampling(model, None, wanted)
    llm = load_local(model, disk_cache, device)
    out = None if as_json else console()
    if task is not None:
        result = _instruct(llm, text, task, thinking, max_tokens, sampling, out)
    elif chat:
        result = _answer(llm, text, thinking, max_tokens, sampling, out)
    else:
        result = _complete(llm, text, max_tokens, sampling, out)
    if as_json:
        print_json(result)


def _complete(
    llm: LLM, text: str, max_tokens: int, sampling: Sampling, out: Console | None
) -> dict[str, Any]:
    started = time.perf_counter()
    run = llm.stream(
        text,
        max_tokens=max_tokens,
        temperature=1.0 if sampling.temperature is None else sampling.temperature,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        seed=sampling.seed,
    )
    pieces = []
    for piece in run:
        pieces.append(piece)
        if out is not None:
            _show(out, Piece(kind="content", text=piece.text))
    if out is not None:
        out.print()
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [piece.token_id for piece in pieces],
        "logprobs": [piece.logprob for piece in pieces],
        "finish_reason": run.finish_reason,
        "prompt_tokens": run.prompt_tokens,
        "seconds": round(time.perf_counter() - started, 4),
    }


def _answer(
    llm: LLM, text: str, thinking: str, max_tokens: int, sampling: Sampling, out: Console | None
) -> dict[str, Any]:
    from fathom.engine.chat_model import LocalModel

    kinds: list[str] = []

    def show(piece: Piece) -> None:
        if out is None or (piece.kind != "content" and not out.is_terminal):
            return
        if kinds and kinds[-1] != piece.kind:
            out.print("\n")
        kinds.append(piece.kind)
        _show(out, piece)

    reply = LocalModel(llm).reply(
        [{"role": "user", "content": text}],
        thinking=thinking,
        max_tokens=max_tokens,
        sampling=sampling,
        on_piece=show,
    )
    if out is not None:
        out.print()
    return {
        "content": reply.message.content,
        "reasoning": reply.message.reasoning,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.usage.prompt_tokens,
        "completion_tokens": reply.usage.completion_tokens,
        "seconds": round(reply.timings.total, 4),
    }


def _instruct(
    llm: LLM, text: str, task: str, thinking: str, max_tokens: int, sampling: Sampling,
    out: Console | None,
) -> dict[str, Any]:  # fmt: skip
    from fathom.engine.chat_model import LocalModel

    model = LocalModel(llm)
    ask = partial(model.reply, thinking=thinking, max_tokens=max_tokens, sampling=sampling)
    messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    if TASKS[task].role == "assistant":
        messages.append(ask(messages).message.to_dict())
    reply = ask(task_message(messages, task))
    if out is not None:
        _show(out, Piece(kind="content", text=str(reply.message.content)))
        out.print()
    return {
        "task": task,
        "content": reply.message.content,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.usage.prompt_tokens,
        "cached_tokens": reply.usage.cached_tokens,
        "completion_tokens": reply.usage.completion_tokens,
        "seconds": round(reply.timings.total, 4),
    }


def _show(out: Console, piece: Piece) -> None:
    text = visible(piece.text) if out.is_terminal else piece.text
    style = "" if piece.kind == "content" else "dim italic"
    out.print(Text(text, style=style), end="", soft_wrap=True)
