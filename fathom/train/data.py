"""Batches for training: worker processes make them ahead of need, the trainer takes them in order.

Batch k depends on the seed, k and its plan alone, whichever process makes it and however many there
are. Resuming at batch k therefore needs nothing but k, and costs nothing.

Paper: §4.1 (packing).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathom.errors import TrainError
from fathom.train.packing import Episode
from fathom.train.workers import Failure, Filled, Request, SlotMemory, Source, fill, serve

_QUEUED_PER_WORKER = 2  # one in work, one waiting, so that no worker idles between two batches


@dataclass(slots=True)
class Batch:
    """One batch: tokens, documents [batch, seq] int32 and weights [batch, seq] float32.

    `weights` belong to the token they stand at, as something to predict (see next_token_targets).
    """

    index: int
    stage: float
    tokens: Tensor
    documents: Tensor
    weights: Tensor
    episodes: int
    dropped: int


@dataclass(frozen=True, slots=True)
class CurriculumSource:
    """Episodes of the curriculum, with the tokenizer of a folder (loaded once per process)."""

    tokenizer_folder: Path

    def __call__(self, seed: int, stage: float) -> Iterator[Episode]:
        """An endless stream of (ids, weights)."""
        from fathom.train.curriculum import EpisodeStream

        tokenizer = _tokenizer(self.tokenizer_folder)
        return iter(EpisodeStream(seed, 0, 1, tokenizer, stage))


_tokenizers: dict[Path, Any] = {}


def _tokenizer(folder: Path) -> Any:
    from fathom.chat.tokenizer import Tokenizer

    if folder not in _tokenizers:
        _tokenizers[folder] = Tokenizer.load(folder)
    return _tokenizers[folder]


class BatchLoader:
    """Iterates over every `stride`-th batch from `first` on; a context manager, ends its processes.

    Each batch has `tokens` tokens. `plan(index)` gives the stage of its episodes (from 0 to 1) and
    the length of its rows; it is asked once for each batch, in order, some batches ahead. With
    `workers=0` batches are made in this process. Raises TrainError when a worker fails, with its
    traceback, or dies, and when rows do not fill a batch exactly.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        tokens: int,
        workers: int,
        plan: Callable[[int], tuple[float, int]],
        device: torch.device | str = "cpu",
        first: int = 0,
        stride: int = 1,
    ) -> None:
        self._source, self._seed, self._plan = source, seed, plan
        self._device = torch.device(device)
        self._next, self._requested, self._stride = first, first, stride
        slots = workers * _QUEUED_PER_WORKER + workers // 2 + 1
        handle, path = tempfile.mkstemp(prefix="fathom-batches-")
        os.close(handle)
        self._memory = SlotMemory(Path(path), slots, tokens)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Any] = []
        try:
            self._memory.create()
            self._slots = self._memory.open()
            self._start(workers)
        except BaseException:
            self.close()
            raise
        self._free = deque(range(slots))
        self._queued = [0] * workers
        self._ready: dict[int, Filled] = {}

    def _start(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        for number in range(workers):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            process = context.Process(
                target=serve,
                args=(theirs, self._source, self._seed, self._memory),
                name=f"fathom-data-{number}",
                daemon=True,
            )
            process.start()
            self._processes.append(process)
            theirs.close()  # only the child holds it now, so its death closes the pipe

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        """The next batch, on the device. Raises TrainError when a worker failed."""
        if not self._processes:
            filled = self._fill_here()
        else:
            self._request()
            self._receive(timeout=0)
            while self._next not in self._ready:
                self._request()
                self._receive(timeout=None)
            filled = self._ready.pop(self._next)
        batch = self._deliver(filled)
        self._free.append(filled.slot)
        self._next += self._stride
        self._request()
        return batch

    def _fill_here(self) -> Filled:
        request = self._request_for(self._next)
        return fill(self._source, self._seed, request, self._slots[request.slot])

    def _request_for(self, index: int) -> Request:
        stage, seq_len = self._plan(index)
        if seq_len < 1 or self._memory.tokens % seq_len:
            raise TrainError(
                f"rows of {seq_len} tokens do not fill a batch of {self._memory.tokens} exactly"
            )
        return Request(index, stage, self._free.popleft(), seq_len)

    def _request(self) -> None:
        """Hand out the next batch numbers while there are slots and workers for them."""
        while self._free and self._queued:
            worker = min(range(len(self._queued)), key=self._queued.__getitem__)
            if self._queued[worker] >= _QUEUED_PER_WORKER:
                return
            request = self._request_for(self._requested)
            try:
                self._pipes[worker].send(request)
            except OSError:
                self._free.append(request.slot)
                self._receive(timeout=0)  # says why the worker ended
                raise TrainError(self._death(worker)) from None
            self._queued[worker] += 1
            self._requested += self._stride

    def _receive(self, timeout: float | None) -> None:
        for pipe in wait(self._pipes, timeout):
            worker = self._pipes.index(pipe)
            try:
                answer = pipe.recv()  # pyright: ignore
            except (EOFError, OSError):
                raise TrainError(self._death(worker)) from None
            if isinstance(answer, Failure):
                raise TrainError(f"data worker {worker} failed:\n{answer.traceback}")
            self._ready[answer.index] = answer
            self._queued[worker] -= 1

    def _death(self, worker: int) -> str:
        process = self._processes[worker]
        process.join(1)
        return f"data worker {worker} ended, exit code {process.exitcode}: out of memory or killed"

    def _deliver(self, filled: Filled) -> Batch:
        planes = torch.from_numpy(np.array(self._slots[filled.slot]))
        if self._device.type == "cuda":
            # One transfer; the allocator of pinned memory knows when it may be used again.
            planes = planes.pin_memory().to(self._device, non_blocking=True)
        tokens, documents, bits = planes.view(3, -1, filled.seq_len).unbind(0)
        return Batch(
            index=filled.index,
            stage=filled.stage,
            tokens=tokens,
            documents=documents,
            weights=bits.view(torch.float32),
            episodes=filled.episodes,
            dropped=filled.dropped,
        )

    def close(self) -> None:
        """End every process and remove the shared file; safe to call twice."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # it holds nothing, and to SIGTERM it does not listen
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []
        with contextlib.suppress(FileNotFoundError):
            self._memory.path.unlink()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
