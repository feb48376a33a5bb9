"""Steps of an engine through the torch model: any device, any arithmetic, one piece at a time.

The readable counterpart of the compiled runner: a sequence's slabs and slot are unpacked into the
model's own cache, the model runs, and what is new is packed again.

Paper: §3.5.1 (KV cache layout).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch

from fathom.engine.batch import Batch, Memory, Piece
from fathom.engine.kv_cache import SLAB_TOKENS
from fathom.engine.recorder import Recorder
from fathom.engine.state_cache import DRAFT_ROOM
from fathom.kernels import register
from fathom.model.cache import Cache, CompressorState, EntryBuffer, LayerCache
from fathom.model.config import CSA_RATIO, HCA_RATIO
from fathom.model.transformer import Transformer
from fathom.quant import kv_pack

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@register("runner", "reference")
class TorchRunner:
    """Runs batches with `Transformer.streams`; deterministic, but its bits may depend on cuts."""

    def __init__(
        self, device: torch.Tensor, model: Transformer, memory: Memory, max_rows: int
    ) -> None:
        self.model, self.memory, self.export = model, memory, False
        self.batch_invariant = True  # nothing else is offered, and cuts may still count
        self._config, self._layout = model.config, memory.slabs.layout
        self._slots = memory.slots.layout
        self._streams = torch.empty(0)
        self._recorder = Recorder(model)
        self._recorded: list[tuple[np.ndarray, np.ndarray]] = []  # routing, selection

    def reload(self) -> None:
        """The model is read at every step."""

    def close(self) -> None:
        """There is nothing that only running needs."""

    @torch.inference_mode()
    def forward(self, batch: Batch) -> None:
        """All main layers, piece after piece."""
        rows = []
        self._recorded.clear()
        for piece in batch.pieces:
            # Few rows may be taken back: go one by one, so that every state on the way is kept.
            step = 1 if len(piece.tokens) <= DRAFT_ROOM else len(piece.tokens)
            for at in range(0, len(piece.tokens), step):
                rows.append(self._piece(piece, at, step))
        self._streams = torch.cat(rows)

    @torch.inference_mode()
    def logits(self, which: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """As Runner.logits."""
        hidden = torch.cat([self.model.hidden(self._streams[None, r : r + 1])[0] for r in which])
        return hidden.float().cpu().numpy(), self.head(hidden.float().cpu().numpy())

    @torch.inference_mode()
    def head(self, hidden: np.ndarray) -> np.ndarray:
        """As Runner.head; one row at a time, so that the rows beside it do not matter."""
        like = self.model.embed.weight
        rows = torch.tensor(np.asarray(hidden)).to(like.device, like.dtype)
        return torch.cat([self.model.head(row[None]) for row in rows]).float().cpu().numpy()

    def streams(self, row: int) -> np.ndarray:
        """As Runner.streams."""
        return self._streams[row].float().cpu().numpy()

    @torch.inference_mode()
    def draft(self, batch: Batch, streams: np.ndarray) -> np.ndarray:
        """As Runner.draft."""
        given = torch.tensor(streams).to(self._weight.device, self.model.dtype)
        block: Any = self.model.mtp[0]
        layer = self._config.num_hidden_layers
        hidden, out, at = [], [], 0
        for piece in batch.pieces:
            for i in range(len(piece.tokens)):
                cache = Cache([], piece.start + i, [])
                window = LayerCache(self._read_window(piece.slot, layer, piece.start + i))
                token = torch.tensor([[piece.tokens[i]]], device=self._weight.device)
                context = self.model.context(token, cache)
                found, own = block.predict(
                    given[None, at : at + 1], self.model.embed(token), token, context, window
                )
                self._write_window(piece.slot, layer, piece.start + i, window.window[0, -1:])
                hidden.append(found[0])
                out.append(own[0])
                at += 1
        self._streams = torch.cat(out)
        return self.head(torch.cat(hidden).float().cpu().numpy())

    def routing(self, count: int) -> np.ndarray:
        """As Runner.routing."""
        return np.concatenate([routing for routing, _ in self._recorded], axis=1)[:, :count]

    def selection(self, count: int) -> np.ndarray:
        """As Runner.selection."""
        return np.concatenate([selection for _, selection in self._recorded], axis=1)[:, :count]

    @property
    def _weight(self) -> torch.Tensor:
        return self.model.embed.weight

    def _piece(self, piece: Piece, at: int, count: int) -> torch.Tensor:
        start = piece.start + at
        tokens = list(piece.tokens[at : at + count])
        cache = Cache([self._read_layer(piece, i, start) for i in range(len(self._ratios))], start)
        device = self._weight.device
        with self._recorder.recording() if self.export else nullcontext():
            streams = self.model.streams(torch.tensor([tokens], device=device), cache)
        if self.export:
            routing = self._recorder.routing(len(tokens))
            self._recorded.append((routing, self._recorder.selection(start, len(tokens))))
        for i in range(len(self._ratios)):
            self._write_layer(piece, i, start, start + len(tokens), cache.layers[i])
        return streams[0]

    @property
    def _ratios(self) -> tuple[int, ...]:
        return self._config.compress_ratios

    def _read_layer(self, piece: Piece, layer: int, start: int) -> LayerCache:
        ratio = self._ratios[layer]
        cache = LayerCache(self._read_window(piece.slot, layer, start))
        if ratio:
            cache.entries = self._entries(piece, layer, start // ratio, False)
        if ratio == CSA_RATIO:
            cache.key_format = self._layout.key_format
            cache.index_keys = self._entries(piece, layer, start // ratio, True)
            cache.compressor = self._read_tail(piece.slot, layer, start, False)
            cache.index_compressor = self._read_tail(piece.slot, layer, start, True)
        elif ratio:
            cache.compressor = self._read_online(piece.slot, layer, start)
        return cache

    def _write_layer(
        self, piece: Piece, layer: int, start: int, end: int, cache: LayerCache
    ) -> None:
        near = min(end - start, self._config.sliding_window - 1)
        self._write_window(piece.slot, layer, end - near, cache.window[0, -near:])
        ratio = self._ratios[layer]
        if not ratio:
            return
        assert cache.entries is not None
        assert cache.compressor is not None
        first, last = max(start, piece.known) // ratio, end // ratio
        if first * ratio < piece.known:  # that one is there already
            first += 1
        self._store(piece, layer, first, cache.entries.reserve(last)[0, first:last], False)
        if ratio == CSA_RATIO:
            assert cache.index_keys is not None
            assert cache.index_compressor is not None
            keys = cache.index_keys.reserve(last)[0, first:last]
            self._store(piece, layer, first, keys, True)
            self._write_tail(piece.slot, layer, end, cache.compressor, False)
            self._write_tail(piece.slot, layer, end, cache.index_compressor, True)
        else:
            self._write_online(piece.slot, layer, end, cache.compressor)

    # Windows.

    def _read_window(self, slot: int, layer: int, start: int) -> torch.Tensor:
        """The raw entries before `start`: [1, window - 1, head_dim], zeros before the first."""
        size = self._config.sliding_window - 1
        places = torch.arange(start - size, start) % self._slots.ring
        rows = self._unpack(*self._window(slot, layer), places, False)
        rows[: max(0, size - start)] = 0
        return rows[None]

    def _write_window(self, slot: int, layer: int, first: int, rows: torch.Tensor) -> None:
        places = torch.arange(first, first + len(rows)) % self._slots.ring
        self._pack(rows, *self._window(slot, layer), places, False)

    def _window(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        p, row = self._slots.layers[layer], self.memory.slots.data[slot]
        return _lines(
            row, (p.window_data, p.window_scales), self._layout.kv_sizes, self._slots.ring
        )

    # Entries and keys.

    def _places(
        self, slot: int, layer: int, key: bool, first: int, last: int
    ) -> list[tuple[torch.Tensor, torch.Tensor, int, int]]:
        """(data, scales, from, to) in every slab that holds entries first .. last - 1."""
        p = self._layout.layers[layer]
        at = (p.key_data, p.key_scales) if key else (p.kv_data, p.kv_scales)
        sizes = self._layout.key_sizes if key else self._layout.kv_sizes
        found = []
        for number in range(first // p.entries, -(-last // p.entries)):
            row = self.memory.slabs.data[int(self.memory.tables[slot, number])]
            low = max(0, first - number * p.entries)
            high = min(p.entries, last - number * p.entries)
            found.append((*_lines(row, at, sizes, p.entries), low, high))
        return found

    def _entries(self, piece: Piece, layer: int, count: int, key: bool) -> EntryBuffer:
        c = self._config
        dim = c.index_head_dim if key else c.head_dim
        buffer = EntryBuffer(1, dim, self.model.dtype, self._weight.device)
        for data, scales, low, high in self._places(piece.slot, layer, key, 0, count):
            buffer.append(self._unpack(data, scales, torch.arange(low, high), key)[None])
        return buffer

    def _store(self, piece: Piece, layer: int, first: int, rows: torch.Tensor, key: bool) -> None:
        done = 0
        for data, scales, low, high in self._places(
            piece.slot, layer, key, first, first + len(rows)
        ):
            part = rows[done : done + high - low]
            self._pack(part, data, scales, torch.arange(low, high), key)
            done += high - low

    def _unpack(
        self, data: torch.Tensor, scales: torch.Tensor, places: torch.Tensor, key: bool
    ) -> torch.Tensor:
        form = self._layout.key_format if key else self._layout.kv_format
        dtype, places = self.model.dtype, places.to(data.device)
        if form in _DTYPES:
            return data[places].view(_DTYPES[form]).to(dtype)
        given = data[places], scales[places]
        if key:
            return kv_pack.unpack_indexer_entries(*given, _indexer(form), dtype, check=False)
        rope = self._config.qk_rope_head_dim
        return kv_pack.unpack_kv_entries(*given, rope, dtype, check=False)

    def _pack(
        self,
        rows: torch.Tensor,
        data: torch.Tensor,
        scales: torch.Tensor,
        places: torch.Tensor,
        key: bool,
    ) -> None:
        form = self._layout.key_format if key else self._layout.kv_format
        rows, places = rows.contiguous(), places.to(data.device)
        if form in _DTYPES:
            data[places] = rows.to(_DTYPES[form]).view(torch.uint8)
        elif key:
            data[places], scales[places] = kv_pack.pack_indexer_entries(rows, _indexer(form))
        else:
            packed = kv_pack.pack_kv_entries(rows, self._config.qk_rope_head_dim)
            data[places], scales[places] = packed

    # Tails of the compressors.

    def _numbers(self, slot: int, at: int, rows: int, cols: int) -> torch.Tensor:
        raw = self.memory.slots.data[slot, at : at + 4 * rows * cols]
        return raw.view(torch.float32).view(rows, cols)

    def _tails(
        self, slot: int, layer: int, key: bool, state: CompressorState
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Rows of values, then of gates: places in a ring, in `state`, in its previous window."""
        p, size = self._slots.layers[layer], self._slots.tail
        cols = self._config.index_head_dim if key else self._config.head_dim
        assert state.previous_kv is not None
        assert state.previous_gate is not None
        starts = (p.key_tail_kv, p.key_tail_gate) if key else (p.tail_kv, p.tail_gate)
        rows = (state.kv, state.previous_kv), (state.gate, state.previous_gate)
        for start, (now, previous) in zip(starts, rows, strict=True):
            yield self._numbers(slot, start, size, 2 * cols), now[0], previous[0]

    def _read_tail(self, slot: int, layer: int, start: int, key: bool) -> CompressorState:
        cols = self._config.index_head_dim if key else self._config.head_dim
        state = CompressorState.empty(1, CSA_RATIO, cols, self._weight.device)
        now, before = _tail_positions(start)
        for ring, rows, previous in self._tails(slot, layer, key, state):
            rows[now % CSA_RATIO] = ring[now % len(ring)]
            previous[before % CSA_RATIO] = ring[before % len(ring), :cols]
        return state

    def _write_tail(
        self, slot: int, layer: int, end: int, state: CompressorState, key: bool
    ) -> None:
        now, before = _tail_positions(end)
        for ring, rows, previous in self._tails(slot, layer, key, state):
            ring[now % len(ring)] = rows[now % CSA_RATIO]
            ring[before % len(ring), : previous.shape[1]] = previous[before % CSA_RATIO]

    def _online(self, slot: int, layer: int, length: int) -> torch.Tensor:
        """Where the running softmax after `length` tokens lies: [3 * head_dim]."""
        at, rows = self._slots.layers[layer].online, self._slots.online
        return self._numbers(slot, at, rows, 3 * self._config.head_dim)[(length - 1) % rows]

    def _read_online(self, slot: int, layer: int, start: int) -> CompressorState:
        """The running softmax as one token: the average so far, with the logarithm of its mass."""
        cols, pending = self._config.head_dim, start % HCA_RATIO
        state = CompressorState.empty(1, HCA_RATIO, cols, self._weight.device)
        if pending:
            high, total, value = self._online(slot, layer, start).split(cols)
            state.gate[0, :pending] = -torch.inf
            state.gate[0, 0] = high + total.log()
            state.kv[0, 0] = value / total
        return state

    def _write_online(self, slot: int, layer: int, end: int, state: CompressorState) -> None:
        pending = end % HCA_RATIO
        if not pending:
            return
        gate, kv = state.gate[0, :pending], state.kv[0, :pending]
        high = gate.amax(0)
        weights = (gate - high).exp()
        row = torch.cat((high, weights.sum(0), (weights * kv).sum(0)))
        self._online(slot, layer, end).copy_(row)


def _lines(
    row: torch.Tensor, starts: tuple[int, int], sizes: tuple[int, int], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and scales [count, bytes] of `count` entries that lie at these places of row [bytes]."""
    data, scales = (
        row[at : at + count * size].view(count, size)
        for at, size in zip(starts, sizes, strict=True)
    )
    return data, scales


def _tail_positions(end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the CSA window begun before `end`, and those of the one before it."""
    begun = end - end % CSA_RATIO
    return torch.arange(begun, end), torch.arange(max(0, begun - CSA_RATIO), begun)


def _indexer(form: str) -> kv_pack.IndexerFormat:
    return cast(kv_pack.IndexerFormat, form)


assert SLAB_TOKENS % HCA_RATIO == 0
