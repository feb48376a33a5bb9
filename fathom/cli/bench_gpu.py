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
from fathom.eval.gpu_goals import WHOLE, goals

# What is decoded: layers, sequences, context.
STEPS = (
    ("SWA", 1, 4096), ("CSA", 1, 4096), ("HCA", 1, 4096), ("all", 1, 4096), ("all", 1, 65_536),
    ("all", 1, 900_000), ("CSA", 1, 1_048_576), ("HCA", 1, 1_048_576), ("all", 1, 1_048_576),
    (WHOLE, 1, 4096), (WHOLE, 1, 900_000), (WHOLE, 1, 1_048_576), ("all", 16, 4096),
    ("all", 64, 4096),
)  # fmt: skip
FP8_KEYS = (("CSA", 1, 4096), ("CSA", 1, 1_048_576))  # likewise, with index keys in FP8
BATCH = (64, 4096)  # sequences and context that each routing profile is measured with
PROMPT = (8192, 8192)  # tokens and tokens of a chunk, likewise
PROMPTS = ((8192, 8192), (32_768, 16_384))
KERNELS_SHOWN = 20
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

    Weights are synthetic. A decode step is one CUDA graph; its floor is the bytes that it must read
    over the copy rate of the same run, a prompt's is its operations over the BF16 matmul rate.
    Goals stand below, reached or by how much not. Nothing about quality can be read off these
    weights.
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
    report = _measure(torch, repeat, kernels, out)
    torch.cuda.empty_cache()
    failed: MissingDependency | None = None
    if against is not None:
        try:
            report[OTHER] = measure_other(OTHER_TOKENS, OTHER_CONTEXT)
        except MissingDependency as error:  # what was measured is shown first
            failed = error
        _judge(report, out)
    if plot is not None:
        from fathom.eval.gpu_plot import plot_roofline

        plot_roofline(report, plot)
    if as_json:
        print_json(report)
    else:
        _print(report)
    if failed is not None:
        raise failed


def _judge(report: dict[str, Any], out: Path | None) -> None:
    """Add the goals to a report, and write it."""
    report["goals"] = [asdict(goal) | {"verdict": goal.verdict} for goal in goals(report)]
    if out is not None:
        out.write_text(json.dumps(report, indent=1))


def _measure(torch: Any, repeat: int, kernels: bool, out: Path | None) -> dict[str, Any]:
    """The report; what there is of it is written to `out` after every part."""
    from fathom.checkpoint.synthetic import PROFILES
    from fathom.eval import gpu_speed
    from fathom.eval.gpu_goals import MILLION, SHORT, TOPK_SCORES
    from fathom.eval.gpu_prefill_speed import expert_time, prefill_time
    from fathom.model import ModelConfig

    flash = ModelConfig.preset("flash")
    config = gpu_speed.three_layers(flash)
    copy, matmul = gpu_speed.copy_rate(), gpu_speed.matmul_rate()
    torch.cuda.empty_cache()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_s": copy,
        "matmul_flops": matmul,
    }
    steps, prompts = [], []

    def keep() -> None:
        report["steps"] = [asdict(row) | {"fraction_of_floor": row.fraction} for row in steps]
        report["prompts"] = [asdict(row) | {"tokens_per_s": row.rate} for row in prompts]
        _judge(report, out)

    layers = gpu_speed.stored_layers(config)
    groups = {gpu_speed.NAMES[layer.ratio]: [layer] for layer in layers}
    groups |= {"all": layers, WHOLE: gpu_speed.whole_model(flash, layers)}
    with torch.inference_mode():
        for kind, tokens, context in STEPS:
            own = flash if kind == WHOLE else config
            steps.append(
                gpu_speed.step_time(own, groups[kind], kind, tokens, context, copy, repeat)
            )
        keep()
        for kind, tokens, context in FP8_KEYS:
            steps.append(
                gpu_speed.step_time(
                    config, groups[kind], kind, tokens, context, copy, repeat, keys="fp8"
                )
            )
        for tokens, chunk in PROMPTS:
            few = max(3, repeat // 10)
            prompts.append(prefill_time(config, layers, tokens, chunk, (matmul, copy), few))
        keep()
        for profile in PROFILES:
            routed = gpu_speed.routed_by(layers, config, profile)
            steps.append(gpu_speed.step_time(config, routed, "all", *BATCH, copy, repeat, profile))
            prompts.append(
                prefill_time(config, routed, *PROMPT, (matmul, copy), 3, routing=profile)
            )
        keep()
        report["topk_us"] = gpu_speed.topk_time(TOPK_SCORES, config.index_topk)
        _, report["expert_flops"] = expert_time(config, layers[0], PROMPT[0], uniform=True)
        if kernels:
            contexts = (SHORT, MILLION)
            report["kernels"] = {
                str(context): gpu_speed.profile_kernels(config, layers, 1, context)
                for context in contexts
            }
            report["kernel_bytes"] = {
                str(context): gpu_speed.family_bytes(config, layers, context)
                for context in contexts
            }
    keep()
    return report


def _print(report: dict[str, Any]) -> None:
    copy, matmul = report["copy_bytes_per_s"] / 1e12, report["matmul_flops"] / 1e12
    rates = f"copy {copy:.2f} TB/s, BF16 {matmul:.0f} TFLOP/s"
    print(f"{report['device']}, torch {report['torch']}: {rates}")
    print("V4-Flash layers, synthetic weights; milliseconds of a decode step or a prompt\n")
    other = report.get(OTHER)
    rows = []
    for r in report["steps"]:
        beside = None
        if other and (r["kind"], r["tokens"], r["context"]) == ("all", 1, other["context"]):
            beside = other["seconds_a_token"] * 1e3
        sequences = f"{r['tokens']} at {r['context']:,}"
        if r["keys"] != "fp4":
            sequences += f", {r['keys'].upper()} keys"
        rows.append(["decode", r["kind"], sequences, *_cells(r, beside)])
    for r in report["prompts"]:
        beside = None
        if other and (r["kind"], r["tokens"]) == ("all", other["tokens"]):
            beside = (
                other["seconds"] * 1e3 if r["routing"] == report["prompts"][0]["routing"] else None
            )
        chunks = f"{r['tokens']:,} by {r['chunk']:,}"
        rows.append(["prefill", r["kind"], chunks, *_cells(r, beside)])
    print_table(
        ["", "layers", "tokens", "routing", "median", "least", "floor", "of floor", "launches",
         OTHER, "ratio"],
        rows,
    )  # fmt: skip
    if other:
        print(f"\n{OTHER} {other['version']}: BF16 weights, eager attention, the same three layers")
    for context, kernels in report.get("kernels", {}).items():
        print(f"\none token at {int(context):,}: microseconds by kernel")
        rows = [[f"{us:.1f}", str(n), name[:70]] for name, n, us in kernels[:KERNELS_SHOWN]]
        print_table(["us", "calls", "kernel"], rows)
    print("\ngoals")
    print_table(["goal", "aim", "found", ""], [goal.cells() for goal in goals(report)])


def _cells(r: dict[str, Any], beside: float | None) -> list[str]:
    """A row from its routing on; beside: milliseconds of the other implementation."""
    return [
        r["routing"],
        f"{r['median']:.3f}",
        f"{r['least']:.3f}",
        f"{r['floor']:.3f}",
        f"{r['floor'] / r['median']:.0%}",
        str(r["launches"]),
        f"{beside:.1f}" if beside else "-",
        f"{beside / r['median']:.1f}" if beside else "-",
    ]
