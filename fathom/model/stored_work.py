"""What runs through the stored layers: rows of a decode step, or a chunk of one sequence.

A `Step` feeds up to 64 rows, each the next token of a sequence (or the next few, when drafts are
checked), as about 16 fused operations a layer that a GPU replays as one graph. A `Chunk` feeds many
consecutive tokens of one sequence and leaves the cache as that many steps would.

Paper: §2.3 (attention), §3.4 (FP4 and FP8 inference), §3.5.1 (cache layout).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fathom.errors import ConfigError
from fathom.kernels import operation
from fathom.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fathom.model.rope import RotaryTable
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import SLAB_TOKENS, StoredCache
from fathom.model.stored_forward import Place

_chunk_attention = operation("chunk_attention")
_chunk_entries = operation("chunk_entries")
_chunk_linear = operation("chunk_linear")
_chunk_mhc_boundary = operation("chunk_mhc_boundary")
_chunk_moe = operation("chunk_moe")
_chunk_picks = operation("chunk_picks")
_entry_attention = operation("entry_attention")
_index_scores_paged = operation("index_scores_paged")
_mhc_boundary = operation("mhc_boundary")
_step_rotations = operation("step_rotations")
_store_entries = operation("store_entries")
_stored_linear = operation("stored_linear")
_stored_moe = operation("stored_moe")
_topk_positions = operation("topk_positions")

MOST_TOKENS = 64  # rows of one decode step
ENTRY_ROTATION = {CSA_RATIO: 2, HCA_RATIO: 3}  # of a window's first position

Tensor = torch.Tensor


def frequencies(config: ModelConfig, device: torch.device | str) -> Tensor:
    """Rotations per token without and with YaRN: [2, rope_dim / 2] float32."""
    tables = (RotaryTable(config, False), RotaryTable(config, True))
    return torch.stack([table.frequencies for table in tables]).to(device)


def check_place(shape: tuple[int, ...], sequence: int, start: int, count: int) -> None:
    """Raise ConfigError unless `count` tokens of a sequence have places from position `start` on in
    a cache whose page table is [sequences, slabs]: kernels find them through it and would take a
    neighbour's.
    """
    sequences, slabs = shape
    end, room = start + count, slabs * SLAB_TOKENS
    if not 0 <= sequence < sequences:
        raise ConfigError(f"the cache has {sequences} sequences: there is no number {sequence}")
    if start < 0 or count < 1:
        raise ConfigError(
            f"a sequence has at least one token, from position 0 on, not {count} from {start}"
        )
    if end > room:
        raise ConfigError(
            f"tokens {start} to {end} of a sequence do not fit its {slabs} slabs of "
            f"{SLAB_TOKENS}: give the cache {-(-end // SLAB_TOKENS)} slabs a sequence"
        )


@dataclass(slots=True, kw_only=True)
class Step:
    """The rows of one decode step, at fixed addresses, so that a graph can replay it.

    rows: [4, tokens] int32, see fathom/kernels/reference/stored.py: position, slot, first row of
    the piece, known length; token_ids: [tokens]; rotations: [4, tokens, 2, rope_dim / 2];
    most_positions: a bound on every position + 1, which sizes the grids: entries beyond it are not
    looked at. A piece has at most as many rows as the cache's rings have room for beyond what is
    looked at. A row's result is the same bits whatever the others are.

    `create` checks positions; whoever makes the rows otherwise has checked them (`check_place`),
    before they are on a device.
    """

    rows: Tensor
    token_ids: Tensor
    rotations: Tensor
    most_positions: int

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        cache: StoredCache,
        positions: Sequence[int],
        token_ids: Tensor,
        most_positions: int,
    ) -> Step:
        """One token of each of the cache's first sequences. token_ids: [tokens] int64, where the
        cache is. Raises ConfigError for more than 64, for positions that the cache does not hold
        and for a bound that they pass.
        """
        count = len(positions)
        if count > MOST_TOKENS:
            raise ConfigError(
                f"a decode step takes at most {MOST_TOKENS} sequences, not {count}: split the batch"
            )
        if count != len(token_ids):
            raise ConfigError(f"there are {count} positions for {len(token_ids)} tokens")
        shape = tuple(cache.table.shape)
        for sequence, position in enumerate(positions):
            check_place(shape, sequence, position, 1)
            if position >= most_positions:
                raise ConfigError(
                    f"position {position} is not below the bound of {most_positions} positions: "
                    "entries beyond it would be ignored"
                )
        every = list(range(count))
        table = [list(positions), every, every, [0] * count]
        rows = torch.tensor(table, dtype=torch.int32, device=token_ids.device)
        return cls(
            rows=rows,
            token_ids=token_ids,
            rotations=_step_rotations(rows, frequencies(config, rows.device)),
            most_positions=most_positions,
        )

    @property
    def boundary(self) -> Callable[..., Any]:
        """As Work.boundary."""
        return _mhc_boundary

    @property
    def linear(self) -> Callable[..., Any]:
        """As Work.linear."""
        return _stored_linear

    @property
    def moe(self) -> Callable[..., Any]:
        """As Work.moe."""
        return _stored_moe

    def attend(
        self, config: ModelConfig, layer: StoredLayer, where: Place, low: Tensor,
        projected: Tensor | None, query: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As Work.attend. low: [tokens, rows]; projected: [tokens, cols]; query: [tokens, rows].
        Returns ([tokens, heads * head_dim], [tokens, topk] or None).
        """
        c, own, ratio = config, where.state, layer.ratio
        rotation, paged = self.rotations[1 if ratio else 0], {}
        if ratio:
            paged = {"pool": where.pool, "table": where.table, "page_entries": SLAB_TOKENS // ratio}
        index_query = _store_entries(
            low,
            layer.kv_norm,
            self.rows,
            rotation,
            own.ring,
            kind=ratio,
            norm_eps=c.rms_norm_eps,
            projected=projected,
            query=query,
            compressor=_with_state(layer.compressor, own.state),
            index_compressor=_with_state(layer.index_compressor, own.index_state),
            entry_rotation=self.rotations[ENTRY_ROTATION[ratio]] if ratio else None,
            offsets=where.offsets,
            index_heads=c.index_n_heads if ratio == CSA_RATIO else 0,
            key_format=where.key_format,
            **paged,
        )
        picks, most = None, max(1, self.most_positions // ratio) if ratio else 0
        if ratio == CSA_RATIO:
            scores, maxima = _index_scores_paged(
                index_query, projected, self.rows, where.pool, where.table, ratio=ratio,
                index_offset=where.offsets[1], page_entries=SLAB_TOKENS // ratio, most_entries=most,
                key_format=where.key_format,
            )  # fmt: skip
            picks = _topk_positions(scores, maxima, self.rows, k=c.index_topk, ratio=ratio)
            del scores, maxima  # at long contexts they are large
        out = _entry_attention(
            query,
            self.rows,
            rotation,
            own.ring,
            layer.sink,
            kind=ratio,
            head_dim=c.head_dim,
            window=c.sliding_window,
            norm_eps=c.rms_norm_eps,
            entry_offset=where.offsets[0],
            picks=picks,
            most_entries=most,
            **paged,
        )
        return out, picks


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence.

    sequence: its slot in the cache; start: the first token's position; known: entries of positions
    before it are there and stay; token_ids: [tokens] int64; rotations: [tokens, 2, rope_dim / 2]
    without and with YaRN, and [windows, 2, rope_dim / 2] of the first positions of the windows of 4
    and of 128 tokens that the chunk touches.
    """

    sequence: int
    start: int
    token_ids: Tensor
    rotations: tuple[Tensor, ...]
    known: int = 0

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        cache: StoredCache,
        sequence: int,
        start: int,
        token_ids: Tensor,
        known: int = 0,
        turns: Tensor | None = None,
    ) -> Chunk:
        """token_ids: [tokens] int64; turns: what `frequencies` gives on their device, [2, rope_dim
        / 2], without which the host waits for the device. Raises ConfigError for a chunk that the
        cache cannot hold.
        """
        check_place(tuple(cache.table.shape), sequence, start, len(token_ids))
        end, device = start + len(token_ids), token_ids.device
        plain, yarn = frequencies(config, device) if turns is None else turns
        at = torch.arange(start, end, device=device)
        rotations = [rotated(at, plain), rotated(at, yarn)]
        for ratio in (CSA_RATIO, HCA_RATIO):
            windows = torch.arange(start // ratio, (end - 1) // ratio + 1, device=device)
            rotations.append(rotated(windows * ratio, yarn))
        return cls(
            sequence=sequence,
            start=start,
            token_ids=token_ids,
            rotations=tuple(rotations),
            known=known,
        )

    @property
    def boundary(self) -> Callable[..., Any]:
        """As Work.boundary."""
        return _chunk_mhc_boundary

    @property
    def linear(self) -> Callable[..., Any]:
        """As Work.linear."""
        return _chunk_linear

    @property
    def moe(self) -> Callable[..., Any]:
        """As Work.moe."""
        return _chunk_moe

    def attend(
        self, config: ModelConfig, layer: StoredLayer, where: Place, low: Tensor,
        projected: Tensor | None, query: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As Work.attend; the result takes the query's memory. low: [tokens, rows]; projected:
        [tokens, cols]; query: [tokens, rows]. Returns ([tokens, heads * head_dim], [tokens, topk]
        or None).
        """
        c, own, ratio, mine = config, where.state, layer.ratio, self.sequence
        rotation, paged = self.rotations[1 if ratio else 0], {}
        if ratio:
            table = where.table[mine]
            paged = {"pool": where.pool, "table": table, "page_entries": SLAB_TOKENS // ratio}
        recent, index_query = _chunk_entries(
            low,
            layer.kv_norm,
            self.start,
            rotation,
            own.ring[mine],
            kind=ratio,
            window=c.sliding_window,
            norm_eps=c.rms_norm_eps,
            projected=projected,
            query=query,
            compressor=_with_state(layer.compressor, own.state, mine),
            index_compressor=_with_state(layer.index_compressor, own.index_state, mine),
            entry_rotation=self.rotations[ENTRY_ROTATION[ratio]] if ratio else None,
            offsets=where.offsets,
            index_heads=c.index_n_heads if ratio == CSA_RATIO else 0,
            key_format=where.key_format,
            known=self.known,
            **paged,
        )
        picks = None
        if ratio == CSA_RATIO:
            picks = _chunk_picks(
                index_query, projected, self.start, where.pool, where.table[mine],
                index_offset=where.offsets[1], page_entries=SLAB_TOKENS // ratio, ratio=ratio,
                k=c.index_topk, key_format=where.key_format,
            )  # fmt: skip
        del low, projected, index_query  # the queries of a long chunk are large
        out = _chunk_attention(
            query,
            self.start,
            rotation,
            recent,
            layer.sink,
            kind=ratio,
            head_dim=c.head_dim,
            window=c.sliding_window,
            norm_eps=c.rms_norm_eps,
            entry_offset=where.offsets[0],
            picks=picks,
            **paged,
        )
        return out, picks


def rotated(positions: Tensor, turns: Tensor) -> Tensor:
    """Cosines and sines, as RotaryTable.at: positions [seq] int64, turns [rope_dim / 2] float32 ->
    [seq, 2, rope_dim / 2] float32.
    """
    phase = (positions.float().unsqueeze(-1) * turns).double()
    return torch.stack((phase.cos().float(), phase.sin().float()), dim=1)


def _with_state(
    compressor: tuple[Tensor, Tensor] | None, state: Tensor | None, sequence: int | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(ape, norm, every sequence's state or one's), where there is a compressor."""
    if compressor is None or state is None:
        return None
    return (*compressor, state if sequence is None else state[sequence])
