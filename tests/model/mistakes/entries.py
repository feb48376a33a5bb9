"""Mistakes in compressed entries and in the lightning indexer."""

from __future__ import annotations

import pytest
import torch

from fathom.kernels.reference.norm import head_rmsnorm
from fathom.model.cache import CompressorState
from fathom.model.compressor import Compressor, CompressorProjection
from fathom.model.context import Context
from fathom.model.indexer import LightningIndexer
from fathom.quant import fp8
from tests.model.mistakes.planting import (
    caught_by,
    modules,
    wrong_kernel,
    wrong_method,
    wrong_values,
)
from tests.model.probes import CONFIG

# Compressor -------------------------------------------------------------------------------------


@caught_by("block_csa", "scores")
def halves_swapped(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, kv, gate, *a):
        return right(self, kv.roll(self.cols, -1), gate.roll(self.cols, -1), *a)

    wrong_method(m, Compressor, "_overlapped", wrong)


@caught_by("block_csa")
def halves_of_ape_swapped(m: pytest.MonkeyPatch) -> None:
    wrong_values(m, "attn.compressor.ape", lambda ape: ape.roll(ape.shape[1] // 2, 1))


@caught_by("block_csa", "scores")
def previous_window_ignored(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "compress", lambda right, kv, gate, *previous: right(kv, gate))


@caught_by("block_csa", "scores")
def first_entry_padded_with_zero_scores(m: pytest.MonkeyPatch) -> None:
    def wrong(right, *a):
        state = right(*a)
        if state.previous_gate is not None:
            state.previous_gate.zero_()
        return state

    wrong_method(m, CompressorState, "empty", wrong)


@caught_by("block_csa", "block_hca")
def ape_shifted_by_one(m: pytest.MonkeyPatch) -> None:
    wrong_values(m, "attn.compressor.ape", lambda ape: ape.roll(1, 0))


@caught_by("scores")
def ape_shifted_in_the_indexer(m: pytest.MonkeyPatch) -> None:
    wrong_values(m, "indexer.compressor.ape", lambda ape: ape.roll(1, 0))


@caught_by("block_csa", "block_hca", "scores")
def entries_rotated_at_their_index(m: pytest.MonkeyPatch) -> None:
    def wrong(self, ratio, first, count):
        return self.tables[True].span(first, count, 1, self.device)

    m.setattr(Context, "entry_rotation", wrong)


@caught_by("block_csa", "block_hca", "scores")
def entries_rotated_at_their_last_token(m: pytest.MonkeyPatch) -> None:
    def wrong(self, ratio, first, count):
        return self.tables[True].span(first * ratio + ratio - 1, count, ratio, self.device)

    m.setattr(Context, "entry_rotation", wrong)


@caught_by("block_csa", "scores")
def entries_rotated_at_the_previous_window(m: pytest.MonkeyPatch) -> None:
    """As if an overlapping entry began where its first half comes from."""

    def wrong(right, self, ratio, first, count):
        places = (torch.arange(count) + first - 1).clamp(min=0) * ratio
        return self.tables[True].at(places) if ratio == 4 else right(self, ratio, first, count)

    wrong_method(m, Context, "entry_rotation", wrong)


# Visibility -------------------------------------------------------------------------------------


def visibility(m: pytest.MonkeyPatch, count) -> None:
    """Query t sees the first count(t, ratio) entries."""

    def wrong(self, ratio):
        entries = torch.arange((self.start + self.seq) // ratio)
        positions = torch.arange(self.start, self.start + self.seq).unsqueeze(-1)
        return (entries < count(positions, ratio)).unsqueeze(0)

    m.setattr(Context, "visible_entries", wrong)


@caught_by("block_csa", "block_hca", "chunks")
def entry_invisible_to_its_last_token(m: pytest.MonkeyPatch) -> None:
    visibility(m, lambda t, ratio: t // ratio)


@caught_by("block_csa", "block_hca")
def entry_visible_before_it_is_complete(m: pytest.MonkeyPatch) -> None:
    visibility(m, lambda t, ratio: t // ratio + 1)


@caught_by("block_csa", "block_hca")
def no_causal_mask_on_entries(m: pytest.MonkeyPatch) -> None:
    visibility(m, lambda t, ratio: torch.full_like(t, 2**30))


@caught_by("block_csa", "block_hca")
def only_entries_outside_of_the_window(m: pytest.MonkeyPatch) -> None:
    visibility(m, lambda t, ratio: (t + 1 - CONFIG.sliding_window).clamp(min=0) // ratio)


# Indexer ----------------------------------------------------------------------------------------


def is_query(x: torch.Tensor) -> bool:
    return x.dim() == 4


@caught_by("scores_q")
def hadamard_on_queries_only(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "hadamard", lambda right, x: right(x) if is_query(x) else x)


@caught_by("scores_q")
def hadamard_on_keys_only(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "hadamard", lambda right, x: x if is_query(x) else right(x))


@caught_by("scores_q")
def no_hadamard(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "hadamard", lambda right, x: x)


@caught_by("scores_q")
def hadamard_unscaled(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "hadamard", lambda right, x: right(x) * x.shape[-1] ** 0.5)


@caught_by("scores_q")
def index_keys_not_quantised(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, x, cache):
        return right(self, x, cache) if is_query(x) else x

    wrong_method(m, LightningIndexer, "_rotate_and_round", wrong)


@caught_by("scores_q")
def weights_proj_quantised(m: pytest.MonkeyPatch) -> None:
    for owner, leaf in modules("weights_proj"):
        m.setattr(getattr(owner, leaf), "quantize_input", True)


@caught_by("scores_q")
def input_of_index_queries_not_quantised(m: pytest.MonkeyPatch) -> None:
    for owner, leaf in modules("indexer.wq_b"):
        m.setattr(getattr(owner, leaf), "quantize_input", False)


@caught_by("scores_q", "block_csa_q")
def compressor_input_quantised(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, x):
        return right(self, fp8.simulate(x))

    wrong_method(m, CompressorProjection, "forward", wrong)


@caught_by("scores", "block_csa")
def indexer_without_relu(m: pytest.MonkeyPatch) -> None:
    def wrong(right, q, keys, weights):
        return torch.einsum("bshd,bed,bsh->bse", q, keys, weights)

    wrong_kernel(m, "index_scores", wrong)


@caught_by("scores", "block_csa")
def relu_after_the_sum_over_heads(m: pytest.MonkeyPatch) -> None:
    def wrong(right, q, keys, weights):
        return torch.einsum("bshd,bed,bsh->bse", q, keys, weights).relu()

    wrong_kernel(m, "index_scores", wrong)


@caught_by("scores", "block_csa")
def indexer_without_head_weights(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "index_scores", lambda right, q, k, w: right(q, k, torch.ones_like(w)))


@caught_by("scores", "block_csa")
def negative_head_weights_clipped(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "index_scores", lambda right, q, k, w: right(q, k, w.relu()))


@caught_by("scores", "block_csa")
def index_queries_normalised(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "index_scores", lambda right, q, k, w: right(head_rmsnorm(q, 1e-6), k, w))


@caught_by("block_csa")
def every_visible_entry_attended_to(m: pytest.MonkeyPatch) -> None:
    for owner, leaf in modules("indexer"):
        m.setattr(getattr(owner, leaf), "topk", 10**6)


@caught_by("block_csa")
def entries_chosen_by_lowest_score(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "topk", lambda right, scores, *a: right(-scores, *a))


@caught_by("ties")
def ties_broken_by_buffer_length(m: pytest.MonkeyPatch) -> None:
    def wrong(right, scores, visible, k):
        picks = right(scores.flip(-1), visible.flip(-1), k)
        return torch.where(picks < 0, -1, scores.shape[-1] - 1 - picks)

    wrong_kernel(m, "topk", wrong)


@caught_by("ties")
def ties_left_to_torch_topk(m: pytest.MonkeyPatch) -> None:
    def wrong(right, scores, visible, k):
        masked = scores.masked_fill(~visible, -torch.inf)
        return masked.topk(min(k, scores.shape[-1]), dim=-1).indices

    wrong_kernel(m, "topk", wrong)
