from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import TrainError
from fathom.train.data import BatchLoader
from fathom.train.packing import ALIGNMENT, Rows, pack
from tests.train.sources import Dummy, Dying, Failing


def numbered(lengths):
    """Endless episodes; episode e holds the ids e, its weights count up from 1."""
    number = 0
    while True:
        length = lengths[number % len(lengths)]
        yield [number] * length, list(range(1, length + 1))
        number += 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=40),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 8),
)
def test_packed_rows_hold_whole_aligned_episodes(lengths, rows, blocks):
    seq_len = blocks * ALIGNMENT
    into = Rows.empty(rows, seq_len)
    if min(lengths) > seq_len:
        with pytest.raises(TrainError, match="longer than a row"):
            pack(numbered(lengths), into)
        return
    pack(numbered(lengths), into)
    placed = Counter()
    for row in range(rows):
        assert into.documents[row, 0] == 0  # no row is left empty
        for document in range(into.documents[row].max() + 1):
            where = np.flatnonzero(into.documents[row] == document)
            assert where[0] % ALIGNMENT == 0
            assert (np.diff(where) == 1).all()
            number = into.tokens[row, where[0]]
            assert (into.tokens[row, where] == number).all()
            assert len(where) == lengths[number % len(lengths)]  # never cut
            assert into.weights[row, where].tolist() == list(range(1, len(where) + 1))
            placed[number] += 1
    assert all(count == 1 for count in placed.values())
    assert sum(placed.values()) == into.episodes
    padding = into.documents == -1
    assert (into.weights[padding] == 0).all()


def test_little_is_padding_when_episodes_vary():
    rng = random.Random(0)
    lengths = [rng.randint(200, 1500) for _ in range(1000)]
    into = Rows.empty(32, 2048)
    pack(numbered(lengths), into)
    assert (into.documents == -1).mean() < 0.1
    # Beyond what alignment itself costs, nearly nothing is left open.
    free = sum(
        2048 - (np.flatnonzero(row >= 0)[-1] // ALIGNMENT + 1) * ALIGNMENT for row in into.documents
    )
    assert free / into.documents.size < 0.01


def test_long_episodes_are_placed_as_often_as_they_come():
    lengths = [2000, 300, 300, 300]
    into = Rows.empty(64, 2048)
    pack(numbered(lengths), into)
    long = sum((np.bincount(row[row >= 0]) == 2000).sum() for row in into.documents)
    assert long / into.episodes == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        (iter([([1, 2], [1.0, 1.0])]), "ended"),
        (iter([([1, 2], [1.0])] * 9), "2 tokens and 1 weights"),
    ],
)
def test_bad_streams_are_refused(stream, match):
    with pytest.raises(TrainError, match=match):
        pack(stream, Rows.empty(4, 256))


def plan(index):
    return float(index >= 3), 1024


def _take(count, **kwargs):
    with BatchLoader(Dummy(), seed=5, tokens=3072, **kwargs) as loader:
        return [next(loader) for _ in range(count)]


def test_batches_depend_on_seed_and_number_alone():
    alone = _take(5, workers=0, plan=plan)
    shared = _take(5, workers=2, plan=plan)
    later = _take(2, workers=2, first=3, plan=plan)
    for a, b in [*zip(alone, shared, strict=True), *zip(alone[3:], later, strict=True)]:
        assert a.index == b.index
        for name in ("tokens", "documents", "weights"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert not torch.equal(alone[0].tokens, alone[1].tokens)
    assert [b.stage for b in alone] == [0, 0, 0, 1, 1]
    assert alone[4].tokens.max() >= 1000  # the stage reached the source


def test_rows_may_grow_during_a_run():
    lengths = [512, 1024, 1024, 1000]
    with BatchLoader(
        Dummy(high=300), seed=1, tokens=2048, workers=0, plan=lambda k: (0.0, lengths[k])
    ) as loader:
        shapes = [tuple(next(loader).tokens.shape) for _ in range(3)]
        assert shapes == [(4, 512), (2, 1024), (2, 1024)]
        with pytest.raises(TrainError, match="exactly"):
            next(loader)


def test_the_traceback_of_a_worker_reaches_the_trainer():
    with BatchLoader(Failing(), seed=1, tokens=1024, workers=1, plan=plan) as loader:
        next(loader), next(loader), next(loader)
        with pytest.raises(TrainError, match=r"(?s)in __call__.*planted failure"):
            next(loader)
        processes = list(loader._processes)
    assert not any(p.is_alive() for p in processes)
    assert not loader._memory.path.exists()


def test_a_worker_that_dies_is_noticed():
    with BatchLoader(Dying(), seed=1, tokens=1024, workers=2, plan=plan) as loader:
        with pytest.raises(TrainError, match="exit code 7"):
            next(loader)


def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_trainer():
    with BatchLoader(Dummy(), seed=1, tokens=1024, workers=1, plan=plan) as loader:
        next(loader)
        os.kill(loader._processes[0].pid, signal.SIGTERM)
        for _ in range(10):  # more than were made ahead
            next(loader)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_a_killed_trainer(how, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent("""
            import itertools, sys, time
            from fathom.train.data import BatchLoader

            class Source:
                def __call__(self, seed, stage):
                    return itertools.repeat(([1] * 300, [1.0] * 300))

            if __name__ == "__main__":
                loader = BatchLoader(
                    Source(), seed=1, tokens=1024, workers=1, plan=lambda index: (0.0, 1024)
                )
                next(loader)
                print(loader._processes[0].pid, loader._memory.path, flush=True)
                time.sleep(60)
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as trainer:
        pid, path = trainer.stdout.readline().split()
        trainer.send_signal(how)
    deadline = time.monotonic() + 10
    while _runs(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.unlink(path)
    assert not _runs(int(pid))


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
