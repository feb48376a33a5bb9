"""How commands hand out results: JSON, tables that stay whole in a pipe, and files.

Paper: none (command line).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from fathom.errors import ConfigError, MissingDependency


def print_json(value: Any) -> None:
    """Print one JSON document, indented, with characters outside ASCII as they are."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def check_writable(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written before the work whose result it is for.

    Raises typer.BadParameter, as for any other unusable value of `option`.
    """
    if path is None:
        return
    try:
        # Opened, since a look at the mode says little to root and on file systems of the kernel.
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        problem = error.strerror or str(error)
        raise typer.BadParameter(f"{option}: cannot write {path}: {problem}") from None


def check_picture(option: str, path: Path | None) -> None:
    """Refuse a picture that cannot be drawn before the work that it is to show.

    Raises typer.BadParameter for another ending, and MissingDependency without matplotlib.
    """
    from fathom.eval.plot import FORMATS

    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise typer.BadParameter(
            f"{option} is {path}: name a file that ends in {', '.join(FORMATS)}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency(
            f"{option} needs matplotlib, which is not installed. Run: pip install 'fathom[plots]'"
        )


def write_file(path: Path, content: str | bytes) -> None:
    """Write a result. Raises ConfigError where it cannot be written (a full disk, for instance)."""
    try:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print right-aligned columns under their names."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
