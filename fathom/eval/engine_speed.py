"""How fast the engine is here: prefill, decoding against context, batches, and a saved session.

Contexts longer than a prompt that anybody wants to wait for are made of copies of real slabs: every
entry lies in memory of its own, so a step reads what it would read, but attends to nonsense.

Paper: none (measurement).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fathom.engine.batch import Batch, Piece
from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.kv_cache import SLAB_TOKENS, slabs_for
from fathom.engine.prefix_cache import Checkpoint
from fathom.engine.sampler import SamplingParams
from fathom.eval.speed import random_tokens
from fathom.model.transformer import Transformer

PATTERN = 2048  # tokens of real slabs that long contexts are made of


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


def write_session(model: Transformer, folder: Path, tokens: int) -> dict[str, float]:
    """Save a session of `tokens` tokens, made of copies of real slabs; what it took.

    The last tokens are computed, so that the checkpoint is a real one.
    """
    config = EngineConfig(cache_tokens=tokens + 64 * SLAB_TOKENS, disk=folder)
    engine = Engine(model, config)
    ids = session_tokens(model, tokens)
    memory, cache = engine.memory, engine.cache
    full = tokens // SLAB_TOKENS
    chain = cache.chain(ids)
    slabs = [memory.slabs.take() for _ in range(full)]
    memory.tables[0, :full] = torch.tensor(slabs, dtype=torch.int32)
    pattern = PATTERN // SLAB_TOKENS
    engine.runner.forward(Batch.of([Piece(slot=0, start=0, tokens=ids[: SLAB_TOKENS * pattern])]))
    for i in range(pattern, full):
        memory.slabs.data[slabs[i]] = memory.slabs.data[slabs[i % pattern]]
    last = full * SLAB_TOKENS
    piece = Piece(slot=0, start=last - 1024, tokens=ids[last - 1024 : last], known=last)
    engine.runner.forward(Batch.of([piece]))
    for name, slab in zip(chain, slabs, strict=True):
        cache.keep_slab(name, slab)
    state = memory.slots.read(0, last)
    checkpoint = Checkpoint(position=last, tail=(), state=state, entries=b"")
    cache.keep_checkpoint(chain[-1], checkpoint)
    start = time.perf_counter()
    engine.save_session(ids)
    assert cache.disk is not None
    return {
        "seconds": time.perf_counter() - start,
        "bytes": float(cache.disk.size),
        "bytes_per_token": cache.disk.size / tokens,
    }


def session_tokens(model: Transformer, tokens: int) -> list[int]:
    """The tokens of that session."""
    pattern = random_tokens(model.config.vocab_size, PATTERN)
    return (pattern * (tokens // PATTERN + 1))[:tokens]


def resume_session(model: Transformer, folder: Path, tokens: int) -> dict[str, float]:
    """In a process of its own: seconds from the request to its first new token.

    The files are dropped from the page cache first. The engine is made before the clock starts, as
    a server's is; `start` says how long that took.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    begun = time.perf_counter()
    engine = Engine(model, EngineConfig(cache_tokens=tokens + 64 * SLAB_TOKENS, disk=folder))
    warm = engine.submit([5, 6], SamplingParams(max_tokens=1))
    engine.run([warm])
    start = time.perf_counter()
    ids = [*session_tokens(model, tokens // SLAB_TOKENS * SLAB_TOKENS), 7]
    request = engine.submit(ids, SamplingParams(temperature=0.0, max_tokens=1))
    engine.run([request])
    return {
        "start": start - begun,
        "first_token": time.perf_counter() - start,
        "cached_tokens": float(request.cached_tokens),
        "token": float(request.output[0].token),
        "logprob": request.output[0].logprob,
    }


def plot(report: dict[str, Any], file: Path) -> None:
    """Decoding against context, and batches, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, part, label in (
        (left, "decode", "tokens of context"),
        (right, "batch", "streams at once"),
    ):
        rows = report[part]
        x = [row["size"] for row in rows]
        low = [row["median"] - row["low"] for row in rows]
        high = [row["high"] - row["median"] for row in rows]
        axes.errorbar(x, [r["median"] for r in rows], yerr=[low, high], marker="o", capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel("tokens per second")
        axes.grid(alpha=0.3)
    left.set_title("One stream")
    right.set_title("All streams together")
    figure.savefig(file, dpi=150)
