"""What runs only at long contexts: grouped index scores, many chunks of entries, blocks of queries.

In the interpreter the sizes from which on these ways are taken are made small; a GPU runs them at
their own sizes, and one row under every bound that an engine's graphs have.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace

import pytest
import torch

from fathom.kernels import operation, use_backend
from fathom.quant.kv_pack import IndexerFormat
from tests.kernels import limits
from tests.kernels import stored_cases as cases
from tests.kernels.backends import DEVICE, DTYPES, GPU, Versions, versions, versions_of
from tests.kernels.stored_cases import FLASH, SMALL, Draw, Sizes

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
attention = importlib.import_module("fathom.kernels.triton.attention")
chunk_index = importlib.import_module("fathom.kernels.triton.chunk_index")
index = importlib.import_module("fathom.kernels.triton.index")

DTYPE = DTYPES[0]
# Few heads: these tests are about entries.
SIZES = FLASH if GPU else replace(SMALL, heads=2, index_heads=4, topk=16)
MILLION = 1 << 20


def scored(
    d: Draw, s: Sizes, positions: list[int], store: cases.Pages, most: int, keys: IndexerFormat
) -> Versions:  # fmt: skip
    """Scores and maxima."""
    return versions_of(
        "index_scores_paged",
        DTYPE,
        d.normal(len(positions), s.index_heads, s.index_dim),
        d.normal(len(positions), 8 + s.index_heads, dtype=torch.float32),
        cases.rows([(p,) for p in positions], DEVICE),
        store.pool,
        store.table,
        index_offset=store.offsets[1],
        page_entries=store.page_entries,
        ratio=4,
        most_entries=most,
        key_format=keys,
    )


def shorten(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    """Groups of several entries, and programs of several blocks, with few entries already."""
    monkeypatch.setattr(index, "MOST_GROUPS", held)
    monkeypatch.setattr(index, "PROGRAMS", 4)


# Entries, and in the interpreter how many maxima may be held: groups of 4 and of 32 entries.
LONG_SCORES = [(32_768, 0), (33_000, 0), (262_144, 0)] if GPU else [(900, 256), (1000, 32)]


@pytest.mark.parametrize("keys", ["fp4", "fp8"])
@pytest.mark.parametrize(("most", "held"), LONG_SCORES)
def test_index_scores_in_groups(
    most: int, held: int, keys: IndexerFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    if held:
        shorten(monkeypatch, held)
    s, d = SIZES, Draw(most, DTYPE, DEVICE)
    store = cases.pages(d, s, 4, 2, most, keys)
    positions = [4 * most - 1, 4 * (most // 3) + 1]
    v = scored(d, s, positions, store, most, keys)
    found, maxima = v.found
    group = found.shape[1] // maxima.shape[1]
    assert group > 1
    assert torch.equal(found.unflatten(1, (-1, group)).amax(2), maxima)
    assert torch.equal(found[:, :most].isinf(), v.exact[0].isinf())
    assert found[:, most:].isinf().all()
    for row, position in enumerate(positions):
        count = (position + 1) // 4
        own = v.each(lambda out, row=row, count=count: out[0][row, :count])
        own.assert_agree(DTYPE, limits.SCORES)
    rows = cases.rows([(p,) for p in positions], DEVICE)
    if not held:  # the sort of thousands takes the interpreter a minute; see test_topk
        picks = operation("topk_positions")(found, maxima, rows, k=s.topk, ratio=4)
        with use_backend("reference"):
            best = operation("topk_positions")(found, found, rows, k=s.topk, ratio=4)
        assert torch.equal(picks, best)


# Beyond 8,192 tokens there is a second chunk of far entries; 40,000 are 5 + 2 chunks, read by fours
# in the interpreter; at 278,000 a GPU's `attention_combine` reads twice.
HCA_POSITIONS = [8191, 8392, 40_000, 278_527, MILLION - 1] if GPU else [8191, 8392, 40_000]


def attended(d: Draw, s: Sizes, positions: list[int], store: cases.Pages, most: int) -> Versions:
    """HCA decode: [tokens, heads, head_dim]."""
    v = versions_of(
        "entry_attention",
        DTYPE,
        d.normal(len(positions), s.heads * s.head_dim),
        cases.rows([(p,) for p in positions], DEVICE),
        d.rotation(len(positions), s.rope_dim),
        cases.ring(d, s, len(positions)),
        d.normal(s.heads, dtype=torch.float32) + 4,
        kind=128,
        head_dim=s.head_dim,
        window=s.window,
        norm_eps=1e-6,
        pool=store.pool,
        table=store.table,
        entry_offset=store.offsets[0],
        page_entries=store.page_entries,
        most_entries=most,
    )
    return v.each(lambda out: out.unflatten(1, (s.heads, -1)))


@pytest.mark.parametrize("position", HCA_POSITIONS)
def test_hca_decode_over_many_chunks(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(attention, "AT_ONCE", 4)
    d = Draw(position, DTYPE, DEVICE)
    entries = (position + 1) // 128
    store = cases.pages(d, SIZES, 128, 2, entries)
    v = attended(d, SIZES, [position, position // 2], store, entries + 70)
    v.assert_agree(DTYPE, limits.ATTENTION)


@pytest.mark.parametrize("start", [20_000] if not GPU else [20_000, 300_000])
def test_hca_prefill_over_many_entries(start: int) -> None:
    s, tokens = SIZES, 70 if GPU else 3
    d = Draw(start, DTYPE, DEVICE)
    store = cases.pages(d, s, 128, 1, (start + tokens) // 128)
    query, rotation = d.normal(tokens, s.heads * s.head_dim), d.rotation(tokens, s.rope_dim)
    recent = d.normal(s.window + tokens, s.head_dim)
    sink = d.normal(s.heads, dtype=torch.float32) + 4

    def prompted(of) -> torch.Tensor:
        return operation("chunk_attention")(
            of(query).clone(), start, rotation, of(recent), sink, kind=128, head_dim=s.head_dim,
            window=s.window, norm_eps=1e-6, pool=store.pool, table=store.table[0],
            entry_offset=store.offsets[0], page_entries=store.page_entries,
        ).unflatten(1, (s.heads, -1))  # fmt: skip

    versions(prompted, DTYPE).assert_agree(DTYPE, limits.ATTENTION)


def test_picks_in_several_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt's middle: some tokens see at most k entries, the others come block by block."""
    s, tokens, each = SIZES, 90 if GPU else 5, 7 if GPU else 2
    d = Draw(3, DTYPE, DEVICE)
    store = cases.pages(d, s, 4, 1, 1200)
    query = d.normal(tokens, s.index_heads, s.index_dim)
    weights = d.normal(tokens, 8 + s.index_heads, dtype=torch.float32)
    where = dict(k=s.topk, index_offset=store.offsets[1], page_entries=store.page_entries, ratio=4)

    def picks(start: int, block: int) -> torch.Tensor:
        room = -(-((start + tokens) // 4) // chunk_index.ENTRIES) * chunk_index.ENTRIES
        monkeypatch.setattr(chunk_index, "SCORE_BYTES", 4 * room * block)
        with use_backend("triton"):
            return operation("chunk_picks")(
                query, weights, start, store.pool, store.table[0], **where
            )

    for start in (4 * s.topk - 2, 4 * s.topk + 300):
        found = picks(start, each)
        if GPU:
            assert torch.equal(found, picks(start, tokens))
        else:  # equal scores but for sums in another order: test_picks looks at those
            with use_backend("reference"):
                expected = operation("chunk_picks")(
                    query, weights, start, store.pool, store.table[0], **where
                )
            assert torch.equal(found, expected)


# The bounds of an engine's graphs, each four times the one before.
BOUNDS = [4096, 16_384, 65_536, 262_144, MILLION] if GPU else [1024, 16_384]


def test_a_row_has_the_same_bits_under_every_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long neighbour moves a row to another graph: other grids, groups, numbers of chunks."""
    s = SIZES if GPU else replace(SIZES, window=64)
    d = Draw(9, DTYPE, DEVICE)
    if not GPU:
        shorten(monkeypatch, 256)
    positions = [BOUNDS[0] - 1, 700, BOUNDS[0] - 100, 90] if GPU else [BOUNDS[0] - 1]
    rows, count = cases.rows([(p,) for p in positions], DEVICE), len(positions)
    keys, far = (cases.pages(d, s, ratio, count, BOUNDS[0] // ratio) for ratio in (4, 128))
    query = d.normal(count, s.index_heads, s.index_dim)
    weights = d.normal(count, s.index_heads, dtype=torch.float32)
    own, rotation = d.normal(count, s.heads * s.head_dim), d.rotation(count, s.rope_dim)
    ring, sink = cases.ring(d, s, count), d.normal(s.heads, dtype=torch.float32) + 4
    seen = []
    for bound in BOUNDS:
        with use_backend("triton"):
            scores, maxima = operation("index_scores_paged")(
                query, weights, rows, keys.pool, keys.table, index_offset=keys.offsets[1],
                page_entries=keys.page_entries, ratio=4, most_entries=bound // 4,
            )  # fmt: skip
            out = operation("entry_attention")(
                own, rows, rotation, ring, sink, kind=128, head_dim=s.head_dim, window=s.window,
                norm_eps=1e-6, pool=far.pool, table=far.table, entry_offset=far.offsets[0],
                page_entries=far.page_entries, most_entries=bound // 128,
            )  # fmt: skip
            found = [scores[:, : BOUNDS[0] // 4], out]
            if GPU:
                choose = operation("topk_positions")
                found.append(choose(scores, maxima, rows, k=s.topk, ratio=4))
        assert scores[:, BOUNDS[0] // 4 :].isinf().all()
        seen.append(found)
    for found in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, seen[0], strict=True))
