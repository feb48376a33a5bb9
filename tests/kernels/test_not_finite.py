"""NaN stays NaN: a token whose input holds one gets NaN, every other token the bits it has without.

As backends.py describes, Triton's interpreter runs the kernels in float32 where there is no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import pytest
import torch

from fathom.kernels import operation, registry, use_backend
from fathom.kernels.reference.stored import read_rows
from fathom.quant import kv_pack
from fathom.quant.kv_pack import IndexerFormat
from tests.kernels import stored_cases as cases
from tests.kernels.backends import DEVICE, DTYPES, GPU
from tests.kernels.stored_cases import FLASH, SMALL, Draw, Sizes
from tests.kernels.test_stored import sublayer

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
chunk_experts = importlib.import_module("fathom.kernels.triton.chunk_experts")
chunk_linear = importlib.import_module("fathom.kernels.triton.chunk_linear")
few_experts = importlib.import_module("fathom.kernels.triton.few_experts")
formats = importlib.import_module("fathom.kernels.triton.formats")
route = importlib.import_module("fathom.kernels.triton.route")

S: Sizes = FLASH if GPU else SMALL
DTYPE = DTYPES[0]
MANY = 70 if GPU else 3  # tokens of a chunk
ROW = 1  # whose input holds a NaN
SIGNED = GPU  # the device's NaN is positive and so sorts above all; what x86 computes is negative
pytestmark = [
    pytest.mark.parametrize("backend", ["reference", "triton"]),
    # The interpreter's numpy says so of NaN.
    pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning"),
]
Run = Callable[[torch.Tensor], tuple[torch.Tensor | None, ...]]


def one_row_is_nan(run: Run, x: torch.Tensor, backend: str, at: object = 3) -> None:
    """run(x) returns tensors with a row a token; `at`: where in the row's input the NaN is put."""
    damaged = x.clone()
    damaged[ROW][at] = torch.nan
    with use_backend(backend):
        clean, found = run(x.clone()), run(damaged)
    others = torch.arange(len(x), device=DEVICE) != ROW
    for a, b in zip(found, clean, strict=True):
        if a is not None and b is not None:
            assert not b.isnan().any()
            assert a[ROW].isnan().all()
            assert torch.equal(a[others], b[others])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter prefill's own kernels, with few tokens, and few programs."""
    if not GPU:
        monkeypatch.setattr(chunk_linear, "FEW", 0)
        monkeypatch.setattr(chunk_experts, "FEW", 0)
        monkeypatch.setattr(chunk_experts, "TOKENS", 16)
        monkeypatch.setattr(few_experts, "ROWS", 128)


@pytest.mark.parametrize(("op", "tokens"), [("stored_linear", 3), ("chunk_linear", MANY)])
@pytest.mark.parametrize("way", ["rounded", "normed", "as it is"])
def test_linear(backend: str, op: str, tokens: int, way: str) -> None:
    d = Draw(1, DTYPE, DEVICE)
    codes, scale = d.fp8(128, S.hidden)
    norm = 1 + d.normal(S.hidden, scale=0.2) if way == "normed" else None
    plain = d.normal(16, S.hidden) if way == "rounded" else None
    one_row_is_nan(
        lambda x: operation(op)(
            x, codes, scale, norm=norm, plain=plain, quantize_input=way != "as it is"
        ),
        d.normal(tokens, S.hidden),
        backend,
    )


@pytest.mark.parametrize(("op", "tokens"), [("stored_linear", 3), ("chunk_linear", MANY)])
def test_a_weight_that_is_nan(backend: str, op: str, tokens: int) -> None:
    """As no checkpoint that is read has it: it shows, in its own row of the matrix."""
    if backend == "reference":
        pytest.skip("dequantize_weight refuses a NaN scale")
    d = Draw(1, DTYPE, DEVICE)
    codes, scale = d.fp8(256, S.hidden)
    codes[7, 5], scale[1, 0] = 0x7F, 255
    with use_backend(backend):
        out, _ = operation(op)(d.normal(tokens, S.hidden), codes, scale, quantize_input=False)
    assert out[:, 7].isnan().all()
    assert not out[:, 128:].isfinite().any()
    assert out[:, [i for i in range(128) if i != 7]].isfinite().all()


