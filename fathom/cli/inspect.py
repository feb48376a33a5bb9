"""`fathom inspect`: what a checkpoint contains and whether it is whole.

Paper: none (command line).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fathom.cli.models import checkpoint_path
from fathom.cli.output import print_json
from fathom.cli.terminal import TASK_FAILED, console, visible

if TYPE_CHECKING:
    from fathom.checkpoint import CheckpointReport

SHOWN_PROBLEMS = 20


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A checkpoint folder, one safetensors file, or a shipped model."),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a checkpoint contains and whether it is whole.

    Reads headers, scales and routing tables, no weights. Exit code 0: whole; 1: damaged or
    incomplete; 2: not a checkpoint that fathom can read.
    """
    from fathom.checkpoint import inspect_checkpoint

    with console(stderr=True).status("Reading headers and scales"):
        report = inspect_checkpoint(checkpoint_path(path))
    if json:
        print_json(report.to_json())
    else:
        print_report(report, console())
    if not report.whole:
        raise typer.Exit(TASK_FAILED)


def print_report(report: CheckpointReport, out: Console) -> None:
    """Print a report as tables and plain lines."""
    state = Text("whole", "bold green") if report.whole else Text("damaged", "bold red")
    out.print(Text.assemble((visible(report.path), "bold"), "  ", state), soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(report):
        facts.add_row(Text(name, "dim"), Text(value))
    out.print(facts)
    types = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    types.add_column("dtype")
    types.add_column("bytes", justify="right")
    types.add_column("share", justify="right")
    for dtype, count in report.bytes_by_dtype.items():
        types.add_row(dtype, f"{count:,}", f"{count / max(1, report.bytes):.1%}")
    out.print(types)
    for note in report.notes:
        out.print(Text(f"note: {visible(note)}"), soft_wrap=True)
    for problem in report.problems[:SHOWN_PROBLEMS]:
        out.print(Text(f"problem: {visible(problem)}", "red"), soft_wrap=True)
    more = len(report.problems) - SHOWN_PROBLEMS
    if more > 0:
        out.print(f"... and {more:,} more problems (--json lists them)", soft_wrap=True)


def _facts(report: CheckpointReport) -> list[tuple[str, str]]:
    c = report.config
    ratios = {"0": "sliding window", "4": "CSA", "128": "HCA"}
    layers = ", ".join(f"{n} {ratios[ratio]}" for ratio, n in report.layers_by_ratio.items())
    experts = {"instruct": "FP4", "base": "FP8", "bf16": "BF16"}[report.kind]
    matrices = "FP8" if c["quantized"] else "BF16"
    return [
        ("variant", f"{report.kind} ({matrices} matrices, {experts} experts), {report.form} names"),
        ("tensors", f"{report.tensors:,} in {report.files:,} files, {report.bytes:,} bytes"),
        ("parameters", f"{report.parameters:,}"),
        ("layers", f"{c['num_hidden_layers']}: {layers}"),
        ("MTP blocks", f"{c['num_nextn_predict_layers']}"),
        ("width", f"{c['hidden_size']}, {c['num_attention_heads']} heads of {c['head_dim']}"),
        (
            "experts",
            f"{c['n_routed_experts']} of {c['moe_intermediate_size']}, "
            f"{c['num_experts_per_tok']} per token, {c['num_hash_layers']} hash-routed layers",
        ),
        ("context", f"{c['max_position_embeddings']:,} tokens, vocabulary {c['vocab_size']:,}"),
    ]
