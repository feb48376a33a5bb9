"""Decode operations on stored weights and caches: the CUDA kernels against their references.

Where there is no GPU the kernels run in Triton's interpreter, in float32 (it computes BF16 products
wrongly): the logic is tested there, the arithmetic on a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from fathom.engine.sampler import SURE
from fathom.kernels import operation, use_backend
from fathom.quant.kv_pack import IndexerFormat
from tests.kernels import stored_cases as cases
from tests.kernels.stored_cases import FLASH, ODD, SMALL, Draw, Sizes
from tests.kernels.stored_compare import same_pool, same_ring

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
importlib.import_module("fathom.kernels.triton")

DEVICE = "cuda" if GPU else "cpu"


def cases_of(every: list, few: list) -> list:
    """All cases on a GPU, a few in the interpreter, which is thousands of times slower."""
    return every if GPU else few


DTYPES = [torch.bfloat16] if GPU else [torch.float32]
SIZES = [FLASH, ODD] if GPU else [SMALL]
pytestmark = [pytest.mark.parametrize("dtype", DTYPES), pytest.mark.parametrize("s", SIZES)]


def near(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-2


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||; NaN is far."""
    a, b = a.double(), b.double()
    value = ((a - b).norm() / b.norm()).item()
    return value if value == value else float("inf")


def both(op: str, *args: object, **kwargs: object):
    with use_backend("reference"):
        expected = operation(op)(*args, **kwargs)
    with use_backend("triton"):
        found = operation(op)(*args, **kwargs)
    return expected, found


@pytest.mark.parametrize(
    ("op", "tokens"),
    cases_of(
        [("stored_linear", t) for t in (1, 5, 17)]
        + [("chunk_linear", t) for t in (1, 20, 64, 70, 257)],
        [("stored_linear", 1), ("stored_linear", 17), ("chunk_linear", 3), ("chunk_linear", 70)],
    ),
)
@pytest.mark.parametrize("norm", [False, True])
def test_linear(s: Sizes, dtype: torch.dtype, op: str, tokens: int, norm: bool) -> None:
    d = Draw(tokens, dtype, DEVICE)
    codes, scale = d.fp8(224, s.hidden)  # a tile of 128 rows and a part of one
    (expected, other), (found, found_other) = both(
        op,
        d.normal(tokens, s.hidden + 128)[:, : s.hidden],  # rows further apart than they are long
        codes,
        scale,
        norm=1 + d.normal(s.hidden, scale=0.2) if norm else None,
        plain=None if norm else d.normal(72, s.hidden, scale=s.hidden**-0.5),
    )
    assert distance(found, expected) < near(dtype)
    if not norm:
        assert distance(found_other, other) < near(dtype)


@pytest.mark.parametrize(("op", "tokens"), [("stored_linear", 2), ("chunk_linear", 5)])
def test_grouped_linear_reads_its_own_columns(
    s: Sizes, dtype: torch.dtype, op: str, tokens: int
) -> None:
    d = Draw(3, dtype, DEVICE)
    codes, scale = d.fp8(128 * s.groups, 256)
    x = d.normal(tokens, 256 * s.groups)
    (expected, _), (found, _) = both(op, x, codes, scale, groups=s.groups, quantize_input=False)
    assert distance(found, expected) < near(dtype)


@pytest.mark.parametrize(
    ("op", "tokens"),
    cases_of(
        [("mhc_boundary", 1), ("mhc_boundary", 3), ("chunk_mhc_boundary", 300)],
        [("mhc_boundary", 2), ("chunk_mhc_boundary", 2)],
    ),
)
@pytest.mark.parametrize("mode", ["first", "attention", "experts"])
def test_mhc_boundary(s: Sizes, dtype: torch.dtype, op: str, tokens: int, mode: str) -> None:
    d = Draw(tokens, dtype, DEVICE)
    kwargs = {} if mode == "first" else sublayer(d, s, tokens)
    if mode == "attention":
        del kwargs["pairs"]
    expected, found = both(
        op,
        d.normal(tokens, 4, s.hidden),
        d.normal(24, 4 * s.hidden, scale=0.02, dtype=torch.float32),
        d.normal(24, dtype=torch.float32),
        d.normal(3, dtype=torch.float32),
        1 + d.normal(s.hidden, scale=0.2),
        iterations=20,
        eps=1e-6,
        norm_eps=1e-6,
        **kwargs,
    )
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < near(dtype)


def sublayer(d: Draw, s: Sizes, tokens: int) -> dict[str, torch.Tensor]:
    """What a sublayer leaves to be written."""
    return {
        "y": d.normal(tokens, s.hidden),
        "pairs": d.normal(tokens, s.chosen, s.hidden),
        "post": d.normal(tokens, 4, dtype=torch.float32).sigmoid(),
        "comb": d.normal(tokens, 4, 4, dtype=torch.float32).softmax(-1),
    }


