"""Steps of an engine from stored weights: the way to serve on a GPU.

A batch is cut into decode steps of up to 64 rows, of a sequence at most as many as its rings have
spare room for; the host uploads one small table for all of them, and each step is a replay of one
CUDA graph, captured once for a number of rows and a bound on positions. Rows that fill a step up
repeat its first one: they write the same bytes to the same places. A row's bits depend on its
sequence alone. Logits stay on the device, which sums them up and draws from them; a row leaves it
where somebody needs the whole of it.

`batch_invariant` (the default): every row of every prompt goes through decode steps too. Otherwise
prompts go through the layers as chunks, many times as fast, and what they leave depends, within the
formats' rounding, on how a prompt was cut.

Where there is no CUDA device the same operations run as their references, without graphs.

Paper: §3.5.1 (KV cache layout); otherwise none (engine).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fathom.engine.batch import Batch, Memory
from fathom.engine.graphs import Graphs
from fathom.engine.kv_cache import SLAB_TOKENS
from fathom.engine.runner import Summarised
from fathom.engine.sampler import SURE, Wanted
from fathom.engine.state_cache import DRAFT_ROOM
from fathom.engine.stored_fit import refusal
from fathom.engine.stored_steps import (
    PLACE,
    POSITION,
    TOKEN,
    Span,
    bounds,
    bucket,
    cut,
    table_of,
    views,
)
from fathom.errors import ConfigError
from fathom.kernels import operation, register
from fathom.model.stored import MergeSite, StoredModel
from fathom.model.stored_forward import Choices, run_layers
from fathom.model.stored_work import MOST_TOKENS, Chunk, Step, check_place, frequencies
from fathom.model.transformer import Transformer

_head_logits = operation("head_logits")
_logit_summary = operation("logit_summary")
_step_rotations = operation("step_rotations")
_step_streams = operation("step_streams")
_stream_head = operation("stream_head")


def _accepts(device: torch.Tensor, model: Any, memory: Memory, max_rows: int) -> bool:
    """Whether a runner from stored formats can serve this model."""
    return refusal(device.device, model, memory.slabs.layout.kv_format) is None


@register("runner", "triton", accepts=_accepts)
class StoredRunner:
    """Runs batches over an engine's memory with the operations of stored formats.

    Raises ConfigError for a model or memory that they do not fit.
    """

    def __init__(
        self, device: torch.Tensor, model: StoredModel | Transformer, memory: Memory, max_rows: int
    ) -> None:
        reason = refusal(device.device, model, memory.slabs.layout.kv_format)
        if reason is not None:
            raise ConfigError(
                f"this model cannot be served from its stored formats here: {reason}. Load it as a "
                "Transformer (load_model)"
            )
        self.model, self.memory = model, memory
        self.export, self.batch_invariant = False, True
        self._config, self._device = model.config, device.device
        self._main, self._own = views(memory, self._config)
        self._frequencies = frequencies(self._config, self._device)
        c = self._config
        make = {"dtype": model.dtype, "device": self._device}
        self._streams = torch.zeros(max_rows, c.hc_mult, c.hidden_size, **make)
        self._given = torch.zeros_like(self._streams) if model.mtp else self._streams[:0]
        self._experts, self._picks = (torch.empty(0, device=self._device) for _ in range(2))
        self._bounds = bounds(memory.tables.shape[1] * SLAB_TOKENS)
        self._graphs = Graphs(self._device)
        self.reload()

    def reload(self) -> None:
        """Read the model's weights again."""
        model = self.model
        self._graphs.clear()
        self._stored = model if isinstance(model, StoredModel) else StoredModel.of(model)

    def close(self) -> None:
        """Let go of the graphs; what runs again captures them again."""
        self._graphs.clear()

    @torch.inference_mode()
    def forward(self, batch: Batch) -> None:
        """All main layers for a batch; `logits` and `streams` then read its rows.

        Raises ConfigError for a piece that the memory has no place for, before anything is written.
        """
        self._check(batch)
        if self.export:
            self._make_room_for_choices()
        spans, chunks, row = [], [], 0
        for piece in batch.pieces:
            span = Span(piece, 0, len(piece.tokens), row)
            whole = not self.batch_invariant and span.count > DRAFT_ROOM
            (chunks if whole else spans).append(span)
            row += span.count
        for span in chunks:
            self._chunk(span)
        self._steps(spans, self._step)

    @torch.inference_mode()
    def draft(self, batch: Batch, streams: np.ndarray) -> np.ndarray:
        """The MTP block: streams [rows, streams, hidden] before, tokens after each position.

        Returns logits [rows, vocab] float32; `streams` of its rows are then the block's own.
        """
        self._draft(batch, self._upload(torch.from_numpy(streams)))
        return self._read_whole(list(range(len(streams))), self._stored.mtp[0].merge)[1]

    @torch.inference_mode()
    def draft_summarised(
        self, batch: Batch, given: list[int], which: list[int], wanted: Sequence[Wanted]
    ) -> Summarised:
        """The same from the streams of rows that are here already."""
        rows = self._upload(torch.tensor(given))
        self._draft(batch, self._streams.index_select(0, rows))
        return self._read(which, wanted, self._stored.mtp[0].merge)

    def _check(self, batch: Batch) -> None:
        shape = tuple(self._main.table.shape)
        for piece in batch.pieces:
            check_place(shape, piece.slot, piece.start, len(piece.tokens))

    def _draft(self, batch: Batch, streams: torch.Tensor) -> None:
        self._check(batch)
        self._given[: len(streams)] = streams
        spans, row = [], 0
        for piece in batch.pieces:
            spans.append(Span(piece, 0, len(piece.tokens), row))
            row += len(piece.tokens)
        self._steps(spans, self._draft_step)

    @torch.inference_mode()
    def logits(self, which: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """For rows of the last batch: final hidden states [rows, hidden], logits [rows, vocab]."""
        return self._read_whole(which, self._stored.merge)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """The logits [rows, vocab] of hidden states [rows, hidden] that `logits` returned."""
        return _stacked(self.head_summarised(hidden, [Wanted(whole=True)] * len(hidden)).logits)

    @torch.inference_mode()
    def summarised(self, which: list[int], wanted: Sequence[Wanted]) -> Summarised:
        """As `Summarising` of fathom.engine.runner, for rows of the last batch."""
        return self._read(which, wanted, self._stored.merge)

    @torch.inference_mode()
    def head_summarised(self, hidden: np.ndarray, wanted: Sequence[Wanted]) -> Summarised:
        """The same for hidden states [rows, hidden] that were kept."""
        draws = self._upload(torch.from_numpy(_draws(wanted, len(wanted))))
        logits = _head_logits(
            self._upload(torch.from_numpy(np.array(hidden, np.float32))), self._stored.head
        )
        return self._leave(None, logits, _logit_summary(logits, draws), wanted)

    def streams(self, row: int) -> np.ndarray:
        """A row's residual streams after the last layer that ran: [streams, hidden] float32."""
        return self._streams[row].float().cpu().numpy()

    def routing(self, count: int) -> np.ndarray:
        """With `export`: experts chosen, [layers, rows, topk] int16."""
        return self._experts[:, :count].short().cpu().numpy()

    def selection(self, count: int) -> np.ndarray:
        """With `export`: entries picked, ascending, [layers, rows, index_topk] int32, -1 = none."""
        none = torch.iinfo(torch.int32).max
        picks = self._picks[:, :count]
        picks = picks.masked_fill(picks < 0, none).sort(dim=-1).values
        return picks.masked_fill(picks == none, -1).cpu().numpy()

    # Steps.

    def _steps(
        self, spans: Sequence[Span], call: Callable[[torch.Tensor, int], Choices | None]
    ) -> None:
        """Run rows through `call`, a step's table [6, tokens] at a time."""
        steps = cut(spans, self.memory.slots.layout.room)
        if not steps:
            return
        tables, bounds = [], []
        for step in steps:
            tables.append(table_of(step))
            bounds.append(self._bound(int(tables[-1][POSITION].max()) + 1))
        uploaded = self._upload(torch.from_numpy(np.concatenate(tables, axis=1)))
        at = 0
        for table, bound in zip(tables, bounds, strict=True):
            given = uploaded[:, at : at + table.shape[1]]
            at += table.shape[1]
            key = call.__name__, given.shape, bound
            choices = self._graphs.run(key, call, given, bound)
            if self.export and choices is not None:
                self._keep_choices(choices, given[PLACE])

    def _bound(self, positions: int) -> int:
        return next(bound for bound in self._bounds if bound >= positions)

    def _work(self, table: torch.Tensor, bound: int) -> Step:
        rows = table[:TOKEN]
        return Step(
            rows=rows,
            token_ids=table[TOKEN],
            rotations=_step_rotations(rows, self._frequencies),
            most_positions=bound,
        )

    def _step(self, table: torch.Tensor, bound: int) -> Choices:
        stored, choices = self._stored, Choices()
        streams = _step_streams(table[TOKEN], stored.embed.weight, self._config.hc_mult)
        work = self._work(table, bound)
        pending = run_layers(self._config, stored.layers, self._main, work, streams, choices)
        pending.write(table[PLACE], self._streams)
        return choices

    def _draft_step(self, table: torch.Tensor, bound: int) -> None:
        stored, c = self._stored, self._config
        block, work = stored.mtp[0], self._work(table, bound)
        embedded = _step_streams(table[TOKEN], stored.embed.weight, 1)[:, 0]
        given = self._given.index_select(0, table[PLACE])
        own, _ = work.linear(embedded, *block.e_proj, norm=block.enorm, norm_eps=c.rms_norm_eps)
        # A step's operations take 64 rows at most, and every stream is one here.
        parts = [
            work.linear(part, *block.h_proj, norm=block.hnorm, norm_eps=c.rms_norm_eps)[0]
            for part in given.flatten(0, 1).split(MOST_TOKENS)
        ]
        streams = own.unsqueeze(1) + torch.cat(parts).view_as(given)
        pending = run_layers(c, [block.layer], self._own, work, streams)
        pending.write(table[PLACE], self._streams)

    def _chunk(self, span: Span) -> None:
        """A piece as one chunk, its rows kept where they belong."""
        piece, stored = span.piece, self._stored
        choices = Choices() if self.export else None
        ids = self._upload(torch.tensor(list(piece.tokens)))
        chunk = Chunk.create(
            self._config, self._main, piece.slot, piece.start, ids, piece.known, self._frequencies
        )
        streams = _step_streams(ids, stored.embed.weight, self._config.hc_mult)
        pending = run_layers(self._config, stored.layers, self._main, chunk, streams, choices)
        del streams
        make = {"dtype": torch.int32, "device": self._device}
        places = torch.arange(span.row, span.row + span.count, **make)
        pending.write(places, self._streams)
        if choices is not None:
            self._keep_choices(choices, places)

    # Results.

    def _merge(self, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._merged(given, self._stored.merge)

    def _merge_draft(self, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._merged(given, self._stored.mtp[0].merge)

    def _merged(self, given: torch.Tensor, site: MergeSite) -> tuple[torch.Tensor, ...]:
        """given: [rows * 20] uint8, what is drawn [2, rows] float64 and rows' places [rows] int32.
        Returns hidden states [rows, hidden], logits [rows, vocab] and summaries [rows, 6].
        """
        c, split = self._config, len(given) // 20 * 16
        draws = given[:split].view(torch.float64).unflatten(0, (2, -1))
        weights = (site.fn, site.base, site.scale, site.norm)
        hidden = _stream_head(
            self._streams,
            given[split:].view(torch.int32),
            *weights,
            eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
        )
        logits = _head_logits(hidden, self._stored.head)
        return hidden, logits, _logit_summary(logits, draws)

    def _read_whole(self, which: list[int], site: MergeSite) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states [rows, hidden] and logits [rows, vocab] of kept rows."""
        if not which:
            c = self._config
            return np.empty((0, c.hidden_size), np.float32), np.empty((0, c.vocab_size), np.float32)
        found = self._read(which, [Wanted(whole=True, hidden=True)] * len(which), site)
        assert found.hidden is not None
        return found.hidden, _stacked(found.logits)

    def _read(self, which: list[int], wanted: Sequence[Wanted], site: MergeSite) -> Summarised:
        """What is wanted of kept rows."""
        call = self._merge if site is self._stored.merge else self._merge_draft
        parts, keep = [], any(w.hidden for w in wanted)
        for first in range(0, len(which), MOST_TOKENS):
            some, own = which[first : first + MOST_TOKENS], wanted[first : first + MOST_TOKENS]
            size = bucket(len(some))
            places = np.array(some + some[:1] * (size - len(some)), np.int32)
            given = np.frombuffer(_draws(own, size).tobytes() + places.tobytes(), np.uint8).copy()
            key = call.__name__, size
            found = self._graphs.run(key, call, self._upload(torch.from_numpy(given)))
            hidden, logits, summaries = (value[: len(some)] for value in found)
            parts.append(self._leave(hidden if keep else None, logits, summaries, own))
        if len(parts) == 1:
            return parts[0]
        return Summarised(
            np.concatenate([part.hidden for part in parts if part.hidden is not None])
            if keep
            else None,
            [row for part in parts for row in part.logits],
            np.concatenate([part.summaries for part in parts if part.summaries is not None]),
        )

    def _leave(
        self,
        hidden: torch.Tensor | None,
        logits: torch.Tensor,
        summaries: torch.Tensor,
        wanted: Sequence[Wanted],
    ) -> Summarised:
        """Copy what is wanted to the host, waiting once; a draw that is not sure takes its row."""
        runs = _runs([number for number, w in enumerate(wanted) if w.whole])
        leaving = [summaries, *(logits[a:b] for a, b in runs)]
        told, *found = self._download(*leaving, *([] if hidden is None else [hidden]))
        states = None if hidden is None else found.pop()
        if runs == [(0, len(wanted))]:
            return Summarised(states, found[0], told)
        unsure = [
            number
            for number, w in enumerate(wanted)
            if w.temperature > 0 and not w.whole and not told[number, 5] > SURE
        ]
        if unsure:  # seldom: two draws in a billion for every token that is not unlikely
            late = _runs(unsure)
            found += self._download(*(logits[a:b] for a, b in late))
            runs += late
        rows: list[np.ndarray | None] = [None] * len(wanted)
        for (first, end), values in zip(runs, found, strict=True):
            rows[first:end] = list(values)
        return Summarised(states, rows, told)

    def _upload(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return values
        return values.pin_memory().to(self._device, non_blocking=True)

    def _download(self, *values: torch.Tensor) -> tuple[np.ndarray, ...]:
        """On the host, in pinned memory that torch keeps for the next ones of this size."""
        if self._device.type == "cpu":
            return tuple(value.numpy() for value in values)
        found = [torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for v in values]
        for host, value in zip(found, values, strict=True):
            host.copy_(value, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return tuple(host.numpy() for host in found)

    def _make_room_for_choices(self) -> None:
        if self._experts.numel():
            return
        c, rows = self._config, len(self._streams)
        make = {"dtype": torch.int32, "device": self._device}
        self._experts = torch.full((c.num_hidden_layers, rows, c.num_experts_per_tok), -1, **make)
        self._picks = torch.full((c.num_hidden_layers, rows, c.index_topk), -1, **make)

    def _keep_choices(self, choices: Choices, places: torch.Tensor) -> None:
        where = places.long()
        for layer, (experts, picks) in enumerate(zip(choices.experts, choices.picks, strict=True)):
            self._experts[layer, where] = experts
            if picks is not None:
                self._picks[layer, where] = picks


def _draws(wanted: Sequence[Wanted], size: int) -> np.ndarray:
    """What to draw [2, size] float64; nothing for rows that leave the device as a whole."""
    draws = np.zeros((2, size))
    for number, w in enumerate(wanted):
        if not w.whole:
            draws[:, number] = w.temperature, w.number
    return draws


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, end) of those that follow one another."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs


def _stacked(rows: Sequence[np.ndarray | None] | np.ndarray) -> np.ndarray:
    """Rows [vocab] that are all there, as [rows, vocab]."""
    return rows if isinstance(rows, np.ndarray) else np.stack([r for r in rows if r is not None])
