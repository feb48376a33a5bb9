"""Random inputs for the operations on stored weights and caches, at any size, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fathom.quant import fp4, fp8, kv_pack


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The dimensions that the operations see; the defaults are as small as the tiles allow."""

    hidden: int = 256
    heads: int = 16
    head_dim: int = 128
    rope_dim: int = 64
    q_lora: int = 128
    groups: int = 2
    index_heads: int = 16
    index_dim: int = 128
    topk: int = 32
    inner: int = 128
    experts: int = 16
    chosen: int = 3
    window: int = 128
    vocab: int = 50


SMALL = Sizes()
# No power of two anywhere: the shipped models' dimensions.
ODD = Sizes(heads=8, head_dim=96, rope_dim=32, index_heads=8, index_dim=64, window=64)
FLASH = Sizes(
    hidden=4096, heads=64, head_dim=512, q_lora=1024, groups=8, index_heads=64, topk=512,
    inner=2048, experts=32, chosen=6,
)  # fmt: skip
PRO = Sizes(
    hidden=7168, heads=128, head_dim=512, q_lora=1536, groups=16, index_heads=64, topk=1024,
    inner=3072, experts=8, chosen=6,
)  # fmt: skip


SPARE = 5  # tokens that rings have room for beyond what is looked at


class Draw:
    """Seeded tensors on one device in one arithmetic."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None):
        made = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return made.to(dtype or self.dtype)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        made = torch.randint(high, shape, generator=self.generator, device=self.device)
        return made.to(dtype)

    def permutation(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self.generator, device=self.device).int()

    def fp8(self, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = fp8.quantize_weight(self.normal(rows, cols, scale=cols**-0.5).float())
        return codes.view(torch.uint8), scale.view(torch.uint8)

    def fp4(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = fp4.quantize(self.normal(*shape, scale=shape[-1] ** -0.5).float())
        return codes.view(torch.uint8), scale.view(torch.uint8)

    def rotation(self, tokens: int, rope_dim: int) -> torch.Tensor:
        phase = self.normal(tokens, rope_dim // 2, scale=3.0, dtype=torch.float32)
        return torch.stack((phase.cos(), phase.sin()), dim=1).contiguous()


@dataclass(slots=True)
class Pages:
    """A pool of shuffled pages whose every byte is a valid entry, and the tokens' page tables."""

    pool: torch.Tensor
    table: torch.Tensor
    page_entries: int
    offsets: tuple[int, int]


def pages(
    d: Draw, s: Sizes, ratio: int, tokens: int, entries: int,
    key_format: kv_pack.IndexerFormat = "fp4",
) -> Pages:  # fmt: skip
    """Room for `entries` entries of every token."""
    each = 64 if ratio == 4 else 2
    count = -(-entries // each)
    total = count * tokens
    kv = d.normal(total, each, s.head_dim)
    data, scales = kv_pack.pack_kv_entries(kv, s.rope_dim)
    parts = [data.flatten(1), scales.flatten(1)]
    size = sum(p.shape[1] for p in parts)
    keys, key_scales = kv_pack.pack_indexer_entries(d.normal(total, each, s.index_dim), key_format)
    parts += [keys.flatten(1), key_scales.flatten(1)]
    pool = torch.cat(parts, dim=1).contiguous()
    return Pages(pool, d.permutation(total).view(tokens, count), each, (0, size))


def ring(d: Draw, s: Sizes, slots: int, spare: int = SPARE) -> torch.Tensor:
    """A full ring of every slot: [slots, bytes] uint8, rows further apart than they are long."""
    entries = d.normal(slots, s.window + spare, s.head_dim)
    data, scales = kv_pack.pack_kv_entries(entries, s.rope_dim)
    whole = torch.cat((data.flatten(1), scales.flatten(1)), dim=1)
    return torch.nn.functional.pad(whole, (0, 24))[:, : whole.shape[1]]


def rows(pieces: list[tuple[int, ...]], device: str, known: int = 0) -> torch.Tensor:
    """What a step knows of its tokens, [4, tokens] int32, from each sequence's positions.

    The slots are the sequences', last one first.
    """
    table: list[tuple[int, int, int, int]] = []
    for slot, positions in enumerate(pieces):
        first = len(table)
        table += [(p, len(pieces) - 1 - slot, first, known) for p in positions]
    return torch.tensor(table, dtype=torch.int32, device=device).T.contiguous()


def compressor(
    d: Draw, kind: int, cols: int, slots: int, spare: int = SPARE
) -> tuple[torch.Tensor, ...]:
    """(ape, norm, state) as after some tokens."""
    width = 2 * cols if kind == 4 else cols
    ape = d.normal(kind, width, dtype=torch.float32)
    norm = 1 + d.normal(cols, scale=0.2)
    if kind == 4:
        return ape, norm, d.normal(slots, 2, 8 + spare, width, dtype=torch.float32)
    state = d.normal(slots, 1 + spare, 3, cols, dtype=torch.float32)
    state[:, :, 1] = state[:, :, 1].abs() + 1
    return ape, norm, state
