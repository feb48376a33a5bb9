"""`fathom bench gpu`: decode of V4-Flash layers on one GPU, against what its memory allows.

Paper: none (measurement).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fathom.cli.bench_gpu_engine import measure_engine
from fathom.cli.bench_gpu_prefill import OTHER, check_other, measure_other, measure_prefill
from fathom.cli.output import print_json, print_table

# Sequences, context, whether a sequence's result may not depend on the others.
CASES = (
    (1, 4096, True), (1, 65_536, True), (1, 900_000, True), (1, 1_048_576, True),
    (16, 4096, True), (16, 4096, False), (64, 4096, True), (64, 4096, False),
)  # fmt: skip
KERNELS_SHOWN = 20
OTHER_CONTEXT = 4096  # in which the other implementation decodes


def gpu(
    repeat: Annotated[int, typer.Option(min=3, help="Replays of each step.")] = 50,
    kernels: Annotated[bool, typer.Option(help="Also list the time of each kernel.")] = False,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Measure prompts instead of decode steps.")
    ] = False,
    engine: Annotated[
        bool, typer.Option("--engine", help="Measure the engine that serves from these layers.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="Also time `transformers` on this device.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure decode steps of one SWA, CSA and HCA layer at V4-Flash's sizes, weights synthetic.

    Each step is one CUDA graph. The floor is the bytes that a step must read over the copy rate of
    the same run; nothing about quality can be read off these weights.
    """
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
    report = _measure(torch, repeat, kernels)
    torch.cuda.empty_cache()
    if against is not None:
        report[OTHER] = measure_other(OTHER_CONTEXT)
    if out is not None:
        out.write_text(json.dumps(report, indent=1))
    if as_json:
        print_json(report)
    else:
        _print(report)


def _measure(torch: Any, repeat: int, kernels: bool) -> dict[str, Any]:
    from fathom.eval import gpu_speed
    from fathom.model import ModelConfig

    config = gpu_speed.three_layers(ModelConfig.preset("flash"))
    rate = gpu_speed.copy_rate()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_s": rate,
        "matmul_flops": gpu_speed.matmul_rate(),
        "rows": [],
    }
    layers = gpu_speed.stored_layers(config)
    with torch.inference_mode():
        for tokens, context, invariant in CASES:
            for row in gpu_speed.layer_times(
                config, layers, tokens, context, rate, repeat, invariant
            ):
                report["rows"].append(asdict(row) | {"fraction_of_floor": row.fraction})
        if kernels:
            report["kernels"] = {
                str(context): gpu_speed.profile_kernels(config, layers, 1, context)[:KERNELS_SHOWN]
                for context in (4096, 1_048_576)
            }
    return report


def _print(report: dict[str, Any]) -> None:
    copy, matmul = report["copy_bytes_per_s"] / 1e12, report["matmul_flops"] / 1e12
    rates = f"copy {copy:.2f} TB/s, BF16 {matmul:.0f} TFLOP/s"
    print(f"{report['device']}, torch {report['torch']}: {rates}")
    print("three V4-Flash layers, synthetic weights; milliseconds of one decode step\n")
    rows = [
        [
            r["kind"],
            str(r["tokens"]) + ("" if r["batch_invariant"] else " free"),
            f"{r['context']:,}",
            f"{r['median']:.3f}",
            f"{r['least']:.3f}",
            f"{r['floor']:.3f}",
            f"{r['fraction_of_floor']:.0%}",
            str(r["launches"]),
        ]
        for r in report["rows"]
    ]
    print_table(
        ["layer", "tokens", "context", "median", "least", "floor", "of floor", "launches"], rows
    )
    if OTHER in report:
        other = report[OTHER]
        own = next(r for r in report["rows"] if r["kind"] == "all")
        each = other["seconds_a_token"] * 1e3
        print(
            f"\n{OTHER} {other['version']}, BF16 weights, one token at {other['tokens']:,}: "
            f"{each:.2f} ms for three layers, {each / own['median']:.1f} times as long"
        )
    for context, kernels in report.get("kernels", {}).items():
        print(f"\none token at {int(context):,}: microseconds by kernel")
        print_table(
            ["us", "calls", "kernel"], [[f"{us:.1f}", str(n), name[:70]] for name, n, us in kernels]
        )
