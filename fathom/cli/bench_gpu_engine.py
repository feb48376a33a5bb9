"""`fathom bench gpu --engine`: the engine on one GPU, against its layers alone.

Paper: none (measurement).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fathom.cli.models import SHIPPED_MODEL, checkpoint_path
from fathom.cli.output import print_json, print_table
from fathom.errors import MissingDependency

CONTEXT = 4096
BATCHES = (1, 8, 64)
PROMPTS = (2048, 8192)
ROWS = (8, 64, 0)  # of a prompt in a step, batch-invariant, or 0: as chunks


def measure_engine(repeat: int, out: Path | None, as_json: bool) -> None:
    """Measure, write the figures to `out` if given, and print them.

    Raises MissingDependency without a CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise MissingDependency("bench gpu needs a CUDA device, and torch sees none here")
    report = _measure(torch, repeat, out)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _measure(torch: Any, repeat: int, out: Path | None) -> dict[str, Any]:
    """The report; what there is of it is written to `out` after every row."""
    from fathom.checkpoint import load_model
    from fathom.eval import gpu_engine_speed as speed

    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def keep() -> None:
        if out is not None:
            out.write_text(json.dumps(report, indent=1))

    flash = speed.three_layer_model(speed.three_layers())
    nano = load_model(checkpoint_path(Path(SHIPPED_MODEL)), torch.bfloat16, device="cuda")
    report["decode"], report["prompts"] = [], []
    for name, model in (("three V4-Flash layers", flash), (SHIPPED_MODEL, nano)):
        cases = [(batch, 0) for batch in BATCHES]
        if model.mtp:
            cases.append((1, 1))
        for batch, drafts in cases:
            row = speed.decode_time(model, batch, CONTEXT, steps=repeat, drafts=drafts)
            report["decode"].append({"model": name, **asdict(row), "tokens_per_s": row.rate})
            keep()
        for tokens in PROMPTS:
            for count in ROWS:
                prompt = speed.prompt_time(model, tokens, rows=count, repeat=3)
                report["prompts"].append(
                    {"model": name, **asdict(prompt), "tokens_per_s": prompt.rate}
                )
                keep()
        torch.cuda.empty_cache()
    return report


def _print(report: dict[str, Any]) -> None:
    print(f"{report['device']}, torch {report['torch']}; milliseconds of one step\n")
    rows = [
        [
            r["model"],
            str(r["batch"]),
            str(r["drafts"]),
            f"{r['layers']:.3f}",
            f"{r['runner']:.3f}",
            f"{r['engine']:.3f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['launches']} + {r['copies']}",
            f"{r['memory']:,}",
        ]
        for r in report["decode"]
    ]
    print_table(
        ["model", "streams", "drafts", "layers", "runner", "engine", "tok/s", "kernels + copies",
         "bytes of sequences"],
        rows,
    )  # fmt: skip
    print("\nprompts until the first token\n")
    rows = [
        [
            r["model"],
            f"{r['tokens']:,}",
            f"{r['rows']} a step" if r["rows"] else "one chunk",
            f"{r['seconds'] * 1e3:.1f}",
            f"{r['tokens_per_s']:,.0f}",
        ]
        for r in report["prompts"]
    ]
    print_table(["model", "tokens", "rows", "ms", "tok/s"], rows)
