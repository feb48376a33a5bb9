"""Mistakes that show only when a sequence comes in pieces, after another one, beside one, or packed
for the compiled rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fathom.engine.state_cache import SlotLayout
from fathom.kernels.numba import layout as at
from fathom.kernels.numba import packing
from fathom.kernels.numba.runner import CompiledRunner
from fathom.model import Cache, Transformer
from fathom.model.attention import SlidingWindowAttention
from fathom.model.cache import CompressorState, EntryBuffer
from fathom.model.compressor import Compressor
from fathom.model.context import Context
from fathom.model.indexer import LightningIndexer
from tests.model.mistakes.planting import caught_by, wrong_kernel, wrong_method
from tests.model.probes import CONFIG

# One sequence after another, or beside another ---------------------------------------------------


@caught_by("second_sequence")
def cache_reused_between_sequences(m: pytest.MonkeyPatch) -> None:
    kept: list[Cache] = []

    def wrong(right, self, *a):
        kept.append(kept[0] if kept else right(self, *a))
        kept[-1].length = 0
        for layer in kept[-1].layers:
            for entries in (layer.entries, layer.index_keys):
                if entries is not None:
                    entries._count = 0
        return kept[-1]

    wrong_method(m, Transformer, "new_cache", wrong)


@caught_by("second_sequence")
def compressor_state_reused_between_sequences(m: pytest.MonkeyPatch) -> None:
    kept: dict[tuple, CompressorState] = {}

    def wrong(right, *a):
        return kept.setdefault(a, right(*a))

    wrong_method(m, CompressorState, "empty", wrong)


@caught_by("second_row")
def rows_of_a_batch_share_compressed_values(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "compress", lambda right, kv, *a: right(kv[:1].expand_as(kv), *a))


@caught_by("second_row")
def rows_of_a_batch_share_picks(m: pytest.MonkeyPatch) -> None:
    def wrong(right, scores, *a):
        picks = right(scores, *a)
        return picks[:1].expand_as(picks)

    wrong_kernel(m, "topk", wrong)


# Chunks and steps -------------------------------------------------------------------------------


@caught_by("chunks")
def positions_restart_with_every_chunk(m: pytest.MonkeyPatch) -> None:
    def wrong(self, compressed):
        return self.tables[compressed].span(0, self.seq, 1, self.device)

    m.setattr(Context, "rotation", wrong)


@caught_by("chunks")
def unfinished_window_dropped(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, rows, rest):
        return torch.zeros_like(right(self, rows, rest))

    wrong_method(m, Compressor, "_keep", wrong)


@caught_by("chunks")
def previous_window_forgotten_between_chunks(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, kv, gate, state, context):
        entries = right(self, kv, gate, state, context)
        state.previous_gate = torch.full_like(state.previous_gate, -torch.inf)
        return entries

    wrong_method(m, Compressor, "_overlapped", wrong)


@caught_by("chunks")
def window_forgotten_between_chunks(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, kv, cache):
        window_kv = right(self, kv, cache)
        cache.window = torch.zeros_like(cache.window)
        return window_kv

    wrong_method(m, SlidingWindowAttention, "extend_window", wrong)


@caught_by("chunks")
def earlier_entries_forgotten(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, rows):
        out = right(self, rows).clone()
        out[:, : out.shape[1] - rows.shape[1]] = 0
        return out

    wrong_method(m, EntryBuffer, "append", wrong)


@caught_by("chunks")
def index_keys_skipped_while_nothing_is_chosen(m: pytest.MonkeyPatch) -> None:
    """The keys of a prompt's first entries are needed later although all of them are visible."""

    def wrong(right, self, x, context, cache):
        keys = right(self, x, context, cache)
        if keys.shape[1] <= self.topk:
            keys.zero_()
        return keys

    wrong_method(m, LightningIndexer, "keys", wrong)


# Drafts taken back ------------------------------------------------------------------------------


@caught_by("rejected_drafts")
def compressor_state_not_rolled_back(m: pytest.MonkeyPatch) -> None:
    m.setattr(CompressorState, "clone", lambda self: self)


@caught_by("rejected_drafts", crashes=True)
def entries_not_rolled_back(m: pytest.MonkeyPatch) -> None:
    m.setattr(EntryBuffer, "clone", lambda self: self)


@caught_by("rejected_decodes")
def window_without_room_for_drafts(m: pytest.MonkeyPatch) -> None:
    m.setattr(SlotLayout, "ring", property(lambda self: self.slabs.config.sliding_window))


@caught_by("rejected_decodes")
def tails_without_room_for_drafts(m: pytest.MonkeyPatch) -> None:
    m.setattr(SlotLayout, "tail", property(lambda self: 8))


@caught_by("rejected_decodes")
def running_softmax_without_room_for_drafts(m: pytest.MonkeyPatch) -> None:
    m.setattr(SlotLayout, "online", property(lambda self: 1))


# Documents packed into one row, and passes that train the indexer ---------------------------------


@caught_by("packed_documents")
def documents_see_each_other_in_the_window(m: pytest.MonkeyPatch) -> None:
    def wrong(right, *a):
        context = right(*a)
        context.segments = torch.where(context.segments < 0, -1, 0)
        return context

    wrong_method(m, Context, "create", wrong)


