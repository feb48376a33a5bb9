"""Manifold-Constrained Hyper-Connections: several residual streams, mixed by a near doubly
stochastic matrix around every sublayer, and merged once before the head.

Dimensions: streams n (4), hidden d, flattened n*d; mixes n + n + n*n = 24.

Paper: §2.2, eq. 1-8 (the order of Sinkhorn's normalisations and the eps follow the released code).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fathom.kernels.reference.norm import rmsnorm
from fathom.kernels.registry import operation, register

_sinkhorn = operation("sinkhorn")


def mixing_logits(streams: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """The token's own mixing logits: (fn x) * rsqrt(mean(x^2) + eps), scaled after the product.

    streams: [batch, seq, streams, hidden]; fn: [cols, streams * hidden] float32. Returns
    [batch, seq, cols] float32.
    """
    x = streams.flatten(-2).float()  # [batch, seq, streams * hidden]
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(x, fn) * r


@register("sinkhorn", "reference")
def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """Make a positive matrix almost doubly stochastic.

    logits: [..., streams, streams] float32. The first of `iterations` rounds is a row softmax (plus
    eps) and a column normalisation, the others rows, then columns; every divisor carries eps. The
    columns of the result sum to 1 closely, its rows only approximately. Returns the same shape.
    """
    # Spelled out, since torch's softmax multiplies by a reciprocal: a last bit here decides which
    # way a value on a rounding border falls layers later.
    m = (logits - logits.amax(-1, keepdim=True).detach()).exp()
    m = m / m.sum(-1, keepdim=True) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def mixing_weights(
    mixes: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, iterations: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How streams are read, written and mixed: logits split n | n | n * n, each with its own scale.

    mixes: [..., cols], base: [cols], scale: [3], float32. Returns (pre [..., streams], which
    carries eps; post [..., streams] in (0, 2), which does not; comb [..., streams, streams],
    row-major).
    """
    n = math.isqrt(base.shape[0] + 1) - 1  # cols = n * (n + 2)
    pre = torch.sigmoid(mixes[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(mixes[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mixes[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    return pre, post, _sinkhorn(comb, iterations, eps)


@register("mhc_pre", "reference")
def mhc_pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read a sublayer's input out of the streams, and decide how its output is written back.

    streams: [batch, seq, streams, hidden]; fn: [cols, streams * hidden], base: [cols], scale: [3],
    all float32, cols = streams * (2 + streams). Returns (input [batch, seq, hidden] in the streams'
    dtype, post [batch, seq, streams] float32, comb [batch, seq, streams, streams] float32).
    """
    mixes = mixing_logits(streams, fn, norm_eps)
    pre, post, comb = mixing_weights(mixes, base, scale, iterations, eps)
    x = (pre.unsqueeze(-1) * streams.float()).sum(-2).to(streams.dtype)  # [batch, seq, hidden]
    return x, post, comb


@register("mhc_post", "reference")
def mhc_post(
    y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """Write a sublayer's output back: stream j = post_j * y + sum_i comb[i, j] * stream i.

    y: [batch, seq, hidden]; streams: [batch, seq, streams, hidden]; post: [batch, seq, streams];
    comb: [batch, seq, streams, streams], contracted over its first index, i.e. transposed. Returns
    the new streams in the streams' dtype; float32 inside.
    """
    first, *others = streams.float().unbind(-2)
    # Four scaled copies, which compilers fuse; as a product of tiny matrices it is a slow kernel.
    mixed = comb[..., 0, :, None] * first.unsqueeze(-2)  # [batch, seq, streams, hidden]
    for i, stream in enumerate(others, start=1):
        mixed = mixed + comb[..., i, :, None] * stream.unsqueeze(-2)
    # The output joins last, as in the official code: another order of these additions lets other
    # values fall over the rounding borders that follow.
    return (post.unsqueeze(-1) * y.unsqueeze(-2).float() + mixed).to(streams.dtype)


@register("mhc_head", "reference")
def mhc_head(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    norm_eps: float,
) -> torch.Tensor:
    """Merge the streams into one hidden state by a sigmoid-weighted sum (no softmax).

    streams: [batch, seq, streams, hidden]; fn: [streams, streams * hidden]; base: [streams];
    scale: [1]. Returns [batch, seq, hidden] in the streams' dtype.
    """
    weights = torch.sigmoid(mixing_logits(streams, fn, norm_eps) * scale + base) + eps
    return (weights.unsqueeze(-1) * streams.float()).sum(-2).to(streams.dtype)


@register("mhc_boundary", "reference")
def mhc_boundary(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
    y: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    post: torch.Tensor | None = None,
    comb: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write one sublayer's output into the streams, and read the next one's normed input.

    streams: [tokens, streams, hidden]; y: [tokens, hidden], the last sublayer's output, or None
    before the first; pairs: [tokens, topk, hidden], routed experts' outputs to be added to it;
    post, comb: what the last read returned, the same shapes as below; fn: [cols, streams * hidden],
    base: [cols], scale: [3] and norm: [hidden], the next site's. Returns
    (streams, x [tokens, hidden], post [tokens, streams], comb [tokens, streams, streams]).
    """
    wide = streams.unsqueeze(1)
    if y is not None:
        if pairs is not None:
            y = (pairs.float().sum(1) + y.float()).to(y.dtype)
        assert post is not None
        assert comb is not None
        wide = mhc_post(y.unsqueeze(1), wide, post.unsqueeze(1), comb.unsqueeze(1))
    x, new_post, new_comb = mhc_pre(wide, fn, base, scale, iterations, eps, norm_eps)
    return wide[:, 0], rmsnorm(x, norm, norm_eps)[:, 0], new_post[:, 0], new_comb[:, 0]


@register("mhc_write", "reference")
def mhc_write(
    streams: torch.Tensor,
    y: torch.Tensor,
    pairs: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    places: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the last sublayer's output, that of experts, into streams that are kept elsewhere.

    streams: [tokens, streams, hidden]; y: [tokens, hidden]; pairs: [tokens, topk, hidden]; post:
    [tokens, streams], comb: [tokens, streams, streams], of the last read; places: [tokens] int32,
    the row of out: [rows, streams, hidden] that each token's streams go to.
    """
    y = (pairs.float().sum(1) + y.float()).to(y.dtype)
    out[places.long()] = mhc_post(y, streams, post, comb)


@register("stream_head", "reference")
def stream_head(
    streams: torch.Tensor,
    places: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor,
    *,
    eps: float,
    norm_eps: float,
) -> torch.Tensor:
    """Merge and normalise kept streams: what the output head reads.

    streams: [rows, streams, hidden]; places: [tokens] int32, the rows that are wanted; fn:
    [streams, streams * hidden], base: [streams], scale: [1] float32; norm: [hidden]. Returns
    [tokens, hidden] float32, rounded to the streams' dtype.
    """
    merged = mhc_head(streams[places.long()], fn, base, scale, eps, norm_eps)
    return rmsnorm(merged, norm, norm_eps).float()
