"""What an engine counts, and its text for Prometheus.

Paper: none (infrastructure).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fathom.engine.kv_cache import SLAB_TOKENS

if TYPE_CHECKING:
    from fathom.engine.batch import Memory
    from fathom.engine.prefix_cache import PrefixCache
    from fathom.engine.request import Request
    from fathom.engine.scheduler import Scheduler

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COUNTERS = {
    "requests": "Requests taken in.",
    "steps": "Steps computed.",
    "computed_tokens": "Rows computed, drafts included.",
    "sampled_tokens": "Tokens drawn.",
    "prompt_tokens": "Tokens of the prompts of admitted requests.",
    "cached_tokens": "Those of them that were not computed.",
    "preemptions": "Times that a request was set back.",
    "drafts": "Drafts checked.",
    "drafted_tokens": "Tokens in them.",
    "accepted_tokens": "Those of them that were drawn.",
}


@dataclass(slots=True)
class Histogram:
    """Counts of seconds below fixed bounds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count one duration, or several of the same."""
        self.counts[bisect_left(_SECONDS, seconds)] += times
        self.total += seconds * times


@dataclass(slots=True)
class Metrics:
    """Counters since the engine started. `prompt_tokens` and `cached_tokens` are of admitted
    requests: their ratio is the hit rate weighted by tokens.
    """

    requests: int = 0
    finished: Counter[str] = field(default_factory=Counter[str])
    steps: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    drafting: bool = False
    last_batch: int = 0
    time_to_first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)

    @property
    def accepted_length(self) -> float:
        """Drafted tokens that were right, on average per draft."""
        return self.accepted_tokens / self.drafts if self.drafts else 0.0

    def step_done(self, rows: int) -> None:
        """Take note of a step and its rows."""
        self.steps += 1
        self.last_batch = rows
        self.computed_tokens += rows

    def tokens_drawn(self, request: Request, count: int, previous: float | None) -> None:
        """Take note of `count` tokens; `previous`: when the one before them was drawn."""
        self.sampled_tokens += count
        assert request.last_token is not None
        if previous is None:
            self.time_to_first_token.add(request.last_token - request.arrived)
        else:
            self.inter_token.add((request.last_token - previous) / count, count)

    def text(self, scheduler: Scheduler, memory: Memory, cache: PrefixCache) -> str:
        """Everything in Prometheus' text format, with what is so at this moment."""
        from prometheus_client import generate_latest

        families = list(self._families(scheduler, memory, cache))
        collector: Any = SimpleNamespace(collect=lambda: families)
        return generate_latest(collector).decode()

    def _families(self, scheduler: Scheduler, memory: Memory, cache: PrefixCache) -> Iterator[Any]:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"fathom_engine_{name}", text, value=getattr(self, name))
        finished = CounterMetricFamily(
            "fathom_engine_finished", "Requests by how they ended.", labels=["reason"]
        )
        for reason, count in sorted(self.finished.items()):
            finished.add_metric([reason], count)
        found = CounterMetricFamily(
            "fathom_engine_found_tokens",
            "Tokens found, by the tier that had them.",
            labels=["tier"],
        )
        for tier, count in asdict(cache.stats).items():
            found.add_metric([tier], count)
        tokens, size = (
            GaugeMetricFamily(f"fathom_engine_stored_{what}", text, labels=["tier"])
            for what, text in (
                ("tokens", "Tokens whose entries a tier keeps."),
                ("bytes", "Bytes that a tier keeps, checkpoints included."),
            )
        )
        for tier, (kept, taken) in cache.occupancy().items():
            tokens.add_metric([tier], kept)
            size.add_metric([tier], taken)
        yield from (finished, found, tokens, size)
        for name, text, value in self._gauges(scheduler, memory, cache):
            yield GaugeMetricFamily(f"fathom_engine_{name}", text, value=value)
        for name, text, histogram in (
            ("time_to_first_token", "From a request to its first token.", self.time_to_first_token),
            ("inter_token", "From one token to the next.", self.inter_token),
        ):
            bounds = zip([*map(str, _SECONDS), "+Inf"], accumulate(histogram.counts), strict=True)
            yield HistogramMetricFamily(
                f"fathom_engine_{name}_seconds", text, list(bounds), histogram.total
            )

    def _gauges(
        self, scheduler: Scheduler, memory: Memory, cache: PrefixCache
    ) -> Iterator[tuple[str, str, float]]:
        slabs, slots = memory.slabs, memory.slots
        problems = cache.disk.problems if cache.disk is not None else 0
        in_use, rate = (
            slabs.count - cache.available(),
            self.cached_tokens / max(1, self.prompt_tokens),
        )
        for state in ("waiting", "running", "paused"):
            yield f"{state}_requests", f"Requests that are {state}.", len(getattr(scheduler, state))
        yield "slots_used", "Sequence slots in use.", slots.count - slots.free
        yield "slots", "All sequence slots.", slots.count
        yield "capacity_tokens", "Tokens that the device has room for.", slabs.count * SLAB_TOKENS
        yield "capacity_bytes", "Bytes of that room.", slabs.count * slabs.layout.slab_bytes
        yield "in_use_tokens", "Tokens of that room that requests hold.", in_use * SLAB_TOKENS
        yield "disk_problems", "Files damaged, or that could not be read or written.", problems
        yield "batch_tokens", "Rows of the last step.", self.last_batch
        yield "hit_rate", "Of all prompt tokens, the part that was not computed.", rate
        yield "drafting", "Whether drafts are made.", self.drafting
        yield "accepted_draft_length", "Drafted tokens drawn, per draft.", self.accepted_length
