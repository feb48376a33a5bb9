"""What the GPU path is meant to reach, and whether a report of `fathom bench gpu` reaches it.

Every goal is a line with its figure, its limit and a verdict; what was not measured says so.

Paper: §3.1 (fused kernels); §2.3.4 (efficiency).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

WHOLE = "43 layers"  # of V4-Flash, each kind with the same weights
LAYERS = 43
SHORT, LONG, MILLION = 4096, 900_000, 1_048_576  # contexts
TOPK_SCORES = 262_144
GIB = 2**30
# Kernels of a decode step that memory bounds, by the names that a profile gives them.
FAMILIES = {
    "linears, router logits, shared up": ("_linear",),
    "experts up": ("_up",),
    "experts down": ("_down",),
    "index scores": ("_scores",),
}
BOUNDARY = ("_write_and_mix", "_read")  # of one mHC boundary


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A figure and its limit. found: None where it was not measured; at_most: less is better."""

    name: str
    found: float | None
    limit: float
    unit: str
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None where it was not measured."""
        if self.found is None:
            return None
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    @property
    def verdict(self) -> str:
        """One of "pass", "short by so many per cent" and "not measured"."""
        if self.found is None:
            return "not measured"
        if self.met:
            return "pass"
        off = self.found / self.limit - 1 if self.at_most else 1 - self.found / self.limit
        return f"short by {off:.0%}"

    def cells(self) -> list[str]:
        """A row of a table: goal, aim, found, verdict."""
        sign = "at most" if self.at_most else "at least"
        found = "-" if self.found is None else f"{self.found:.3g} {self.unit}"
        return [self.name, f"{sign} {self.limit:g} {self.unit}", found, self.verdict]


def goals(report: dict[str, Any]) -> list[Goal]:
    """All goals with what a report says of them. report: as `fathom bench gpu` writes it."""
    found: list[Goal] = []

    def milliseconds(context: int) -> float | None:
        row = _one(report["steps"], kind=WHOLE, tokens=1, context=context)
        return row["median"] / LAYERS if row else None

    short, long = milliseconds(SHORT), milliseconds(LONG)
    for name, value, limit in (
        ("decode, a layer at 4K", short, 0.25),
        ("decode, a layer at 1M", milliseconds(MILLION), 0.30),
        ("stretch: decode, a layer at 4K", short, 0.12),
    ):
        found.append(Goal(name=name, found=value, limit=limit, unit="ms"))
    slower = 100 * (long / short - 1) if long and short else None
    found.append(Goal(name="decode at 900K above 4K", found=slower, limit=10, unit="%"))

    prompts = [row for row in report["prompts"] if row["routing"] == "own router"]
    eight = _one(prompts, kind="all", tokens=8192)
    longer = _one(prompts, kind="all", tokens=32_768)
    other = report.get("transformers")
    ratio = None
    if other and eight and other["tokens"] == eight["tokens"]:
        ratio = other["seconds"] * 1e3 / eight["median"]
    rates = longer["tokens_per_s"] / eight["tokens_per_s"] if longer and eight else None
    memory = eight["peak"] / GIB if eight else None
    found += [
        Goal(name="prefill of 8K beside transformers", found=ratio, limit=8, unit="times",
             at_most=False),
        Goal(name="prefill of 8K above the weights", found=memory, limit=8, unit="GiB"),
        Goal(name="prefill rate at 32K over 8K", found=rates, limit=1, unit="times", at_most=False),
    ]  # fmt: skip

    copy = report["copy_bytes_per_s"]
    for context, kernels in report.get("kernels", {}).items():
        for family, names in FAMILIES.items():
            time, _ = _of(kernels, names)
            size = report["kernel_bytes"][context][family]
            if time and not (family == "index scores" and int(context) == SHORT):
                reached = 100 * size / (time / 1e6) / copy
                found.append(
                    Goal(name=f"{family} at {int(context):,}, of the copy rate", found=reached,
                         limit=60, unit="%", at_most=False)
                )  # fmt: skip
    experts = report.get("expert_flops")
    found.append(
        Goal(name="prefill experts, of the BF16 matmul rate", limit=50, unit="%", at_most=False,
             found=experts and 100 * experts / report["matmul_flops"])
    )  # fmt: skip
    found.append(
        Goal(name=f"choice among {TOPK_SCORES:,}", found=report.get("topk_us"), limit=30, unit="us")
    )
    time, calls = _of(report.get("kernels", {}).get(str(SHORT), []), BOUNDARY)
    boundary = 2 * time / calls if calls else None  # two launches each
    found.append(Goal(name="one mHC boundary", found=boundary, limit=20, unit="us"))
    return found


def _one(rows: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    return next((r for r in rows if all(r[name] == v for name, v in wanted.items())), None)


def _of(kernels: Iterable[Sequence[Any]], names: Sequence[str]) -> tuple[float, int]:
    """(microseconds, calls) of kernels [(name, calls, microseconds)] of these names."""
    own = [row for row in kernels if row[0] in names]
    return sum(row[2] for row in own), sum(row[1] for row in own)
