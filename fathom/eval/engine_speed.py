"""How fast the engine is here: prefill, decoding against context, batches, and the log's cost.

Contexts longer than a prompt that anybody wants to wait for are made of copies of real slabs: every
entry lies in memory of its own, so a step reads what it would read, but attends to nonsense.

Paper: none (measurement).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fathom.engine.batch import Batch, Piece
from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.kv_cache import SLAB_TOKENS, slabs_for
from fathom.engine.llm import LLM
from fathom.engine.request import Request
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.eval.engine_session import PATTERN
from fathom.eval.speed import GenerateSide, ProcessSide, random_tokens, ratio, take_turns
from fathom.model.transformer import Transformer


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "low": min(values), "high": max(values)}


class Bench:
    """One engine under measurement; `threads` are torch's."""

    def __init__(self, model: Transformer, threads: int, rounds: int) -> None:
        torch.set_num_threads(threads)
        self._model, self._rounds = model, rounds
        room = model.config.max_position_embeddings
        self._engine = Engine(model, EngineConfig(cache_tokens=room + 64 * SLAB_TOKENS))
        self._tokens = random_tokens(model.config.vocab_size, PATTERN)
        self._feed(0, self._tokens)  # compiled before the clock starts
        self._feed(PATTERN, self._tokens[:1])

    def all(self, longest: int) -> list[dict[str, Any]]:
        """Rows of prefill, decode and batch: part, size, threads, then the spread."""
        contexts = [c for c in (256, 2048, 16_384, 131_072) if c < longest] + [longest]
        prompts = [p for p in (512, 2048, 8192) if p <= longest]
        parts = [
            ("prefill", prompts, self.prefill),
            ("decode", contexts, self.decode),
            ("batch", [1, 2, 4, 8, 16], self.batch),
        ]
        return [
            {"part": part, "size": size, "threads": torch.get_num_threads(), **measure(size)}
            for part, sizes, measure in parts
            for size in sizes
        ]

    def prefill(self, tokens: int) -> dict[str, float]:
        """Tokens of one prompt per second, in the engine's pieces."""
        ids = (self._tokens * (tokens // PATTERN + 1))[:tokens]
        return spread([tokens / self._seconds(lambda: self._feed(0, ids)) for _ in self._times])

    def decode(self, context: int, steps: int = 32) -> dict[str, float]:
        """Tokens per second of one stream that has `context` tokens behind it."""
        self._lay_out(context)
        runner = self._engine.runner

        def run() -> None:
            for i in range(steps):
                piece = Piece(slot=0, start=context + i, tokens=[self._tokens[i]])
                runner.forward(Batch.of([piece]))
                runner.logits([0])

        run()
        return spread([steps / self._seconds(run) for _ in self._times])

    def batch(self, streams: int, tokens: int = 48) -> dict[str, float]:
        """Tokens per second of several requests together, sampling included."""

        def run() -> None:
            engine = self._engine
            params = SamplingParams(max_tokens=tokens, seed=1, logit_bias={1: -1000.0})
            requests = [engine.submit(self._tokens[i : i + 64], params) for i in range(streams)]
            engine.run(requests)

        run()
        self._engine.cache.clear()
        return spread([streams * tokens / self._seconds(run) for _ in self._times])

    def log(self, requests: int = 20, tokens: int = 512) -> dict[str, Any]:
        """What the write-ahead log costs one stream: seconds of steps with it over those without.

        Steps of one request take turns, four with the log and four without, in either order: what
        else the machine does meets both. Median over all pairs, with its 95% interval of confidence
        (`low`, `high`). `bytes_per_token`: of the whole file without its header; `request_seconds`:
        what beginning and ending a log takes.
        """
        with tempfile.TemporaryDirectory() as name:
            engine = Engine(self._model, EngineConfig(cache_tokens=8192, wal=Path(name)))
            params = SamplingParams(max_tokens=tokens, seed=1, logit_bias={1: -1000.0})
            ratios: list[float] = []
            for i in range(requests * self._rounds + 1):
                request = engine.submit(self._tokens[i : i + 64], params)
                engine.step()  # the prompt, and its first token
                found = _in_turns(engine, request)
                ratios += found if i else []  # the first warms up
                engine.forget(request)
            return {**_of_median(ratios), "pairs": len(ratios), **_log_size(engine, params)}

    @property
    def _times(self) -> range:
        return range(self._rounds)

    @staticmethod
    def _seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _feed(self, start: int, ids: Sequence[int]) -> None:
        budget, memory = self._engine.config.budget.tokens, self._engine.memory
        memory.tables[0] = torch.arange(memory.tables.shape[1])
        for at in range(0, len(ids), budget):
            piece = Piece(slot=0, start=start + at, tokens=ids[at : at + budget])
            self._engine.runner.forward(Batch.of([piece]))

    def _lay_out(self, context: int) -> None:
        self._feed(0, self._tokens)
        slabs = self._engine.memory.slabs.data
        for i in range(PATTERN // SLAB_TOKENS, slabs_for(context)):
            slabs[i] = slabs[i % (PATTERN // SLAB_TOKENS)]


def _in_turns(engine: Engine, request: Request, block: int = 4) -> list[float]:
    """Seconds of `block` steps with the log over those of as many without, pair after pair."""
    log, ratios = engine.wal, []
    while len(request.output) + 2 * block < request.params.max_tokens:
        seconds = {}
        for logged in (True, False) if len(ratios) % 2 else (False, True):
            engine.wal = log if logged else None
            start = time.perf_counter()
            for _ in range(block):
                engine.step()
            seconds[logged] = time.perf_counter() - start
        ratios.append(seconds[True] / seconds[False])
    engine.wal = log
    return ratios


def _of_median(values: Sequence[float]) -> dict[str, float]:
    """The median, and the values between which that of all possible ones lies with 95%."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low, high = (round(len(ordered) / 2 + side) for side in (-half, half))
    return {
        "median": median(ordered),
        "low": ordered[max(0, low)],
        "high": ordered[min(len(ordered) - 1, high)],
    }


def _log_size(engine: Engine, params: SamplingParams) -> dict[str, float]:
    """Bytes a token in a whole log without its header, and seconds to begin and end one."""
    assert engine.wal is not None
    seconds, sizes = [], []
    for count in (*[0] * 20, params.max_tokens):
        request = Request(prompt=[5] * 64, params=params)
        start = time.perf_counter()
        engine.wal.begin(request)
        begun = time.perf_counter()
        for _ in range(count):
            engine.wal.append(request, Drawn(token=5, logprob=-1.0))
        ending = time.perf_counter()
        engine.wal.end(request)
        seconds.append(begun - start + time.perf_counter() - ending)
        sizes.append(sum(file.stat().st_size for file in engine.wal.folder.iterdir()))
        engine.wal.forget(request.id)
    record = (sizes[-1] - sizes[0]) / params.max_tokens
    return {
        "bytes_per_token": record * (params.max_tokens + 1) / params.max_tokens,
        "request_seconds": median(seconds),
    }


def beside_transformers(
    llm: LLM, other: ProcessSide, context: int, tokens: int, threads: Sequence[int], rounds: int
) -> dict[str, Any]:
    """The engine and transformers in turns: `context` random tokens, then `tokens` one by one."""
    engine = GenerateSide("engine", llm)
    ids = random_tokens(llm.config.vocab_size, context + tokens)
    results = take_turns([engine, other], ids[:context], ids[context:], threads, rounds)
    return {
        "context": context,
        "tokens": tokens,
        "results": [r.to_json() for r in results],
        "times_as_fast": asdict(ratio(results, "engine", other.name)),
    }


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Decoding against context, prefill and batches, a line per number of threads."""
    from matplotlib.figure import Figure

    titles = {
        "decode": ("One stream", "tokens of context"),
        "prefill": ("Prefill", "tokens of prompt"),
        "batch": ("All streams together", "streams at once"),
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (part, (title, label)) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for threads in sorted({row["threads"] for row in rows}):
            own = [r for r in rows if (r["part"], r["threads"]) == (part, threads)]
            middle = [r["median"] for r in own]
            error = [
                [r["median"] - r["low"] for r in own],
                [r["high"] - r["median"] for r in own],
            ]
            name = f"{threads} thread" + ("s" if threads > 1 else "")
            sizes = [r["size"] for r in own]
            axes.errorbar(sizes, middle, yerr=error, marker="o", capsize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set(title=title, xlabel=label, ylabel="tokens per second")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=150)
