"""The mHC boundary between two sublayers in two launches, and what follows the last of them.

`mhc_write_and_mix` writes the last sublayer's output into the streams and, while they are in
registers, multiplies them with the next site's `fn`; programs own slices of the hidden dimension.
`mhc_read` adds those partial products in a fixed order, reads the next sublayer's input out of the
streams and normalises it, and in a second program runs Sinkhorn. It is alone on the device and
waits for memory once: all its loads stand before its first sum. The output head reads the streams
in the same way with `mhc_merge`.

Bytes for one token of V4-Flash: fn 24 x 16384 x 4 = 1.5 MB, streams 3 x 32 KB.

Paper: §2.2, eq. 1-8; §3.1 (fused mHC kernels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fathom.kernels.registry import register

SLICE = 64  # hidden columns of one program
MIXES = 32  # 24 mixing logits and the square sum, padded to a power of two
WRITTEN = 1024  # hidden columns of one program of mhc_write_streams
READ_WARPS = 4  # of a program of mhc_read


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sublayer_output(
    y, pairs, token, hidden, col, live, SLOTS: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Columns of a sublayer's output; routed experts in the order of their choice, then y."""
    value = tl.load(y + token * hidden + col, mask=live, other=0.0).to(tl.float32)
    if SLOTS > 0:
        routed = tl.zeros(col.shape, tl.float32)
        for slot in tl.static_range(SLOTS):
            at = pairs + (token * SLOTS + slot) * hidden + col
            routed += tl.load(at, mask=live, other=0.0).to(tl.float32)
        value = (routed + value).to(dtype).to(tl.float32)
    return value


@triton.jit
def written_stream(
    value, streams, post, comb, token, hidden, col, live, j: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Stream j after a write, float32; streams: the token's own."""
    stream = tl.load(post + token * N + j) * value
    for i in tl.static_range(N):
        old = tl.load(streams + i * hidden + col, mask=live, other=0.0).to(tl.float32)
        stream += tl.load(comb + token * N * N + i * N + j) * old
    return stream


@triton.jit
def _rows_scaled(m, eps, N: tl.constexpr):
    """Every row of a matrix over its sum; m: its numbers, row after row."""
    out = ()
    for i in tl.static_range(N):
        total = m[i * N]
        for j in tl.static_range(1, N):
            total += m[i * N + j]
        inverse = 1.0 / (total + eps)
        for j in tl.static_range(N):
            out += (m[i * N + j] * inverse,)
    return out


@triton.jit
def _transposed(m, N: tl.constexpr):
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            out += (m[j * N + i],)
    return out


@triton.jit
def _sinkhorn(logits, eps, N: tl.constexpr, ROUNDS: tl.constexpr):
    """A matrix of logits to one whose rows and columns sum to one, both as N * N numbers.

    Every thread has all of them: as a tensor's, each of 40 sums would wait for other warps.
    """
    m = ()
    for i in tl.static_range(N):
        high = logits[i * N]
        for j in tl.static_range(1, N):
            high = tl.maximum(high, logits[i * N + j])
        for j in tl.static_range(N):
            m += (tl.exp(logits[i * N + j] - high),)
    m = _rows_scaled(m, 0.0, N)
    shifted = ()
    for c in tl.static_range(N * N):
        shifted += (m[c] + eps,)
    m = _transposed(_rows_scaled(_transposed(shifted, N), eps, N), N)
    for _ in range(ROUNDS - 1):
        m = _rows_scaled(m, eps, N)
        m = _transposed(_rows_scaled(_transposed(m, N), eps, N), N)
    return m


@triton.jit
def normed(value, weight, hidden, eps, dtype: tl.constexpr):
    """RMSNorm of a merged row, rounded before and after it to the streams' dtype."""
    value = value.to(dtype).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / hidden + eps)
    return (value * r * weight).to(dtype)


