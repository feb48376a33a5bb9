"""A batch of tokens through the blocks, in compiled code that treats every token alike.

A row is one token of one sequence. What a row computes does not depend on the rows beside it: not
on how many there are, nor on how a prompt was cut into pieces, nor on whether the token was part of
a prompt or just sampled.

`forward` does any of five parts of a block, for some layers and rows:

    COMBINE   the MTP block's input (row by row)
    PROJECT   mHC read, queries, keys, what the compressors and the indexer need (row by row)
    ABSORB    compressor states move on, completed entries go into slabs (in order)
    ATTEND    attention, its projection, the experts (row by row)
    REMEMBER  the last raw entries go into the sliding window's ring (in order)

PROJECT and ATTEND may run in several threads over different rows; ABSORB and REMEMBER may not.

Paper: §2.2 (mHC), §2.3 (attention), §2.1 (DeepSeekMoE): a block, in the order of figure 2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fathom.kernels.numba import layout
from fathom.kernels.numba.attention import attend, project, search_entries
from fathom.kernels.numba.compiled import compiled
from fathom.kernels.numba.compressor import absorb, remember
from fathom.kernels.numba.experts import run_experts
from fathom.kernels.numba.layout import line, matrix, of_row, part
from fathom.kernels.numba.memory import address, view_float32, view_int64
from fathom.kernels.numba.primitives import copy
from fathom.kernels.numba.streams import combine, merge_streams, read_streams, write_streams
from fathom.kernels.numba.vector import PANEL

PROJECT, ABSORB, ATTEND, REMEMBER, COMBINE = 1, 2, 4, 8, 16
EVERYTHING = PROJECT | ABSORB | ATTEND | REMEMBER
BLOCK = 256  # rows that share a widened panel of weights


@compiled
def forward(
    record: Any, first_layer: int, last_layer: int, parts: int, a: int, b: int, shares: int
) -> None:
    """The chosen parts of layers first .. last - 1, for rows a .. b - 1; see the module.

    record: [1] layout.RECORD. shares: see attention.attend. Raises MemoryError; state and entries
    of the rows are then worth nothing.
    """
    k, at = record[0], address(record)
    widest = 0
    for layer in range(first_layer, last_layer):
        sizes = view_int64(k.meta + 8 * layer * layout.COLUMNS, 4 * layout.MATRICES)
        for which in range(layout.MATRICES):
            widest = max(widest, sizes[4 * which + 3])
    panel = np.empty(widest * PANEL, np.float32)
    scratch = address(panel)
    for layer in range(first_layer, last_layer):
        done = 1
        if parts & COMBINE:
            done &= combine(at, layer, a, b, scratch)
        if parts & PROJECT:
            for t in range(a, b, BLOCK):
                end = min(t + BLOCK, b)
                done &= read_streams(at, layer, layout.ZERO, t, end, scratch)
                done &= project(at, layer, t, end, scratch)
        if parts & ABSORB:
            done &= absorb(at, layer, a, b)
        if parts & ATTEND:
            for t in range(a, b, BLOCK):
                end = min(t + BLOCK, b)
                done &= attend(at, layer, t, end, shares, scratch)
                done &= write_streams(at, t, end)
                done &= read_streams(at, layer, layout.ONE, t, end, scratch)
                done &= run_experts(at, layer, t, end, scratch)
                done &= write_streams(at, t, end)
        if parts & REMEMBER:
            done &= remember(at, layer, a, b)
        if not done:
            raise MemoryError
    panel[0] = 0  # keep it alive until here: numba does not see that its address is in use


@compiled
def prepare(record: Any, count: int, embed: int) -> None:
    """Rotations of all rows and, if `embed`, their tokens' embeddings into all streams."""
    k = record[0]
    pairs, d = k.rope_dim // 2, k.hidden
    for t in range(count):
        for far in range(2):
            cos = line(k.far_cos if far else k.plain_cos, k.w_plain_cos, t, pairs)
            sin = line(k.far_sin if far else k.plain_sin, k.w_plain_cos, t, pairs)
            frequencies = view_float32(k.frequencies + 4 * far * pairs, pairs)
            for j in range(pairs):
                phase = np.float32(of_row(k, layout.POSITION, t)) * frequencies[j]
                cos[j] = np.float32(math.cos(phase))
                sin[j] = np.float32(math.sin(phase))
        if embed:
            source = view_float32(k.embed + 4 * of_row(k, layout.TOKEN, t) * d, d)
            for i in range(k.streams):
                copy(source, line(k.flow + 4 * i * d, k.w_flow, t, d))


@compiled
def search_share(record: Any, layer: int, t: int, first: int, last: int, share: int) -> None:
    """A part of row t's search, into `values` and `places`: several threads share a long one."""
    k = record[0]
    values, places = k.values + 4 * share * k.room, k.places + 8 * share * k.room
    search_entries(k, layer, t, first, last, values, places, k.held + 8 * share)


@compiled
def merge(record: Any, layer: int, which: Any, hidden: Any) -> None:
    """The final hidden states of the rows `which`, by the stream head and norm of `layer`.

    which: [count] int64; hidden: [count * padded hidden] float32, out.
    """
    k = record[0]
    panel = np.empty(k.streams * k.hidden * PANEL, np.float32)
    x, mixes = np.empty(k.hidden, np.float32), np.empty(PANEL, np.float32)
    for i in range(which.shape[0]):
        own = part(hidden, k.w_normed, i, k.hidden)
        merge_streams(k, layer, which[i], x, mixes, address(panel), own)
    panel[0] = 0


@compiled
def output(record: Any, count: int, hidden: Any, logits: Any) -> None:
    """logits [count * padded vocab] of hidden states [count * padded hidden]."""
    k = record[0]
    width, wide = k.w_normed, (k.vocab + PANEL - 1) // PANEL * PANEL
    panel = np.empty(width * PANEL, np.float32)
    x, to = address(hidden), address(logits)
    matrix(k, layout.ZERO, layout.HEAD, layout.ZERO, count, x, width, to, wide, address(panel))
    panel[0] = hidden[0] = hidden[0]
