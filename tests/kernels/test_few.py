"""Operations for a few tokens: odd sizes, and the same bits whatever the batch.

As backends.py describes, Triton's interpreter runs them in float32 where there is no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from fathom.kernels import operation, use_backend
from fathom.kernels.reference.route import route as reference_route
from tests.kernels import limits
from tests.kernels.backends import DEVICE, DTYPES, GPU, both, cases_of, versions_of
from tests.kernels.stored_cases import FLASH, SMALL, Draw, Sizes

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
route = importlib.import_module("fathom.kernels.triton.route")
index = importlib.import_module("fathom.kernels.triton.index")
few_experts = importlib.import_module("fathom.kernels.triton.few_experts")

S: Sizes = FLASH if GPU else SMALL
DTYPE = DTYPES[0]
MOST = 64 if GPU else 9


def experts(d: Draw, s: Sizes) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(routed, shared) weights."""
    routed = (
        *d.fp4(s.experts, s.inner, s.hidden),
        *d.fp4(s.experts, s.inner, s.hidden),
        *d.fp4(s.experts, s.hidden, s.inner),
    )
    return routed, (*d.fp8(2 * s.inner, s.hidden), *d.fp8(s.hidden, s.inner))


@pytest.mark.parametrize(
    ("rows", "cols", "groups", "rounded"),
    cases_of(
        [(1536, 4096, 1, True), (8192, 1024, 1, True), (1024, 4096, 8, False)],
        [(128, 256, 1, True), (256, 128, 2, False)],
    ),
)
def test_a_row_of_a_linear_layer_does_not_depend_on_the_others(
    rows: int, cols: int, groups: int, rounded: bool
) -> None:
    d = Draw(rows + cols, DTYPE, DEVICE)
    codes, scale = d.fp8(rows, cols)
    x = d.normal(MOST, groups * cols)
    plain = d.normal(72, cols, scale=cols**-0.5) if rounded else None

    def products(x: torch.Tensor) -> list[torch.Tensor]:
        with use_backend("triton"):
            out = operation("stored_linear")(
                x, codes, scale, groups=groups, quantize_input=rounded, plain=plain
            )
        return [part for part in out if part is not None]

    whole = products(x)
    for begin, end in spans(MOST):
        for part, every in zip(products(x[begin:end]), whole, strict=True):
            assert same(part, every[begin:end]), (begin, end)


