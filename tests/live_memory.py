"""Count the bytes of tensors that are alive together, on any device and to the byte."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Within it, `peak` is the most bytes of tensors made in it that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        """Bytes alive at the moment."""
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage()._cdata for a in _tensors((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        _ = self.now  # forgets what has ended, whose addresses may be taken again
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage.nbytes():
                size = storage.nbytes()
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), size))
        self.peak = max(self.peak, self.now)
        return found


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return []
