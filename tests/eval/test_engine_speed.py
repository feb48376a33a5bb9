"""The engine's measurements, on a small model: what they report is what was done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fathom.engine import load
from fathom.eval.engine_session import (
    PATTERN,
    drop_pages,
    resume_after_kill,
    resume_session,
    write_session,
)
from fathom.eval.engine_speed import Bench, plot
from fathom.eval.engine_trace import replay
from fathom.model import Transformer
from tests.engine.helpers import model

TOKENS = 2 * PATTERN


@pytest.fixture(scope="module")
def net() -> Transformer:
    return model(max_position_embeddings=3 * PATTERN)


def test_a_session_goes_on_in_another_engine(net: Transformer, tmp_path: Path) -> None:
    saved = write_session(net, tmp_path, TOKENS)
    assert saved["bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*/*"))
    drop_pages(tmp_path)
    resumed = resume_session(net, tmp_path, TOKENS)
    assert resumed["cached_tokens"] == TOKENS
    assert (resumed["token"], resumed["logprob"]) == (saved["token"], saved["logprob"])


def test_a_session_goes_on_after_a_kill(tmp_path: Path) -> None:
    report = resume_after_kill("nano", tmp_path, TOKENS, 1, 1)
    assert [r["cached_tokens"] for r in report["resumed"]] == [TOKENS]
    damaged = next(tmp_path.glob("*/slab-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    llm = load("nano")
    again = resume_session(llm.model, tmp_path, TOKENS)  # computed, where the copies lay before
    assert again["cached_tokens"] < TOKENS


def test_rates_and_their_picture(net: Transformer, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        bench = Bench(net, 1, 2)
        parts = (
            [("prefill", 300, bench.prefill(300))]
            + [("decode", c, bench.decode(c, 2)) for c in (100, TOKENS)]
            + [("batch", n, bench.batch(n, 4)) for n in (1, 3)]
        )
        log = bench.log(1, 40)
    finally:
        torch.set_num_threads(threads)
    rows = [{"part": part, "size": size, "threads": 1, **row} for part, size, row in parts]
    for row in rows:
        assert 0 < row["low"] <= row["median"] <= row["high"]
    assert log["bytes_per_token"] == 14 * 41 / 40  # and the record of its end
    assert log["pairs"] == 2 * 4  # in two rounds
    assert log["low"] <= log["median"] <= log["high"]
    plot(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_agents_prompts_are_known_but_for_what_is_new() -> None:
    found = replay(load("nano"), 5)
    assert found["cached_tokens"] > 0.99 * (found["prompt_tokens"] - found["last_prompt"])
    assert found["of_tokens_seen_before"] > 0.99
