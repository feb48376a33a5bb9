"""`fathom bench gpu --prefill`: prompts through V4-Flash layers on one GPU.

Paper: none (measurement).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fathom.cli.output import print_json, print_table, write_file
from fathom.errors import ConfigError, MissingDependency

PROMPTS = (
    (8192, 8192),
    (32_768, 8192),
    (32_768, 16_384),
    (32_768, 32_768),
)  # tokens, tokens of a chunk
KERNELS_SHOWN = 25
CHECKOUT = Path(__file__).resolve().parents[2]
OTHER, OTHER_MODULE = "transformers", "bench.transformers_prefill"
OTHER_TOKENS, OTHER_LIMIT = 8192, 300  # of its prompt; seconds it may take


def measure_prefill(
    repeat: int, kernels: bool, against: str | None, out: Path | None, as_json: bool
) -> None:
    """Measure, write the figures to `out` if given, and print them.

    Raises MissingDependency without a CUDA device, ConfigError where the memory does not suffice.
    """
    import torch

    if not torch.cuda.is_available():
        raise MissingDependency("bench gpu needs a CUDA device, and torch sees none here")
    check_other(against)
    with torch.inference_mode():
        report = _measure(torch, repeat, kernels, quiet=as_json)
    torch.cuda.empty_cache()
    if against is not None:
        report[OTHER] = measure_other()
    if out is not None:
        write_file(out, json.dumps(report, indent=1))
    if as_json:
        print_json(report)
    else:
        _print(report)


def _measure(torch: Any, repeat: int, kernels: bool, quiet: bool) -> dict[str, Any]:
    from fathom.eval import gpu_prefill_speed as prefill
    from fathom.eval import gpu_speed
    from fathom.model import ModelConfig
    from fathom.model.prefill_memory import MemoryPlan

    config = gpu_speed.three_layers(ModelConfig.preset("flash"))
    matmul, fp8, copy = gpu_speed.matmul_rate(), gpu_speed.fp8_rate(), gpu_speed.copy_rate()
    rates = prefill.Rates(bf16=matmul, fp8=fp8, copy=copy)
    torch.cuda.empty_cache()
    layers = gpu_speed.stored_layers(config)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_s": copy,
        "matmul_flops": matmul,
        "fp8_flops": fp8,
        "rows": [],
    }

    def show(plan: MemoryPlan) -> None:
        if not quiet:
            print(f"memory plan, chunks of {plan.tokens:,} up to {plan.context:,} tokens, bytes:")
            print("\n".join(plan.lines()), flush=True)

    groups = [([layer], PROMPTS[:1]) for layer in layers] + [(layers, PROMPTS)]
    for group, prompts in groups:
        for tokens, chunk in prompts:
            row = prefill.prefill_time(
                config, group, tokens, chunk, rates, repeat,
                show if len(group) > 1 else None,
            )  # fmt: skip
            report["rows"].append(asdict(row) | {"tokens_per_s": row.rate})
    report["experts"] = []
    for tokens in sorted({chunk for _, chunk in PROMPTS}):
        for routing in ("uniform", "own router"):
            milliseconds, flops = prefill.expert_time(
                config, layers[0], tokens, routing == "uniform"
            )
            report["experts"].append(
                {
                    "tokens": tokens,
                    "routing": routing,
                    "ms": milliseconds,
                    "flops": flops,
                    "of_matmul": flops / matmul,
                }
            )
    if kernels:
        report["kernels"] = prefill.kernel_times(config, layers, PROMPTS[0][0])[:KERNELS_SHOWN]
    return report


def check_other(against: str | None) -> None:
    """Raises ConfigError for what nothing can be measured against."""
    if against not in (None, OTHER):
        raise ConfigError(f"a GPU is measured against {OTHER!r} only, not {against!r}")


def measure_other(tokens: int = OTHER_TOKENS, context: int = OTHER_TOKENS) -> dict[str, Any]:
    """What the other implementation needs for a prompt of `tokens` and for single tokens behind
    `context`, measured in a process of its own.

    Raises MissingDependency where it cannot run.
    """
    command = [sys.executable, "-m", OTHER_MODULE, str(tokens), str(context)]
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, capture_output=True, text=True, timeout=OTHER_LIMIT
        )
    except subprocess.TimeoutExpired as error:
        raise MissingDependency(
            f"{OTHER} took more than {OTHER_LIMIT} s for {tokens:,} tokens: measure without "
            "--against"
        ) from error
    if done.returncode:
        raise MissingDependency(
            f"{OTHER} could not be measured ({done.stderr.strip().splitlines()[-1:]}): it must be "
            "installed, and the command run from a checkout of this project"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _print(report: dict[str, Any]) -> None:
    copy, matmul = report["copy_bytes_per_s"] / 1e12, report["matmul_flops"] / 1e12
    rates = f"copy {copy:.2f} TB/s, BF16 {matmul:.0f} TFLOP/s"
    if report["fp8_flops"]:
        rates += f", FP8 {report['fp8_flops'] / 1e12:.0f} TFLOP/s"
    print(f"\n{report['device']}, torch {report['torch']}: {rates}")
    print("V4-Flash layers, synthetic weights; milliseconds of one prompt, MiB while it runs\n")
    mib = 2**20
    rows = [
        [
            r["kind"],
            f"{r['tokens']:,}",
            f"{r['chunk']:,}",
            f"{r['median']:.2f}",
            f"{r['least']:.2f}",
            f"{r['floor']:.2f}" if r["floor"] is not None else "-",
            f"{r['floor'] / r['median']:.0%}" if r["floor"] is not None else "-",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['planned'] / mib:,.0f}",
            f"{r['peak'] / mib:,.0f}",
        ]
        for r in report["rows"]
    ]
    header = "layer tokens chunk median least floor of-floor tokens/s planned peak".split()
    print_table(header, rows)
    print("\nrouter, routed and shared experts of one layer")
    rows = [
        [
            r["routing"],
            f"{r['tokens']:,}",
            f"{r['ms']:.2f}",
            f"{r['flops'] / 1e12:.0f}",
            f"{r['of_matmul']:.0%}",
        ]
        for r in report["experts"]
    ]
    print_table(["routing", "tokens", "ms", "TFLOP/s", "of-matmul"], rows)
    if OTHER in report:
        other = report[OTHER]
        own = next(r for r in report["rows"] if r["kind"] == "all")
        each = other["seconds"] / other["tokens"] * own["tokens"] * 1e3
        print(
            f"{OTHER} {other['version']}, {other['tokens']:,} tokens: {other['seconds']:.3f} s, "
            f"{other['peak_bytes'] / mib:,.0f} MiB above its weights; "
            f"{each / own['median']:.1f} times as long a token"
        )
    if "kernels" in report:
        print("\nmicroseconds by kernel, one chunk through all layers")
        table = [[f"{us:,.0f}", str(n), name[:70]] for name, n, us in report["kernels"]]
        print_table(["us", "calls", "kernel"], table)
