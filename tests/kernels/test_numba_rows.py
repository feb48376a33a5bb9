"""The compiled rows: equal to the torch model and the packers, and blind to neighbours."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from fathom.engine.batch import Batch, Memory, Piece
from fathom.engine.kv_cache import SlabLayout, SlabPool
from fathom.engine.state_cache import SlotLayout, SlotPool
from fathom.errors import CheckpointError
from fathom.kernels.numba import compiled, entries, index_scan, lanes, selection, vector
from fathom.kernels.numba.runner import CompiledRunner
from fathom.model import Transformer
from fathom.model.attention import SlidingWindowAttention
from fathom.quant import fp4, kv_pack
from tests.model.tiny import random_model


def runner(
    model: Transformer, slots: int = 2, tokens: int = 1024, keys: str = "fp4"
) -> CompiledRunner:
    layout = SlabLayout.of(model.config, model.quantized, model.dtype, keys)
    each = -(-tokens // 256)
    memory = Memory(
        SlabPool(layout, slots * each), SlotPool(SlotLayout(layout, True), slots), tokens
    )
    for s in range(slots):
        memory.tables[s, :each] = torch.arange(s * each, (s + 1) * each)
    made = CompiledRunner(model.embed.weight, model, memory, 512)
    made.memory = memory  # type: ignore[attr-defined]
    return made


def feed(of: CompiledRunner, ids: list[int], cuts: list[int], slot: int = 0) -> np.ndarray:
    """Logits [tokens, vocab] of a sequence fed in pieces."""
    found, at = [], 0
    for end in [*cuts, len(ids)]:
        of.forward(Batch.of([Piece(slot=slot, start=at, tokens=ids[at:end])]))
        found.append(of.logits(list(range(end - at)))[1].copy())
        at = end
    return np.concatenate(found)


def tokens(model: Transformer, count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, model.config.vocab_size, (count,), generator=generator).tolist()


@pytest.fixture
def stored_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the torch model round the rotated part of an entry to bfloat16, as it is stored."""

    def store(self: SlidingWindowAttention, kv: torch.Tensor) -> torch.Tensor:
        if not self.quantized:
            return kv
        data, scales = kv_pack.pack_kv_entries(kv, self.rope_dim)
        return kv_pack.unpack_kv_entries(data, scales, self.rope_dim, kv.dtype)

    monkeypatch.setattr(SlidingWindowAttention, "store", store)


@pytest.mark.usefixtures("stored_rope")
@pytest.mark.parametrize("keys", ["fp4", "fp8"])
@pytest.mark.parametrize("quantized", [False, True])
@torch.inference_mode()
def test_equal_to_the_torch_model(quantized: bool, keys: str) -> None:
    model = random_model(3, quantized=quantized)
    ids = tokens(model, 300)
    made = runner(model, keys=keys)
    found = feed(made, ids, [])
    cache = model.new_cache()
    for layer in cache.layers:
        layer.key_format = keys
    each = model.streams(torch.tensor([ids]), cache)
    expected = model.head(model.hidden(each))[0].numpy()
    worst = np.abs(found - expected).max(1)
    # A value on the edge between two codes may fall to either side; most rows see none.
    assert np.median(worst) < 2e-5
    assert worst.max() < (2e-2 if quantized else 5e-5)
    streams = np.stack([made.streams(i) for i in range(299)])
    drafted = made.draft(Batch.of([Piece(slot=1, start=0, tokens=ids[1:])]), streams)
    same = model.head(model.mtp_hidden(each[:, :-1], torch.tensor([ids[1:]])))[0].numpy()
    guesses = np.abs(drafted - same).max(1)
    assert np.median(guesses) < 5e-5


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("cuts", [[1], [3, 4, 5], [127, 128], list(range(1, 40)), [17, 140, 256]])
def test_a_row_does_not_depend_on_how_its_prompt_was_cut(quantized: bool, cuts: list[int]) -> None:
    model = random_model(3, quantized=quantized)
    ids = tokens(model, 290)
    assert np.array_equal(feed(runner(model), ids, cuts), feed(runner(model), ids, []))


def test_a_row_does_not_depend_on_its_neighbours_or_threads() -> None:
    model = random_model(3, quantized=True)
    ids, other = tokens(model, 200), tokens(model, 60, seed=9)
    alone = feed(runner(model), ids, [])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            made = runner(model)
            first = Piece(slot=1, start=0, tokens=other)
            made.forward(Batch.of([first, Piece(slot=0, start=0, tokens=ids)]))
            together = made.logits(list(range(60, 260)))[1]
            assert np.array_equal(together, alone)
    finally:
        torch.set_num_threads(threads)


def test_threads_share_a_long_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fathom.kernels.numba.runner.SPLIT_ENTRIES", 8)
    model = random_model(3, quantized=True)
    ids = tokens(model, 600)
    alone = feed(runner(model), ids, [599])[-1]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert np.array_equal(feed(runner(model), ids, [599])[-1], alone)
    finally:
        torch.set_num_threads(threads)


