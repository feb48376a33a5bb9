"""`fathom bench gpu`: decode of V4-Flash layers on one GPU, against what its memory allows.

Paper: none (measurement).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fathom.cli.bench_gpu_engine import measure_engine
from fathom.cli.bench_gpu_layers import Report, measure_layers
from fathom.cli.bench_gpu_prefill import OTHER, check_other, measure_other, measure_prefill
from fathom.cli.output import check_picture, check_writable, print_json, print_table
from fathom.errors import ConfigError, FathomError
from fathom.eval.gpu_goals import goals

ROUTING = ("with", "without", "alone")
KERNELS_SHOWN = 40
OTHER_TOKENS, OTHER_CONTEXT = 8192, 4096  # of the other implementation's prompt and decoding


def gpu(
    repeat: Annotated[int, typer.Option(min=3, help="Replays of each step.")] = 50,
    kernels: Annotated[
        bool, typer.Option(help="Also list each kernel's time, and judge the goals that need it.")
    ] = False,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Measure prompts alone, with their memory.")
    ] = False,
    engine: Annotated[
        bool, typer.Option("--engine", help="Measure the engine that serves from these layers.")
    ] = False,
    routing: Annotated[
        str, typer.Option(help="Routing profiles: with, without, or alone.")
    ] = "with",
    against: Annotated[
        str | None, typer.Option(help="Also time `transformers` on this device.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw them below the device's two limits.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure one SWA, CSA and HCA layer at V4-Flash's sizes: decode steps and prompts.

    Weights are synthetic. A decode step is one CUDA graph, from streams to written streams; its
    floor is the bytes that it must read over the copy rate of the same run, a prompt's is its
    operations over the FP8 and BF16 matmul rates. Goals stand below, reached or by how much not.
    Nothing about quality can be read off these weights. What fails is said, and the rest measured.
    """
    if routing not in ROUTING:
        raise ConfigError(f"no routing {routing!r}: name one of {', '.join(ROUTING)}")
    check_picture("--plot", plot)
    check_writable("--plot", plot)
    check_writable("--out", out)
    if prefill:
        measure_prefill(max(3, repeat // 10), kernels, against, out, as_json)
        return
    if engine:
        measure_engine(repeat, out, as_json)
        return
    import torch

    from fathom.errors import MissingDependency

    if not torch.cuda.is_available():
        raise MissingDependency("bench gpu needs a CUDA device, and torch sees none here")
    check_other(against)
    report = Report(out)
    report.figures |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    measure_layers(report, repeat, kernels, routing)
    torch.cuda.empty_cache()
    failed: FathomError | None = None
    if against is not None:
        with report.part(OTHER):
            try:
                report.figures[OTHER] = measure_other(OTHER_TOKENS, OTHER_CONTEXT)
            except FathomError as error:  # what was measured is shown first
                failed = error
    if plot is not None:
        from fathom.eval.gpu_plot import plot_roofline

        plot_roofline(report.figures, plot)
    if as_json:
        print_json(report.figures)
    else:
        _print(report.figures)
    if failed is not None:
        raise failed
    if report.figures["errors"]:
        raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    copy, matmul = report["copy_bytes_per_s"] / 1e12, report["matmul_flops"] / 1e12
    rates = f"copy {copy:.2f} TB/s, BF16 {matmul:.0f} TFLOP/s"
    if report.get("fp8_flops"):
        rates += f", FP8 {report['fp8_flops'] / 1e12:.0f} TFLOP/s"
    print(f"{report['device']}, torch {report['torch']}: {rates}")
    print("V4-Flash layers, synthetic weights; milliseconds of a decode step or a prompt\n")
    other = report.get(OTHER)
    rows = []
    for r in report["steps"]:
        beside = None
        if other and (r["kind"], r["tokens"], r["context"]) == ("all", 1, other["context"]):
            beside = other.get("seconds_a_token", 0.0) * 1e3
        sequences = f"{r['tokens']} at {r['context']:,}"
        if r["keys"] != "fp4":
            sequences += f", {r['keys'].upper()} keys"
        rows.append(["decode", r["kind"], sequences, *_cells(r, beside)])
    for r in report["prompts"]:
        beside = None
        if other and (r["kind"], r["tokens"]) == ("all", other["tokens"]):
            beside = other["seconds"] * 1e3 if r["routing"] == "own router" else None
        chunks = f"{r['tokens']:,} by {r['chunk']:,}"
        rows.append(["prefill", r["kind"], chunks, *_cells(r, beside)])
    print_table(
        ["", "layers", "tokens", "routing", "median", "least", "floor", "of floor", "launches",
         OTHER, "ratio"],
        rows,
    )  # fmt: skip
    if other:
        print(
            f"\n{OTHER} {other['version']}: BF16 weights, {other.get('attention')} attention, "
            f"{other.get('experts')} experts, the same three layers, medians of "
            f"{other.get('repeats')} prompts.\nIts times are the host's, around eager calls that "
            "also embed, mask, merge and norm. Ratios are to the\ndevice's time for the layers "
            "alone; through the engine: fathom bench gpu --engine"
        )
    for context, kernels in report.get("kernels", {}).items():
        print(f"\none token at {int(context):,}: kernels by their time in a step")
        rows = [_kernel(row, report["copy_bytes_per_s"]) for row in kernels[:KERNELS_SHOWN]]
        print_table(["us", "calls", "MB", "of copy", "part", "kernel"], rows)
    print("\ngoals")
    print_table(["goal", "aim", "found", ""], [goal.cells() for goal in goals(report)])
    taken = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["seconds"].items())
    print(f"\nseconds: {taken}")
    for error in report["errors"]:
        print(f"error: {error}")


def _kernel(row: dict[str, Any], copy: float) -> list[str]:
    """A kernel's row; its share of a copy's rate where it reads something of the model."""
    size = row["num_bytes"]
    share = f"{size / row['us'] * 1e6 / copy:.0%}" if size and row["us"] else "-"
    megabytes = f"{size / 1e6:.1f}" if size else "-"
    return [f"{row['us']:.1f}", str(row["calls"]), megabytes, share, row["part"], row["kernel"]]


def _cells(r: dict[str, Any], beside: float | None) -> list[str]:
    """A row from its routing on; beside: milliseconds of the other implementation."""
    return [
        r["routing"],
        f"{r['median']:.3f}",
        f"{r['least']:.3f}",
        f"{r['floor']:.3f}" if r["floor"] is not None else "-",
        f"{r['floor'] / r['median']:.0%}" if r["floor"] is not None else "-",
        str(r["launches"]),
        f"{beside:.1f}" if beside else "-",
        f"{beside / r['median']:.1f}" if beside else "-",
    ]
