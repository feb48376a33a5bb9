"""`fathom bench gpu --engine`: the engine on one GPU, against its layers alone.

Kernels are compiled for every model and every size of a step: two hundred, minutes of it one after
the other. So processes compile them side by side first (fathom/cli/compiling.py), and what is
measured afterwards finds them in Triton's cache on disk.

Paper: none (measurement).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fathom.cli.compiling import compile_side_by_side
from fathom.cli.models import SHIPPED_MODEL, checkpoint_path
from fathom.cli.output import print_json, print_table, write_file
from fathom.errors import MissingDependency

LAYERS = "three V4-Flash layers"
CONTEXT = 4096
BATCHES = (1, 8, 64)
SAMPLED = 64  # streams that are drawn at temperature 1 too
PROMPTS = (2048, 8192)
ROWS = (8, 64, 0)  # of a prompt in a step, batch-invariant, or 0: as chunks


def measure_engine(repeat: int, out: Path | None, as_json: bool) -> None:
    """Measure, tell every row on standard error, write the figures to `out` if given, print them.

    Raises MissingDependency without a CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise MissingDependency("bench gpu needs a CUDA device, and torch sees none here")
    started = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", file=sys.stderr, flush=True)

    tell("kernels: compiled side by side")
    compile_ahead(tell)
    report = _measure(torch, repeat, out, tell)
    if as_json:
        print_json(report)
    else:
        _print(report)


def compile_ahead(tell: Callable[[str], None]) -> None:
    """Compile side by side what all of the measurement launches, listed in processes too."""
    from fathom.kernels.triton.ahead import compile_kernel

    lists = {name: partial(_sketches, name) for name in (LAYERS, SHIPPED_MODEL)}
    compile_side_by_side((), lists, compile_kernel, tell)


def _sketches(name: str) -> set[Any]:
    """The kernels of all that is measured of a model, in a process whose memory goes with it."""
    import torch

    from fathom.eval import gpu_engine_speed as speed
    from fathom.kernels.triton.ahead import Zeroed, sketched

    model = _model(name)
    with Zeroed(), sketched() as found:
        for batch in BATCHES:
            speed.touch_steps(model, batch, CONTEXT)
        for tokens in (*PROMPTS, CONTEXT):
            speed.touch_prompts(model, tokens)
        if model.mtp:
            speed.touch_drafts(model, CONTEXT)
    del model
    torch.cuda.empty_cache()
    return found


def _model(name: str) -> Any:
    import torch

    from fathom.checkpoint import load_model
    from fathom.eval import gpu_engine_speed as speed

    if name == LAYERS:
        return speed.three_layer_model(speed.three_layers())
    return load_model(checkpoint_path(Path(name)), torch.bfloat16, device="cuda")


def _measure(
    torch: Any, repeat: int, out: Path | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The report; what there is of it is written to `out` after every row."""
    from fathom.eval import gpu_engine_speed as speed

    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["decode"], report["prompts"] = [], []

    def keep(kind: str, row: dict[str, Any]) -> None:
        report[kind].append(row)
        tell(" ".join(_decoded(row) if kind == "decode" else _prompted(row)))
        if out is not None:
            write_file(out, json.dumps(report, indent=1))

    for name in (LAYERS, SHIPPED_MODEL):
        model = _model(name)
        cases = [(batch, 0, 0.0) for batch in BATCHES] + [(SAMPLED, 0, 1.0)]
        if model.mtp:
            cases.append((1, 1, 0.0))
        for batch, drafts, temperature in cases:
            row = speed.decode_time(
                model, batch, CONTEXT, steps=repeat, drafts=drafts, temperature=temperature
            )
            keep("decode", {"model": name, **asdict(row), "tokens_per_s": row.rate})
        for tokens in PROMPTS:
            for count in ROWS:
                prompt = speed.prompt_time(model, tokens, rows=count, repeat=3)
                keep("prompts", {"model": name, **asdict(prompt), "tokens_per_s": prompt.rate})
        del model
        torch.cuda.empty_cache()
    return report


DECODED = ("model", "streams", "temperature", "drafts", "layers", "runner", "engine", "tok/s",
           "kernels + copies", "bytes of sequences")  # fmt: skip
PROMPTED = ("model", "tokens", "rows", "ms", "tok/s")


def _print(report: dict[str, Any]) -> None:
    print(f"{report['device']}, torch {report['torch']}; milliseconds of one step\n")
    print_table(DECODED, [_decoded(row) for row in report["decode"]])
    print("\nprompts until the first token\n")
    print_table(PROMPTED, [_prompted(row) for row in report["prompts"]])


def _decoded(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        str(row["batch"]),
        f"{row['temperature']:g}",
        str(row["drafts"]),
        f"{row['layers']:.3f}",
        f"{row['runner']:.3f}",
        f"{row['engine']:.3f}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['launches']} + {row['copies']}",
        f"{row['memory']:,}",
    ]


def _prompted(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        f"{row['tokens']:,}",
        f"{row['rows']} a step" if row["rows"] else "one chunk",
        f"{row['seconds'] * 1e3:.1f}",
        f"{row['tokens_per_s']:,.0f}",
    ]
