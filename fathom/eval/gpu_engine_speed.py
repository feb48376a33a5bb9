"""How fast the engine serves on one GPU, against its layers alone.

Three V4-Flash layers with a whole vocabulary, weights synthetic, and the shipped model. Everything
goes through `Engine.step`: scheduling, the runner's graphs, the head, the copy of the logits to the
host and the choice of tokens there. What that costs beyond the layers' own graph is the overhead.

Paper: none (measurement).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from fathom.checkpoint.synthetic import synthetic_checkpoint
from fathom.engine.batch import Batch, Piece
from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.options import MemoryPlan
from fathom.engine.request import Request
from fathom.engine.runner import summarised
from fathom.engine.sampler import SamplingParams, Wanted
from fathom.engine.scheduler import Budget
from fathom.eval import gpu_speed
from fathom.eval.speed import random_tokens
from fathom.model.config import ModelConfig
from fathom.model.stored import StoredModel
from fathom.model.stored_forward import run_layers
from fathom.model.transformer import Transformer

CHUNK = 8192  # tokens of a step's budget
WARM = 4  # steps before the clock starts


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTime:
    """A decode step of `batch` streams, milliseconds: through the engine; through its runner alone
    (layers, head, what is wanted of the logits on the host), with its kernels and copies; and the
    layers' own graph. memory: bytes planned for its sequences.
    """

    batch: int
    context: int
    drafts: int
    temperature: float
    engine: float
    runner: float
    layers: float
    tokens_per_step: float
    launches: int
    copies: int
    memory: int

    @property
    def rate(self) -> float:
        """Tokens of all streams per second."""
        return 1e3 * self.tokens_per_step / self.engine


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTime:
    """A prompt through the engine until its first token. rows: of it in a step, 0 as a chunk."""

    tokens: int
    rows: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def three_layer_model(config: ModelConfig) -> StoredModel:
    """The synthetic checkpoint of `gpu_speed.three_layers`, with embeddings and a head."""
    return StoredModel.from_tensors(config, synthetic_checkpoint(config, seed=1, device="cuda"))


def three_layers() -> ModelConfig:
    """One SWA, CSA and HCA layer of V4-Flash, without its MTP block."""
    return replace(gpu_speed.three_layers(ModelConfig.preset("flash")), num_nextn_predict_layers=0)


def serve(
    model: StoredModel | Transformer, batch: int, context: int, *, drafts: int = 0,
    rows: int | None = None,
) -> Engine:  # fmt: skip
    """An engine with room for `batch` sequences of `context` tokens; rows: of a prompt in a step, 0
    as a chunk, None as by default.
    """
    return Engine(
        model,
        EngineConfig(
            max_sequences=batch,
            cache_tokens=batch * (context + 1024),
            budget=Budget(tokens=CHUNK, beside_streams=CHUNK),
            drafts=drafts,
            drafts_adaptive=False,
            checkpoint_spacing=0,
            batch_invariant=rows != 0,
            prompt_rows=rows or None,
        ),
    )


def decode_time(
    model: StoredModel | Transformer, batch: int, context: int, *, steps: int = 50, drafts: int = 0,
    temperature: float = 0.0, layers_alone: bool = True,
) -> DecodeTime:  # fmt: skip
    """Streams that have `context` tokens behind them, greedy or drawn at a temperature."""
    served = serve(model, batch, context, drafts=drafts)
    memory = MemoryPlan.of(served.config, model).total
    runs = _streams(served, batch, context, temperature)
    engine, drawn = _steps(served, runs, steps)
    pieces = [
        Piece(slot=run.slot, start=run.computed, tokens=run.tokens[run.computed :][:1])
        for run in runs
        if run.slot is not None
    ]

    wanted = [run.sampler.wanted(masked=False) for run in runs]

    def alone() -> None:
        served.runner.forward(Batch.of(pieces))
        summarised(served.runner, list(range(len(pieces))), wanted)

    runner = _median_ms(alone, steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        alone()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.device_type.name == "CUDA"]
    for run in runs:
        served.cancel(run)
    layers = float("nan")
    if layers_alone and isinstance(model, StoredModel):
        layers = layers_time(model, batch, context, steps)
    return DecodeTime(
        batch=batch,
        context=context,
        drafts=drafts,
        temperature=temperature,
        engine=engine,
        runner=runner,
        layers=layers,
        tokens_per_step=drawn,
        launches=sum(e.count for e in events if not e.key.startswith("Mem")),
        copies=sum(e.count for e in events if e.key.startswith("Mem")),
        memory=memory,
    )


def _streams(served: Engine, batch: int, context: int, temperature: float) -> list[Request]:
    """Requests that decode: each prompt alone beforehand, so that it is one chunk and not 32."""
    tokens = random_tokens(served.model.config.vocab_size, context + batch)
    prompts = [tokens[i : i + context] for i in range(batch)]
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=1000)
    served.runner.batch_invariant = False  # only how long the prompts take changes
    for prompt in prompts:
        served.run([served.submit(prompt, replace(params, max_tokens=1))])
    served.runner.batch_invariant = True
    runs = [served.submit(prompt, params) for prompt in prompts]
    while not all(run.output for run in runs):
        served.step()
    return runs


def _steps(served: Engine, runs: list[Request], steps: int) -> tuple[float, float]:
    """(median milliseconds of a step, tokens drawn by one)."""
    times, drawn = [], 0
    for number in range(WARM + steps):
        before = sum(len(run.output) for run in runs)
        started = time.perf_counter()
        served.step()
        if number >= WARM:
            times.append(1e3 * (time.perf_counter() - started))
            drawn += sum(len(run.output) for run in runs) - before
    return statistics.median(times), drawn / steps


def _median_ms(call: Callable[[], None], repeat: int) -> float:
    times = []
    for number in range(WARM + repeat):
        started = time.perf_counter()
        call()
        if number >= WARM:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def layers_time(model: StoredModel, batch: int, context: int, repeat: int) -> float:
    """Milliseconds of the layers' graph alone, as `fathom bench gpu` measures it."""
    config = model.config
    ratios = [layer.ratio for layer in model.layers]
    with torch.inference_mode():
        cache = gpu_speed.filled_cache(config, ratios, batch, context)
        step = gpu_speed.decode_step(config, cache, batch, context)
        streams = torch.randn(batch, config.hc_mult, config.hidden_size, device="cuda").bfloat16()
        graph, _ = gpu_speed.captured(
            lambda: run_layers(config, model.layers, cache, step, streams)
        )
        return statistics.median(gpu_speed.times_ms(graph.replay, repeat))


