"""Mistakes in the residual streams, the experts, the MTP block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fathom.kernels.reference import experts, mhc
from fathom.model import moe
from fathom.model.moe import Expert
from fathom.model.mtp import MTPBlock
from fathom.model.router import HashRouter, Router
from tests.model.mistakes.planting import (
    caught_by,
    modules,
    swapped,
    wrong_kernel,
    wrong_member,
    wrong_method,
    wrong_values,
)
from tests.model.probes import CONFIG, subject, token_ids

# mHC --------------------------------------------------------------------------------------------


@caught_by("block_swa", "logits")
def comb_not_transposed(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "mhc_post", lambda right, y, s, post, comb: right(y, s, post, comb.mT))


@caught_by("block_swa")
def post_without_factor_two(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "mhc_post", lambda right, y, s, post, comb: right(y, s, post / 2, comb))


@caught_by("mhc_extremes")
def post_with_eps(m: pytest.MonkeyPatch) -> None:
    def wrong(right, *a):
        pre, post, comb = right(*a)
        return pre, post + 1e-6, comb

    wrong_method(m, mhc, "mixing_weights", wrong)


@caught_by("mhc_extremes")
def pre_without_eps(m: pytest.MonkeyPatch) -> None:
    def wrong(right, *a):
        pre, post, comb = right(*a)
        return pre - 1e-6, post, comb

    wrong_method(m, mhc, "mixing_weights", wrong)


@caught_by("mhc_extremes", "block_swa")
def sinkhorn_columns_first(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "sinkhorn", lambda right, x, *a: right(x.mT, *a).mT)


@caught_by("mhc_extremes")
def sinkhorn_one_round_short(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "sinkhorn", lambda right, x, rounds, eps: right(x, rounds - 1, eps))


@caught_by("mhc_extremes")
def sinkhorn_without_eps(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "sinkhorn", lambda right, x, rounds, eps: right(x, rounds, 0.0))


@caught_by("block_swa", "logits")
def streams_not_normalised_for_mixing(m: pytest.MonkeyPatch) -> None:
    m.setattr(mhc, "mixing_logits", lambda s, fn, eps: F.linear(s.flatten(-2), fn))


@caught_by("logits", "mtp")
def stream_head_with_softmax(m: pytest.MonkeyPatch) -> None:
    def wrong(right, s, fn, base, scale, eps, norm_eps):
        weights = (mhc.mixing_logits(s, fn, norm_eps) * scale + base).softmax(-1)
        return (weights.unsqueeze(-1) * s).sum(-2)

    wrong_kernel(m, "mhc_head", wrong)


@caught_by("mhc_extremes")
def stream_head_without_eps(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "mhc_head", lambda right, s, *a: right(s, *a[:3], 0.0, a[4]))


@caught_by("logits", "mtp_fed")
def last_write_missing(m: pytest.MonkeyPatch) -> None:
    m.setattr(subject(False).layers[-1]._ffn_site, "write", lambda y, s, post, comb: s)


# Router and experts -----------------------------------------------------------------------------


def wrong_scores(m: pytest.MonkeyPatch, affinity) -> None:
    wrong_kernel(m, "router_scores", lambda right, x, weight: affinity(F.linear(x, weight)))


@caught_by("block_csa")
def router_without_root(m: pytest.MonkeyPatch) -> None:
    wrong_scores(m, F.softplus)


@caught_by("block_csa")
def router_sigmoid(m: pytest.MonkeyPatch) -> None:
    wrong_scores(m, torch.sigmoid)


@caught_by("block_csa")
def router_softmax(m: pytest.MonkeyPatch) -> None:
    wrong_scores(m, lambda x: x.softmax(-1))


@caught_by("block_csa")
def router_bias_in_the_weights(m: pytest.MonkeyPatch) -> None:
    def wrong(right, scores, bias, *a):
        return right(scores if bias is None else scores + bias, None, *a)

    wrong_kernel(m, "route", wrong)


@caught_by("block_csa")
def router_bias_ignored(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "route", lambda right, scores, bias, *a: right(scores, None, *a))


@caught_by("block_csa", "block_swa")
def router_weights_not_normalised(m: pytest.MonkeyPatch) -> None:
    def wrong(right, scores, bias, chosen, k, factor):
        chosen, _ = right(scores, bias, chosen, k, factor)
        return chosen, scores.gather(-1, chosen) * factor

    wrong_kernel(m, "route", wrong)


@caught_by("block_csa", "block_swa")
def router_scaling_factor_missing(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "route", lambda right, *a: right(*a[:-1], 1.0))


@caught_by("block_swa")
def hash_layer_routed_by_score(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "route", lambda right, s, b, chosen, *a: right(s, b, None, *a))


@caught_by("block_swa")
def hash_layer_with_equal_weights(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, *a):
        chosen, weights = right(self, *a)
        return chosen, weights.mean(-1, keepdim=True).expand_as(weights)

    wrong_method(m, HashRouter, "forward", wrong)


@caught_by("block_swa")
def hash_layer_by_the_previous_token(m: pytest.MonkeyPatch) -> None:
    wrong_method(m, HashRouter, "forward", lambda right, self, x, t, *a: right(self, x, t.roll(1)))


@caught_by("block_csa")
def router_one_expert_short(m: pytest.MonkeyPatch) -> None:
    for owner, leaf in modules("ffn.gate"):
        if isinstance(getattr(owner, leaf), Router):
            m.setattr(getattr(owner, leaf), "k", 1)


def wrong_swiglu(m: pytest.MonkeyPatch, wrong, routed: bool = True, shared: bool = True) -> None:
    def replacement(gate, up, limit, weight=None):
        y = wrong(gate, up, limit)
        return y if weight is None else y * weight

    if routed:
        m.setattr(experts, "swiglu", replacement)
    if shared:
        m.setattr(moe, "_swiglu", replacement)


def unclamped(gate, up, limit):
    return F.silu(gate) * up


@caught_by("block_csa")
def clamp_missing(m: pytest.MonkeyPatch) -> None:
    wrong_swiglu(m, unclamped)


@caught_by("block_csa")
def clamp_missing_in_the_shared_expert(m: pytest.MonkeyPatch) -> None:
    wrong_swiglu(m, unclamped, routed=False)


@caught_by("block_csa")
def clamp_only_in_the_shared_expert(m: pytest.MonkeyPatch) -> None:
    wrong_swiglu(m, unclamped, shared=False)


@caught_by("block_csa")
def gate_clamped_below_too(m: pytest.MonkeyPatch) -> None:
    def wrong(gate, up, limit):
        return F.silu(gate.clamp(-limit, limit)) * up.clamp(-limit, limit)

    wrong_swiglu(m, wrong)


@caught_by("block_csa")
def clamp_after_silu(m: pytest.MonkeyPatch) -> None:
    wrong_swiglu(m, lambda gate, up, c: F.silu(gate).clamp(max=c) * up.clamp(-c, c))


@caught_by("block_csa")
def gate_and_up_swapped(m: pytest.MonkeyPatch) -> None:
    swapped(m, "experts.w1", "experts.w3")


@caught_by("block_csa")
def gate_and_up_swapped_in_the_shared_expert(m: pytest.MonkeyPatch) -> None:
    swapped(m, "shared_experts.w1", "shared_experts.w3")


@caught_by("block_csa_q", "block_swa_q")
def weight_after_w2(m: pytest.MonkeyPatch) -> None:
    def wrong(right, x, w1, w2, w3, indices, weights, *a):
        out = torch.zeros_like(x)
        for slot in range(indices.shape[1]):
            one = torch.ones_like(weights[:, :1])
            y = right(x, w1, w2, w3, indices[:, slot : slot + 1], one, *a)
            out = out + y * weights[:, slot : slot + 1]
        return out

    wrong_kernel(m, "experts", wrong)


@caught_by("block_csa", "mtp")
def shared_expert_dropped(m: pytest.MonkeyPatch) -> None:
    wrong_method(m, Expert, "forward", lambda right, self, x: torch.zeros_like(x))


@caught_by("block_csa")
def shared_expert_scaled_like_the_routed(m: pytest.MonkeyPatch) -> None:
    factor = CONFIG.routed_scaling_factor
    wrong_method(m, Expert, "forward", lambda right, self, x: right(self, x) * factor)


@caught_by("block_swa_q", "block_csa_q", "mtp_q")
def activations_not_quantised(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "linear", lambda right, x, weight, *_: right(x, weight))


@caught_by("block_csa_q")
def only_attention_inputs_quantised(m: pytest.MonkeyPatch) -> None:
    wrong_kernel(m, "experts", lambda right, *a: right(*a[:-1], False))


# MTP --------------------------------------------------------------------------------------------


@caught_by("mtp")
def mtp_projections_swapped(m: pytest.MonkeyPatch) -> None:
    swapped(m, "e_proj", "h_proj")


@caught_by("mtp")
def mtp_norms_swapped(m: pytest.MonkeyPatch) -> None:
    swapped(m, "enorm", "hnorm")


@caught_by("mtp_q")
def mtp_projections_not_quantised(m: pytest.MonkeyPatch) -> None:
    for name in ("e_proj", "h_proj"):
        for owner, leaf in modules(name):
            m.setattr(getattr(owner, leaf), "quantize_input", False)


@caught_by("mtp")
def mtp_embedding_in_one_stream_only(m: pytest.MonkeyPatch) -> None:
    def wrong(self, streams, embedded):
        out = self.h_proj(self.hnorm(streams))
        out[:, :, 0] += self.e_proj(self.enorm(embedded))
        return out

    m.setattr(MTPBlock, "combine", wrong)


@caught_by("mtp")
def mtp_streams_averaged(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, streams, embedded):
        return right(self, streams.mean(2, keepdim=True).expand_as(streams), embedded)

    wrong_method(m, MTPBlock, "combine", wrong)


@caught_by("mtp")
def mtp_with_the_main_final_norm(m: pytest.MonkeyPatch) -> None:
    for quantized in (False, True):
        wrong_member(m, subject(quantized).mtp[0], "norm", subject(quantized).norm)


@caught_by("mtp")
def mtp_with_the_main_stream_head(m: pytest.MonkeyPatch) -> None:
    for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
        wrong_member(m, subject(False).mtp[0], name, getattr(subject(False), name))


@caught_by("mtp_fed")
def mtp_fed_the_same_token(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, streams, embedded, tokens, *a):
        same = torch.cat((token_ids()[:, :1], tokens[:, :-1]), 1)
        return right(self, streams, subject(False).embed(same), same, *a)

    wrong_method(m, MTPBlock, "predict", wrong)


@caught_by("mtp_fed")
def mtp_fed_averaged_streams(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, streams, *a):
        return right(self, streams.mean(2, keepdim=True).expand_as(streams), *a)

    wrong_method(m, MTPBlock, "predict", wrong)


@caught_by("mtp_fed")
def mtp_fed_streams_after_the_head(m: pytest.MonkeyPatch) -> None:
    def wrong(right, self, streams, *a):
        merged = subject(False).hidden(streams).unsqueeze(2)
        return right(self, merged.expand_as(streams), *a)

    wrong_method(m, MTPBlock, "predict", wrong)


@caught_by("block_csa", "logits")
def sublayer_norm_missing(m: pytest.MonkeyPatch) -> None:
    for owner, leaf in modules("ffn_norm"):
        wrong_member(m, owner, leaf, nn.Identity())


@caught_by("logits")
def final_norm_weight_missing(m: pytest.MonkeyPatch) -> None:
    wrong_values(m, "norm.weight", torch.ones_like)
