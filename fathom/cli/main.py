"""The `fathom` command: all commands together, logging, and errors turned into exit codes.

Exit code 0 success, 1 the task failed, 2 wrong usage or input, 3 the machine lacks something; those
that pass on a program's own code end with 125 instead. A deliberate error is one line on standard
error, or one JSON object on standard output where `--json` was asked for; `--debug` shows where it
was raised. No command imports torch before it runs.

Paper: none (command line).
"""

from __future__ import annotations

import errno
import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fathom import __version__
from fathom.cli.agent import AgentCommand, agent
from fathom.cli.bench import app as bench_app
from fathom.cli.chat import chat
from fathom.cli.convert import convert
from fathom.cli.demo import demo
from fathom.cli.doctor import doctor
from fathom.cli.efficiency import efficiency
from fathom.cli.eval import app as eval_app
from fathom.cli.generate import generate
from fathom.cli.images import app as images_app
from fathom.cli.inspect import inspect
from fathom.cli.output import print_json
from fathom.cli.passing import OWN_FAILURES
from fathom.cli.sandbox import app as sandbox_app
from fathom.cli.serve import serve
from fathom.cli.snapshots import app as snapshots_app
from fathom.cli.terminal import MACHINE_LACKS, exit_code, visible
from fathom.cli.train import train
from fathom.cli.trajectory import forget, logs, replay
from fathom.errors import FathomError

_FULL = (errno.ENOSPC, errno.EDQUOT)  # of these the kernel names no file


class _Fathom(TyperGroup):
    """The group of all commands: the one place where errors become exit codes."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        # The group consumes its arguments while it runs the command, so look before.
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except FathomError as error:
            if ctx.params.get("debug"):
                logging.getLogger(__name__).error("code=%s", error.code, exc_info=error)
            if as_json:
                print_json({"error": {"code": error.code, "message": str(error)}})
            else:
                sys.stderr.write(f"fathom: {visible(str(error))}\n")
            raise typer.Exit(ctx.meta.get(OWN_FAILURES) or exit_code(error)) from None
        except OSError as error:
            # Those that no part foresaw: a home that cannot be written, a disk that is full.
            if error.filename is None and error.errno not in _FULL:
                raise
            if ctx.params.get("debug"):
                logging.getLogger(__name__).error("code=os_error", exc_info=error)
            where = "" if error.filename is None else f"{error.filename}: "
            message = f"{where}{error.strerror} (`fathom --debug` shows what needed it)"
            if as_json:
                print_json({"error": {"code": "os_error", "message": message}})
            else:
                sys.stderr.write(f"fathom: {visible(message)}\n")
            raise typer.Exit(ctx.meta.get(OWN_FAILURES) or MACHINE_LACKS) from None


app = typer.Typer(
    name="fathom",
    cls=_Fathom,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text: quick, and the same on a terminal, in a pipe and in docs/
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fathom {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the log, and where an error was raised.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """DeepSeek-V4 in readable Python: run it, look inside, train it, give it a sandbox."""
    del version  # its callback has done the work
    # Commands say themselves what their user must know; the log is for whoever looks for a cause.
    logging.basicConfig(
        level=logging.WARNING if debug else logging.ERROR,
        format="level=%(levelname)s logger=%(name)s %(message)s",
        stream=sys.stderr,
    )
    if debug:
        logging.getLogger("fathom").setLevel(logging.DEBUG)


for _command in (
    doctor,
    demo,
    chat,
    generate,
    serve,
    inspect,
    convert,
    efficiency,
    train,
):
    app.command(_command.__name__)(_command)
app.command("agent", cls=AgentCommand)(agent)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
for _command in (logs, replay, forget):
    sandbox_app.command(_command.__name__)(_command)
sandbox_app.add_typer(images_app, name="images")
sandbox_app.add_typer(snapshots_app, name="snapshots")
app.add_typer(sandbox_app, name="sandbox")


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="fathom")
