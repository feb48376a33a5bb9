"""Open the model that a command names: one in this process, or one behind a URL.

Paper: none (command line).
"""

from __future__ import annotations

from pathlib import Path

import typer

from fathom.agent import Model
from fathom.chat.reply import Sampling
from fathom.cli.terminal import console

SHIPPED_MODEL = "nano"
THINKING = ("off", "high", "max")


def check_thinking(thinking: str) -> str:
    """Return `thinking` if it is a mode. Raises typer.BadParameter."""
    if thinking not in THINKING:
        raise typer.BadParameter(f"--thinking is {thinking!r}; choose off, high or max")
    return thinking


def open_model(model: str | None, url: str | None, api_key: str | None = None) -> Model:
    """The model `model` of the server at `url`, or without a URL the checkpoint `model`.

    Without a name this is the first model that the server lists, or the shipped one. Raises
    AgentError for an unusable URL, and what `fathom.load` raises.
    """
    if url is not None:
        from fathom.agent import HTTPModel

        return HTTPModel(url, model=model, api_key=api_key)
    import fathom  # loads torch, which a model behind a URL does not need
    from fathom.engine.chat_model import LocalModel

    name = model or SHIPPED_MODEL
    llm = fathom.load(name)
    announce_compiling()
    return LocalModel(llm, name=name)


def announce_compiling() -> None:
    """Tell whoever watches a terminal why the first token on this machine takes so long."""
    from fathom.kernels.numba import rows
    from fathom.kernels.numba.compiled import must_compile

    out = console(stderr=True)
    if out.is_terminal and must_compile(rows.forward):
        out.print("compiling the decoder for this machine: once, some ten seconds", style="dim")


def checkpoint_path(path: Path) -> Path:
    """`path`, or the folder of the shipped model of that name where nothing else has it."""
    from fathom.engine.llm import SHIPPED

    shipped = SHIPPED / path
    if not path.exists() and len(path.parts) == 1 and (shipped / "config.json").is_file():
        return shipped
    return path


def default_sampling(model: str | None, url: str | None, wanted: Sampling) -> Sampling:
    """`wanted`, but the shipped model draws its likeliest token unless a temperature is given.

    A model this small is right more often that way; large ones are made for temperature 1.
    """
    shipped = url is None and (model or SHIPPED_MODEL) == SHIPPED_MODEL
    if wanted.temperature is None and shipped:
        return Sampling(temperature=0.0, top_p=wanted.top_p, seed=wanted.seed)
    return wanted
