"""A decode step's products, streams and ends on stored weights: the CUDA kernels against their
references, as backends.py describes; tests/kernels/test_entries.py has the caches.
"""

from __future__ import annotations

import pytest
import torch

from fathom.engine.sampler import SURE
from fathom.kernels import operation, use_backend
from tests.kernels import limits
from tests.kernels import stored_cases as cases
from tests.kernels.backends import DEVICE, DTYPES, GPU, SIZES, both, cases_of, versions, versions_of
from tests.kernels.stored_cases import Draw, Sizes

pytestmark = [pytest.mark.parametrize("dtype", DTYPES), pytest.mark.parametrize("s", SIZES)]


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
    v = versions_of(
        op,
        dtype,
        d.normal(tokens, s.hidden + 128)[:, : s.hidden],  # rows further apart than they are long
        codes,
        scale,
        norm=1 + d.normal(s.hidden, scale=0.2) if norm else None,
        plain=None if norm else d.normal(72, s.hidden, scale=s.hidden**-0.5),
    )
    v.each(lambda out: out[0]).assert_agree(dtype, limits.NORMED if norm else limits.PRODUCT)
    if not norm:
        v.each(lambda out: out[1]).assert_agree(dtype, limits.EXACT)


@pytest.mark.parametrize(("op", "tokens"), [("stored_linear", 2), ("chunk_linear", 5)])
def test_grouped_linear_reads_its_own_columns(
    s: Sizes, dtype: torch.dtype, op: str, tokens: int
) -> None:
    d = Draw(3, dtype, DEVICE)
    codes, scale = d.fp8(128 * s.groups, 256)
    x = d.normal(tokens, 256 * s.groups)
    v = versions_of(op, dtype, x, codes, scale, groups=s.groups, quantize_input=False)
    v.each(lambda out: out[0]).assert_agree(dtype, limits.PRODUCT)


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
    v = versions_of(
        op,
        dtype,
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
    v.each(lambda out: out[0]).assert_agree(dtype, limits.STREAMS)
    v.each(lambda out: out[1]).assert_agree(dtype, limits.READ)
    mixes = limits.EXACT_MIXES if mode == "first" else limits.MIXES
    for part in (2, 3):
        v.each(lambda out, part=part: out[part]).assert_agree(dtype, mixes)


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

    def written_and_merged(of) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.full((5, 4, s.hidden), torch.nan, dtype=of(streams).dtype, device=DEVICE)
        operation("mhc_write")(of(streams), **of(kwargs), places=places, out=kept)
        merged = operation("stream_head")(kept, places[:2], *of(site), eps=1e-6, norm_eps=1e-6)
        assert kept[[1, 3]].isnan().all()
        assert merged.dtype == torch.float32
        return kept[[4, 0, 2]], merged

    v = versions(written_and_merged, dtype)
    v.each(lambda out: out[0]).assert_agree(dtype, limits.STREAMS)
    v.each(lambda out: out[1]).assert_agree(dtype, limits.READ)


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


@pytest.mark.parametrize("tokens", cases_of([1, 16, 64, 65], [3, 65]))
def test_logits(s: Sizes, dtype: torch.dtype, tokens: int) -> None:
    """Of more rows than two programs have, and more tokens than one has."""
    d = Draw(tokens, dtype, DEVICE)
    hidden, weight = d.normal(tokens, s.hidden), d.normal(300, s.hidden, scale=s.hidden**-0.5)
    versions_of("head_logits", dtype, hidden.float(), weight).assert_agree(dtype, limits.EXACT)


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
    given = (
        d.normal(tokens, s.hidden),
        d.integers(s.vocab, tokens, dtype=torch.int64),
        d.normal(s.experts, s.hidden, scale=0.1),
        routed,
        shared,
    )
    settings = dict(
        topk=s.chosen,
        scaling_factor=1.5,
        limit=1.0 if routing == "hash" else 10.0,  # which cuts one in six, or none
        bias=None if table is not None else bias,
        table=table,
    )
    v = versions_of(op, dtype, *given, **settings)
    if routing == "hash":
        with use_backend("reference"):
            uncut = operation(op)(*given, **settings | {"limit": 10.0})
        assert not torch.allclose(uncut[0], v.expected[0], rtol=0.1)
    same = (v.found[2] == v.exact[2]).all(1)
    assert torch.equal(v.expected[2], v.exact[2])
    # The matrix units may swap two experts whose scores are equal to the last bits.
    assert same.float().mean() > (0.98 if op == "chunk_moe" else 0.999)
    v.each(lambda out: out[0][same]).assert_agree(dtype, limits.EXPERTS)
    v.each(lambda out: out[1]).assert_agree(dtype, limits.EXPERTS)
