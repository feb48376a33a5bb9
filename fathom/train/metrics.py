"""Metrics of every step in a JSONL file, fetched from the device without making it wait.

Values stay on the device until a group of steps is complete; the group then travels to pinned
memory behind the running work and is written once it has arrived, normally when the next group is
complete.

Paper: none (infrastructure).
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]


class MetricLog:
    """Appends one line per step to `path`; `show` also gets the last row of each written group."""

    def __init__(
        self, path: Path, *, every: int, show: Callable[[Row], None] | None = None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8")
        if _is_torn(path):
            self._file.write("\n")  # or the first new row would be lost with the torn one
        self._every, self._show = max(every, 1), show
        self._open: list[tuple[Row, Sequence[str], Tensor]] = []
        self._travelling: deque[tuple[list[tuple[Row, Sequence[str]]], Tensor, Any]] = deque()
        self.last: Row = {}

    def add(self, row: Row, names: Sequence[str], values: Tensor) -> None:
        """One step: what the host knows (`row`), and `values` [entries] float32 on the device."""
        self._open.append((row, names, values))
        if len(self._open) >= self._every:
            self._send()
            self._write(wait=False)

    def flush(self) -> None:
        """Write everything, waiting for the device."""
        self._send()
        self._write(wait=True)
        self._file.flush()

    def _send(self) -> None:
        if not self._open:
            return
        stacked = torch.stack([values for *_, values in self._open])  # [rows, entries]
        arrival = None
        if stacked.is_cuda:
            here = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            here.copy_(stacked, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
            stacked = here
        self._travelling.append(([(r, n) for r, n, _ in self._open], stacked, arrival))
        self._open = []

    def _write(self, *, wait: bool) -> None:
        while self._travelling:
            heads, table, arrival = self._travelling[0]
            if arrival is not None:
                if not wait and not arrival.query():
                    return
                arrival.synchronize()
            self._travelling.popleft()
            for (row, names), values in zip(heads, table.tolist(), strict=True):
                self.last = row | {
                    # JSON has no NaN; a missing value is null.
                    name: (value if math.isfinite(value) else None)
                    for name, value in zip(names, values, strict=True)
                }
                self._file.write(json.dumps(self.last) + "\n")
            self._file.flush()
            if self._show is not None:
                self._show(self.last)

    def close(self) -> None:
        """Write what is left and close the file."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()  # after a device error nothing can be fetched


def _is_torn(path: Path) -> bool:
    """Whether a file ends within a line, as a crash leaves it."""
    with open(path, "rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        return f.read(1) not in (b"", b"\n")


def read_log(path: Path) -> list[Row]:
    """The rows of a log in order of step; of a step that a resumed run repeated, the last."""
    rows: dict[int, Row] = {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut short by a crash; the resumed run has written that step again
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]
