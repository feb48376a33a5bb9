"""A batch as steps of stored-format operations: which rows share a step, and where memory lies.

Paper: §3.5.1 (KV cache layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from fathom.engine.batch import Memory, Piece
from fathom.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fathom.model.stored_cache import LayerState, StoredCache
from fathom.model.stored_work import MOST_TOKENS
from fathom.quant.kv_pack import IndexerFormat

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # rows of a step
FIRST_BOUND = 4096  # positions that the smallest graphs reach; every next one four times as many
POSITION, SLOT, FIRST, KNOWN, TOKEN, PLACE = range(6)  # lines of a step's table


@dataclass(frozen=True, slots=True)
class Span:
    """Some rows of a batch: `count` tokens of a piece from its `at`-th on; the first is `row`."""

    piece: Piece
    at: int
    count: int
    row: int


def cut(spans: Sequence[Span], room: int) -> list[list[Span]]:
    """Steps of at most 64 rows: of each piece its next ones, at most `room`, while they fit."""
    steps: list[list[Span]] = []
    left = list(spans)
    while left:
        step, later, space = [], [], MOST_TOKENS
        for span in left:
            count = min(room, span.count, space)
            space -= count
            if count:
                step.append(Span(span.piece, span.at, count, span.row))
            if span.count > count:
                rest = span.count - count
                later.append(Span(span.piece, span.at + count, rest, span.row + count))
        steps.append(step)
        left = later
    return steps


def table_of(step: Sequence[Span]) -> np.ndarray:
    """A step's table [6, tokens] int32, filled up to a bucket with repetitions of its first row,
    which write the same bytes to the same places.
    """
    rows: list[tuple[int, ...]] = []
    for span in step:
        piece, first = span.piece, len(rows)
        rows += [
            (
                piece.start + span.at + i,
                piece.slot,
                first,
                piece.known,
                piece.tokens[span.at + i],
                span.row + i,
            )
            for i in range(span.count)
        ]
    columns = np.array(rows, np.int32).T
    count = columns.shape[1]
    fill = bucket(count) - count
    extra = np.repeat(columns[:, :1], fill, axis=1)
    extra[FIRST] = np.arange(count, count + fill)
    return np.concatenate((columns, extra), axis=1)


def bucket(rows: int) -> int:
    """The smallest size of a step that holds so many rows."""
    return next(size for size in BUCKETS if size >= rows)


def bounds(most: int) -> list[int]:
    """How many positions graphs reach, ascending; the last is `most`."""
    found = [FIRST_BOUND]
    while found[-1] < most:
        found.append(found[-1] * 4)
    return [*(bound for bound in found if bound < most), most]


def views(memory: Memory, config: ModelConfig) -> tuple[StoredCache, StoredCache]:
    """An engine's memory as the operations see it: of the main layers, and of the MTP block."""
    slabs, slots = memory.slabs.layout, memory.slots.layout
    data = memory.slots.data
    entry = sum(slabs.kv_sizes)

    def numbers(at: int, *shape: int) -> torch.Tensor:
        count = 4 * int(np.prod(shape))
        return data[:, at : at + count].view(torch.float32).unflatten(1, shape)

    layers = []
    for p in slabs.layers:  # the operations find a page's scales right behind its data
        assert p.kv_scales == p.kv_data + p.entries * slabs.kv_sizes[0]
        assert p.ratio != CSA_RATIO or p.key_scales == p.key_data + p.entries * slabs.key_sizes[0]
    for p in slots.layers:
        assert p.window_scales == p.window_data + slots.ring * slabs.kv_sizes[0]
        state = LayerState(data[:, p.window_data : p.window_data + slots.ring * entry])
        if p.ratio == CSA_RATIO:
            width, key_width = 2 * config.head_dim, 2 * config.index_head_dim
            assert p.tail_gate == p.tail_kv + 4 * slots.tail * width
            assert p.key_tail_gate == p.key_tail_kv + 4 * slots.tail * key_width
            state.state = numbers(p.tail_kv, 2, slots.tail, width)
            state.index_state = numbers(p.key_tail_kv, 2, slots.tail, key_width)
        elif p.ratio == HCA_RATIO:
            state.state = numbers(p.online, slots.online, 3, config.head_dim)
        layers.append(state)
    offsets = tuple((p.kv_data, p.key_data) for p in slabs.layers)
    pool, tables, count = memory.slabs.data, memory.tables, len(slabs.layers)
    own = ((0, 0),) * (len(layers) - count)
    form = cast(IndexerFormat, slabs.key_format)
    return (
        StoredCache(offsets, layers[:count], pool, tables, form),
        StoredCache(own, layers[count:], pool, tables, form),
    )
