"""The engine's measurements, on a small model: what they report is what was done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fathom.engine.batch import Batch, Piece
from fathom.engine.engine import Engine, EngineConfig
from fathom.eval.engine_speed import (
    PATTERN,
    Bench,
    plot,
    resume_session,
    session_tokens,
    write_session,
)
from fathom.model import Transformer
from tests.engine.helpers import model

TOKENS = 2 * PATTERN


@pytest.fixture(scope="module")
def net() -> Transformer:
    return model(max_position_embeddings=3 * PATTERN)


def test_a_session_goes_on_in_another_engine(net: Transformer, tmp_path: Path) -> None:
    saved = write_session(net, tmp_path, TOKENS)
    assert saved["bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*/*"))
    resumed = resume_session(net, tmp_path, TOKENS)
    assert resumed["cached_tokens"] == TOKENS
    again = resume_session(net, tmp_path, TOKENS)
    assert (again["token"], again["logprob"]) == (resumed["token"], resumed["logprob"])
    # The same by hand: one more token over the first half's entries, twice.
    engine = Engine(net, EngineConfig(cache_tokens=3 * PATTERN))
    ids = session_tokens(net, TOKENS)
    engine.memory.tables[0] = torch.arange(engine.memory.tables.shape[1])
    for at in range(0, PATTERN, 1024):
        engine.runner.forward(Batch.of([Piece(slot=0, start=at, tokens=ids[at : at + 1024])]))
    half = PATTERN // 256
    engine.memory.slabs.data[half : 2 * half] = engine.memory.slabs.data[:half]
    last = ids[TOKENS - 1024 :]
    engine.runner.forward(Batch.of([Piece(slot=0, start=TOKENS - 1024, tokens=last, known=TOKENS)]))
    engine.runner.forward(Batch.of([Piece(slot=0, start=TOKENS, tokens=[7])]))
    assert int(engine.runner.logits([0])[1][0].argmax()) == resumed["token"]


def test_rates_and_their_picture(net: Transformer, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        bench = Bench(net, 1, 2)
        report = {
            "prefill": [{"size": 300, **bench.prefill(300)}],
            "decode": [{"size": c, **bench.decode(c, 2)} for c in (100, TOKENS)],
            "batch": [{"size": n, **bench.batch(n, 4)} for n in (1, 3)],
        }
    finally:
        torch.set_num_threads(threads)
    for rows in report.values():
        for row in rows:
            assert 0 < row["low"] <= row["median"] <= row["high"]
    plot(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
