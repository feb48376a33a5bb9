"""Where a decode step begins and ends: embeddings and rotations of its tokens, and the output head.

Paper: §2 (architecture), §2.3.3 (partial RoPE).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fathom.kernels.registry import register

WINDOWS = (1, 1, 4, 128)  # whose first positions the four rotations of a token belong to
YARN = (0, 1, 1, 1)  # which frequencies they take


@register("step_rotations", "reference")
def step_rotations(rows: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of every token, without and with YaRN, and of its windows of 4 and 128.

    rows: [4, tokens] int32, the positions first; frequencies: [2, rope_dim / 2] float32, without
    and with YaRN. Phases are float32 products, their cosines rounded once, from float64. Returns
    [4, tokens, 2, rope_dim / 2] float32.
    """
    found = []
    for window, which in zip(WINDOWS, YARN, strict=True):
        first = rows[0] // window * window
        phase = (first.float().unsqueeze(-1) * frequencies[which]).double()
        found.append(torch.stack((phase.cos(), phase.sin()), dim=1).float())
    return torch.stack(found)


@register("step_streams", "reference")
def step_streams(token_ids: torch.Tensor, embed: torch.Tensor, copies: int) -> torch.Tensor:
    """Embeddings as streams. token_ids: [tokens]; embed: [vocab, hidden]. Returns [tokens, streams,
    hidden], `copies` streams.
    """
    return F.embedding(token_ids.long(), embed).unsqueeze(1).repeat(1, copies, 1)


@register("head_logits", "reference")
def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden: [tokens, hidden] float32; weight: [vocab, hidden]. Returns [tokens, vocab] float32.

    A token's logits do not depend on the others.
    """
    wide = weight.float()
    return torch.cat([F.linear(row[None], wide) for row in hidden])


@register("logit_summary", "reference")
def logit_summary(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """What a choice and its log-probability need of a whole vocabulary.

    logits: [tokens, vocab] float32. draws: [2, tokens] float64, of each token a temperature (0:
    nothing is drawn) and a number in [0, 1). Returns [tokens, 6] float64: the largest logit (NaN if
    any is), the first place that has it, and the logarithm of the sum of all exponentials; then the
    first place up to which the shares at that temperature come to more than the number says, its
    logit, and by how much of the whole the nearer of its ends is away. -1, 0 and 0 without a draw.
    """
    high = logits.amax(dim=-1)
    place = (logits == high[:, None]).int().argmax(dim=-1)  # the first of equals on any device
    total = (logits - high[:, None]).exp().sum(dim=-1, dtype=torch.float64)
    temperature, number = draws.unsqueeze(-1)
    drawing = temperature[:, 0] > 0
    warm = torch.where(drawing[:, None], temperature, 1.0)
    mass = ((logits - high[:, None]).double() / warm).exp().cumsum(dim=-1)
    target = number * mass[:, -1:]
    drawn = (mass <= target).sum(dim=-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    end = mass.gather(1, drawn)
    begin = torch.where(drawn > 0, mass.gather(1, (drawn - 1).clamp(min=0)), 0.0)
    slack = torch.minimum(target - begin, end - target) / mass[:, -1:]
    found = torch.cat((drawn.double(), logits.gather(1, drawn).double(), slack), dim=1)
    nothing = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=logits.device)
    first = torch.stack((high.double(), place.double(), high.double() + total.log()), dim=1)
    return torch.cat((first, torch.where(drawing[:, None], found, nothing)), dim=1)
