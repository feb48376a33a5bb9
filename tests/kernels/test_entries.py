"""What a decode step stores in caches and reads from them: the CUDA kernels against their
references, as backends.py describes.
"""

from __future__ import annotations

import pytest
import torch

from fathom.kernels import operation
from fathom.quant.kv_pack import IndexerFormat
from tests.kernels import limits
from tests.kernels import stored_cases as cases
from tests.kernels.backends import DEVICE, DTYPES, GPU, SIZES, both, cases_of, versions, versions_of
from tests.kernels.stored_cases import Draw, Sizes
from tests.kernels.stored_compare import Left, left_alike

pytestmark = [pytest.mark.parametrize("dtype", DTYPES), pytest.mark.parametrize("s", SIZES)]

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
    same_step(s, dtype, kind, pieces, known, "fp4")


@pytest.mark.parametrize("pieces", cases_of(list(PIECES), ["across a window of 4"]))
def test_store_fp8_keys(s: Sizes, dtype: torch.dtype, pieces: str) -> None:
    same_step(s, dtype, 4, pieces, 0, "fp8")


@pytest.mark.parametrize("kind", [0, 4, 128])
def test_a_whole_step_of_one_sequence(s: Sizes, dtype: torch.dtype, kind: int) -> None:
    """As a prompt's 64 rows, in rings that have room for just so many."""
    same_step(s, dtype, kind, "a whole step", 0, "fp4", spare=WHOLE_STEP)


def same_step(
    s: Sizes, dtype: torch.dtype, kind: int, pieces: str, known: int, keys: IndexerFormat,
    spare: int = cases.SPARE,
) -> None:  # fmt: skip
    """All versions leave the same caches and queries."""
    positions = {**PIECES, "a whole step": [tuple(range(119, 119 + WHOLE_STEP))]}[pieces]
    rows = cases.rows(positions, DEVICE, known)
    tokens, slots = rows.shape[1], len(positions)

    def stored(of) -> Left:
        d = Draw(kind + len(pieces), dtype, DEVICE)
        store = cases.pages(d, s, kind or 4, slots, 256, keys)
        ring = cases.ring(d, s, slots, spare)
        kwargs: dict[str, object] = {}
        states: list[torch.Tensor] = []
        if kind:
            width = 4 * s.head_dim + 4 * s.index_dim + 16 if kind == 4 else 2 * s.head_dim
            main = cases.compressor(d, kind, s.head_dim, slots, spare)
            states.append(main[2])
            kwargs = dict(
                projected=d.normal(tokens, width, dtype=torch.float32),
                compressor=of(main),
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
                index_compressor=of(index),
                index_heads=s.index_heads,
                query=of(d.normal(tokens, 96 + s.index_heads * s.index_dim)),
                key_format=keys,
            )
        before = (ring.clone(), store.pool.clone())
        query = operation("store_entries")(
            of(d.normal(tokens, 64 + s.head_dim)),
            of(1 + d.normal(s.head_dim, scale=0.2)),
            rows,
            d.rotation(tokens, s.rope_dim),
            ring,
            kind=kind,
            norm_eps=1e-6,
            **kwargs,
        )
        return Left(before, ring, store, states, query)

    ends = rows[0].tolist()
    done = [p for p in ends if kind and p % kind == kind - 1 and p - kind + 1 >= known]
    left_alike(versions(stored, dtype), s, dtype, tokens, len(done), keys if kind == 4 else None)


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
    v = versions_of(
        "entry_attention",
        dtype,
        d.normal(tokens, s.heads * s.head_dim + 32),
        rows,
        d.rotation(tokens, s.rope_dim),
        cases.ring(d, s, 2),
        d.normal(s.heads, dtype=torch.float32) + 4,  # so that a wrong sink is seen
        kind=kind,
        head_dim=s.head_dim,
        window=s.window,
        norm_eps=1e-6,
        **kwargs,
    )
    v.each(lambda out: out.unflatten(1, (s.heads, -1))).assert_agree(dtype, limits.ATTENTION)


@pytest.mark.parametrize("keys", ["fp4", "fp8"])
@pytest.mark.parametrize("position", cases_of([2, 3, 500, 4099], [3, 600]))
def test_index_scores(s: Sizes, dtype: torch.dtype, position: int, keys: IndexerFormat) -> None:
    d = Draw(position, dtype, DEVICE)
    store = cases.pages(d, s, 4, 2, 1200, keys)
    v = versions_of(
        "index_scores_paged",
        dtype,
        d.normal(2, s.index_heads, s.index_dim),
        d.normal(2, 8 + s.index_heads, dtype=torch.float32),
        cases.rows([(position,), (700,)], DEVICE),
        store.pool,
        store.table,
        index_offset=store.offsets[1],
        page_entries=store.page_entries,
        ratio=4,
        most_entries=1200,
        key_format=keys,
    )
    count = (position + 1) // 4
    found, maxima = v.found[0][:, :1200], v.found[1]
    assert torch.equal(found.isinf(), v.exact[0].isinf())
    for row, seen in enumerate((count, 175)):
        if seen > 1:  # one alone may come near zero
            own = v.each(lambda out, row=row, seen=seen: out[0][row, :seen])
            own.assert_agree(dtype, limits.SCORES)
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
