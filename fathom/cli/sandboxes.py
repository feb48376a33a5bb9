"""Open the sandbox that a command names.

Paper: §5.2.5 (sandbox types with one surface).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from fathom.sandbox import Sandbox
    from fathom.sandbox.types import Kept

# "container" means the best substrate for one on this machine.
CONTAINERS = ("container", "crun", "runc", "bubblewrap")
MACHINES = ("microvm", "fullvm")
KINDS = (*CONTAINERS, *MACHINES)


def check_kind(kind: str, kinds: tuple[str, ...] = CONTAINERS) -> str:
    """Return `kind` if it is one of `kinds`. Raises typer.BadParameter."""
    if kind == "fn":
        raise typer.BadParameter(
            "--sandbox fn keeps nothing between two calls, and every command here goes on from "
            f"the one before; choose {', '.join(kinds)}"
        )
    if kind not in kinds:
        raise typer.BadParameter(f"--sandbox is {kind!r}; choose {', '.join(kinds)}")
    return kind


def substrate_of(kind: str) -> str:
    """The substrate for containers that `kind` asks for."""
    return "auto" if kind in ("container", *MACHINES) else kind


def spec_of(kind: str, workdir: Path | str | None = None) -> Kept:
    """The values of a sandbox of `kind`; `workdir` is its /work. Raises typer.BadParameter."""
    from fathom.sandbox import Container, FullVM, MicroVM

    if kind not in MACHINES:
        return Container(workdir=workdir)
    if workdir is not None:
        raise typer.BadParameter("a virtual machine shares no folder, so it has no --workdir")
    return MicroVM() if kind == "microvm" else FullVM()


@asynccontextmanager
async def open_sandbox(kind: str, workdir: Path | None = None) -> AsyncGenerator[Sandbox]:
    """A sandbox of `kind` that is gone afterwards; `workdir` is its /work.

    Raises Unsupported when this machine cannot run it, SandboxError when it does not start.
    """
    from fathom.sandbox import Client

    substrate = substrate_of(kind)
    async with Client("local", substrate=substrate) as client:  # type: ignore[arg-type]
        yield await client.create(spec_of(kind, workdir))
