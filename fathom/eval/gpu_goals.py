"""What the GPU path is meant to reach, and whether a report of `fathom bench gpu` reaches it.

Every goal is a line with its figure, its limit and a verdict; what was not measured says so.

Paper: §3.1 (fused kernels); §2.3.4 (efficiency).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WHOLE = "43 layers"  # of V4-Flash, each kind with the same weights
LAYERS = 43
SHORT, LONG, MILLION = 4096, 900_000, 1_048_576  # contexts
TOPK_SCORES = 262_144
GIB = 2**30
# Bytes from which on a kernel is bound by memory and judged by it: 1.4 microseconds at the rate of
# a copy on an H100. One that reads less is bound by the time of any kernel at all.
JUDGED = 4 << 20
# Parts of a step that are judged with 4,096 tokens of context, and with a million.
OF_A_STEP = ("low", "high", "wo a", "wo b", "shared up", "experts up", "experts down", "head")
OF_THE_CACHE = ("index keys", "entries")


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
    eight = _one(prompts, kind="all", tokens=8192, chunk=8192)
    other = report.get("transformers")
    ratio = None
    if other and eight and other["tokens"] == eight["tokens"]:
        ratio = other["seconds"] * 1e3 / eight["median"]
    memory = eight["peak"] / GIB if eight else None
    found += [
        Goal(name="prefill of 8K beside transformers", found=ratio, limit=8, unit="times",
             at_most=False),
        Goal(name="prefill of 8K above the weights", found=memory, limit=8, unit="GiB"),
    ]  # fmt: skip
    for chunk in (16_384, 8192):  # of the longer prompt; of the shorter 8,192
        longer = _one(prompts, kind="all", tokens=32_768, chunk=chunk)
        rates = longer["tokens_per_s"] / eight["tokens_per_s"] if longer and eight else None
        name = f"prefill rate at 32K by {chunk:,} over 8K by 8,192"
        found.append(Goal(name=name, found=rates, limit=1, unit="times", at_most=False))
    found += _of_kernels(report)
    experts = report.get("expert_flops")
    found.append(
        Goal(name="prefill experts, of the BF16 matmul rate", limit=50, unit="%", at_most=False,
             found=experts and 100 * experts / report["matmul_flops"])
    )  # fmt: skip
    found.append(
        Goal(name=f"choice among {TOPK_SCORES:,}", found=report.get("topk_us"), limit=30, unit="us")
    )
    boundary = report.get("boundary_us")
    found.append(Goal(name="one mHC boundary", found=boundary, limit=20, unit="us"))
    return found


def _of_kernels(report: dict[str, Any]) -> list[Goal]:
    """One goal for each kernel in each part of the model that is bound by memory; and one for
    each such part of which no kernel is known.
    """
    found: list[Goal] = []
    for context, parts in ((SHORT, OF_A_STEP), (MILLION, OF_THE_CACHE)):
        rows = report.get("kernels", {}).get(str(context), [])
        for part in parts:
            own = [row for row in rows if part in _parts(row["part"])]
            for row in own:
                if row["num_bytes"] >= JUDGED:
                    rate = row["num_bytes"] / (row["us"] / 1e6)
                    name = f"{row['part']}, {row['num_bytes'] / 1e6:.1f} MB ({row['kernel']})"
                    found.append(_of_copy(name, 100 * rate / report["copy_bytes_per_s"]))
            if not own:
                found.append(_of_copy(part, None))
    return found


def _of_copy(name: str, found: float | None) -> Goal:
    name = f"{name}, of the copy rate"
    return Goal(name=name, found=found, limit=60, unit="%", at_most=False)


def _parts(name: str) -> list[str]:
    """All parts that a row names, such as ["low", "plain"] of "CSA low, plain"."""
    kind, _, rest = name.partition(" ")
    return (rest if kind in ("SWA", "CSA", "HCA") else name).split(", ")


def _one(rows: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    return next((r for r in rows if all(r[name] == v for name, v in wanted.items())), None)
