"""The ways to compute a step: compiled rows on the CPU, stored formats on a GPU, and the torch
model on any device.

`runner` is an operation like any other: the registry chooses by device and by what fits a model.

Paper: none (engine).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from fathom.engine.batch import Batch, Memory
from fathom.engine.sampler import Wanted
from fathom.kernels import operation
from fathom.model.stored import StoredModel
from fathom.model.transformer import Transformer

_runner = operation("runner")
_log = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes batches over an engine's memory.

    `batch_invariant`: a row's result depends on its sequence alone. Set to False, a runner that has
    a faster way for prompts may take it. `export`: keep what `routing` and `selection` tell.
    """

    export: bool
    batch_invariant: bool

    def reload(self) -> None:
        """Read the model's weights again."""
        ...

    def forward(self, batch: Batch) -> None:
        """All main layers for a batch; state and entries move on."""
        ...

    def logits(self, which: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Final hidden states [rows, hidden] and logits [rows, vocab] of rows of the last batch."""
        ...

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """The same logits [rows, vocab] from remembered hidden states [rows, hidden]."""
        ...

    def streams(self, row: int) -> np.ndarray:
        """A row's residual streams after the last layer: [streams, hidden]."""
        ...

    def draft(self, batch: Batch, streams: np.ndarray) -> np.ndarray:
        """The MTP block over streams [rows, streams, hidden]: logits [rows, vocab]."""
        ...

    def routing(self, count: int) -> np.ndarray:
        """With `export`: experts chosen, [layers, rows, topk] int16."""
        ...

    def selection(self, count: int) -> np.ndarray:
        """With `export`: entries picked, [layers, rows, index_topk] int32, -1 = none."""
        ...

    def close(self) -> None:
        """Let go of what only running needs; a runner that runs again makes it anew."""
        ...


@runtime_checkable
class Summarising(Protocol):
    """A runner whose device sums logits up and draws from them: few rows have to leave it."""

    def summarised(self, which: list[int], wanted: Sequence[Wanted]) -> Summarised:
        """As `logits` of Runner, for each row what is wanted of it."""
        ...

    def head_summarised(self, hidden: np.ndarray, wanted: Sequence[Wanted]) -> Summarised:
        """As `head` of Runner, likewise."""
        ...

    def draft_summarised(
        self, batch: Batch, given: list[int], which: list[int], wanted: Sequence[Wanted]
    ) -> Summarised:
        """As `draft` of Runner, from the streams of rows `given` of whatever ran last; of its own
        rows those that `which` says.
        """
        ...


class Summarised(NamedTuple):
    """hidden: [rows, hidden], or None where no row wanted it; logits: [vocab] of each row, or None
    where it was not wanted; summaries: [rows, 6] float64, `logit_summary` of each row, or None.
    """

    hidden: np.ndarray | None
    logits: Sequence[np.ndarray | None] | np.ndarray
    summaries: np.ndarray | None


def summarised(runner: Runner, which: list[int], wanted: Sequence[Wanted]) -> Summarised:
    """What is wanted of rows of the last batch; from a runner that sums nothing up, all of it."""
    if isinstance(runner, Summarising):
        return runner.summarised(which, wanted)
    hidden, logits = runner.logits(which)
    return Summarised(hidden, logits, None)


def head_summarised(runner: Runner, hidden: np.ndarray, wanted: Sequence[Wanted]) -> Summarised:
    """The same for hidden states [rows, hidden] that were kept."""
    if isinstance(runner, Summarising):
        return runner.head_summarised(hidden, wanted)
    return Summarised(hidden, runner.head(hidden), None)


def draft_summarised(
    runner: Runner, batch: Batch, given: list[int], which: list[int], wanted: Sequence[Wanted]
) -> Summarised:
    """The MTP block behind rows of whatever ran last: what is wanted of some of its rows."""
    if isinstance(runner, Summarising):
        return runner.draft_summarised(batch, given, which, wanted)
    logits = runner.draft(batch, np.stack([runner.streams(row) for row in given]))
    return Summarised(None, logits[which], None)


def make_runner(model: Transformer | StoredModel, memory: Memory, max_rows: int) -> Runner:
    """The best runner for a model where it lies; on a GPU the log says why it is the slow one.

    Raises ConfigError for a StoredModel that no operation's tiles fit.
    """
    from fathom.engine import torch_runner  # noqa: F401  (registers the reference)
    from fathom.engine.stored_fit import refusal
    from fathom.engine.stored_runner import StoredRunner

    weight = _weight(model)
    if isinstance(model, StoredModel):  # nothing else computes with one
        return StoredRunner(weight, model, memory, max_rows)
    reason = refusal(weight.device, model, memory.slabs.layout.kv_format)
    if weight.device.type == "cuda" and reason is not None:
        _log.warning("event=torch_runner reason=%r", reason)
    return _runner(weight, model, memory, max_rows)


def _weight(model: Transformer | StoredModel) -> torch.Tensor:
    return model.embed.weight
