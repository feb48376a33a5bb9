"""Whether versions left the same in caches, looking only at what was written.

Against the reference in the same arithmetic the bytes are compared, code by code. The reference in
float32 rounds other numbers, which differ by BF16's rounding, to the same formats: there the
decoded entries are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from fathom.kernels.reference.stored import read_rows
from fathom.quant import kv_pack
from tests.kernels import limits
from tests.kernels.backends import Versions
from tests.kernels.stored_cases import Pages, Sizes


@dataclass(frozen=True, slots=True)
class Left:
    """What a version left. before: the ring and the pool as they were; states: the compressors';
    query: rounded index queries; recent: a chunk's raw entries, of which `alike` are a copy.
    """

    before: tuple[torch.Tensor, torch.Tensor]
    ring: torch.Tensor
    pages: Pages
    states: list[torch.Tensor]
    query: torch.Tensor | None
    recent: torch.Tensor | None = None


def left_alike(
    v: Versions, s: Sizes, dtype: torch.dtype, ring_written: int, written: int, keys: str | None
) -> None:
    """v: of `Left`; ring_written, written: entries that must be others than before in the ring and
    in the pool; keys: the format of keys, if there are any.
    """
    found, expected, exact = v
    ring, pool = found.before
    same_ring(found.ring, expected.ring, ring, s, ring_written)
    same_pool(found.pages, expected.pages, pool, s, written, keys)
    entries_agree(v.each(lambda left: _ring_rows(left, s)), s, dtype)
    if written:
        entries_agree(v.each(lambda left: pool_rows(left, s)), s, dtype)
    if written and keys is not None:
        v.each(lambda left: pool_keys(left, s, keys)).assert_agree(dtype, limits.ROUNDED[keys])
    if exact.query is not None:
        v.each(lambda left: left.query).assert_agree(dtype, limits.ROUNDED[keys or ""])
    if exact.recent is not None:
        entries_agree(v.each(lambda left: left.recent), s, dtype)
    for a, b in zip(found.states, exact.states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def entries_agree(v: Versions, s: Sizes, dtype: torch.dtype) -> None:
    """v: of entries [..., head_dim]: codes, and behind them what is kept in BF16."""
    cut = s.head_dim - s.rope_dim
    v.each(lambda rows: rows[..., :cut]).assert_agree(dtype, limits.CODED)
    v.each(lambda rows: rows[..., cut:]).assert_agree(dtype, limits.TURNED)


def _ring_rows(left: Left, s: Sizes) -> torch.Tensor:
    """The ring's entries that were written: [entries, head_dim]."""
    now, before = (r.reshape(-1, r.shape[-1]) for r in (left.ring, left.before[0]))
    return _changed(now, before, kv_pack.ring_entries(now, s.head_dim, s.rope_dim), s)


def pool_rows(left: Left, s: Sizes) -> torch.Tensor:
    """The pool's entries that were written: [entries, head_dim]."""
    return _changed(left.pages.pool, left.before[1], left.pages.page_entries, s)


def _changed(now: torch.Tensor, before: torch.Tensor, room: int, s: Sizes) -> torch.Tensor:
    rows = [
        torch.cat([read_rows(b, room, s.head_dim, s.rope_dim, torch.float32) for b in blocks])
        for blocks in (now, before)
    ]
    return rows[0][(rows[0] != rows[1]).any(1)]


def pool_keys(left: Left, s: Sizes, form: str) -> torch.Tensor:
    """The pool's keys that were written: [keys, index_dim]."""
    own = cast(kv_pack.IndexerFormat, form)
    (_, first), room = left.pages.offsets, left.pages.page_entries
    end = first + room * kv_pack.indexer_entry_bytes(own, s.index_dim)
    now, before = (
        kv_pack.unpack_indexer_page(
            pool[:, first:end].contiguous(), own, s.index_dim, check=False
        ).flatten(0, 1)
        for pool in (left.pages.pool, left.before[1])
    )
    return now[(now != before).any(1)]


def same_ring(
    found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, s: Sizes, written: int
) -> None:
    """Rings [..., bytes] uint8; written: how many entries must be others than before."""
    room = kv_pack.ring_entries(found, s.head_dim, s.rope_dim)
    rings = [ring.reshape(-1, ring.shape[-1]) for ring in (found, expected, before)]
    _same_entries(rings, room, s, written)


def same_pool(
    found: Pages, expected: Pages, before: torch.Tensor, s: Sizes, written: int, keys: str | None
) -> None:
    """before: the pool [pages, bytes] uint8 before; keys: the format of keys, if there are any."""
    pools = [found.pool, expected.pool, before]
    room, (_, end) = found.page_entries, found.offsets
    _same_entries([pool[:, :end] for pool in pools], room, s, written)
    pools = [pool[:, end:] for pool in pools]
    if keys is None:
        assert torch.equal(pools[0], pools[2])
        return
    size = s.index_dim if keys == "fp8" else s.index_dim // 2
    _same(pools, room, size, 4 if keys == "fp8" else s.index_dim // 32, size, keys, written)


def _same_entries(blocks: list[torch.Tensor], room: int, s: Sizes, written: int) -> None:
    size = s.head_dim + s.rope_dim
    scales = kv_pack.kv_entry_bytes(s.head_dim, s.rope_dim) - size
    _same(blocks, room, size, scales, s.head_dim - s.rope_dim, "fp8", written)


def _same(
    blocks: list[torch.Tensor], room: int, size: int, scales: int, coded: int, form: str,
    written: int,
) -> None:  # fmt: skip
    """blocks: found, expected, before, [blocks, bytes] each; `room` entries of `size` data bytes,
    `coded` of which are codes, the rest BF16, then of as many scale bytes.
    """
    cut, end = room * size, room * (size + scales)
    data = [b[:, :cut].reshape(-1, size) for b in blocks]
    units = [b[:, cut:end].reshape(-1, scales) for b in blocks]
    assert torch.equal(blocks[0][:, end:], blocks[2][:, end:])
    own = (data[1] != data[2]).any(1) | (units[1] != units[2]).any(1)
    assert int(own.sum()) == written
    assert torch.equal(data[0][~own], data[2][~own])
    assert torch.equal(units[0][~own], units[2][~own])
    assert torch.equal(units[0][own], units[1][own])
    _near(*(_codes(d[own, :coded], form) for d in data[:2]))
    if coded < size:
        _near(*(_ordered(d[own, coded:].clone().view(torch.int16), 15) for d in data[:2]))


def _near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A value at a rounding boundary may fall either way: one in a hundred, to the next number."""
    apart = (found - expected).abs()
    if apart.numel():
        assert int(apart.max()) <= 1
        assert int((apart > 0).sum()) <= max(1, apart.numel() // 100)


def _codes(data: torch.Tensor, form: str) -> torch.Tensor:
    if form == "fp8":
        return _ordered(data, 7)
    return _ordered(torch.stack((data & 15, data >> 4)), 3)


def _ordered(bits: torch.Tensor, sign: int) -> torch.Tensor:
    """Numbers of sign and magnitude as integers of the same order."""
    magnitude = bits.int() & ((1 << sign) - 1)
    return torch.where(bits.int() >> sign & 1 == 1, -magnitude, magnitude)