@triton.jit
def mhc_write_and_mix(
    y, pairs, streams, places, post, comb, fn, new, partial, hidden,
    N: tl.constexpr, SLOTS: tl.constexpr, WRITE: tl.constexpr, PLACED: tl.constexpr,
    ROWS: tl.constexpr, MIXES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """ROWS: of fn. PLACED: the streams of token t are those of row places[t]."""
    slice_, token = tl.program_id(0), tl.program_id(1)
    col = slice_ * SLICE + tl.arange(0, SLICE)
    live = col < hidden
    source = token.to(tl.int64)
    if PLACED:
        source = tl.load(places + token).to(tl.int64)
    own = streams + source * N * hidden
    dtype: tl.constexpr = streams.dtype.element_ty
    mix = tl.arange(0, MIXES)
    total = tl.zeros([MIXES], tl.float32)
    square = tl.zeros([SLICE], tl.float32)
    if WRITE:
        value = sublayer_output(y, pairs, token, hidden, col, live, SLOTS, dtype)
    for j in tl.static_range(N):
        if WRITE:
            stream = written_stream(value, own, post, comb, token, hidden, col, live, j, N)
            stream = stream.to(dtype).to(tl.float32)
            tl.store(new + (source * N + j) * hidden + col, stream.to(dtype))
        else:
            stream = tl.load(own + j * hidden + col).to(tl.float32)
        weight = tl.load(
            fn + mix[:, None] * N * hidden + j * hidden + col[None, :],
            mask=(mix < ROWS)[:, None], other=0.0,
        )  # fmt: skip
        total += tl.sum(weight * stream[None, :], axis=1)
        square += stream * stream
    total = tl.where(mix == MIXES - 1, tl.sum(square, axis=0), total)
    at = (token * tl.num_programs(0) + slice_) * MIXES
    tl.store(partial + at + mix, total)


@triton.jit
def _logits(
    partial, scale, base, token, hidden, eps, N: tl.constexpr, COUNT: tl.constexpr,
    SLICES: tl.constexpr, ROOM: tl.constexpr, MIXES: tl.constexpr,
):  # fmt: skip
    """A token's COUNT mixing logits [MIXES], each with its scale and base; ROOM: SLICES padded to a
    power of two.
    """
    slice_, mix = tl.arange(0, ROOM), tl.arange(0, MIXES)
    used = mix < COUNT
    which = tl.where(mix < N, 0, tl.where(mix < 2 * N, 1, 2))
    at = partial + (token * SLICES + slice_[:, None]) * MIXES + mix[None, :]
    if ROOM == SLICES:
        every = tl.load(at)
    else:
        every = tl.load(at, mask=(slice_ < SLICES)[:, None], other=0.0)
    scale = tl.load(scale + which, mask=used, other=0.0)
    base = tl.load(base + mix, mask=used, other=0.0)
    total = tl.sum(every, axis=0)
    square = tl.sum(tl.where(mix == MIXES - 1, total, 0.0), axis=0)
    return total * (1.0 / tl.sqrt(square / (N * hidden) + eps)) * scale + base


@triton.jit
def _picked(values, places, MIXES: tl.constexpr):
    """Of [MIXES] those at places [count]."""
    here = tl.arange(0, MIXES)[None, :] == places[:, None]
    return tl.sum(tl.where(here, values[None, :], 0.0), axis=1)


@triton.jit
def _merged(
    streams, partial, base, scale, norm, token, hidden, eps, norm_eps, N: tl.constexpr,
    COUNT: tl.constexpr, SLICES: tl.constexpr, ROOM: tl.constexpr, MIXES: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """The streams weighed by the first N mixing logits, normed; streams: the token's own."""
    mix, col = tl.arange(0, MIXES), tl.arange(0, HIDDEN)
    live = col < hidden
    # All loads before the first sum, so that they are under way at once.
    every = ()
    for j in tl.static_range(N):
        every += (tl.load(streams + j * hidden + col, mask=live, other=0.0),)
    weight = tl.load(norm + col, mask=live, other=0.0).to(tl.float32)
    logits = _logits(partial, scale, base, token, hidden, norm_eps, N, COUNT, SLICES, ROOM, MIXES)
    pre = sigmoid(logits) + eps
    value = tl.zeros([HIDDEN], tl.float32)
    for j in tl.static_range(N):
        value += tl.sum(tl.where(mix == j, pre, 0.0), axis=0) * every[j].to(tl.float32)
    return normed(value, weight, hidden, norm_eps, streams.dtype.element_ty)


@triton.jit
def mhc_read(
    streams, partial, base, scale, norm, x, post, comb, hidden, eps, norm_eps,
    N: tl.constexpr, SLICES: tl.constexpr, ROOM: tl.constexpr, MIXES: tl.constexpr,
    ROUNDS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """A token's next input, normed; in another program what the next write needs: post and comb."""
    token, n = tl.program_id(1), tl.arange(0, N)
    COUNT: tl.constexpr = N * (N + 2)
    if tl.program_id(0) == 0:
        own = streams + token.to(tl.int64) * N * hidden
        col = tl.arange(0, HIDDEN)
        value = _merged(
            own, partial, base, scale, norm, token, hidden, eps, norm_eps, N, COUNT, SLICES, ROOM,
            MIXES, HIDDEN,
        )  # fmt: skip
        tl.store(x + token * hidden + col, value, mask=col < hidden)
    else:
        # Needed only by the next write: another program does it meanwhile.
        logits = _logits(
            partial, scale, base, token, hidden, norm_eps, N, COUNT, SLICES, ROOM, MIXES
        )
        tl.store(post + token * N + n, 2 * sigmoid(_picked(logits, N + n, MIXES)))
        numbers, mix = (), tl.arange(0, MIXES)
        for c in tl.static_range(N * N):
            numbers += (tl.sum(tl.where(mix == 2 * N + c, logits, 0.0), axis=0),)
        m = _sinkhorn(numbers, eps, N, ROUNDS)
        for c in tl.static_range(N * N):
            tl.store(comb + token * N * N + c, m[c])


@triton.jit
def mhc_merge(
    streams, places, partial, base, scale, norm, out, hidden, eps, norm_eps,
    N: tl.constexpr, SLICES: tl.constexpr, ROOM: tl.constexpr, MIXES: tl.constexpr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """A token's streams merged for the output head, normed; those of token t are row places[t]."""
    token, col = tl.program_id(0), tl.arange(0, HIDDEN)
    own = streams + tl.load(places + token).to(tl.int64) * N * hidden
    value = _merged(
        own, partial, base, scale, norm, token, hidden, eps, norm_eps, N, N, SLICES, ROOM, MIXES,
        HIDDEN,
    )  # fmt: skip
    tl.store(out + token * hidden + col, value.to(tl.float32), mask=col < hidden)


@triton.jit
def mhc_write_streams(
    y, pairs, streams, places, post, comb, new, hidden,
    N: tl.constexpr, SLOTS: tl.constexpr, PLACED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """PLACED: the new streams of token t become row places[t]."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = col < hidden
    dtype: tl.constexpr = streams.dtype.element_ty
    target = token
    if PLACED:
        target = tl.load(places + token).to(tl.int64)
    own = streams + token * N * hidden
    value = sublayer_output(y, pairs, token, hidden, col, live, SLOTS, dtype)
    for j in tl.static_range(N):
        stream = written_stream(value, own, post, comb, token, hidden, col, live, j, N)
        tl.store(new + (target * N + j) * hidden + col, stream.to(dtype), mask=live)


def write(
    streams: torch.Tensor,
    y: torch.Tensor,
    pairs: torch.Tensor | None,
    post: torch.Tensor,
    comb: torch.Tensor,
    new: torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """Write a sublayer's output into new [rows, streams, hidden], at places [tokens] if given.

    streams: [tokens, streams, hidden]; y: [tokens, hidden]; pairs: [tokens, topk, hidden]; post,
    comb: the same shapes as there.
    """
    tokens, n, hidden = streams.shape
    width = min(WRITTEN, triton.next_power_of_2(hidden))
    mhc_write_streams[(tokens, triton.cdiv(hidden, width))](
        y, pairs if pairs is not None else y, streams, places if places is not None else y, post,
        comb, new, hidden, N=n, SLOTS=pairs.shape[1] if pairs is not None else 0,
        PLACED=places is not None, COLS=width, num_warps=4,
    )  # fmt: skip


@register("mhc_write", "triton")
def mhc_write(
    streams: torch.Tensor,
    y: torch.Tensor,
    pairs: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    places: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """As the reference. streams: [tokens, streams, hidden]; y: [tokens, hidden]; pairs: [tokens,
    topk, hidden]; post, comb: the same as there; places: [tokens] int32; out: [rows, streams,
    hidden].
    """
    write(streams, y, pairs, post, comb, out, places)


@register("stream_head", "triton")
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
    """As the reference. streams: [rows, streams, hidden]; places: [tokens] int32; fn: [streams,
    streams * hidden]; base: [streams]; scale: [1]; norm: [hidden]. Returns [tokens, hidden]
    float32.
    """
    tokens, (_, n, hidden) = places.shape[0], streams.shape
    slices = hidden // SLICE
    make = {"dtype": torch.float32, "device": streams.device}
    partial = torch.empty(tokens, slices, MIXES, **make)
    mhc_write_and_mix[(slices, tokens)](
        streams, streams, streams, places, base, base, fn, streams, partial, hidden,
        N=n, SLOTS=0, WRITE=False, PLACED=True, ROWS=n, MIXES=MIXES, SLICE=SLICE, num_warps=4,
    )  # fmt: skip
    out = torch.empty(tokens, hidden, **make)
    mhc_merge[(tokens,)](
        streams, places, partial, base, scale, norm, out, hidden, eps, norm_eps,
        N=n, SLICES=slices, ROOM=triton.next_power_of_2(slices), MIXES=MIXES,
        HIDDEN=triton.next_power_of_2(hidden), num_warps=READ_WARPS,
    )  # fmt: skip
    return out


@register("mhc_boundary", "triton")
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
    """As the reference. streams: [tokens, streams, hidden]; y: [tokens, hidden]; pairs:
    [tokens, topk, hidden]; fn, base, scale, norm, post, comb: the same as there. Returns
    (streams, x [tokens, hidden], post, comb).
    """
    tokens, n, hidden = streams.shape
    slices = hidden // SLICE
    partial = torch.empty(tokens, slices, MIXES, dtype=torch.float32, device=streams.device)
    new = torch.empty_like(streams) if y is not None else streams
    slots = pairs.shape[1] if pairs is not None else 0
    mhc_write_and_mix[(slices, tokens)](
        y if y is not None else streams, pairs if pairs is not None else streams, streams, streams,
        post if post is not None else base, comb if comb is not None else base, fn, new, partial,
        hidden, N=n, SLOTS=slots, WRITE=y is not None, PLACED=False, ROWS=n * (n + 2), MIXES=MIXES,
        SLICE=SLICE, num_warps=4,
    )  # fmt: skip
    x = torch.empty(tokens, hidden, dtype=streams.dtype, device=streams.device)
    post = torch.empty(tokens, n, dtype=torch.float32, device=streams.device)
    comb = torch.empty(tokens, n, n, dtype=torch.float32, device=streams.device)
    mhc_read[(2, tokens)](
        new, partial, base, scale, norm, x, post, comb, hidden, eps, norm_eps,
        N=n, SLICES=slices, ROOM=triton.next_power_of_2(slices), MIXES=MIXES, ROUNDS=iterations,
        HIDDEN=triton.next_power_of_2(hidden), num_warps=READ_WARPS,
    )  # fmt: skip
    return new, x, post, comb
