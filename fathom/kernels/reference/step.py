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