@caught_by("packed_documents")
def documents_see_each_others_entries(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, ratio):
        documents, self.documents = self.documents, None
        visible = right(self, ratio)
        self.documents = documents
        return visible

    wrong_method(m, Context, "visible_entries", wrong)


@caught_by("packed_documents")
def first_entry_of_a_document_overlaps_the_one_before(m: pytest.MonkeyPatch) -> None:
    m.setattr(Context, "starts_document", lambda self, ratio, blocks: None)


@caught_by("taught")
def every_entry_attended_to_in_training(m: pytest.MonkeyPatch) -> None:
    def wrong(right, *a):
        context = right(*a)
        context.dense = True
        return context

    wrong_method(m, Context, "create", wrong)


# The compiled rows ------------------------------------------------------------------------------
# Their loops are compiled and cannot be altered here: the packed weights and tables are.


def wrong_packing(m: pytest.MonkeyPatch, kind: str, change: dict[int, Any]) -> None:
    """Alter "matrix" or "vector" of the packer: by place, another place or what to make of it."""

    def altered(right, self, layer, which, values, *a, **k):
        wrong = change.get(int(which), int(which))
        if callable(wrong):
            return right(self, layer, which, wrong(values), *a, **k)
        return right(self, layer, wrong, values, *a, **k)

    wrong_method(m, packing.Packer, kind, altered)


def swapped(a: int, b: int) -> dict[int, Any]:
    return {int(a): int(b), int(b): int(a)}


@caught_by("decode")
def packed_gate_and_up_swapped(m: pytest.MonkeyPatch) -> None:
    wrong_packing(m, "matrix", swapped(at.W1, at.W3))


@caught_by("decode")
def packed_shared_gate_and_up_swapped(m: pytest.MonkeyPatch) -> None:
    wrong_packing(m, "matrix", swapped(at.SHARED_1, at.SHARED_3))


@caught_by("decode")
def packed_sink_missing(m: pytest.MonkeyPatch) -> None:
    wrong_packing(m, "vector", {at.SINK: lambda sink: torch.full_like(sink, -1e9)})


@caught_by("decode")
def packed_router_bias_missing(m: pytest.MonkeyPatch) -> None:
    wrong_packing(m, "vector", {at.GATE_BIAS: torch.zeros_like})


@caught_by("decode")
def packed_hash_table_shifted(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, embed, hashes):
        return right(self, embed, np.roll(hashes, CONFIG.num_experts_per_tok))

    wrong_method(m, packing.Packer, "packed", wrong)


@caught_by("decode")
def packed_sites_swapped(m: pytest.MonkeyPatch) -> None:
    wrong_packing(m, "matrix", swapped(at.ATTN_FN, at.FFN_FN))


@caught_by("decode")
def packed_comb_transposed(m: pytest.MonkeyPatch) -> None:
    n = CONFIG.hc_mult
    order = np.r_[: 2 * n, 2 * n + np.arange(n * n).reshape(n, n).T.ravel()]
    wrong_packing(m, "matrix", {at.ATTN_FN: lambda fn: fn[order]})


@caught_by("decode")
def packed_ape_shifted(m: pytest.MonkeyPatch) -> None:
    wrong_packing(m, "vector", {at.COMP_APE: lambda ape: ape.roll(1, 0)})


@caught_by("decode")
def packed_index_ape_shifted(m: pytest.MonkeyPatch) -> None:
    wrong_packing(m, "vector", {at.INDEX_APE: lambda ape: ape.roll(1, 0)})


@caught_by("decode")
def packed_halves_swapped(m: pytest.MonkeyPatch) -> None:
    def wrong(weight):
        return weight.roll(CONFIG.head_dim, 0)

    wrong_packing(m, "matrix", {at.COMP_KV: wrong, at.COMP_GATE: wrong})


@caught_by("decode")
def packed_index_weights_missing(m: pytest.MonkeyPatch) -> None:
    wrong_packing(m, "matrix", {at.INDEX_W: lambda weight: weight.flip(0)})


@caught_by("decode")
def compiled_with_one_rope_base(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self):
        self._arrays["frequencies"][1] = self._arrays["frequencies"][0]
        return right(self)

    wrong_method(m, CompiledRunner, "_write_record", wrong)


def wrong_rounding(m: pytest.MonkeyPatch, place: int) -> None:
    def wrong(right, self, layer, *which):
        return right(self, layer, *(value and i != place for i, value in enumerate(which)))

    wrong_method(m, packing.Packer, "rounds", wrong)


@caught_by("decode_q")
def decoded_without_rounding_attention_inputs(m: pytest.MonkeyPatch) -> None:
    wrong_rounding(m, 0)


@caught_by("decode_q")
def decoded_without_rounding_query_latents(m: pytest.MonkeyPatch) -> None:
    wrong_rounding(m, 1)


@caught_by("decode_q")
def decoded_without_rounding_outputs(m: pytest.MonkeyPatch) -> None:
    wrong_rounding(m, 2)


@caught_by("decode_q")
def decoded_without_rounding_expert_inputs(m: pytest.MonkeyPatch) -> None:
    wrong_rounding(m, 3)


@caught_by("decode_q")
def decoded_without_rounding_shared_inputs(m: pytest.MonkeyPatch) -> None:
    wrong_rounding(m, 4)


@caught_by("decode_q")
def decoded_without_rounding_stored_entries(m: pytest.MonkeyPatch) -> None:
    wrong_rounding(m, 6)
