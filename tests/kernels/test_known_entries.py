"""Compressed entries of a known beginning, which sequences share, stay as they are: in decode steps
and in prompts' chunks; also with dimensions that are no powers of two.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fathom.kernels import operation
from tests.kernels import limits
from tests.kernels import stored_cases as cases
from tests.kernels.backends import DEVICE, DTYPES, GPU, versions
from tests.kernels.stored_cases import FLASH, ODD, SMALL, Draw, Sizes
from tests.kernels.stored_compare import Left, entries_agree, pool_keys, pool_rows

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

DTYPE = DTYPES[0]
START, TOKENS = 253, 5  # past the end of windows of 4 and of 128 tokens


def stored(s: Sizes, kind: int, op: str, known: int, of: Callable[[Any], Any]) -> Left:
    """The pool before and after tokens from START on, of one sequence."""
    d = Draw(kind, DTYPE, DEVICE)
    store = cases.pages(d, s, kind, 1, 128)
    before = store.pool.clone()
    rows = cases.rows([tuple(range(START, START + TOKENS))], DEVICE, known)
    width = 4 * s.head_dim + 4 * s.index_dim + 16 if kind == 4 else 2 * s.head_dim
    chunk, index_rows = op == "chunk_entries", s.index_heads * s.index_dim
    main = cases.compressor(d, kind, s.head_dim, 1)
    index = cases.compressor(d, 4, s.index_dim, 1)
    # A chunk is told of its windows, a step of every token's own.
    turns = d.rotation(TOKENS, s.rope_dim)
    windows = [p // kind for p in range(START, START + TOKENS)]
    if chunk:
        turns = turns[[windows.index(w) for w in range(windows[0], windows[-1] + 1)]]
    else:
        turns = turns[[windows.index(w) for w in windows]]
    one = (lambda c: (*c[:2], c[2][0])) if chunk else (lambda c: c)
    kwargs: dict[str, Any] = dict(
        kind=kind,
        norm_eps=1e-6,
        projected=d.normal(TOKENS, width, dtype=torch.float32),
        compressor=of(one(main)),
        entry_rotation=turns.contiguous(),
        table=store.table[0] if chunk else store.table,
        pool=store.pool,
        offsets=store.offsets,
        page_entries=store.page_entries,
    )
    if kind == 4:
        kwargs |= dict(index_compressor=of(one(index)), index_heads=s.index_heads)
        kwargs |= dict(query=of(d.normal(TOKENS, 96 + index_rows)))
    if chunk:
        kwargs |= dict(window=s.window, known=known)
    low, norm = d.normal(TOKENS, 64 + s.head_dim), 1 + d.normal(s.head_dim, scale=0.2)
    rotation, ring = d.rotation(TOKENS, s.rope_dim), cases.ring(d, s, 1)
    where = (START, rotation, ring[0]) if chunk else (rows, rotation, ring)
    operation(op)(of(low), of(norm), *where, **kwargs)
    return Left((ring, before), ring, store, [], None)


@pytest.mark.parametrize("kind", [4, 128])
@pytest.mark.parametrize("op", ["store_entries", "chunk_entries"])
@pytest.mark.parametrize("s", [FLASH, ODD] if GPU else [SMALL, ODD])
def test_known_entries_stay_as_they_are(s: Sizes, op: str, kind: int) -> None:
    last = (START + TOKENS) // kind * kind  # the first position behind the last whole window
    kept = versions(lambda of: stored(s, kind, op, last, of), DTYPE).found
    assert torch.equal(kept.pages.pool, kept.before[1])
    v = versions(lambda of: stored(s, kind, op, last - kind, of), DTYPE)
    before, written, expected = v.found.before[1], v.found.pages.pool, v.expected.pages.pool
    changed, wanted = written != before, expected != before
    # One entry, and no byte anywhere else; single codes may fall either way.
    size = (s.head_dim + s.rope_dim) + 8 + (s.index_dim if kind == 4 else 0)
    assert 0 < wanted.sum() <= size
    assert (changed != wanted).sum() <= size // 20
    assert (written != expected).sum() <= size // 20
    entries_agree(v.each(lambda left: pool_rows(left, s)), s, DTYPE)
    if kind == 4:
        v.each(lambda left: pool_keys(left, s, "fp4")).assert_agree(DTYPE, limits.ROUNDED["fp4"])
