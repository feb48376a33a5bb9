"""The forward half of one training step: a batch in, losses and what balancing needs out.

Paper: §2.1 (MTP, balance), §2.3.1 (indexer), §4.2.2 (stages and weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fathom.model.context import LayerSignals
from fathom.train.balance import expert_counts, imbalance
from fathom.train.data import Batch
from fathom.train.losses import (
    cross_entropy,
    indexed_queries,
    indexer_kl,
    mean_loss,
    next_token_targets,
    sequence_balance_loss,
)
from fathom.train.parallel import ALONE, Ranks
from fathom.train.schedule import DENSE, INDEXER

METRICS = ("loss", "accuracy", "mtp_loss", "balance_loss", "indexer_kl", "imbalance", "used")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """What each auxiliary loss counts in the sum."""

    mtp: float
    balance: float
    indexer: float


@dataclass(slots=True)
class StepResult:
    """`total`: [] float32; `metrics`: [entries] (METRICS); counts: [experts] per layer.

    The counts are of all processes, the rest is this process's part: the average over the
    processes is the value for the whole batch.
    """

    total: Tensor
    metrics: Tensor
    counts: list[Tensor]


@dataclass(slots=True)
class Outputs:
    """What one pass of the model gives a trainer.

    hidden: [batch, seq, hidden], normed, before the head; mtp_hidden: [batch, seq - 1, hidden] or
    None; router: ([batch * seq, experts] scores, [batch * seq, topk] chosen, tokens per row) of
    each layer with a bias; index: (scores, target, visible) of each CSA layer.
    """

    hidden: Tensor
    mtp_hidden: Tensor | None
    router: list[tuple[Tensor, Tensor, int]]
    index: list[tuple[Tensor, Tensor, Tensor]]


def run_model(
    model: Any, tokens: Tensor, documents: Tensor, *, dense: bool | Tensor, mtp: bool
) -> Outputs:
    """One pass. tokens: [batch, seq] int64; documents: [batch, seq] integer, -1 for padding.

    dense: whether CSA layers attend to every entry, a bool or [] bool.
    """
    signals = [LayerSignals() for _ in model.layers]
    context = model.context(tokens, documents=documents, dense=dense)
    context.prepare(model.config.compress_ratios)
    streams = model.streams(tokens, context=context, signals=signals)
    out = Outputs(model.hidden(streams), None, _router(signals, tokens.shape[1]), [])
    for s in signals:
        if s.index_scores is not None and s.index_targets is not None:
            assert s.index_visible is not None
            out.index.append((s.index_scores, s.index_targets, s.index_visible))
    if mtp and model.mtp:
        following, last = tokens[:, 1:], LayerSignals()
        # Position p keeps its own document: the one whose token p + 2 it will be asked for.
        context = model.context(following, documents=documents[:, :-1])
        context.prepare(())
        out.mtp_hidden = model.mtp_hidden(streams[:, :-1], following, context, last)
        out.router += _router([last], following.shape[1])
    return out


def _router(signals: Sequence[LayerSignals], seq: int) -> list[tuple[Tensor, Tensor, int]]:
    return [
        (s.router_scores, s.chosen, seq)
        for s in signals
        if s.router_scores is not None and s.chosen is not None
    ]


def training_step(
    model: Any,
    batch: Batch,
    attention: str,
    weights: LossWeights,
    ranks: Ranks = ALONE,
    *,
    chunk: int | None = None,
) -> StepResult:
    """Losses of one batch in one stage of attention (see schedule.py).

    In the indexer stage only the indexers get gradients: their inputs are detached, so it is enough
    to differentiate their loss alone.
    """
    tokens, documents = batch.tokens.long(), batch.documents
    out = run_model(model, tokens, documents, dense=attention != "sparse", mtp=weights.mtp > 0)
    head, options = model.head.weight, {} if chunk is None else {"chunk": chunk}
    targets, wanted = next_token_targets(tokens, documents, batch.weights)
    later, wanted_later = next_token_targets(tokens, documents, batch.weights, ahead=2)
    share = ranks.share(torch.stack((wanted.sum(), wanted_later[:, :-1].sum())))
    loss, accuracy = cross_entropy(out.hidden, head, targets, wanted, **options)
    loss, accuracy = loss * share[0], accuracy * share[0]
    zero = loss.detach() * 0
    mtp_loss = zero
    if out.mtp_hidden is not None:
        mtp_loss, _ = cross_entropy(
            out.mtp_hidden, head, later[:, :-1], wanted_later[:, :-1], **options
        )
        mtp_loss = mtp_loss * share[1]
    used = documents >= 0
    experts_per_token = model.config.num_experts_per_tok
    counts, balance = [], []
    for scores, chosen, seq in out.router:
        mask = used[:, :seq]
        counts.append(expert_counts(chosen, mask, scores.shape[-1]))
        scores = scores.view(*mask.shape, -1)
        balance.append(
            sequence_balance_loss(scores, counts[-1], mask, experts_per_token=experts_per_token)
        )
    balance_loss = mean_loss(balance, loss)
    kl = zero if attention == DENSE else _indexer_loss(out.index, ranks, loss)
    if attention == INDEXER:
        total = weights.indexer * kl
    else:
        total = loss + weights.mtp * mtp_loss + weights.balance * balance_loss
        total = total + weights.indexer * kl
    loads = list(ranks.sum(torch.stack([c.sum(0) for c in counts]))) if counts else []
    worst = imbalance(loads) if loads else zero
    values: Sequence[Tensor] = (
        loss,
        accuracy,
        mtp_loss,
        balance_loss,
        kl,
        worst,
        used.float().mean(),
    )
    return StepResult(total, torch.stack([v.detach().float() for v in values]), loads)


def _indexer_loss(index: list[tuple[Tensor, Tensor, Tensor]], ranks: Ranks, like: Tensor) -> Tensor:
    """The mean KL of all CSA layers: [] float32. like: [...], any tensor on the device."""
    if not index:
        return mean_loss([], like)
    share = ranks.share(torch.stack([indexed_queries(target, seen) for _, target, seen in index]))
    return mean_loss([indexer_kl(*i) * s for i, s in zip(index, share, strict=True)], like)
