"""Counters in Prometheus' format, one registry per server.

Paper: none (operations).
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fathom.server.turn import Account

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


_APIS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/messages": "messages",
    "/v1/responses": "responses",
}


class Metrics:
    """What happened so far. Labels come from fixed sets: no client can add one."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "fathom_requests", "Answers by HTTP status.", ["api", "status"], registry=registry
        )
        self.streams = Counter(
            "fathom_streams", "Streams by how they ended.", ["api", "outcome"], registry=registry
        )
        self.tokens = Counter("fathom_tokens", "Tokens by kind.", ["kind"], registry=registry)
        self.finished = Counter(
            "fathom_completions", "Completions by how they ended.", ["reason"], registry=registry
        )
        self.calls = Counter("fathom_calls", "Tool calls by fate.", ["fate"], registry=registry)
        self.diagnostics = Counter(
            "fathom_diagnostics", "Irregular markup by kind.", ["code"], registry=registry
        )
        self.restored = Counter(
            "fathom_reasoning_restored", "Turns whose reasoning was restored.", registry=registry
        )
        self.running = Gauge("fathom_running", "Completions being generated.", registry=registry)
        self.waiting = Gauge("fathom_waiting", "Completions that wait.", registry=registry)
        self.first_token = Histogram(
            "fathom_first_token_seconds",
            "From the request to its first event.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.duration = Histogram(
            "fathom_completion_seconds",
            "From the request to its end.",
            registry=registry,
            buckets=_SECONDS,
        )

    def answered(self, path: str, status: int) -> None:
        """Add an answer, whoever gave it: a route, the guard or a failure."""
        self.requests.labels(_APIS.get(path, "other"), str(status)).inc()

    def count(self, account: Account, reason: str, started: float) -> None:
        """Add a completion that ended for `reason`; `started` is a `time.perf_counter` value."""
        self.duration.observe(time.perf_counter() - started)
        self.finished.labels(reason).inc()
        self.tokens.labels("prompt").inc(account.prompt_tokens)
        self.tokens.labels("cached").inc(account.cached_tokens)
        self.tokens.labels("completion").inc(account.completion_tokens)
        self.tokens.labels("reasoning").inc(account.reasoning_tokens)
        for fate, calls in (("delivered", account.calls), ("withheld", account.withheld)):
            if calls:
                self.calls.labels(fate).inc(len(calls))
        for note in account.diagnostics:
            self.diagnostics.labels(note.code).inc()

    def render(self) -> bytes:
        """All of it as text."""
        return generate_latest(self._registry)
