"""Pre-training: the loop, from a recipe to a folder with log, states and weights.

    OUT/log.jsonl           one line per step
    OUT/state/step-N/       resumable states, the newest two
    OUT/weights.safetensors the final weights, matrices as bfloat16 (export_compact)

Paper: §4.2 (pre-training: dense, indexer warm-up, sparse), §3.4 (QAT at the end).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fathom.errors import TrainError
from fathom.model.config import ModelConfig
from fathom.train.balance import update_biases
from fathom.train.data import BatchLoader, CurriculumSource
from fathom.train.metrics import MetricLog, Row
from fathom.train.optimizer import Optimizer, split_parameters
from fathom.train.parallel import ALONE, Ranks, joined
from fathom.train.qat import enable_qat
from fathom.train.recipe import Recipe
from fathom.train.schedule import INDEXER, progress
from fathom.train.state import (
    Position,
    export_compact,
    latest_state,
    load_compact,
    load_state,
    save_state,
)
from fathom.train.step import METRICS, LossWeights, StepResult, training_step
from fathom.train.workers import Source

StepFunction = Callable[..., StepResult]


def pretrain(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    source: Source | None = None,
    step_function: StepFunction = training_step,
    show: Callable[[Row], None] | None = None,
    leave_after: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a recipe in the folder `out`; returns a summary. SIGTERM and `leave_after` save and stop.

    Raises TrainError when the run cannot start, when data workers fail, or when `out` already holds
    a run and `resume` is not set.
    """
    with joined(recipe.run.processes, device) as (ranks, where):
        torch.manual_seed(recipe.run.seed)
        model = build_model(recipe, where)
        trainer = Trainer(recipe, model, out, step_function, ranks)
        trainer.start(resume=resume)
        loader = BatchLoader(
            source or curriculum_source(recipe),
            seed=recipe.run.seed,
            tokens=tokens_of_each(recipe),
            workers=recipe.data.workers,
            plan=trainer.plan,
            device=where,
            first=trainer.position.next_batch + ranks.rank,
            stride=ranks.size,
        )
        first = ranks.rank == 0
        path = out / "log.jsonl" if first else Path(os.devnull)
        log = MetricLog(path, every=recipe.run.log_every, show=show if first else None)
        with loader, log, _terminated() as terminated:
            finished = trainer.run(loader, log, lambda: terminated.is_set() or leave_after())
        trainer.save()
        if finished and first:
            export_compact(model, out / "weights.safetensors")
    return {
        "first": first,
        "finished": finished,
        "step": trainer.position.step,
        "tokens": trainer.position.tokens,
        "minutes": trainer.position.elapsed_seconds / 60,
        "out": str(out),
        "last": log.last,
    }


