"""Operations that know a chunk's tokens to follow one another: CUDA kernels against references.

As backends.py describes, Triton's interpreter runs them in float32 where there is no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace

import pytest
import torch

from fathom.kernels import operation
from fathom.kernels.reference import stored as reference
from fathom.quant import kv_pack
from fathom.quant.kv_pack import IndexerFormat
from tests.kernels import limits
from tests.kernels import stored_cases as cases
from tests.kernels.backends import DEVICE, DTYPES, GPU, SIZES, cases_of, versions, versions_of
from tests.kernels.limits import FLOAT32
from tests.kernels.stored_cases import Draw, Sizes
from tests.kernels.stored_compare import Left, left_alike

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
chunk_index = importlib.import_module("fathom.kernels.triton.chunk_index")

pytestmark = [pytest.mark.parametrize("dtype", DTYPES), pytest.mark.parametrize("s", SIZES)]


@pytest.mark.parametrize("kind", [0, 4, 128])
@pytest.mark.parametrize(
    ("start", "tokens"),
    cases_of(
        [(0, 1), (0, 9), (3, 6), (5, 2), (120, 9), (126, 131), (256, 300)],
        [(0, 2), (5, 2), (119, 19)],
    ),
)
@pytest.mark.parametrize("known", cases_of([0, 256], [0]))
def test_entries(
    s: Sizes, dtype: torch.dtype, kind: int, start: int, tokens: int, known: int
) -> None:
    same_chunk(s, dtype, kind, start, tokens, known, "fp4")


@pytest.mark.parametrize(("start", "tokens"), cases_of([(3, 6), (256, 300)], [(5, 7)]))
def test_fp8_keys(s: Sizes, dtype: torch.dtype, start: int, tokens: int) -> None:
    same_chunk(s, dtype, 4, start, tokens, 0, "fp8")


def same_chunk(
    s: Sizes, dtype: torch.dtype, kind: int, start: int, tokens: int, known: int,
    keys: IndexerFormat,
) -> None:  # fmt: skip
    """All versions leave the same caches and queries."""
    if not GPU:
        s = replace(s, window=16)  # so that a short chunk wraps the ring

    def stored(of) -> Left:
        d = Draw(kind + start + tokens, dtype, DEVICE)
        store = cases.pages(d, s, kind or 4, 1, 256, keys)
        ring = cases.ring(d, s, 1)[0]
        kwargs: dict[str, object] = {}
        states: list[torch.Tensor] = []
        if kind:
            width = 4 * s.head_dim + 4 * s.index_dim + 16 if kind == 4 else 2 * s.head_dim
            ape, norm, state = cases.compressor(d, kind, s.head_dim, 1)
            states.append(state[0])
            touched = (start + tokens - 1) // kind - start // kind + 1
            kwargs = dict(
                projected=d.normal(tokens, width, dtype=torch.float32),
                compressor=of((ape, norm, state[0])),
                entry_rotation=d.rotation(touched, s.rope_dim),
                table=store.table[0],
                pool=store.pool,
                offsets=store.offsets,
                page_entries=store.page_entries,
            )
        if kind == 4:
            ape, norm, state = cases.compressor(d, 4, s.index_dim, 1)
            states.append(state[0])
            kwargs |= dict(
                index_compressor=of((ape, norm, state[0])),
                index_heads=s.index_heads,
                query=of(d.normal(tokens, 96 + s.index_heads * s.index_dim)),
                key_format=keys,
            )
        before = (ring.clone(), store.pool.clone())
        recent, query = operation("chunk_entries")(
            of(d.normal(tokens, 64 + s.head_dim)),
            of(1 + d.normal(s.head_dim, scale=0.2)),
            start,
            d.rotation(tokens, s.rope_dim),
            ring,
            kind=kind,
            window=s.window,
            norm_eps=1e-6,
            known=known,
            **kwargs,
        )
        if kind == 128:  # a chunk is never taken back: only the newest state counts
            states[0] = states[0][(start + tokens - 1) % (1 + cases.SPARE)]
        return Left(before, ring, store, states, query, recent)

    ends = range(start, start + tokens)
    done = [p for p in ends if kind and p % kind == kind - 1 and p - kind + 1 >= known]
    v = versions(stored, dtype)
    room = kv_pack.ring_entries(v.found.ring, s.head_dim, s.rope_dim)
    own = keys if kind == 4 else None
    left_alike(v, s, dtype, min(tokens, room), len(done), own)


@pytest.mark.parametrize("kind", [0, 4, 128])
@pytest.mark.parametrize(
    ("start", "tokens"), cases_of([(0, 1), (0, 70), (125, 7), (700, 130)], [(0, 3), (254, 3)])
)
def test_attention(s: Sizes, dtype: torch.dtype, kind: int, start: int, tokens: int) -> None:
    d = Draw(start + tokens, dtype, DEVICE)
    store = cases.pages(d, s, kind or 4, 1, 256)
    kwargs: dict[str, object] = {}
    if kind:
        kwargs = dict(
            pool=store.pool,
            table=store.table[0],
            entry_offset=store.offsets[0],
            page_entries=store.page_entries,
        )
    if kind == 4:
        rows = []
        for position in range(start, start + tokens):
            visible = (position + 1) // 4
            own = d.permutation(max(1, visible))[: min(visible, s.topk)].sort().values
            rows.append(torch.nn.functional.pad(own, (0, s.topk - own.shape[0]), value=-1))
        kwargs["picks"] = torch.stack(rows).contiguous()
    recent = d.normal(s.window + tokens, s.head_dim)
    query = d.normal(tokens, s.heads * s.head_dim + 32)
    rotation = d.rotation(tokens, s.rope_dim)
    sink = d.normal(s.heads, dtype=torch.float32) + 4  # so that a wrong sink is seen

    def attended(of) -> torch.Tensor:
        return operation("chunk_attention")(
            of(query).clone(), start, rotation, of(recent), sink, kind=kind, head_dim=s.head_dim,
            window=s.window, norm_eps=1e-6, **kwargs,
        ).unflatten(1, (s.heads, -1))  # fmt: skip

    versions(attended, dtype).assert_agree(dtype, limits.ATTENTION)


@pytest.mark.parametrize(
    ("start", "tokens"),
    cases_of([(0, 60), (2043, 90), (3000, 50), (4090, 9)], [(120, 12), (509, 5)]),
)
@pytest.mark.parametrize("keys", ["fp4", "fp8"])
def test_picks(s: Sizes, dtype: torch.dtype, start: int, tokens: int, keys: IndexerFormat) -> None:
    """Equal scores but for sums in another order: compare what was picked by its scores."""
    d = Draw(start, dtype, DEVICE)
    store = cases.pages(d, s, 4, 1, 1200, keys)
    query = d.normal(tokens, s.index_heads, s.index_dim)
    weights = d.normal(tokens, 8 + s.index_heads, dtype=torch.float32)
    where = dict(
        index_offset=store.offsets[1], page_entries=store.page_entries, ratio=4, key_format=keys
    )
    v = versions_of(
        "chunk_picks", dtype, query, weights, start, store.pool, store.table[0], k=s.topk, **where
    )
    rows = torch.zeros(4, tokens, dtype=torch.int32, device=DEVICE)
    rows[0] = torch.arange(start, start + tokens)
    found = v.found
    for other, own, limit in (
        (v.expected, query, limits.SCORES.expected),
        (v.exact, query.float(), limits.SCORES.exact if dtype != torch.float32 else FLOAT32),
    ):
        scores, _ = reference.index_scores_paged(
            own, weights, rows, store.pool, store.table, most_entries=1200, **where
        )
        assert ((found >= 0) == (other >= 0)).all()
        last, best = (
            scores.gather(1, p.clamp(min=0).long()).masked_fill(p < 0, torch.inf).amin(1)
            for p in (found, other)
        )
        seen = scores.isfinite()
        size = (scores.masked_fill(~seen, 0).square().sum(1) / seen.sum(1).clamp(min=1)).sqrt()
        # Either score of the two that changed places may be off by the limit.
        assert (
            best.where(size > 0, 0) - last.where(size > 0, 0) <= 2 * limit.elements * size
        ).all()
    ordered = found.masked_fill(found < 0, 2**30)
    assert (ordered.diff(dim=1)[ordered[:, 1:] < 2**30] > 0).all()
    assert (found == v.expected).float().mean() > 0.9


@pytest.mark.parametrize("shape", ["random", "ties", "all equal", "few", "signs of zero"])
def test_select(s: Sizes, dtype: torch.dtype, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    d = Draw(1, torch.float32, DEVICE)
    if not GPU:
        monkeypatch.setattr(chunk_index, "SELECT_BLOCK", 256)
    entries = 20_000 if GPU else 700
    scores = d.normal(3, entries)
    if shape == "ties":
        scores = (scores * 4).round() / 4
    elif shape == "all equal":
        scores[:] = 0.0
    elif shape == "signs of zero":
        scores = torch.where(scores > 0, 0.0, -0.0)
    start = 4 * (s.topk - 1) if shape == "few" else 4 * entries - 4
    rows = torch.arange(start, start + 3, dtype=torch.int32, device=DEVICE)[None]
    picks = torch.full((3, s.topk), -7, dtype=torch.int32, device=DEVICE)
    chunk_index.select(scores, start, picks, 4)
    expected = reference.topk_positions(scores, scores, rows, k=s.topk, ratio=4)
    none = 2**30
    ascending = expected.masked_fill(expected < 0, none).sort(dim=1).values
    assert torch.equal(picks, ascending.masked_fill(ascending == none, -1))


def test_the_memory_plan_knows_the_scores_block(s: Sizes, dtype: torch.dtype) -> None:
    from fathom.model import prefill_memory

    assert prefill_memory.SCORE_BYTES == chunk_index.SCORE_BYTES