def test_a_tokens_experts_do_not_depend_on_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    d = Draw(11, DTYPE, DEVICE)
    tokens = MOST if GPU else 3
    if not GPU:  # the interpreter's time is the number of programs
        monkeypatch.setattr(few_experts, "ROWS", 128)
    routed, shared = experts(d, S)
    x = d.normal(tokens, S.hidden)
    gate, bias = d.normal(S.experts, S.hidden, scale=0.1), d.normal(S.experts, dtype=torch.float32)

    def outputs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ids = torch.zeros(len(x), dtype=torch.int64, device=DEVICE)
        with use_backend("triton"):
            return operation("stored_moe")(
                x, ids, gate, routed, shared, topk=S.chosen, scaling_factor=1.5, limit=10.0,
                bias=bias,
            )  # fmt: skip

    whole = outputs(x)
    for begin, end in spans(tokens):
        for part, every in zip(outputs(x[begin:end]), whole, strict=True):
            assert same(part, every[begin:end]), (begin, end)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits; the interpreter's products are numpy's, which promise less."""
    return torch.equal(a, b) if GPU else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def spans(tokens: int) -> list[tuple[int, int]]:
    """Beginnings and ends of batches of every size at which a product changes its shape."""
    sizes = [n for n in (1, 2, 8, 9, 16, 17, 33) if n < tokens]
    return [(0, n) for n in sizes] + [(tokens - n, tokens) for n in sizes]


@pytest.mark.parametrize("tokens", cases_of([1, 2, 15, 64], [1, 2, 9]))
@pytest.mark.parametrize("way", ["bias", "hash", "twice", "equal scores", "one choice"])
def test_routing_lists_every_pair_once_by_expert(tokens: int, way: str) -> None:
    experts, topk = (256, 6) if GPU else (32, 3)
    d = Draw(tokens, torch.float32, DEVICE)
    logits = d.normal(tokens, experts, scale=2.0)
    bias, table = d.normal(experts, scale=0.1), None
    ids = d.integers(20, tokens, dtype=torch.int64)
    if way in ("hash", "twice"):
        table = torch.stack([d.permutation(experts)[:topk] for _ in range(20)]).long()
        if way == "twice":  # some name an expert more than once
            table[::2, 1], table[::3, 2] = table[::2, 0], table[::3, 0]
    elif way == "equal scores":  # the lowest numbers win
        logits, bias = logits * 0, bias * 0
    elif way == "one choice":  # all tokens choose the same experts, all others stay empty
        bias[3 : 3 + topk] += 100
    r = route.routing(logits, ids, topk=topk, scaling_factor=2.5, bias=bias, table=table)
    scores = torch.nn.functional.softplus(logits).sqrt()
    if table is None:  # of equal scores the lowest number, which torch's topk does not promise
        order = (scores + bias).sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, :topk]
    else:
        chosen = table[ids]
    expected, weights = reference_route(scores, None, chosen, topk, 2.5)
    assert torch.equal(r.indices.long(), expected.long())
    torch.testing.assert_close(r.weights, weights, rtol=1e-5, atol=1e-6)
    count = int(r.tiles)
    assert 0 < count <= r.most
    pairs = []
    for tile in range(count):
        places = range(int(r.tile_first[tile]), int(r.tile_last[tile]))
        assert 0 < len(places) <= route.TILE
        own = [int(r.pairs[place]) for place in places]
        assert {int(r.indices.flatten()[pair]) for pair in own} == {int(r.tile_expert[tile])}
        pairs += own
    assert sorted(pairs) == list(range(tokens * topk))


@pytest.mark.parametrize("entries", cases_of([262_144, 225_000, 600], [1500]))
@pytest.mark.parametrize("shape", ["random", "ties", "two values", "signs of zero"])
def test_topk_of_a_long_context(entries: int, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    k = 512 if GPU else 32
    if not GPU:  # sorting thousands takes the interpreter a minute
        monkeypatch.setattr(index, "SORTED", 64)
        monkeypatch.setattr(index, "COARSE", 64)
        monkeypatch.setattr(index, "TILE", 32)
    d = Draw(entries, torch.float32, DEVICE)
    room = -(-entries // index.ROUNDED) * index.ROUNDED
    scores = d.normal(2, room)
    if shape == "ties":
        scores = (scores * 8).round() / 8
    elif shape == "two values":
        scores = (scores > 3).float()
    elif shape == "signs of zero":  # which are equal
        scores = torch.where(scores > 0, 0.0, -0.0)
    seen = entries // 4  # a graph serves as few
    scores[0, entries:] = scores[1, seen:] = -torch.inf
    maxima = scores.view(2, -1, index.group_size(room)).amax(-1).contiguous()
    rows = torch.zeros(4, 2, dtype=torch.int32, device=DEVICE)
    rows[0] = torch.tensor([4 * entries, 4 * seen])
    expected, found = both("topk_positions", scores, maxima, rows, k=k, ratio=4)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", cases_of([1, 3, 20, 64], [2]))
def test_experts_with_hot_and_empty_ones(tokens: int) -> None:
    """Every token has the first expert and some of the next few; most have none."""
    d = Draw(tokens, DTYPE, DEVICE)
    routed, shared = experts(d, S)
    others = [d.permutation(S.chosen + 1)[: S.chosen - 1].long() + 1 for _ in range(S.vocab)]
    table = torch.stack([torch.cat((own.new_zeros(1), own)) for own in others])
    v = versions_of(
        "stored_moe", DTYPE, d.normal(tokens, S.hidden),
        d.integers(S.vocab, tokens, dtype=torch.int64), d.normal(S.experts, S.hidden, scale=0.1),
        routed, shared, topk=S.chosen, scaling_factor=1.5, limit=10.0, table=table,
    )  # fmt: skip
    assert torch.equal(v.found[2], v.exact[2])
    for part in (0, 1):
        v.each(lambda out, part=part: out[part]).assert_agree(DTYPE, limits.EXPERTS)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_float32_matrix_keeps_its_precision(tokens: int) -> None:
    """Beside an input of half the width, which numpy can multiply only as float16."""
    d = Draw(tokens, torch.bfloat16 if GPU else torch.float16, DEVICE)
    codes, scale = d.fp8(128, 256)
    plain = torch.full((16, 256), 1 + 2.0**-13, device=DEVICE)
    x = torch.ones(tokens, 256, dtype=d.dtype, device=DEVICE)
    with use_backend("triton"):
        _, found = operation("stored_linear")(x, codes, scale, plain=plain, quantize_input=False)
    assert (found == 256 + 256 * 2.0**-13).all()
