"""Decode operations on stored weights and caches: the CUDA kernels against their references.

Where there is no GPU the kernels run in Triton's interpreter, in float32 (it computes BF16 products
wrongly): the logic is tested there, the arithmetic on a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from fathom.kernels import operation, use_backend
from tests.kernels import stored_cases as cases
from tests.kernels.stored_cases import FLASH, SMALL, Draw, Sizes

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
SIZES = [FLASH] if GPU else [SMALL]
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


@pytest.mark.parametrize("tokens", cases_of([1, 5, 17], [1, 17]))
@pytest.mark.parametrize(("norm", "plain"), [(False, True), (True, False)])
def test_linear(s: Sizes, dtype: torch.dtype, tokens: int, norm: bool, plain: bool) -> None:
    d = Draw(tokens, dtype, DEVICE)
    codes, scale = d.fp8(256, s.hidden)
    (expected, other), (found, found_other) = both(
        "stored_linear",
        d.normal(tokens, s.hidden),
        codes,
        scale,
        norm=1 + d.normal(s.hidden, scale=0.2) if norm else None,
        plain=d.normal(72, s.hidden, scale=s.hidden**-0.5) if plain else None,
    )
    assert distance(found, expected) < near(dtype)
    if plain:
        assert distance(found_other, other) < near(dtype)


def test_grouped_linear_reads_its_own_columns(s: Sizes, dtype: torch.dtype) -> None:
    d = Draw(3, dtype, DEVICE)
    codes, scale = d.fp8(128 * s.groups, 256)
    x = d.normal(2, 256 * s.groups)
    (expected, _), (found, _) = both(
        "stored_linear", x, codes, scale, groups=s.groups, quantize_input=False
    )
    assert distance(found, expected) < near(dtype)


@pytest.mark.parametrize("tokens", cases_of([1, 3], [2]))
@pytest.mark.parametrize("mode", ["first", "attention", "experts"])
def test_mhc_boundary(s: Sizes, dtype: torch.dtype, tokens: int, mode: str) -> None:
    d = Draw(tokens, dtype, DEVICE)
    kwargs: dict[str, object] = {}
    if mode != "first":
        comb = d.normal(tokens, 4, 4, dtype=torch.float32).softmax(-1)
        post = d.normal(tokens, 4, dtype=torch.float32).sigmoid()
        kwargs = {"y": d.normal(tokens, s.hidden), "post": post, "comb": comb}
    if mode == "experts":
        kwargs["pairs"] = d.normal(tokens, s.chosen, s.hidden)
    expected, found = both(
        "mhc_boundary",
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


@pytest.mark.parametrize("kind", [0, 4, 128])
@pytest.mark.parametrize(
    "positions", cases_of([(0, 3), (6, 7), (127, 128), (255, 511)], [(0, 3), (127, 128)])
)
def test_store_entries(s: Sizes, dtype: torch.dtype, kind: int, positions: tuple[int, ...]) -> None:
    results = []
    for backend in ("reference", "triton"):
        d = Draw(kind + positions[0], dtype, DEVICE)
        tokens = len(positions)
        store = cases.pages(d, s, kind or 4, tokens, 256)
        kept = cases.ring(d, s, tokens)
        index_rows = s.index_heads * s.index_dim
        kwargs: dict[str, object] = {}
        states: list[torch.Tensor] = []
        if kind:
            width = 4 * s.head_dim + 4 * s.index_dim + 16 if kind == 4 else 2 * s.head_dim
            main = cases.compressor(d, kind, s.head_dim, tokens)
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
            index = cases.compressor(d, 4, s.index_dim, tokens)
            states.append(index[2])
            kwargs |= dict(
                index_compressor=index,
                index_heads=s.index_heads,
                query=d.normal(tokens, 96 + index_rows),
            )
        with use_backend(backend):
            query = operation("store_entries")(
                d.normal(tokens, 64 + s.head_dim),
                1 + d.normal(s.head_dim, scale=0.2),
                torch.tensor(positions, dtype=torch.int32, device=DEVICE),
                d.rotation(tokens, s.rope_dim),
                kept,
                kind=kind,
                window=s.window,
                norm_eps=1e-6,
                **kwargs,
            )
        results.append((kept, store.pool, states, query))
    (ring_a, pool_a, states_a, query_a), (ring_b, pool_b, states_b, query_b) = results
    # A value at a rounding boundary may fall either way: a few codes in thousands.
    assert (ring_a != ring_b).float().mean() < 1e-3
    assert (pool_a != pool_b).float().mean() < 1e-3
    for a, b in zip(states_a, states_b, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if query_a is not None:
        assert distance(query_b, query_a) < 5e-3


@pytest.mark.parametrize("position", cases_of([0, 5, 127, 128, 700], [0, 127, 300]))
@pytest.mark.parametrize("kind", [0, 4, 128])
def test_entry_attention(s: Sizes, dtype: torch.dtype, kind: int, position: int) -> None:
    d = Draw(position, dtype, DEVICE)
    tokens = 2
    store = cases.pages(d, s, kind or 4, tokens, 256)
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
        visible = max(1, position // 4)  # the second token's, which sees no more
        picks = d.permutation(visible)[: s.topk].repeat(tokens, 1)
        picks = torch.nn.functional.pad(picks, (0, s.topk - picks.shape[1]), value=-1)
        if position < 4:
            picks = torch.full_like(picks, -1)
        kwargs["picks"] = picks.contiguous()
    expected, found = both(
        "entry_attention",
        d.normal(tokens, s.heads * s.head_dim + 32),
        torch.tensor([position, max(0, position - 1)], dtype=torch.int32, device=DEVICE),
        d.rotation(tokens, s.rope_dim),
        cases.ring(d, s, tokens),
        d.normal(s.heads, dtype=torch.float32),
        kind=kind,
        head_dim=s.head_dim,
        window=s.window,
        norm_eps=1e-6,
        **kwargs,
    )
    assert distance(found, expected) < near(dtype)


@pytest.mark.parametrize("position", cases_of([2, 3, 500, 4099], [3, 600]))
def test_index_scores(s: Sizes, dtype: torch.dtype, position: int) -> None:
    d = Draw(position, dtype, DEVICE)
    store = cases.pages(d, s, 4, 2, 1200)
    (expected, _), (found, maxima) = both(
        "index_scores_paged",
        d.normal(2, s.index_heads, s.index_dim),
        d.normal(2, 8 + s.index_heads, dtype=torch.float32),
        torch.tensor([position, 7], dtype=torch.int32, device=DEVICE),
        store.pool,
        store.table,
        index_offset=store.offsets[1],
        page_entries=store.page_entries,
        ratio=4,
        most_entries=1200,
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
        monkeypatch.setattr(index, "COLLECT", 256)
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
    positions = torch.tensor([4 * visible, 4 * visible + 2], dtype=torch.int32, device=DEVICE)
    expected, found = both("topk_positions", scores, maxima, positions, k=s.topk, ratio=4)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("tokens", "routing"),
    cases_of(
        [(t, r) for t in (1, 4, 20) for r in ("bias", "hash", "one expert")],
        [(1, "bias"), (3, "hash"), (7, "one expert")],
    ),
)
def test_moe(
    s: Sizes, dtype: torch.dtype, tokens: int, routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GPU:  # the interpreter's time is the number of programs
        from fathom.kernels.triton import stored_experts

        monkeypatch.setattr(stored_experts, "UP_SHARE", 1)
        monkeypatch.setattr(stored_experts, "DOWN_SHARE", 1)
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
        "stored_moe",
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
    assert torch.equal(found[2], expected[2])
    assert distance(found[0], expected[0]) < near(dtype)
    assert distance(found[1], expected[1]) < near(dtype)