class Trainer:
    """A model under training: its optimiser, its position in the recipe, and the step."""

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        out: Path,
        step_function: StepFunction = training_step,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.model, self.out, self.ranks = recipe, model, out, ranks
        self.position = Position(recipe=recipe.to_dict())
        self._step_function = step_function
        parts = recipe.optimizer
        self.optimizer = Optimizer(model, clip=parts.clip, weight_decay=parts.weight_decay)
        self._biases = [bias for _, bias in split_parameters(model).balanced]
        self._qat = False
        self._resumed_at, self._started = 0.0, time.monotonic()

    def start(self, *, resume: bool) -> None:
        """Begin at the newest saved state, or anew. Raises TrainError when `out` forbids it."""
        state = latest_state(self.out / "state")
        if state is not None and not resume:
            raise TrainError(f"{self.out} already holds a run: use --resume, or another folder")
        if state is not None:
            position = load_state(state, self.model, self.optimizer)
            # The recipe may have changed on purpose (more minutes, another rate).
            self.position = dataclasses.replace(position, recipe=self.recipe.to_dict())
        if self.ranks.rank == 0:
            text = json.dumps(self.recipe.to_dict(), indent=1)
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                (self.out / "recipe.json").write_text(text + "\n")
            except OSError as e:
                raise TrainError(f"cannot write the run to {self.out}: {e.strerror or e}") from e
        self._resumed_at, self._started = self.position.elapsed_seconds, time.monotonic()

    def elapsed(self) -> float:
        """Seconds of training, those before a resumption included."""
        return self._resumed_at + time.monotonic() - self._started

    def progress(self, step: int) -> float:
        """The share of the run that is finished at `step`, now."""
        run = self.recipe.run
        return progress(step, self.elapsed(), steps=run.steps, minutes=run.minutes)

    def plan(self, batch: int) -> tuple[float, int]:
        """Stage of the episodes and row length of a batch that is wanted soon."""
        t = self.progress(batch // self.ranks.size)
        return round(t, 2), self.recipe.schedule.row_length(t, self.recipe.data.seq_len)

    def run(self, loader: BatchLoader, log: MetricLog, leave: Callable[[], bool]) -> bool:
        """Step until the budget is used up (True) or `leave()` says so (False)."""
        saved = timed = time.monotonic()
        while True:
            due = time.monotonic() - saved > self.recipe.run.save_every_minutes * 60
            t, left, due = self.ranks.decide(self.progress(self.position.step), leave(), due)
            if due:
                log.flush()
                self.save()
                saved = timed = time.monotonic()
            if t >= 1.0 or left:
                return t >= 1.0
            batch = next(loader)
            metrics = self.step(batch, t)
            now = time.monotonic()
            row = self._row(batch, t, seconds=now - timed)
            log.add(row, (*METRICS, "norm", "skipped"), metrics)
            timed = now

    def step(self, batch: Any, t: float) -> torch.Tensor:
        """One update at progress t; returns the metrics, still on the device: [entries] float32."""
        schedule, parts = self.recipe.schedule, self.recipe.optimizer
        if schedule.qat(t) and not self._qat:
            enable_qat(self.model)
            self._qat = True
        weights = LossWeights(
            mtp=schedule.mtp_loss_weight(t),
            balance=parts.balance_weight,
            indexer=parts.indexer_weight,
        )
        attention = schedule.attention(t)
        result = self._step_function(self.model, batch, attention, weights, self.ranks)
        self.model.zero_grad(set_to_none=True)
        result.total.backward()
        if attention == INDEXER:
            self._leave_to_indexers()
        self.ranks.average([p.grad for p in self.model.parameters() if p.grad is not None])
        factor = schedule.learning_rate_factor(t, self.position.step)
        self.optimizer.set_learning_rates(parts.muon_lr * factor, parts.adamw_lr * factor)
        self.optimizer.step()
        if attention != INDEXER and result.counts:
            update_biases(self._biases, result.counts, speed=parts.balance_speed)
        self.position.step += 1
        self.position.next_batch = batch.index - self.ranks.rank + self.ranks.size
        self.position.tokens += batch.tokens.numel() * self.ranks.size
        self.position.elapsed_seconds = self.elapsed()
        metrics = self.ranks.sum(result.metrics) / self.ranks.size
        return torch.cat((metrics, self.optimizer.norm[None], self.optimizer.skipped[None]))

    def _leave_to_indexers(self) -> None:
        """Drop every gradient but the indexers'.

        Compiled blocks return zeros where nothing was asked for, and Muon makes a full-sized update
        out of whatever its momentum still holds.
        """
        for name, parameter in self.model.named_parameters():
            if ".indexer." not in name:
                parameter.grad = None

    def save(self) -> None:
        """Write a resumable state."""
        state = self.optimizer.state()
        self.ranks.level([*state.values(), *self._biases])
        self.optimizer.load(state)  # parameters follow their masters
        if self.ranks.rank == 0:
            save_state(self.out / "state", self.model, self.optimizer, self.position)

    def _row(self, batch: Any, t: float, *, seconds: float) -> Row:
        schedule, parts = self.recipe.schedule, self.recipe.optimizer
        return {
            "step": self.position.step,
            "tokens": self.position.tokens,
            "elapsed": round(self.position.elapsed_seconds, 3),
            "progress": round(t, 5),
            "seq_len": batch.tokens.shape[1],
            "attention": schedule.attention(t),
            "qat": self._qat,
            "lr": parts.muon_lr * schedule.learning_rate_factor(t, self.position.step),
            "tokens_per_second": round(batch.tokens.numel() * self.ranks.size / max(seconds, 1e-9)),
            "episodes": batch.episodes,
            "dropped": batch.dropped,
        }


def tokens_of_each(recipe: Recipe) -> int:
    """The part of a batch that one process makes. Raises TrainError when it does not divide."""
    tokens, processes = recipe.data.tokens, recipe.run.processes
    if processes < 1 or tokens % processes:
        raise TrainError(f"[data] tokens: {tokens} cannot be divided among {processes} processes")
    return tokens // processes


def build_model(recipe: Recipe, device: torch.device) -> Any:
    """The recipe's model, from its seed or its `init`. Raises ConfigError and TrainError."""
    from fathom.model import Transformer

    part = recipe.model
    if part.dtype not in ("float32", "bfloat16"):
        raise TrainError(f"[model] dtype must be float32 or bfloat16, not {part.dtype!r}")
    try:
        config = dataclasses.replace(ModelConfig.preset(part.preset), **part.override)
    except TypeError as e:
        raise TrainError(f"[model] override names no field of the configuration: {e}") from e
    dtype = torch.bfloat16 if part.dtype == "bfloat16" and device.type != "cpu" else torch.float32
    model = Transformer(config, dtype=dtype)
    model.initialize(torch.Generator().manual_seed(recipe.run.seed))
    if part.init:
        load_compact(model, Path(part.init))
    model.to(device)
    if device.type == "cuda":
        compile_blocks(model)
    return model


def compile_blocks(model: Any) -> None:
    """Compile each kind of block once: two minutes at the start, several times faster steps.

    Whole models take far longer to compile, and the blocks of a kind share their code.
    """
    torch.set_float32_matmul_precision("high")  # TF32 where the model computes in float32
    torch._dynamo.config.cache_size_limit = 64  # kinds of blocks x stages of attention x QAT
    for block in (*model.layers, *model.mtp):
        block.compile(dynamic=False)


def curriculum_source(recipe: Recipe) -> CurriculumSource:
    """Episodes with the recipe's tokenizer. Raises TrainError when it names none."""
    folder = recipe.data.tokenizer
    if not folder or not (Path(folder) / "tokenizer.json").is_file():
        raise TrainError(f"[data] tokenizer: no tokenizer.json in {folder!r}")
    return CurriculumSource(Path(folder))


@contextlib.contextmanager
def _terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that the loop can save before it ends."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may install handlers
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
