"""What `fathom bench gpu` measures of layers, row by row: what matters most first.

Every row is told on standard error and written to the report as it comes; a row that fails is told
too, and the others go on. Kernels are compiled side by side first (fathom/cli/compiling.py).

Paper: none (measurement).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fathom.cli.compiling import compile_side_by_side
from fathom.cli.output import write_file
from fathom.eval.gpu_goals import MILLION, SHORT, TOPK_SCORES, WHOLE, goals

# What is decoded: layers, sequences, context. First what goals are about, then what explains it.
FIRST_STEPS = (
    (WHOLE, 1, 4096), (WHOLE, 1, 1_048_576), (WHOLE, 1, 900_000), ("all", 1, 4096),
    ("all", 64, 4096), ("all", 16, 4096),
)  # fmt: skip
STEPS = (
    ("all", 1, 1_048_576), ("SWA", 1, 4096), ("CSA", 1, 4096), ("HCA", 1, 4096),
    ("CSA", 1, 1_048_576), ("HCA", 1, 1_048_576), ("all", 1, 65_536), ("all", 1, 900_000),
)  # fmt: skip
FP8_KEYS = (("CSA", 1, 1_048_576), ("CSA", 1, 4096))  # likewise, with index keys in FP8
BATCH = (64, 4096)  # sequences and context that each routing profile is measured with
PROMPT = (8192, 8192)  # tokens and tokens of a chunk, likewise
PROMPTS = ((8192, 8192), (32_768, 16_384), (32_768, 8192))


class Report:
    """The figures so far, and what of them was told and written.

    Raises what writing raises; what a measurement raises is kept in `errors`.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.started = time.monotonic()
        self.figures: dict[str, Any] = {"steps": [], "prompts": [], "errors": [], "seconds": {}}

    def tell(self, text: str) -> None:
        """Say it now, with the seconds since the beginning."""
        seconds = time.monotonic() - self.started
        print(f"{seconds:6.1f} s  {text}", file=sys.stderr, flush=True)

    def keep(self) -> None:
        """Judge what there is, and write it."""
        found = self.figures
        found["goals"] = [asdict(goal) | {"verdict": goal.verdict} for goal in goals(found)]
        if self.out is not None:
            write_file(self.out, json.dumps(found, indent=1))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what the block takes to `name`. An error in it is told and kept, not raised."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            self.wrong(f"{name}: {error!r}")
        finally:
            seconds = self.figures["seconds"]
            seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - began, 2)
            self.keep()

    def wrong(self, text: str) -> None:
        """An error that ends nothing."""
        self.figures["errors"].append(text[:2000])
        self.tell(f"error: {text[:400]}")

    def row(self, kind: str, row: dict[str, Any], fraction: float | None) -> None:
        """One more of "steps" or "prompts". fraction: the floor's share of its time."""
        self.figures[kind].append(row | {"fraction_of_floor": fraction})
        said = f"{row['kind']}, {row['tokens']:,} tokens, {row['routing']}: {row['median']:.3f} ms"
        if "context" in row:
            said += f" at {row['context']:,}, {row['keys']} keys"
        if fraction is not None:
            said += f", {fraction:.0%} of floor"
            if fraction > 1:
                self.wrong(f"{said}: nothing is quicker than its floor, so one of them is wrong")
                return
        self.tell(said)


def measure_layers(report: Report, repeat: int, kernels: bool, routing: str) -> None:
    """Fill a report. kernels: each kernel's time too; routing: "with" or "without" the profiles of
    routing, or these "alone".
    """
    import torch

    with torch.inference_mode():
        _Measurement(torch, report, repeat).all(kernels, routing)