def test_a_token_may_name_an_expert_twice_but_none_that_is_not_there() -> None:
    model = random_model(3)
    table = model.layers[0].ffn.gate.tid2eid
    table[:] = 1  # every row, every choice
    ids = tokens(model, 40)
    expected = model(torch.tensor([ids]))[0].detach().numpy()
    assert np.abs(feed(runner(model), ids, []) - expected).max() < 1e-4
    for wrong in (-1, model.config.n_routed_experts):
        table[5, 0] = wrong
        with pytest.raises(CheckpointError, match="routing table"):
            runner(model)


@njit
def _store_kv(x, rope_dim, form, memory, data, scales):
    at = memory.ctypes.data
    entries.store_kv(x, rope_dim, form, at + data, at + scales)


@njit
def _load_kv(memory, data, scales, rope_dim, c, form, out):
    at = memory.ctypes.data
    entries.load_kv(at + data, at + scales, rope_dim, c, form, out.ctypes.data)


@njit
def _store_key(x, form, memory, data, scales):
    at = memory.ctypes.data
    entries.store_key(x, form, at + data, at + scales)


@njit
def _load_key(memory, data, scales, dim, form, out):
    at = memory.ctypes.data
    entries.load_key(at + data, at + scales, dim, form, out, 0)


def values(count: int, cols: int) -> torch.Tensor:
    """Numbers of many magnitudes, zeros of both signs, and ties between codes."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, cols, generator=generator) * 10 ** torch.linspace(-6, 3, count)[:, None]
    x[1, ::3], x[2, ::5] = 0.0, -0.0
    x[3] = torch.arange(cols) * 0.25 - 4
    return x


@pytest.mark.parametrize(("cols", "rope"), [(96, 32), (80, 16), (512, 64)])
def test_main_entries_have_the_packers_bytes(cols: int, rope: int) -> None:
    for row in values(40, cols):
        data, scales = kv_pack.pack_kv_entries(row, rope)
        memory = np.zeros(len(data) + len(scales), np.uint8)
        x = row.numpy().copy()
        _store_kv(x, rope, entries.FP8, memory, 0, len(data))
        assert np.array_equal(memory, torch.cat((data, scales)).numpy())
        expected = kv_pack.unpack_kv_entries(data, scales, rope, torch.float32).numpy()
        out = np.empty(cols, np.float32)
        _load_kv(memory, 0, len(data), rope, cols, entries.FP8, out)
        assert np.array_equal(out, expected)
        assert np.array_equal(x, expected)


@pytest.mark.parametrize("form", ["fp4", "fp8"])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_indexer_keys_have_the_packers_bytes(form: str, dim: int) -> None:
    number = {"fp4": entries.FP4, "fp8": entries.FP8}[form]
    for row in values(40, dim):
        data, scales = kv_pack.pack_indexer_entries(row, form)  # type: ignore[arg-type]
        memory = np.zeros(len(data) + len(scales), np.uint8)
        x = row.numpy().copy()
        _store_key(x, number, memory, 0, len(data))
        assert np.array_equal(memory, torch.cat((data, scales)).numpy())
        expected = kv_pack.unpack_indexer_entries(data, scales, form).numpy()  # type: ignore[arg-type]
        out = np.empty(dim, np.float32)
        _load_key(memory, 0, len(data), dim, number, out)
        assert np.array_equal(out, expected)
        assert np.array_equal(x, expected)


@functools.cache
def _scorer(integers: str) -> Any:
    """A function that scores 64 keys with the fast path, in one of its two forms, or without it."""
    if integers:
        score_integers = index_scan.make_score_integers(integers == "vnni")

    @njit
    def by_integers(query, weights, memory, base, size, extra, scores):
        heads, blocks = weights.shape[0], (weights.shape[0] + 7) // 8
        dim, padded = query.shape[0] // heads, np.zeros(blocks * 8, np.float32)
        padded[:heads] = weights
        groups = dim // 32
        codes, excess = (
            np.zeros(blocks * groups * 256, np.int8),
            np.zeros(blocks * groups * 8, np.int32),
        )
        factors, keys = np.zeros(blocks * groups * 8, np.float32), np.empty(groups * 256, np.uint8)
        key_scales = np.empty(groups * 8, np.float32)
        index_scan.encode_query(query, heads, dim, codes, excess, factors)
        data = memory.ctypes.data + base
        score_integers(
            data, size, data + 64 * size, extra, 64, data, groups, blocks, codes, excess, factors,
            padded, keys, key_scales, scores,
        )  # fmt: skip

    @njit
    def by_floats(query, weights, memory, base, size, extra, scores):
        heads, blocks = weights.shape[0], (weights.shape[0] + 7) // 8
        dim, padded = query.shape[0] // heads, np.zeros(blocks * 8, np.float32)
        padded[:heads] = weights
        turned, keys = np.zeros(dim * blocks * 8, np.float32), np.empty(64 * dim, np.float32)
        sums, part = np.empty(64 * blocks * 8, np.float32), np.empty(64 * blocks * 8, np.float32)
        index_scan.turn_query(query, heads, dim, turned)
        at = memory.ctypes.data + base
        index_scan.score_floats(
            at, size, at + 64 * size, extra, 64, entries.FP4, dim, turned, padded, keys, sums, part,
            scores,
        )  # fmt: skip

    return by_integers if integers else by_floats


@pytest.mark.parametrize(("heads", "dim"), [(8, 64), (16, 32), (64, 128), (5, 32)])
def test_integer_and_float_scans_have_the_same_bits(heads: int, dim: int) -> None:
    compiled.link()
    generator = torch.Generator().manual_seed(2)
    count = 300
    keys = (
        torch.randn(count, dim, generator=generator) * 10 ** torch.linspace(-3, 2, count)[:, None]
    )
    query = fp4.simulate(torch.randn(heads, dim, generator=generator))
    weights = torch.randn(heads, generator=generator)
    data, scales = kv_pack.pack_indexer_entries(keys, "fp4")
    size, extra = data.shape[1], scales.shape[1]
    memory = np.zeros((5, 64 * (size + extra)), np.uint8)
    for e in range(count):
        row = memory[e // 64]
        row[(e % 64) * size : (e % 64 + 1) * size] = data[e].numpy()
        at = 64 * size + (e % 64) * extra
        row[at : at + extra] = scales[e].numpy()
    found = {}
    for kind in (
        "",
        *(["pairs"] if index_scan.INTEGER else []),
        *(["vnni"] if index_scan.VNNI else []),
    ):
        scorer, scores = _scorer(kind), np.zeros((5, 64), np.float32)
        for slab in range(5):
            scorer(query.flatten().numpy(), weights.numpy(), memory.reshape(-1),
                   slab * memory.shape[1], size, extra, scores[slab])  # fmt: skip
        found[kind] = scores.reshape(-1)[:count]
    stored = kv_pack.unpack_indexer_entries(data, scales, "fp4").double()
    expected = ((query.double() @ stored.T).relu() * weights.double()[:, None]).sum(0).numpy()
    scale = np.abs(expected) + (query.double().norm() * stored.norm(dim=1)).numpy()
    for scores in found.values():
        assert np.all(np.abs(scores - expected) <= 1e-6 * scale)
        assert np.array_equal(scores, found[""])


@njit
def _best(scores, k, values, places):
    held, least = 0, np.uint32(0)
    for first in range(0, scores.shape[0], 64):
        part = scores[first : first + 64]
        held, least = selection.offer(part, part.shape[0], first, k, values, places, held, least)
    return selection.keep_best(values, places, held, k)


@pytest.mark.parametrize("count", [3, 130, 131, 1000, 20_000])
def test_the_best_entries_with_ties(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for scores in (
        torch.randn(count, generator=generator),
        torch.randint(-2, 3, (count,), generator=generator).float(),
        torch.zeros(count),
        torch.linspace(-1e-40, 1e-40, count),
        torch.arange(count).float(),  # every entry is better than all before it
        -torch.arange(count).float(),
    ):
        room = selection.capacity(128)
        values, places = np.zeros(room, np.uint32), np.zeros(room, np.int64)
        found = _best(scores.numpy(), 128, values, places)
        expected = scores.sort(descending=True, stable=True).indices[:128].sort().values
        assert places[:found].tolist() == expected.tolist()


@njit
def _exp(x, out):
    for i in range(x.shape[0]):
        out[i] = lanes.exp32(x[i])


def test_exponentials() -> None:
    x = np.linspace(-100, 88, 200_001).astype(np.float32)
    out = np.empty_like(x)
    _exp(x, out)
    exact = np.exp(x.astype(np.float64))
    normal = x > -87
    assert np.max(np.abs(out[normal] / exact[normal] - 1)) < 2.5e-7
    assert np.all(out[x < -87] == 0)
    _exp(np.array([-np.inf, 0], np.float32), out[:2])
    assert out[:2].tolist() == [0, 1]


@njit
def _product(rows_, cols, count, x, w, out, add):
    vector.product(
        rows_, cols, count, x.ctypes.data, count, 1, w.ctypes.data, cols, out.ctypes.data, cols, add
    )


@pytest.mark.parametrize("cols", [8, 16, 24, 32, 72, 96])
def test_products_of_any_shape_sum_in_one_order(cols: int) -> None:
    compiled.link()
    generator = np.random.default_rng(0)
    x = generator.standard_normal((27, 50)).astype(np.float32)
    w = generator.standard_normal((50, cols)).astype(np.float32)
    expected = np.zeros((27, cols))
    for k in range(50):  # a fused multiply-add rounds once: float64 holds its exact value
        expected = (x[:, k, None].astype(np.float64) * w[k] + expected).astype(np.float32)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 27):
        out = np.zeros((count, cols), np.float32)
        _product(count, cols, 50, x[:count], w, out, 0)
        assert np.array_equal(out, expected[:count].astype(np.float32))
        half = np.zeros((count, cols), np.float32)
        _product(count, cols, 20, np.ascontiguousarray(x[:count, :20]), w[:20], half, 0)
        _product(count, cols, 30, np.ascontiguousarray(x[:count, 20:]), w[20:], half, 1)
        assert np.array_equal(half, out)
