"""What an engine counts, and its text for Prometheus.

Paper: none (infrastructure).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from fathom.engine.kv_cache import SLAB_TOKENS

if TYPE_CHECKING:
    from fathom.engine.batch import Memory
    from fathom.engine.prefix_cache import PrefixCache, TierStats
    from fathom.engine.request import Request

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class Histogram:
    """Counts of seconds below fixed bounds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count one duration, or several of the same."""
        self.counts[bisect_left(_SECONDS, seconds)] += times
        self.total += seconds * times

    def lines(self, name: str) -> list[str]:
        """The Prometheus lines of this histogram."""
        out, running = [f"# TYPE {name} histogram"], 0
        for bound, count in zip([*map(str, _SECONDS), "+Inf"], self.counts, strict=True):
            running += count
            out.append(f'{name}_bucket{{le="{bound}"}} {running}')
        return [*out, f"{name}_sum {self.total:.6f}", f"{name}_count {running}"]


def gauges(memory: Memory, cache: PrefixCache) -> dict[str, float]:
    """What memory and cache hold at this moment, by the gauges' names."""
    slabs, slots = memory.slabs, memory.slots
    found: dict[str, float] = {
        "slots_used": slots.count - slots.free,
        "slots": slots.count,
        "capacity_tokens": slabs.count * SLAB_TOKENS,
        "capacity_bytes": slabs.count * slabs.layout.slab_bytes,
        "in_use_tokens": (slabs.count - cache.available()) * SLAB_TOKENS,
    }
    for tier, (tokens, size) in cache.occupancy().items():
        found[f'cached_tokens{{tier="{tier}"}}'] = tokens
        found[f'cached_bytes{{tier="{tier}"}}'] = size
    if cache.disk is not None:
        found["disk_problems"] = cache.disk.problems
    return found


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
    def hit_rate(self) -> float:
        """Of all prompt tokens, the part that was not computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

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

    def text(self, gauges: Mapping[str, float], found: TierStats) -> str:
        """Everything in Prometheus' text format; `gauges` are the values of this moment."""
        gauges = {
            **gauges,
            "batch_tokens": self.last_batch,
            "hit_rate": self.hit_rate,
            "drafting": float(self.drafting),
            "accepted_draft_length": self.accepted_length,
        }
        counters = {
            "requests_total": self.requests,
            "steps_total": self.steps,
            "computed_tokens_total": self.computed_tokens,
            "sampled_tokens_total": self.sampled_tokens,
            "prompt_tokens_total": self.prompt_tokens,
            "cached_tokens_total": self.cached_tokens,
            "preemptions_total": self.preemptions,
            "drafts_total": self.drafts,
            "drafted_tokens_total": self.drafted_tokens,
            "accepted_tokens_total": self.accepted_tokens,
        }
        lines = []
        for name, value in counters.items():
            lines += [f"# TYPE fathom_engine_{name} counter", f"fathom_engine_{name} {value}"]
        lines.append("# TYPE fathom_engine_finished_total counter")
        for reason, count in sorted(self.finished.items()):
            lines.append(f'fathom_engine_finished_total{{reason="{reason}"}} {count}')
        lines.append("# TYPE fathom_engine_found_tokens_total counter")
        for tier, count in asdict(found).items():
            lines.append(f'fathom_engine_found_tokens_total{{tier="{tier}"}} {count}')
        seen = set()
        for name, value in gauges.items():
            plain = name.partition("{")[0]
            if plain not in seen:
                lines.append(f"# TYPE fathom_engine_{plain} gauge")
                seen.add(plain)
            lines.append(f"fathom_engine_{name} {value:g}")
        lines += self.time_to_first_token.lines("fathom_engine_time_to_first_token_seconds")
        lines += self.inter_token.lines("fathom_engine_inter_token_seconds")
        return "\n".join(lines) + "\n"