@pytest.mark.parametrize("op", ["mhc_boundary", "chunk_mhc_boundary"])
@pytest.mark.parametrize("what", ["streams", "y", "pairs"])
def test_mhc_boundary(backend: str, op: str, what: str) -> None:
    d = Draw(2, DTYPE, DEVICE)
    tokens = 3
    streams, kwargs = d.normal(tokens, 4, S.hidden), sublayer(d, S, tokens)
    site = (
        d.normal(24, 4 * S.hidden, scale=0.02, dtype=torch.float32),
        d.normal(24, dtype=torch.float32),
        d.normal(3, dtype=torch.float32),
        1 + d.normal(S.hidden, scale=0.2),
    )

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own, rest = (x, kwargs) if what == "streams" else (streams, {**kwargs, what: x})
        new, *others = operation(op)(own, *site, iterations=20, eps=1e-6, norm_eps=1e-6, **rest)
        return (new[:, :, 3], *others)

    at = {"streams": (2, 3), "y": 3, "pairs": (1, 3)}[what]
    one_row_is_nan(run, streams if what == "streams" else kwargs[what], backend, at)


def test_the_last_write_and_the_head(backend: str) -> None:
    d = Draw(3, DTYPE, DEVICE)
    streams, kwargs = d.normal(3, 4, S.hidden), sublayer(d, S, 3)
    places = torch.tensor([2, 1, 0], dtype=torch.int32, device=DEVICE)
    site = (
        d.normal(4, 4 * S.hidden, scale=0.02, dtype=torch.float32),
        d.normal(4, dtype=torch.float32),
        d.normal(1, dtype=torch.float32),
        1 + d.normal(S.hidden, scale=0.2),
    )
    weight = d.normal(70, S.hidden, scale=S.hidden**-0.5)
    draws = torch.full((2, 3), 0.5, dtype=torch.float64, device=DEVICE)

    def run(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = torch.zeros(3, 4, S.hidden, dtype=DTYPE, device=DEVICE)
        operation("mhc_write")(streams, **{**kwargs, "y": y}, places=places, out=kept)
        merged = operation("stream_head")(kept, places, *site, eps=1e-6, norm_eps=1e-6)
        logits = operation("head_logits")(merged, weight)
        summary = operation("logit_summary")(logits, draws)
        assert ((summary[:, 3] >= 0) & (summary[:, 3] < 70)).all()  # a token's, whatever is drawn
        return kept[places.long()][:, :, 3], merged, logits, summary[:, [0, 2]]

    one_row_is_nan(run, kwargs["y"], backend)


def test_an_embedding_that_is_nan(backend: str) -> None:
    d = Draw(3, DTYPE, DEVICE)
    embed = d.normal(9, S.hidden)
    embed[4] = torch.nan
    ids = torch.tensor([4, 3, 5], dtype=torch.int32, device=DEVICE)
    with use_backend(backend):
        out = operation("step_streams")(ids, embed, 4)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


def weights(d: Draw) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(routed, shared) experts."""
    routed = (
        *d.fp4(S.experts, S.inner, S.hidden),
        *d.fp4(S.experts, S.inner, S.hidden),
        *d.fp4(S.experts, S.hidden, S.inner),
    )
    return routed, (*d.fp8(2 * S.inner, S.hidden), *d.fp8(S.hidden, S.inner))


@pytest.mark.parametrize(
    ("op", "tokens", "hashed"), [("stored_moe", 3, False), ("chunk_moe", MANY, True)]
)
def test_experts(backend: str, op: str, tokens: int, hashed: bool) -> None:
    d = Draw(4, DTYPE, DEVICE)
    routed, shared = weights(d)
    gate, bias = d.normal(S.experts, S.hidden, scale=0.1), d.normal(S.experts, dtype=torch.float32)
    table = torch.stack([d.permutation(S.experts)[: S.chosen] for _ in range(5)]).long()
    ids = d.integers(5, tokens, dtype=torch.int64)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pairs, shared_out, indices = operation(op)(
            x, ids, gate, routed, shared, topk=S.chosen, scaling_factor=1.5, limit=10.0,
            bias=None if hashed else bias, table=table if hashed else None,
        )  # fmt: skip
        assert 0 <= int(indices.min()) <= int(indices.max()) < S.experts
        return pairs, shared_out

    one_row_is_nan(run, d.normal(tokens, S.hidden), backend)


@pytest.mark.parametrize("where", ["one expert", "all experts", "a bias"])
def test_a_router_that_is_nan(backend: str, where: str) -> None:
    """It chooses existing experts, and weighs them with NaN."""
    tokens, experts, topk = 3, 24, 3  # not a power of two: the padding must not be chosen
    d = Draw(5, torch.float32, DEVICE)
    logits, bias = d.normal(tokens, experts), d.normal(experts)
    if where == "a bias":
        bias[5] = torch.nan
    elif where == "one expert":
        logits[ROW, 5] = torch.nan
    else:
        logits[ROW] = torch.nan
    ids = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    if backend == "triton":
        r = route.routing(logits, ids, topk=topk, scaling_factor=2.5, bias=bias)
        indices, weights = r.indices, r.weights
        assert sorted(r.pairs.tolist()) == list(range(tokens * topk))
    else:
        scores = torch.nn.functional.softplus(logits).sqrt()
        with use_backend(backend):
            indices, weights = operation("route")(scores, bias, None, topk, 2.5)
    assert all(len(set(own)) == topk for own in indices.tolist())
    assert 0 <= int(indices.min()) <= int(indices.max()) < experts
    if where == "a bias":
        assert (indices == 5).any(1).all()
        assert weights.isfinite().all()
        return
    assert weights[ROW].isnan().all()
    assert weights[[0, 2]].isfinite().all()


def stored(
    block: torch.Tensor, room: int, place: int, s: Sizes
) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry at a place, and all others, decoded."""
    every = read_rows(block, room, s.head_dim, s.rope_dim, torch.float32)
    return every[place], every[torch.arange(room, device=DEVICE) != place]


def keys_of(page: torch.Tensor, store: cases.Pages, form: IndexerFormat) -> torch.Tensor:
    size = store.page_entries * kv_pack.indexer_entry_bytes(form, S.index_dim)
    own = page[store.offsets[1] : store.offsets[1] + size]
    return kv_pack.unpack_indexer_page(own, form, S.index_dim, check=False)


def only_this_entry(
    found: cases.Pages, clean: cases.Pages, page: int, place: int, form: IndexerFormat | None
) -> None:
    """One entry and its key became NaN, and no other byte of the pages is another."""
    assert set((found.pool != clean.pool).any(1).nonzero().flatten().tolist()) == {page}
    own, others = stored(found.pool[page], found.page_entries, place, S)
    assert own.isnan().all()
    assert torch.equal(others, stored(clean.pool[page], clean.page_entries, place, S)[1])
    if form is not None:
        keys, before = (
            keys_of(found.pool[page], found, form),
            keys_of(clean.pool[page], clean, form),
        )
        assert keys[place].isnan().all()
        rest = torch.arange(len(keys), device=DEVICE) != place
        assert torch.equal(keys[rest], before[rest])


@pytest.mark.parametrize(("kind", "form"), [(4, "fp4"), (4, "fp8"), (128, None)])
def test_store_entries(backend: str, kind: int, form: IndexerFormat | None) -> None:
    positions = [(kind - 1,), (2 * kind - 1,), (4 * kind - 1,)]
    rows = cases.rows(positions, DEVICE)
    results = []
    for damaged in (False, True):
        d = Draw(6, DTYPE, DEVICE)
        store, kept = cases.pages(d, S, kind, 3, 128, form or "fp4"), cases.ring(d, S, 3)
        width = 4 * S.head_dim + 4 * S.index_dim + 16 if kind == 4 else 2 * S.head_dim
        kwargs: dict[str, object] = {}
        if kind == 4:
            kwargs = dict(
                index_compressor=cases.compressor(d, 4, S.index_dim, 3),
                index_heads=S.index_heads,
                query=d.normal(3, S.index_heads * S.index_dim),
                key_format=form,
            )
        low, projected = d.normal(3, S.head_dim), d.normal(3, width, dtype=torch.float32)
        if damaged:
            low[ROW, 3] = projected[ROW, S.head_dim :: S.head_dim] = torch.nan
            if kind == 4:
                projected[ROW, 4 * S.head_dim + S.index_dim + 3] = torch.nan
                query = kwargs["query"]
                assert isinstance(query, torch.Tensor)
                query[ROW, 3 :: S.index_dim] = torch.nan
        with use_backend(backend):
            queries = operation("store_entries")(
                low, 1 + d.normal(S.head_dim, scale=0.2), rows, d.rotation(3, S.rope_dim), kept,
                kind=kind, norm_eps=1e-6, projected=projected,
                compressor=cases.compressor(d, kind, S.head_dim, 3),
                entry_rotation=d.rotation(3, S.rope_dim), table=store.table, pool=store.pool,
                offsets=store.offsets, page_entries=store.page_entries, **kwargs,
            )  # fmt: skip
        results.append((kept, store, queries))
    (clean, before, query), (found, store, damaged_query) = results
    position, slot = int(rows[0, ROW]), int(rows[1, ROW])
    room = kv_pack.ring_entries(found, S.head_dim, S.rope_dim)
    assert set((found != clean).any(1).nonzero().flatten().tolist()) == {slot}
    own, others = stored(found[slot], room, position % room, S)
    assert own.isnan().all()
    assert torch.equal(others, stored(clean[slot], room, position % room, S)[1])
    entry = position // kind
    page = int(store.table[slot, entry // store.page_entries])
    only_this_entry(store, before, page, entry % store.page_entries, form)
    if form is not None:
        assert damaged_query[ROW].isnan().all()
        assert torch.equal(damaged_query[[0, 2]], query[[0, 2]])


@pytest.mark.parametrize(("kind", "form"), [(4, "fp4"), (4, "fp8"), (128, None)])
def test_chunk_entries(backend: str, kind: int, form: IndexerFormat | None) -> None:
    start, tokens = (0, 8) if kind == 4 else (126, 4)
    bad = tokens - 2  # of the last window that the chunk begins or completes
    results = []
    for damaged in (False, True):
        d = Draw(7, DTYPE, DEVICE)
        store, kept = cases.pages(d, S, kind, 1, 128, form or "fp4"), cases.ring(d, S, 1)[0]
        width = 4 * S.head_dim + 4 * S.index_dim + 16 if kind == 4 else 2 * S.head_dim
        ape, norm, state = cases.compressor(d, kind, S.head_dim, 1)
        kwargs: dict[str, object] = {}
        if kind == 4:
            own_ape, own_norm, own_state = cases.compressor(d, 4, S.index_dim, 1)
            kwargs = dict(
                index_compressor=(own_ape, own_norm, own_state[0]),
                index_heads=S.index_heads,
                query=d.normal(tokens, S.index_heads * S.index_dim),
                key_format=form,
            )
        low, projected = d.normal(tokens, S.head_dim), d.normal(tokens, width, dtype=torch.float32)
        if damaged:
            low[bad, 3] = torch.nan
            row = bad if kind == 4 else 1  # token 127 completes the first window
            projected[row, S.head_dim :: S.head_dim] = torch.nan
            if kind == 4:
                projected[bad, 4 * S.head_dim + S.index_dim + 3] = torch.nan
                query = kwargs["query"]
                assert isinstance(query, torch.Tensor)
                query[bad, 3 :: S.index_dim] = torch.nan
        touched = (start + tokens - 1) // kind - start // kind + 1
        with use_backend(backend):
            recent, queries = operation("chunk_entries")(
                low, 1 + d.normal(S.head_dim, scale=0.2), start, d.rotation(tokens, S.rope_dim),
                kept, kind=kind, window=S.window, norm_eps=1e-6, projected=projected,
                compressor=(ape, norm, state[0]), entry_rotation=d.rotation(touched, S.rope_dim),
                table=store.table[0], pool=store.pool, offsets=store.offsets,
                page_entries=store.page_entries, **kwargs,
            )  # fmt: skip
        results.append((kept, store, recent, queries))
    (clean, before, rows, query), (found, store, damaged_rows, damaged_query) = results
    assert damaged_rows[S.window + bad].isnan().all()
    others = torch.arange(len(rows), device=DEVICE) != S.window + bad
    assert torch.equal(damaged_rows[others], rows[others])
    room = kv_pack.ring_entries(found, S.head_dim, S.rope_dim)
    own, rest = stored(found, room, (start + bad) % room, S)
    assert own.isnan().all()
    assert torch.equal(rest, stored(clean, room, (start + bad) % room, S)[1])
    entry = 1 if kind == 4 else 0
    page = int(store.table[0, entry // store.page_entries])
    only_this_entry(store, before, page, entry % store.page_entries, form)
    if form is not None:
        own_row = torch.arange(tokens, device=DEVICE) == bad
        assert damaged_query[own_row].isnan().all()
        assert torch.equal(damaged_query[~own_row], query[~own_row])


def damage_entry(block: torch.Tensor, room: int, place: int) -> None:
    """Store as the `place`-th entry one with a single NaN in each of its groups."""
    value = torch.ones(S.head_dim, device=DEVICE)
    value[::64] = torch.nan
    data, scales = kv_pack.pack_kv_entries(value, S.rope_dim)
    block[place * len(data) : (place + 1) * len(data)] = data
    at = room * len(data) + place * len(scales)
    block[at : at + len(scales)] = scales


@pytest.mark.parametrize("kind", [0, 4, 128])
@pytest.mark.parametrize("what", ["query", "near", "far"])
def test_entry_attention(backend: str, kind: int, what: str) -> None:
    if kind == 0 and what == "far":
        pytest.skip("there is none")
    d = Draw(8, DTYPE, DEVICE)
    rows = cases.rows([(300,), (400,), (500,)], DEVICE)
    store, kept = cases.pages(d, S, kind or 4, 3, 128), cases.ring(d, S, 3)
    slot, position = int(rows[1, ROW]), int(rows[0, ROW])
    kwargs: dict[str, object] = {}
    if kind:
        kwargs = dict(table=store.table, page_entries=store.page_entries, most_entries=128)
    if kind == 4:
        kwargs["picks"] = d.permutation(70)[: S.topk].repeat(3, 1)[:, : S.topk].contiguous()
    rotation, sink = d.rotation(3, S.rope_dim), d.normal(S.heads, dtype=torch.float32)

    def run(x: torch.Tensor) -> tuple[torch.Tensor]:
        ring, pool = kept.clone(), store.pool.clone()
        query = x if what == "query" else torch.ones_like(x) * 0.5
        if what == "near" and x.isnan().any():
            room = kv_pack.ring_entries(ring, S.head_dim, S.rope_dim)
            damage_entry(ring[slot], room, (position - 3) % room)
        if what == "far" and x.isnan().any():
            entry = 2
            picks = kwargs.get("picks")
            if isinstance(picks, torch.Tensor):
                entry = int(picks[ROW, 2])
            page = int(store.table[slot, entry // store.page_entries])
            damage_entry(pool[page], store.page_entries, entry % store.page_entries)
        extra = kwargs | (dict(pool=pool, entry_offset=store.offsets[0]) if kind else {})
        return (
            operation("entry_attention")(
                query, rows, rotation, ring, sink, kind=kind, head_dim=S.head_dim, window=S.window,
                norm_eps=1e-6, **extra,
            ),
        )  # fmt: skip

    one_row_is_nan(run, d.normal(3, S.heads * S.head_dim), backend, slice(3, None, S.head_dim))


@pytest.mark.parametrize("kind", [0, 4, 128])
def test_chunk_attention(backend: str, kind: int) -> None:
    """A NaN in a query is its token's; in an entry, of all who see it."""
    d = Draw(9, DTYPE, DEVICE)
    start, tokens = 300, 4
    store = cases.pages(d, S, kind or 4, 1, 128)
    kwargs: dict[str, object] = {}
    if kind:
        kwargs = dict(table=store.table[0], page_entries=store.page_entries)
    picks = d.permutation(75)[: S.topk].sort().values.repeat(tokens, 1)[:, : S.topk].contiguous()
    if kind == 4:
        picks = torch.nn.functional.pad(picks, (0, S.topk - picks.shape[1]), value=-1)
        picks[2:] = -1
        picks[2:, 0] = 74
        picks = picks.where(picks != 0, 1)
        kwargs["picks"] = picks
        kwargs |= dict(entry_offset=store.offsets[0])
    elif kind:
        kwargs |= dict(entry_offset=store.offsets[0])
    query, recent = d.normal(tokens, S.heads * S.head_dim), d.normal(S.window + tokens, S.head_dim)
    rotation, sink = d.rotation(tokens, S.rope_dim), d.normal(S.heads, dtype=torch.float32)

    def run(query: torch.Tensor, recent: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        extra = kwargs | (dict(pool=pool) if kind else {})
        with use_backend(backend):
            return operation("chunk_attention")(
                query.clone(), start, rotation, recent, sink, kind=kind, head_dim=S.head_dim,
                window=S.window, norm_eps=1e-6, **extra,
            ).clone()  # fmt: skip

    clean = run(query, recent, store.pool)
    bad = query.clone()
    bad[ROW, 3 :: S.head_dim] = torch.nan
    found = {(ROW,): run(bad, recent, store.pool)}
    late = recent.clone()
    late[S.window + 2, 5] = torch.nan
    found[2, 3] = run(query, late, store.pool)
    if kind:
        pool = store.pool.clone()
        entry, seers = (int(picks[0, 1]), (0, 1)) if kind == 4 else (1, (0, 1, 2, 3))
        page = int(store.table[0, entry // store.page_entries])
        damage_entry(pool[page], store.page_entries, entry % store.page_entries)
        found[seers] = run(query, recent, pool)
    for seers, out in found.items():
        rest = [token for token in range(tokens) if token not in seers]
        assert out[list(seers)].isnan().all()
        assert torch.equal(out[rest], clean[rest])


def damage_key(page: torch.Tensor, store: cases.Pages, place: int, form: IndexerFormat) -> None:
    value = torch.ones(S.index_dim, device=DEVICE)
    value[::32] = torch.nan
    codes, scales = kv_pack.pack_indexer_entries(value, form)
    own = page[store.offsets[1] :]
    own[place * len(codes) : (place + 1) * len(codes)] = codes
    at = store.page_entries * len(codes) + place * len(scales)
    own[at : at + len(scales)] = scales


@pytest.mark.parametrize("form", ["fp4", "fp8"])
def test_index_scores(backend: str, form: IndexerFormat) -> None:
    """A NaN query's scores are NaN, and everyone's score of a NaN key, which counts as best."""
    d = Draw(10, DTYPE, DEVICE)
    rows = cases.rows([(303,), (403,), (423,)], DEVICE)
    store = cases.pages(d, S, 4, 3, 128, form)
    query = d.normal(3, S.index_heads, S.index_dim)
    query[ROW, :, 3] = torch.nan
    weights = d.normal(3, S.index_heads, dtype=torch.float32)
    damage_key(store.pool[int(store.table[int(rows[1, 0]), 0])], store, 9, form)
    with use_backend(backend):
        scores, maxima = operation("index_scores_paged")(
            query, weights, rows, store.pool, store.table, index_offset=store.offsets[1],
            page_entries=store.page_entries, ratio=4, most_entries=128, key_format=form,
        )  # fmt: skip
        picks = operation("topk_positions")(scores, maxima, rows, k=32, ratio=4)
    counts = ((rows[0] + 1) // 4).tolist()
    assert scores[0, : counts[0]].isnan().nonzero().flatten().tolist() == [9]
    assert scores[ROW, : counts[ROW]].isnan().all()
    if SIGNED:
        assert picks[0, 0] == 9
        assert picks[ROW].tolist() == list(range(32))
    assert scores[2, : counts[2]].isfinite().all()


@pytest.mark.parametrize("form", ["fp4", "fp8"])
def test_chunk_picks(backend: str, form: IndexerFormat) -> None:
    d = Draw(11, DTYPE, DEVICE)
    start, tokens, k = 4 * 90, 3, 32
    store = cases.pages(d, S, 4, 1, 128, form)
    query = d.normal(tokens, S.index_heads, S.index_dim)
    weights = d.normal(tokens, S.index_heads, dtype=torch.float32)

    def run() -> torch.Tensor:
        with use_backend(backend):
            return operation("chunk_picks")(
                query, weights, start, store.pool, store.table[0], index_offset=store.offsets[1],
                page_entries=store.page_entries, ratio=4, k=k, key_format=form,
            )  # fmt: skip

    clean = run()
    query[ROW, :, 3] = torch.nan
    found = run()
    if SIGNED:
        assert found[ROW].tolist() == list(range(k))
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    missed = next(i for i in range(90) if i not in clean[0].tolist())
    damage_key(store.pool[int(store.table[0, missed // 64])], store, missed % 64, form)
    if SIGNED:
        assert (run()[[0, 2]] == missed).any(1).all()


def test_best_of_scores_that_are_nan(backend: str) -> None:
    d = Draw(12, torch.float32, DEVICE)
    scores = d.normal(2, 64)
    scores[0, [5, 40]] = torch.nan
    scores[1] = torch.nan
    maxima = scores.view(2, -1, 8).amax(-1)
    rows = cases.rows([(4 * 60, 4 * 60)], DEVICE)
    with use_backend(backend):
        picks = operation("topk_positions")(scores, maxima, rows, k=8, ratio=4)
    assert picks[0, :2].tolist() == [5, 40]
    assert picks[1].tolist() == list(range(8))


def test_sinkhorn(backend: str) -> None:
    if backend == "triton" and not GPU:
        pytest.skip("test_mhc_boundary has the same steps")
    one_row_is_nan(
        lambda x: (operation("sinkhorn")(x, 20, 1e-6),),
        Draw(13, torch.float32, DEVICE).normal(3, 4, 4),
        backend,
        (1, 2),
    )


ELSEWHERE = {
    "experts": "for training, products of torch: tests/kernels/test_ground_truth.py",
    "runner": "which calls the others",
    "step_rotations": "of positions alone",
}


def test_every_operation_is_here(backend: str) -> None:
    """But for those that see no activations."""
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    for op, own in registry._kernels:
        if own == "triton" and op not in ELSEWHERE:
            assert f'"{op}"' in text, op
