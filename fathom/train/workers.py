"""What a data process runs: it fills batches on request, in memory shared with the trainer.

Kept free of torch, so that a process starts in a fraction of a second. A process ends when its
pipe does, so none outlives the trainer, however that ends.

Paper: none (infrastructure).
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from fathom.train.packing import Episode, Rows, pack

# (seed, stage) -> an endless stream of episodes; it must be picklable and the same every time.
# The stage is the share of the run that is finished, from 0 to 1.
Source = Callable[[int, float], Iterator[Episode]]


@dataclass(frozen=True, slots=True)
class Request:
    """Fill slot `slot` with batch `index`: episodes of `stage` in rows of `seq_len` tokens."""

    index: int
    stage: float
    slot: int
    seq_len: int


@dataclass(frozen=True, slots=True)
class Filled:
    """Batch `index` lies in `slot`."""

    index: int
    slot: int
    stage: float
    seq_len: int
    episodes: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Failure:
    """The worker's exception, as text; the worker has ended."""

    traceback: str


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """Batches in one mapped file: unlike /dev/shm, a folder for files is never tiny in containers.

    A batch is three int32 planes [tokens]: token ids, documents, and the bits of float32 weights.
    """

    path: Path
    slots: int
    tokens: int

    def create(self) -> None:
        """Reserve the file."""
        with open(self.path, "wb") as f:
            f.truncate(self.slots * 3 * self.tokens * 4)

    def open(self) -> np.ndarray:
        """The mapping: [slots, 3, tokens] int32."""
        shape = (self.slots, 3, self.tokens)
        return np.memmap(self.path, np.int32, mode="r+", shape=shape)


def batch_seed(seed: int, index: int) -> int:
    """The seed of batch `index`: neighbours in either argument are unrelated."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)


def fill(source: Source, seed: int, request: Request, planes: np.ndarray) -> Filled:
    """Write one batch into its planes [3, tokens] int32; it depends on seed and request alone."""
    planes = planes.reshape(3, -1, request.seq_len)
    rows = Rows(planes[0], planes[1], planes[2].view(np.float32))
    pack(source(batch_seed(seed, request.index), request.stage), rows)
    return Filled(
        request.index, request.slot, request.stage, request.seq_len, rows.episodes, rows.dropped
    )


def serve(pipe: Connection, source: Source, seed: int, memory: SlotMemory) -> None:
    """Answer requests until the pipe closes. An exception is sent as Failure and ends it."""
    # Ctrl-C, `timeout` and service managers reach the whole group; the trainer alone decides when
    # to stop, and needs batches until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        slots = memory.open()
        while True:
            request = pipe.recv()
            pipe.send(fill(source, seed, request, slots[request.slot]))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception:
        try:
            pipe.send(Failure(traceback.format_exc()))
        except OSError:
            return
