"""Whether two versions stored the same entries and keys, looking only at what was written."""

from __future__ import annotations

import torch

from fathom.quant import kv_pack
from tests.kernels.stored_cases import Pages, Sizes


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