def test_the_last_write_and_the_merge(s: Sizes, dtype: torch.dtype) -> None:
    d = Draw(5, dtype, DEVICE)
    streams, kwargs = d.normal(3, 4, s.hidden), sublayer(d, s, 3)
    places = torch.tensor([4, 0, 2], dtype=torch.int32, device=DEVICE)
    site = (
        d.normal(4, 4 * s.hidden, scale=0.02, dtype=torch.float32),
        d.normal(4, dtype=torch.float32),
        d.normal(1, dtype=torch.float32),
        1 + d.normal(s.hidden, scale=0.2),
    )
    found = []
    for backend in ("reference", "triton"):
        kept = torch.full((5, 4, s.hidden), torch.nan, dtype=dtype, device=DEVICE)
        with use_backend(backend):
            operation("mhc_write")(streams, **kwargs, places=places, out=kept)
            merged = operation("stream_head")(kept, places[:2], *site, eps=1e-6, norm_eps=1e-6)
        assert kept[[1, 3]].isnan().all()
        assert merged.dtype == torch.float32
        found.append((kept[[4, 0, 2]], merged))
    for a, b in zip(*found, strict=True):
        assert distance(b, a) < near(dtype)


@pytest.mark.parametrize("tokens", cases_of([1, 16, 50], [3]))
def test_where_a_step_begins_and_ends(s: Sizes, dtype: torch.dtype, tokens: int) -> None:
    d = Draw(tokens, dtype, DEVICE)
    positions = d.integers(900_000, tokens)
    rows = cases.rows([tuple(positions.tolist())], DEVICE)
    turns = d.normal(2, s.rope_dim // 2, dtype=torch.float32).abs()
    expected, found = both("step_rotations", rows, turns)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    expected, found = both("step_streams", d.integers(70, tokens), d.normal(70, s.hidden), 4)
    assert torch.equal(found, expected)
    hidden, weight = d.normal(tokens, s.hidden), d.normal(70, s.hidden, scale=s.hidden**-0.5)
    expected, found = both("head_logits", hidden.float(), weight)
    assert distance(found, expected) < near(dtype)
    logits = d.normal(tokens, 5000, scale=4.0, dtype=torch.float32)
    logits[:, 4700] = logits[:, 300] = 30.0  # of two largest the first
    if tokens > 1:
        logits[1] = logits[1, 0]  # all alike: the draw may end anywhere
    draws = torch.rand(2, tokens, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draws[0] += 0.5
    draws[0, 0] = 0.0
    draws = draws.to(DEVICE)
    expected, found = both("logit_summary", logits, draws)
    assert torch.equal(found[:, :2], expected[:, :2])
    torch.testing.assert_close(found[:, 2], expected[:, 2], rtol=1e-7, atol=0)
    assert torch.equal(found[:, 3:5], expected[:, 3:5])
    torch.testing.assert_close(found[:, 5], expected[:, 5], rtol=0, atol=1e-12)
    draws[0] = 1.0
    for number in range(4):  # every part of the vocabulary, and its last token
        draws[1] = (number + 0.9999) / 4
        expected, found = both("logit_summary", logits, draws)
        sure = found[:, 5] > SURE
        assert torch.equal(found[sure, 3], expected[sure, 3])
    logits[0, 17] = torch.nan
    for result in both("logit_summary", logits, draws):
        assert result[0, 0].isnan()
        assert not result[0, 5] > SURE
        assert not result[1:].isnan().any()


WHOLE_STEP = 64 if GPU else 20  # rows
PIECES = {
    "one token each": [(0,), (3,), (127,)],
    "across a window of 4": [(6, 7, 8), (128,)],
    "across a window of 128": [(126, 127, 128, 129, 130), (255,)],
    "from the beginning": [(0, 1, 2, 3, 4), (511,)],
}


@pytest.mark.parametrize("kind", [0, 4, 128])
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("known", cases_of([0, 128], [0]))
def test_store_entries(s: Sizes, dtype: torch.dtype, kind: int, pieces: str, known: int) -> None:
    stored_alike(s, dtype, kind, pieces, known, "fp4")


@pytest.mark.parametrize("pieces", cases_of(list(PIECES), ["across a window of 4"]))
def test_store_fp8_keys(s: Sizes, dtype: torch.dtype, pieces: str) -> None:
    stored_alike(s, dtype, 4, pieces, 0, "fp8")


@pytest.mark.parametrize("kind", [0, 4, 128])
def test_a_whole_step_of_one_sequence(s: Sizes, dtype: torch.dtype, kind: int) -> None:
    """As a prompt's 64 rows, in rings that have room for just so many."""
    stored_alike(s, dtype, kind, "a whole step", 0, "fp4", spare=WHOLE_STEP)


def stored_alike(
    s: Sizes, dtype: torch.dtype, kind: int, pieces: str, known: int, keys: IndexerFormat,
    spare: int = cases.SPARE,
) -> None:  # fmt: skip
    """Both versions leave the same caches and queries."""
    results = []
    for backend in ("reference", "triton"):
        d = Draw(kind + len(pieces), dtype, DEVICE)
        positions = {**PIECES, "a whole step": [tuple(range(119, 119 + WHOLE_STEP))]}[pieces]
        rows = cases.rows(positions, DEVICE, known)
        tokens, slots = rows.shape[1], len(positions)
        store = cases.pages(d, s, kind or 4, slots, 256, keys)
        kept = cases.ring(d, s, slots, spare)
        index_rows = s.index_heads * s.index_dim
        kwargs: dict[str, object] = {}
        states: list[torch.Tensor] = []
        if kind:
            width = 4 * s.head_dim + 4 * s.index_dim + 16 if kind == 4 else 2 * s.head_dim
            main = cases.compressor(d, kind, s.head_dim, slots, spare)
            states.append(main[2])
            kwargs = dict(
                projected=d.normal(tokens, width, dtype=torch.float32),
                compressor=main,
                entry_rotation=d.rotation(tokens, s.rope_dim),
                table=store.table,
                pool=store.pool,
                offsets=store.offsets,
                page_entries=store.page_entries,
            )
        if kind == 4:
            index = cases.compressor(d, 4, s.index_dim, slots, spare)
            states.append(index[2])
            kwargs |= dict(
                index_compressor=index,
                index_heads=s.index_heads,
                query=d.normal(tokens, 96 + index_rows),
                key_format=keys,
            )
        before, ring_before = store.pool.clone(), kept.clone()
        with use_backend(backend):
            query = operation("store_entries")(
                d.normal(tokens, 64 + s.head_dim),
                1 + d.normal(s.head_dim, scale=0.2),
                rows,
                d.rotation(tokens, s.rope_dim),
                kept,
                kind=kind,
                norm_eps=1e-6,
                **kwargs,
            )
        positions = rows[0].tolist()
        done = [p for p in positions if kind and p % kind == kind - 1 and p - kind + 1 >= known]
        assert bool((before != store.pool).any()) == bool(done)
        results.append((kept, store, states, query))
    (ring_a, store_a, states_a, query_a), (ring_b, store_b, states_b, query_b) = results
    same_ring(ring_b, ring_a, ring_before, s, tokens)
    same_pool(store_b, store_a, before, s, len(done), keys if kind == 4 else None)
    for a, b in zip(states_a, states_b, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if query_a is not None:
        assert distance(query_b, query_a) < 5e-3


@pytest.mark.parametrize("position", cases_of([0, 5, 127, 128, 700], [0, 127, 300]))
@pytest.mark.parametrize("kind", [0, 4, 128])
def test_entry_attention(s: Sizes, dtype: torch.dtype, kind: int, position: int) -> None:
    d = Draw(position, dtype, DEVICE)
    rows = cases.rows([(position, position + 1), (max(0, position - 1),)], DEVICE)
    tokens = rows.shape[1]
    store = cases.pages(d, s, kind or 4, 2, 256)
    kwargs: dict[str, object] = {}
    if kind:
        kwargs = dict(
            pool=store.pool,
            table=store.table,
            entry_offset=store.offsets[0],
            page_entries=store.page_entries,
            most_entries=256,
        )
    if kind == 4:
        visible = max(1, position // 4)  # the last token's, which sees no more
        picks = d.permutation(visible)[: s.topk].repeat(tokens, 1)
        picks = torch.nn.functional.pad(picks, (0, s.topk - picks.shape[1]), value=-1)
        if position < 4:
            picks = torch.full_like(picks, -1)
        kwargs["picks"] = picks.contiguous()
    expected, found = both(
        "entry_attention",
        d.normal(tokens, s.heads * s.head_dim + 32),
        rows,
        d.rotation(tokens, s.rope_dim),
        cases.ring(d, s, 2),
        d.normal(s.heads, dtype=torch.float32),
        kind=kind,
        head_dim=s.head_dim,
        window=s.window,
        norm_eps=1e-6,
        **kwargs,
    )
    assert distance(found, expected) < near(dtype)


@pytest.mark.parametrize("keys", ["fp4", "fp8"])
@pytest.mark.parametrize("position", cases_of([2, 3, 500, 4099], [3, 600]))
def test_index_scores(s: Sizes, dtype: torch.dtype, position: int, keys: IndexerFormat) -> None:
    d = Draw(position, dtype, DEVICE)
    store = cases.pages(d, s, 4, 2, 1200, keys)
    (expected, _), (found, maxima) = both(
        "index_scores_paged",
        d.normal(2, s.index_heads, s.index_dim),
        d.normal(2, 8 + s.index_heads, dtype=torch.float32),
        cases.rows([(position,), (7,)], DEVICE),
        store.pool,
        store.table,
        index_offset=store.offsets[1],
        page_entries=store.page_entries,
        ratio=4,
        most_entries=1200,
        key_format=keys,
    )
    count = (position + 1) // 4
    found = found[:, :1200]
    assert torch.equal(found.isinf(), expected.isinf())
    if count:
        assert distance(found[0, :count], expected[0, :count]) < near(dtype)
    assert maxima.max(1).values.tolist() == found.max(1).values.tolist()


@pytest.mark.parametrize("shape", ["random", "ties", "clustered", "few", "all equal"])
def test_topk(s: Sizes, dtype: torch.dtype, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fathom.kernels.triton import index

    d = Draw(1, torch.float32, DEVICE)
    if not GPU:  # sorting thousands takes the interpreter a minute
        monkeypatch.setattr(index, "SORTED", 64)
        monkeypatch.setattr(index, "COARSE", 64)
        monkeypatch.setattr(index, "TILE", 32)
    entries = 8192 if GPU else 1024
    scores = d.normal(2, entries)
    visible = entries - 100
    if shape == "ties":
        scores = (scores * 4).round() / 4
    elif shape == "clustered":  # far more than can be sorted at once pass the bound
        scores[:, entries // 8 : entries // 8 * 5] += 100
    elif shape == "few":
        visible = s.topk - 2
    elif shape == "all equal":
        scores[:] = 0.0
    scores[:, visible:] = -torch.inf
    group = 8
    maxima = scores.view(2, -1, group).amax(-1).contiguous()
    rows = cases.rows([(4 * visible, 4 * visible + 2)], DEVICE)
    expected, found = both("topk_positions", scores, maxima, rows, k=s.topk, ratio=4)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("op", "tokens", "routing"),
    cases_of(
        [("stored_moe", t, r) for t in (1, 4, 20) for r in ("bias", "hash", "one expert")]
        + [("chunk_moe", t, "bias") for t in (1, 70)]
        + [("chunk_moe", t, "hash") for t in (64, 70)]
        + [("chunk_moe", t, "one expert") for t in (20, 130)],
        [
            ("stored_moe", 1, "bias"),
            ("stored_moe", 3, "hash"),
            ("stored_moe", 7, "one expert"),
            ("chunk_moe", 1, "bias"),
            ("chunk_moe", 7, "hash"),
            ("chunk_moe", 21, "one expert"),
        ],
    ),
)
def test_moe(
    s: Sizes,
    dtype: torch.dtype,
    op: str,
    tokens: int,
    routing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not GPU:  # the interpreter's time is the number of programs
        from fathom.kernels.triton import chunk_experts, few_experts

        monkeypatch.setattr(few_experts, "ROWS", 128)
        monkeypatch.setattr(chunk_experts, "TOKENS", 16)
        monkeypatch.setattr(chunk_experts, "FEW", 0)  # its own kernels, with few tokens
    d = Draw(tokens, dtype, DEVICE)
    bias = d.normal(s.experts, scale=0.1, dtype=torch.float32)
    table = None
    if routing == "hash":
        rows = [d.permutation(s.experts)[: s.chosen] for _ in range(s.vocab)]
        table = torch.stack(rows).long()
    elif routing == "one expert":
        bias[: s.chosen] += 100
    routed = (
        *d.fp4(s.experts, s.inner, s.hidden),
        *d.fp4(s.experts, s.inner, s.hidden),
        *d.fp4(s.experts, s.hidden, s.inner),
    )
    shared = (*d.fp8(2 * s.inner, s.hidden), *d.fp8(s.hidden, s.inner))
    expected, found = both(
        op,
        d.normal(tokens, s.hidden),
        d.integers(s.vocab, tokens, dtype=torch.int64),
        d.normal(s.experts, s.hidden, scale=0.1),
        routed,
        shared,
        topk=s.chosen,
        scaling_factor=1.5,
        limit=10.0,
        bias=None if table is not None else bias,
        table=table,
    )
    same = (found[2] == expected[2]).all(1)
    # The matrix units may swap two experts whose scores are equal to the last bits.
    assert same.float().mean() > (0.98 if op == "chunk_moe" else 0.999)
    assert distance(found[0][same], expected[0][same]) < near(dtype)
    assert distance(found[1], expected[1]) < near(dtype)