def prompt_time(
    model: StoredModel | Transformer, tokens: int, *, rows: int, repeat: int = 5
) -> PromptTime:
    """A cold prompt until its first token, the second of two engines' runs compiled already."""
    served = serve(model, 1, tokens, rows=rows)
    times = []
    for number in range(1 + repeat):
        ids = random_tokens(model.config.vocab_size, tokens + number)[number:]
        request = served.submit(ids, SamplingParams(temperature=0.0, max_tokens=1))
        started = time.perf_counter()
        while not request.finished:
            served.step()
        times.append(time.perf_counter() - started)
        served.cache.clear()
    return PromptTime(tokens=tokens, rows=rows, seconds=statistics.median(times[1:]))


def touch_steps(model: StoredModel | Transformer, batch: int, context: int) -> None:
    """Launch the kernels of a decode step of so many streams, upon nothing."""
    served = _empty(model, batch, context)
    pieces = [Piece(slot=slot, start=context, tokens=[2]) for slot in range(batch)]
    served.runner.forward(Batch.of(pieces))
    summarised(served.runner, list(range(batch)), [Wanted(whole=True)] * batch)
    if isinstance(model, StoredModel):
        layers_time(model, batch, context, 1)


def touch_prompts(model: StoredModel | Transformer, tokens: int) -> None:
    """Launch the kernels of a prompt, as one chunk and in steps, likewise."""
    served = _empty(model, 1, tokens)
    for rows in (8, 64, tokens):
        served.runner.batch_invariant = rows < tokens
        served.runner.forward(Batch.of([Piece(slot=0, start=0, tokens=[2] * rows)]))


def touch_drafts(model: StoredModel | Transformer, context: int) -> None:
    """Launch the kernels of a stream that drafts, likewise."""
    served, c = _empty(model, 1, context, drafts=1), model.config
    for rows in (1, 2):
        piece = Piece(slot=0, start=context, tokens=[2] * rows)
        served.runner.forward(Batch.of([piece]))
        served.runner.draft(
            Batch.of([piece]), np.zeros((rows, c.hc_mult, c.hidden_size), np.float32)
        )


def _empty(
    model: StoredModel | Transformer, batch: int, context: int, drafts: int = 0
) -> Engine:  # fmt: skip
    served = serve(model, batch, context, drafts=drafts)
    served.memory.slabs.data.zero_()
    return served