class _Measurement:
    def __init__(self, torch: Any, report: Report, repeat: int) -> None:
        from fathom.eval import gpu_prefill_speed, gpu_speed
        from fathom.model import ModelConfig

        self.torch, self.report, self.repeat = torch, report, repeat
        self.speed, self.prefill = gpu_speed, gpu_prefill_speed
        self.flash = ModelConfig.preset("flash")
        self.config = gpu_speed.three_layers(self.flash)

    def all(self, kernels: bool, routing: str) -> None:
        from fathom.eval.gpu_launches import NAMES

        report, speed = self.report, self.speed
        began = time.monotonic()
        self.layers = speed.stored_layers(self.config)
        self.groups = {NAMES[layer.ratio]: [layer] for layer in self.layers}
        whole = speed.whole_model(self.flash, self.layers)
        self.groups |= {"all": self.layers, WHOLE: whole}
        report.figures["seconds"]["weights"] = round(time.monotonic() - began, 2)
        with report.part("compilation"):
            compile_ahead(self._touch, report.tell)
        self._rates()
        if routing != "alone":
            self._steps(FIRST_STEPS, "steps of goals")
            self._prompts()
            if kernels:
                self._kernels()
            self._steps(STEPS, "other steps")
            self._steps(FP8_KEYS, "FP8 keys", keys="fp8")
        if routing != "without":
            self._profiles()

    def _touch(self) -> None:
        """Launch every kernel of what is measured, upon nothing."""
        speed, model = self.speed, (self.config, self.layers)
        for cases, keys in (((*FIRST_STEPS, *STEPS), "fp4"), (FP8_KEYS, "fp8")):
            # Layers of a kind launch the same kernels, alone or among others.
            for tokens, context in sorted({case[1:] for case in cases}):
                speed.touch_step(*model, tokens, context, keys)
        for tokens, chunk in PROMPTS:
            self.prefill.touch_prompt(*model, tokens, chunk)

    def _rates(self) -> None:
        report, figures = self.report, self.report.figures
        with report.part("rates"):
            figures["copy_bytes_per_s"] = self.speed.copy_rate()
            figures["matmul_flops"] = self.speed.matmul_rate()
            figures["fp8_flops"] = self.speed.fp8_rate()
            self.torch.cuda.empty_cache()
        if "fp8_flops" not in figures:
            raise RuntimeError(f"the rates of this device are not known: {figures['errors']}")
        self.rates = self.prefill.Rates(
            bf16=figures["matmul_flops"], fp8=figures["fp8_flops"], copy=figures["copy_bytes_per_s"]
        )
        if self.rates.fp8 is None:
            report.tell("no FP8 product in this torch or on this card: prompts have no floor")
        report.tell(f"rates: {self.rates}")

    def _step(self, layers: Sequence[Any], kind: str, tokens: int, context: int, **of: Any) -> None:
        config = self.flash if kind == WHOLE else self.config
        row = self.speed.step_time(
            config, layers, kind, tokens, context, self.rates.copy, self.repeat, **of
        )
        self.report.row("steps", asdict(row), row.fraction)

    def _prompt(self, layers: Sequence[Any], tokens: int, chunk: int, **of: Any) -> None:
        row = self.prefill.prefill_time(self.config, layers, tokens, chunk, self.rates, **of)
        self.report.row("prompts", asdict(row) | {"tokens_per_s": row.rate}, row.fraction)

    def _steps(self, cases: Sequence[tuple[str, int, int]], name: str, **of: Any) -> None:
        for kind, tokens, context in cases:
            with self.report.part(name):
                self._step(self.groups[kind], kind, tokens, context, **of)

    def _prompts(self) -> None:
        for tokens, chunk in PROMPTS:
            with self.report.part("prompts"):
                self._prompt(self.layers, tokens, chunk, repeat=max(5, self.repeat // 10))

    def _kernels(self) -> None:
        report, figures, speed = self.report, self.report.figures, self.speed
        for context in (SHORT, MILLION):
            with report.part("kernels"):
                found = speed.profile_kernels(self.config, self.layers, context)
                figures.setdefault("kernels", {})[str(context)] = [asdict(k) for k in found.kernels]
                if context == SHORT:
                    figures["boundary_us"] = found.boundary
                report.tell(f"kernels at {context:,}: {len(found.kernels)} of them")
        with report.part("kernels"):
            figures["topk_us"] = speed.topk_time(TOPK_SCORES, self.config.index_topk)
            report.tell(f"choice among {TOPK_SCORES:,}: {figures['topk_us']:.1f} us")
        with report.part("kernels"):
            _, flops = self.prefill.expert_time(self.config, self.layers[0], PROMPT[0], True)
            figures["expert_flops"] = flops
            report.tell(f"experts of {PROMPT[0]:,} tokens: {flops / 1e12:.0f} TFLOP/s")

    def _profiles(self) -> None:
        from fathom.checkpoint.synthetic import PROFILES

        for profile in PROFILES:
            with self.report.part("routing profiles"):
                routed = self.speed.routed_by(self.layers, self.config, profile)
                self._step(routed, "all", *BATCH, routing=profile)
                self._prompt(routed, *PROMPT, repeat=3, routing=profile)


def compile_ahead(touch: Callable[[], None], tell: Callable[[str], None]) -> None:
    """Compile side by side what `touch` launches."""
    import torch

    from fathom.kernels.triton.ahead import Zeroed, compile_kernel, sketched

    with Zeroed(), sketched() as sketches:
        touch()
    torch.cuda.empty_cache()  # the processes beside this one need some memory each
    if sketches:
        tell(f"kernels: {len(sketches)} to compile")
        compile_side_by_side(sketches, {}, compile_kernel, tell)
