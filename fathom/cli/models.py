"""Open the model that a command names: one in this process, or one behind a URL.

Paper: none (command line).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fathom.agent import Model
from fathom.chat.reply import Sampling
from fathom.cli.engine_options import engine_config
from fathom.cli.terminal import console

if TYPE_CHECKING:
    from fathom.engine import LLM

SHIPPED_MODEL = "nano"
THINKING = ("off", "high", "max")


def check_thinking(thinking: str) -> str:
    """Return `thinking` if it is a mode. Raises typer.BadParameter."""
    if thinking not in THINKING:
        raise typer.BadParameter(f"--thinking is {thinking!r}; choose off, high or max")
    return thinking


def open_model(
    model: str | None,
    url: str | None,
    api_key: str | None = None,
    disk_cache: Path | None = None,
    device: str | None = None,
) -> Model:
    """The model `model` of the server at `url`, or without a URL the checkpoint `model`.

    Without a name this is the first model that the server lists, or the shipped one. disk_cache:
    folder in which its engine keeps what it computed; device: where it runs, cpu by default. Raises
    AgentError for an unusable URL, CacheError for an unusable folder, and what `fathom.load`
    raises.
    """
    if url is not None:
        check_local(url, disk_cache, device)
        from fathom.agent import HTTPModel

        return HTTPModel(url, model=model, api_key=api_key)
    from fathom.engine.chat_model import LocalModel

    name = model or SHIPPED_MODEL
    llm = load_local(name, disk_cache, device)
    return LocalModel(llm, name=name)


def load_local(name: str, disk_cache: Path | None, device: str | None) -> LLM:
    """A model on a device, cpu by default, whose engine keeps what it computed in a folder, if one
    is given.

    Raises CacheError for an unusable folder, and what `fathom.load` raises.
    """
    import fathom

    where = device or "cpu"
    llm = fathom.load(name, device=where, engine=engine_config({"disk_cache": disk_cache}))
    if disk_cache is not None:
        _ = llm.engine  # an unusable folder is told before there is anything to lose
    if where == "cpu":
        announce_compiling()
    return llm


def check_local(url: str | None, disk_cache: Path | None, device: str | None) -> None:
    """Raises typer.BadParameter for a folder or a device that no engine here would use."""
    for option, value in (("--disk-cache", disk_cache), ("--device", device)):
        if url is not None and value is not None:
            raise typer.BadParameter(
                f"{option} and --url exclude each other: that server has its own"
            )


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
