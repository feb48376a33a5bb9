"""Commands that pass on the exit code of a program inside, so that their own failures need another.

Paper: none (command line).
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from fathom.cli.terminal import SANDBOX_FAILED

# Where a command leaves word for the group, which turns errors into exit codes.
OWN_FAILURES = "fathom.own_failures"


class PassingCommand(TyperCommand):
    """A command whose own failures, wrong usage among them, end with `SANDBOX_FAILED`."""

    def make_context(self, *given: Any, **more: Any) -> Any:
        """See click: parses the arguments."""
        try:
            return super().make_context(*given, **more)
        except _UsageError as error:
            error.exit_code = SANDBOX_FAILED
            raise

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """See click: runs the command."""
        ctx.meta[OWN_FAILURES] = SANDBOX_FAILED
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            error.exit_code = SANDBOX_FAILED
            raise


# Typer brings its own click and shows no more of it than this.
_UsageError: Any = typer.BadParameter.__mro__[1]
