"""What one step computes: rows of tokens, of one or many sequences, and the memory they belong to.

Paper: none (engine).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fathom.engine.kv_cache import SLAB_TOKENS, SlabPool
from fathom.engine.state_cache import SlotPool


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive tokens of one sequence. Entries of positions before `known` are there already."""

    slot: int
    start: int
    tokens: Sequence[int]
    known: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of a step, piece after piece, each int64 [rows] on the CPU.

    tokens, positions, slots; firsts: the row where the row's piece begins; known: see Piece.
    """

    pieces: tuple[Piece, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    firsts: torch.Tensor
    known: torch.Tensor

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Batch:
        """Lay pieces out as rows. A sequence may have one piece only."""
        columns: list[list[int]] = [[], [], [], [], []]
        for piece in pieces:
            first, count = len(columns[0]), len(piece.tokens)
            columns[0] += piece.tokens
            columns[1] += range(piece.start, piece.start + count)
            for column, value in zip(columns[2:], (piece.slot, first, piece.known), strict=True):
                column += [value] * count
        table = torch.tensor(columns, dtype=torch.int64)
        tokens, positions, slots, firsts, known = table.unbind(0)
        return cls(
            pieces=tuple(pieces),
            tokens=tokens,
            positions=positions,
            slots=slots,
            firsts=firsts,
            known=known,
        )

    def __len__(self) -> int:
        return len(self.tokens)


class Memory:
    """The device memory of an engine: slabs, slots, and which slabs each slot's sequence has.

    tables: [slots, slabs of the longest sequence] int32.
    """

    def __init__(self, slabs: SlabPool, slots: SlotPool, max_tokens: int) -> None:
        self.slabs, self.slots = slabs, slots
        shape = slots.count, self.columns(max_tokens)
        self.tables = torch.zeros(*shape, dtype=torch.int32, device=slabs.data.device)

    @staticmethod
    def columns(max_tokens: int) -> int:
        """Slabs that a sequence's line of the tables has room for."""
        return -(-max_tokens // SLAB_TOKENS) + 1
