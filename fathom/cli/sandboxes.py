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

# A container is the only type of sandbox on this machine, so it means the best substrate for one.
KINDS = ("container", "crun", "runc", "bubblewrap")


def check_kind(kind: str) -> str:
    """Return `kind` if it names a substrate. Raises typer.BadParameter."""
    if kind not in KINDS:
        raise typer.BadParameter(f"--sandbox is {kind!r}; choose {', '.join(KINDS)}")
    return kind


def substrate_of(kind: str) -> str:
    """The substrate that `kind` asks for."""
    return "auto" if kind == "container" else kind


@asynccontextmanager
async def open_sandbox(kind: str, workdir: Path | None = None) -> AsyncGenerator[Sandbox]:
    """A sandbox of `kind` that is gone afterwards; `workdir` is its /work.

    Raises Unsupported when this machine cannot run it, SandboxError when it does not start.
    """
    from fathom.sandbox import Client, Container

    substrate = substrate_of(kind)
    async with Client("local", substrate=substrate) as client:  # type: ignore[arg-type]
        yield await client.create(Container(workdir=workdir))
