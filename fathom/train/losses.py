"""The losses of pre-training.

The language-model loss never holds the logits of a whole batch: it walks over chunks of tokens and
computes each chunk's gradient at once, so that backward only scales two stored gradients.

Paper: §2.1 (sequence-wise balance loss, MTP); §2.3.1 and §4.2.2 (indexer warm-up).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_TOKENS = 8192


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        # Weights that sum to zero (a batch of padding) give a zero loss, not 0/0.
        weights = weights.float() / weights.float().sum().clamp_min(1e-6)
        projection = head.to(hidden.dtype)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, y, w = hidden[part], targets[part, None], weights[part, None]
            logits = (h @ projection.T).float()  # [tokens, vocab]
            best = logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, y)
            correct += (w * (chosen >= best)).sum()
            probabilities = logits.sub_(best).exp_()
            total = probabilities.sum(-1, keepdim=True)
            loss += (w * (total.log() + best - chosen)).sum()
            if not (needs_hidden or needs_head):
                continue
            grad = probabilities.mul_(w / total).scatter_add_(-1, y, -w).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, projection, out=grad_hidden[part])
            if grad_head is not None:
                grad_head += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * scale).to(ctx.head_dtype),
            None,
            None,
            None,
        )


def cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Weighted mean cross entropy of `hidden @ head.T`, and the weighted share of exact hits.

    hidden: [batch, seq, hidden] or [tokens, hidden], its dtype is that of the products; head:
    [vocab, hidden]; targets: [batch, seq] or [tokens] integer; weights: same, floating, not
    negative. Both results are [] float32; only the loss has a gradient. Softmax and sums are
    float32.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    # Autocast would hand the products back in another dtype than the buffers they go to.
    with torch.autocast(flat.device.type, enabled=False):
        loss, correct = _ChunkedCrossEntropy.apply(
            flat, head, targets.reshape(-1).long(), weights.reshape(-1), chunk
        )  # pyright: ignore
    return loss, correct


def next_token_targets(
    tokens: Tensor, documents: Tensor, weights: Tensor, *, ahead: int = 1
) -> tuple[Tensor, Tensor]:
    """What each position should predict `ahead` tokens later in its document, and with what weight.

    tokens, documents: [batch, seq] integer, documents -1 where there is padding; weights: [batch,
    seq] floating, of each token as something to predict. Returns targets [batch, seq] like tokens
    and weights [batch, seq] float32: 0 wherever the target would lie beyond the document.
    """
    targets, wanted = torch.zeros_like(tokens), torch.zeros_like(weights, dtype=torch.float32)
    targets[:, :-ahead] = tokens[:, ahead:]
    same = (documents[:, ahead:] == documents[:, :-ahead]) & (documents[:, :-ahead] >= 0)
    wanted[:, :-ahead] = weights[:, ahead:].float() * same
    return targets, wanted


def sequence_balance_loss(
    scores: Tensor, counts: Tensor, mask: Tensor, *, experts_per_token: int
) -> Tensor:
    """Mean over sequences of sum_e f_e * P_e: 1 when routing is even within every sequence.

    scores: [batch, seq, experts] floating, affinities before selection; counts: [batch, experts],
    how many tokens of each sequence went to each expert; mask: [batch, seq], true for tokens that
    count (not padding). Returns [] float32, differentiable through the scores alone.
    """
    mask = mask.float()
    length = mask.sum(1, keepdim=True).clamp_min(1)  # [batch, 1]
    share = scores.float()
    share = share / share.sum(-1, keepdim=True).clamp_min(1e-20)
    share = torch.einsum("bse,bs->be", share, mask) / length
    frequency = counts.float() * (scores.shape[-1] / experts_per_token) / length
    return (frequency.detach() * share).sum(-1).mean()


def indexer_kl(index_scores: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """KL(attention mass || softmax of the index scores), averaged over queries that see any entry.

    index_scores: [batch, seq, entries] floating; target: the same shape, attention probability
    summed over heads (not yet normalised), taken as constant; visible: [batch or 1, seq, entries]
    bool, the entries that both are about. Returns [] float32.
    """
    mass = target.detach().float() * visible
    total = mass.sum(-1, keepdim=True)
    mass = mass / total.clamp_min(1e-20)
    # Hidden entries get a finite floor: -inf would meet 0 * inf in the gradient of empty rows.
    log_predicted = F.log_softmax(index_scores.float().masked_fill(~visible, -1e30), dim=-1)
    divergence = torch.xlogy(mass, mass) - mass * log_predicted
    counted = total.squeeze(-1) > 0
    return (divergence.sum(-1) * counted).sum() / counted.sum().clamp_min(1)


def indexed_queries(target: Tensor, visible: Tensor) -> Tensor:
    """How many queries `indexer_kl` averages over: [] float32.

    target: [batch, seq, entries] floating; visible: [batch or 1, seq, entries] bool.
    """
    return ((target.detach().float() * visible).sum(-1) > 0).sum().float()


def mean_loss(losses: Sequence[Tensor], like: Tensor) -> Tensor:
    """The mean of some losses: [] float32; zero when there are none.

    losses: [] floating each; like: [...], any tensor on the device.
    """
    if not losses:
        return torch.zeros((), device=like.device)
    return torch.stack([loss.float() for loss in losses]).mean()
