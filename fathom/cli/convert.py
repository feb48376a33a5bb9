"""`fathom convert`: rewrite a checkpoint in the official form.

Paper: none (command line).
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fathom.cli.models import checkpoint_path
from fathom.cli.terminal import console


class ExpertDtype(StrEnum):
    """How routed experts are to be stored."""

    fp4 = "fp4"
    fp8 = "fp8"
    bf16 = "bf16"


def convert(
    src: Annotated[Path, typer.Argument(help="Checkpoint in any form, or a shipped model.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write.")],
    expert_dtype: Annotated[
        ExpertDtype | None,
        typer.Option(help="fp4, fp8 (base layout) or bf16 (nothing quantised); default: as is."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is in DST.")
    ] = False,
) -> None:
    """Write a checkpoint in the official form: names, types, shards and index.

    FP4 experts become FP8 only where no value changes.
    """
    from fathom.checkpoint import convert_checkpoint, inspect_checkpoint

    with console(stderr=True).status("Converting"):
        convert_checkpoint(
            checkpoint_path(src),
            dst,
            None if expert_dtype is None else expert_dtype.value,
            overwrite=overwrite,
        )
        report = inspect_checkpoint(dst)
    print(
        f"{dst}: {report.kind}, {report.tensors:,} tensors in {report.files:,} files, "
        f"{report.bytes:,} bytes"
    )
