"""Steps of an engine on the CPU: a float32 model packed once, one compiled call for a small batch.

Paper: none (implementation of §2 for batches).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fathom.kernels.numba import layout, rows
from fathom.kernels.numba.compiled import link, must_compile
from fathom.kernels.numba.entries import FP4, FP8, RAW
from fathom.kernels.numba.llvm import LANES
from fathom.kernels.numba.packing import is_uniform, pack
from fathom.kernels.numba.selection import capacity
from fathom.kernels.numba.vector import PANEL
from fathom.kernels.registry import register

_log = logging.getLogger(__name__)

FORMS = {"float32": RAW, "fp8": FP8, "fp4": FP4}
CSA_RATIO, SLAB_ENTRIES = 4, 64
SPLIT_ROWS = 16  # fewer rows than this are not worth a second thread
SPLIT_ENTRIES = 8192  # fewer entries than this are scored by one thread


def _accepts(device: torch.Tensor, model: Any, memory: Any, max_rows: int) -> bool:
    """Whether the compiled rows compute this model: float32, sizes that fill vectors."""
    config = model.config
    sizes = (
        config.hidden_size, config.head_dim, config.qk_rope_head_dim, config.q_lora_rank,
        config.o_groups * config.o_lora_rank, config.moe_intermediate_size, config.index_head_dim,
    )  # fmt: skip
    return (
        model.dtype == torch.float32
        and all(size % LANES == 0 for size in sizes)
        and (config.index_head_dim % 32 == 0 or memory.slabs.layout.key_format != "fp4")
        and memory.slabs.layout.kv_format in FORMS
        and memory.slabs.layout.key_format in FORMS
        and is_uniform(model)
    )


@register("runner", "numba", accepts=_accepts)
class CompiledRunner:
    """Runs batches of at most `max_rows` rows; every row's result is independent of the others."""

    def __init__(self, device: torch.Tensor, model: Any, memory: Any, max_rows: int) -> None:
        if must_compile(rows.forward):
            _log.warning(
                "event=compiling detail='the model for this processor, once: half a minute'"
            )
        link()
        self.model, self.max_rows = model, max_rows
        self._layers = model.config.num_hidden_layers
        self._places = _places(memory.slabs.layout, memory.slots.layout)
        self._numbers = _numbers(model.config, memory.slabs.layout, memory.slots.layout)
        self._arrays: dict[str, np.ndarray] = {
            # Views of the pools, which must not move.
            "slabs": memory.slabs.data.flatten().numpy(),
            "slots": memory.slots.data.flatten().numpy(),
            "tables": memory.tables.numpy(),
        }
        self._pool: ThreadPoolExecutor | None = None
        self._workers_made = 0
        self._allocated, self._exporting = 0, False
        self.export, self.batch_invariant = False, True
        self._make_found(1)
        self.reload()

    def reload(self) -> None:
        """Read the model's weights again."""
        packed = pack(self.model)
        packed.meta[: len(self._places), layout.PLACE_0 :] = self._places
        self._arrays |= packed._asdict()
        self._allocate(max(64, self._allocated))

    def _allocate(self, count: int) -> None:
        """Buffers for steps of up to `count` rows."""
        self._allocated, self._exporting = count, self.export
        config = self.model.config
        tables = (self.model._rotary[far].frequencies.cpu().numpy() for far in (False, True))
        layers, lines = (self._layers + config.num_mtp_layers, count) if self.export else (1, 1)
        self._arrays |= {
            "frequencies": np.stack(list(tables)),
            "rows": np.zeros((5, count), np.int64),
            "chosen": np.full((layers, lines, config.num_experts_per_tok), -1, np.int16),
            "picked": np.full((layers, lines, config.index_topk), -1, np.int32),
        }
        self._widths = {name: _padded(width) for name, width in _widths(self._numbers).items()}
        self._work = np.zeros(count * sum(self._widths.values()), np.float32)
        self._write_record()

    def _write_record(self) -> None:
        """What compiled code gets: all sizes, and where every array lies."""
        record = self._record = np.zeros(1, layout.RECORD)
        for name, value in self._numbers.items():
            record[name] = value
        for name in layout.ARRAYS:
            record[name] = self._arrays[name].ctypes.data
        at = self._work.ctypes.data
        for name, width in self._widths.items():
            record[name], record[f"w_{name}"] = at, width
            at += 4 * self._allocated * width
        record["capacity"], record["export"] = self._allocated, self.export
        record["table_columns"] = self._arrays["tables"].shape[1]
        record["room"] = capacity(self.model.config.index_topk)

    def forward(self, batch: Any) -> None:
        """All main layers for a batch; `logits` and `streams` then read its rows."""
        count = self._take(batch)
        rows.prepare(self._record, count, 1)
        threads = torch.get_num_threads()
        if threads > 1 and count >= SPLIT_ROWS:
            self._forward_split(count, threads)
        elif threads > 1 and int(self._positions(count).max()) // CSA_RATIO >= SPLIT_ENTRIES:
            self._forward_long(count, threads)
        else:
            self._forward(0, self._layers, rows.EVERYTHING, 0, count)

    def logits(self, which: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """For rows of the last batch: final hidden states [rows, hidden], logits [rows, vocab]."""
        hidden = self._merge(0, which)
        return hidden, self.head(hidden)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """The logits [rows, vocab] of hidden states [rows, hidden] that `logits` returned."""
        config, count = self.model.config, len(hidden)
        padded = np.zeros((count, _padded(config.hidden_size)), np.float32)
        padded[:, : config.hidden_size] = hidden
        logits = np.empty((count, _padded(config.vocab_size)), np.float32)
        rows.output(self._record, count, padded.reshape(-1), logits.reshape(-1))
        return logits[:, : config.vocab_size]

    def streams(self, row: int) -> np.ndarray:
        """A row's residual streams after the last layer that ran: [streams, hidden] float32."""
        return self._flow()[row]

    def draft(self, batch: Any, streams: np.ndarray) -> np.ndarray:
        """The MTP block: streams [rows, streams, hidden] before, tokens after each position.

        Returns logits [rows, vocab] float32; `streams` of its rows are then the block's own.
        """
        count = self._take(batch)
        self._flow()[:count] = streams
        rows.prepare(self._record, count, 0)
        parts = rows.EVERYTHING | rows.COMBINE
        self._forward(self._layers, self._layers + 1, parts, 0, count)
        return self.head(self._merge(self._layers, list(range(count))))

    def routing(self, count: int) -> np.ndarray:
        """With `export`: experts chosen, [layers, rows, topk] int16."""
        return self._arrays["chosen"][: self._layers, :count].copy()

    def selection(self, count: int) -> np.ndarray:
        """With `export`: entries picked, ascending, [layers, rows, index_topk] int32, -1 = none."""
        return self._arrays["picked"][: self._layers, :count].copy()

    def _flow(self) -> np.ndarray:
        config, width = self.model.config, self._widths["flow"]  # the first of the buffers
        flow = self._work[: self._allocated * width].reshape(self._allocated, width)
        used = flow[:, : config.hc_mult * config.hidden_size]
        return used.reshape(self._allocated, config.hc_mult, config.hidden_size)

    def _positions(self, count: int) -> np.ndarray:
        return self._arrays["rows"][layout.POSITION, :count]

    def _merge(self, layer: int, which: list[int]) -> np.ndarray:
        size = self.model.config.hidden_size
        hidden = np.zeros((len(which), _padded(size)), np.float32)
        rows.merge(self._record, layer, np.array(which, np.int64), hidden.reshape(-1))
        return hidden[:, :size]

    def _take(self, batch: Any) -> int:
        count = len(batch)
        if count > self._allocated or self._exporting != self.export:
            self._allocate(max(count, min(self.max_rows, 2 * count)))
        columns = (batch.tokens, batch.positions, batch.slots, batch.firsts, batch.known)
        for row, column in zip(self._arrays["rows"], columns, strict=True):
            row[:count] = column.numpy()
        return count

    def _forward(self, *numbers: int, shares: int = 0) -> None:
        rows.forward(self._record, *numbers, shares)

    def _forward_split(self, count: int, threads: int) -> None:
        """Threads share the rows; between a layer's halves one of them moves the state on."""
        cuts = [count * i // threads for i in range(threads + 1)]
        shares = list(pairwise(cuts))

        def everywhere(layer: int, parts: int) -> None:
            self._together(
                [partial(self._forward, layer, layer + 1, parts, *share) for share in shares]
            )

        for layer in range(self._layers):
            everywhere(layer, rows.PROJECT)
            self._forward(layer, layer + 1, rows.ABSORB, 0, count)
            everywhere(layer, rows.ATTEND)
            self._forward(layer, layer + 1, rows.REMEMBER, 0, count)

    def _forward_long(self, count: int, threads: int) -> None:
        """Few rows, many entries: threads share each scan."""
        config, positions = self.model.config, self._positions(count)
        if len(self._arrays["held"]) < threads:
            self._make_found(threads)
            self._write_record()
        for layer, ratio in enumerate(config.compress_ratios):
            if ratio != CSA_RATIO:
                self._forward(layer, layer + 1, rows.EVERYTHING, 0, count)
                continue
            self._forward(layer, layer + 1, rows.PROJECT | rows.ABSORB, 0, count)
            for t in range(count):
                entries = (int(positions[t]) + 1) // CSA_RATIO
                shares = 0
                if entries >= SPLIT_ENTRIES and entries > config.index_topk:
                    shares = threads
                    self._search(layer, t, entries, threads)
                self._forward(layer, layer + 1, rows.ATTEND, t, t + 1, shares=shares)
            self._forward(layer, layer + 1, rows.REMEMBER, 0, count)

    def _make_found(self, threads: int) -> None:
        room = threads * capacity(self.model.config.index_topk)
        self._arrays |= {
            "values": np.empty(room, np.uint32),
            "places": np.empty(room, np.int64),
            "held": np.zeros(threads, np.int64),
        }

    def _search(self, layer: int, t: int, entries: int, threads: int) -> None:
        slabs = -(-entries // SLAB_ENTRIES)
        cuts = [slabs * i // threads * SLAB_ENTRIES for i in range(threads)] + [entries]
        self._together(
            [
                partial(rows.search_share, self._record, layer, t, *cut, i)
                for i, cut in enumerate(pairwise(cuts))
            ]
        )

    def _together(self, parts: list[Callable[[], None]]) -> None:
        """Run parts side by side, the first of them here; none runs on when this ends."""
        futures = [self._workers(len(parts)).submit(part) for part in parts[1:]]
        try:
            parts[0]()
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """Let go of the threads; a batch that needs some makes them anew."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool, self._workers_made = None, 0

    def _workers(self, threads: int) -> ThreadPoolExecutor:
        if self._pool is None or self._workers_made < threads:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool, self._workers_made = ThreadPoolExecutor(threads - 1), threads
        return self._pool


def _padded(cols: int) -> int:
    return -(-cols // PANEL) * PANEL


def _numbers(config: Any, layout: Any, state: Any) -> dict[str, float]:
    """The numbers of layout.INTEGERS and layout.REALS."""
    return {
        "streams": config.hc_mult,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "rope_dim": config.qk_rope_head_dim,
        "groups": config.o_groups,
        "o_rank": config.o_lora_rank,
        "q_rank": config.q_lora_rank,
        "index_heads": config.index_n_heads,
        "index_dim": config.index_head_dim,
        "index_topk": config.index_topk,
        "experts": config.n_routed_experts,
        "topk": config.num_experts_per_tok,
        "inner": config.moe_intermediate_size,
        "window": config.sliding_window,
        "ring": state.ring,
        "tail": state.tail,
        "online": state.online,
        "sinkhorn_iters": config.hc_sinkhorn_iters,
        "slab_tokens": CSA_RATIO * SLAB_ENTRIES,
        "slab_bytes": layout.slab_bytes,
        "slot_bytes": state.slot_bytes,
        "kv_form": FORMS[layout.kv_format],
        "key_form": FORMS[layout.key_format],
        "kv_data": layout.kv_sizes[0],
        "kv_scales": layout.kv_sizes[1],
        "key_data": layout.key_sizes[0],
        "key_scales": layout.key_sizes[1],
        "hash_layers": config.num_hash_layers,
        "vocab": config.vocab_size,
        "hc_eps": config.hc_eps,
        "norm_eps": config.rms_norm_eps,
        "swiglu_limit": config.swiglu_limit,
        "routed_scaling": config.routed_scaling_factor,
    }


def _places(slabs: Any, slots: Any) -> np.ndarray:
    table = np.zeros((len(slots.layers), layout.PLACES), np.int64)
    for row, s in zip(table, slots.layers, strict=True):
        row[layout.WINDOW_DATA : layout.RATIO] = (
            s.window_data, s.window_scales, s.tail_kv, s.tail_gate, s.key_tail_kv, s.key_tail_gate,
            s.online,
        )  # fmt: skip
        row[layout.RATIO] = s.ratio
    for row, p in zip(table, slabs.layers, strict=False):  # MTP blocks have no entries
        row[: layout.WINDOW_DATA] = p.kv_data, p.kv_scales, p.key_data, p.key_scales
    return table


def _widths(n: dict[str, Any]) -> dict[str, int]:
    """Numbers in a line of each buffer, in the order of layout.BUFFERS."""
    pairs = n["rope_dim"] // 2
    return {
        "flow": n["streams"] * n["hidden"],
        "mixes": n["streams"] * (2 + n["streams"]),
        "post": n["streams"],
        "comb": n["streams"] ** 2,
        "normed": n["hidden"],
        "rounded": n["hidden"],
        "q_latent": n["q_rank"],
        "q": n["heads"] * n["head_dim"],
        "kv": n["head_dim"],
        "tail_kv": 2 * n["head_dim"],
        "tail_gate": 2 * n["head_dim"],
        "key_kv": 2 * n["index_dim"],
        "key_gate": 2 * n["index_dim"],
        "index_q": n["index_heads"] * n["index_dim"],
        "index_w": n["index_heads"],
        "attended": n["heads"] * n["head_dim"],
        "low": n["groups"] * n["o_rank"] + PANEL,  # the last group's panel may reach beyond
        "y": n["hidden"],
        "plain_cos": pairs,
        "plain_sin": pairs,
        "far_cos": pairs,
        "far_sin": pairs,
    }
