"""The ways to compute a step: compiled rows on the CPU, stored formats on a GPU, and the torch
model on any device.

`runner` is an operation like any other: the registry chooses by device and by what fits a model.

Paper: none (engine).
"""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
import torch

from fathom.engine.batch import Batch, Memory
from fathom.kernels import operation
from fathom.model.stored import StoredModel
from fathom.model.transformer import Transformer

_runner = operation("runner")
_log = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes batches over an engine's memory.

    `batch_invariant`: a row's result depends on its sequence alone. Set to False, a runner that has
    a faster way for prompts may take it. `export`: keep what `routing` and `selection` tell.
    `summaries`: of the rows that `logits` or `head` returned last, `logit_summary` [rows, 3], where
    the device has made it.
    """

    export: bool
    batch_invariant: bool
    summaries: np.ndarray | None

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


def make_runner(model: Transformer | StoredModel, memory: Memory, max_rows: int) -> Runner:
    """The best runner for a model where it lies; on a GPU the log says why it is the slow one.

    Raises ConfigError for a StoredModel that no operation's tiles fit.
    """
    from fathom.engine import torch_runner  # noqa: F401  (registers the reference)
    from fathom.engine.stored_runner import StoredRunner, refusal

    weight = _weight(model)
    if isinstance(model, StoredModel):  # nothing else computes with one
        return StoredRunner(weight, model, memory, max_rows)
    runner = _runner(weight, model, memory, max_rows)
    if weight.device.type == "cuda" and not isinstance(runner, StoredRunner):
        reason = refusal(weight.device, model, memory.slabs.layout.kv_format)
        _log.warning("event=torch_runner reason=%r", reason)
    return runner


def _weight(model: Transformer | StoredModel) -> torch.Tensor:
    return model.embed.weight
