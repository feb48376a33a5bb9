"""What a torch model's layers choose as they run: experts of each token, entries of each query.

Paper: §2.1 (routing); §2.3.1, eq. 17 (index selection).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from fathom.errors import GenerationError
from fathom.model.config import CSA_RATIO
from fathom.model.transformer import Transformer


class Recorder:
    """Takes note of choices within `recording`; one call of the model at a time."""

    def __init__(self, model: Transformer) -> None:
        self._model, self._config = model, model.config
        self._chosen: dict[int, torch.Tensor] = {}
        self._picked: dict[int, torch.Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the choices of the model's next call."""
        self._chosen.clear()
        self._picked.clear()
        with ExitStack() as undo:
            for number, layer in enumerate(self._model.layers):
                block: Any = layer
                hook = block.ffn.gate.register_forward_hook(self._note_experts(number))
                undo.callback(hook.remove)
                indexer = getattr(block.attn, "indexer", None)
                if indexer is not None:
                    indexer.select = self._note_entries(number, indexer.select)
                    undo.callback(delattr, indexer, "select")
            yield

    def routing(self, count: int) -> np.ndarray:
        """Experts of the last call's tokens: [layers, tokens, topk] int16.

        Raises GenerationError for a model whose layers do not say.
        """
        layers = range(self._config.num_hidden_layers)
        if not all(number in self._chosen for number in layers):
            raise GenerationError("this model does not tell which experts it chooses: no export")
        chosen = [self._chosen[number].reshape(count, -1) for number in layers]
        return torch.stack(chosen).to("cpu", torch.int16).numpy()

    def selection(self, start: int, count: int) -> np.ndarray:
        """Entries of the last call's tokens, which begin at position `start`, ascending:
        [layers, tokens, index_topk] int32, -1 = none.
        """
        c = self._config
        out = np.full((c.num_hidden_layers, count, c.index_topk), -1, np.int32)
        for number, ratio in enumerate(c.compress_ratios):
            if ratio == CSA_RATIO and number in self._picked:
                picks = self._picked[number].reshape(count, -1).cpu().numpy()
                last = np.iinfo(np.int32).max
                picks = np.sort(np.where(picks < 0, last, picks), axis=1)
                out[number, :, : picks.shape[1]] = np.where(picks == last, -1, picks)
            elif ratio == CSA_RATIO:  # no more entries than may be picked
                visible = (np.arange(start, start + count)[:, None] + 1) // ratio
                every = np.arange(c.index_topk)[None]
                out[number] = np.where(every < visible, every, -1)
        return out

    def _note_experts(self, number: int) -> Any:
        def note(module: Any, args: Any, result: tuple[torch.Tensor, torch.Tensor]) -> None:
            self._chosen[number] = result[0]

        return note

    def _note_entries(self, number: int, select: Any) -> Any:
        def note(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            self._picked[number] = select(scores, visible)
            return self._picked[number]

        return note
