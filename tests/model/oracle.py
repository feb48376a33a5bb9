"""A second implementation to hold the model against: NumPy, float64, one sequence.

Written from the specification of the architecture, token by token and head by head, with no cache,
no batch and no cleverness; nothing here is shared with the package but configuration objects. Two
switches perform the official roundings: of the inputs of quantised linears (FP8), and of what a
cache stores (FP8 entries; Hadamard and FP4 in the indexer).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fathom.model import ModelConfig

Array = np.ndarray

# Every non-negative value of the two formats, in the order of their codes.
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(x: Array, values: Array) -> Array:
    """The nearest value of a format, ties to the even code; beyond the last one it clamps."""
    middles = (values[1:] + values[:-1]) / 2
    low = np.searchsorted(middles, np.abs(x), side="left")
    high = np.searchsorted(middles, np.abs(x), side="right")
    return np.copysign(values[np.where(low % 2 == 0, low, high)], x)


def round_groups(x: Array, group: int, values: Array, floor: float) -> Array:
    """Round each group of a vector after dividing it by a power of two that makes it fit."""
    out = np.empty_like(x)
    for first in range(0, len(x), group):
        part = x[first : first + group]
        amax = np.float32(max(np.abs(part).max(), floor))
        mantissa, exponent = math.frexp(float(amax * np.float32(1 / values[-1])))
        scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
        out[first : first + group] = nearest(part / scale, values) * scale
    return out


def fp8(x: Array, group: int) -> Array:
    """FP8 with one scale per `group` values."""
    return round_groups(x, group, E4M3, 1e-4)


def bf16(x: Array) -> Array:
    """Eight bits of significand, ties to even."""
    significand, exponent = np.frexp(x)
    return np.ldexp(np.rint(significand * 256), exponent - 8)


def fp4(x: Array) -> Array:
    """MXFP4: one scale per 32 values."""
    return round_groups(x, 32, E2M1, 6 * 2.0**-126)


@functools.cache
def hadamard_matrix(n: int) -> Array:
    """Sylvester's construction, orthonormal."""
    if n == 1:
        return np.ones((1, 1))
    half = hadamard_matrix(n // 2)
    return np.block([[half, half], [half, -half]]) / math.sqrt(2)


def frequencies(config: ModelConfig, compressed: bool) -> Array:
    """Radians per token of every pair, float32."""
    dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    out = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    yarn = config.rope_scaling
    if compressed and yarn is not None:

        def pair(turns: float) -> float:
            wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(theta))

        low = max(math.floor(pair(yarn.beta_fast)), 0)
        high = min(math.ceil(pair(yarn.beta_slow)), dim - 1)
        for i in range(dim // 2):
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            out[i] = out[i] * (1 - ramp) + out[i] / yarn.factor * ramp
    return np.array(out, dtype=np.float32)


def rotate(x: Array, position: int, freq: Array, inverse: bool = False) -> Array:
    """Turn the adjacent pairs of the last dimensions by position * frequency."""
    out = x.copy()
    first = len(x) - 2 * len(freq)
    for i, f in enumerate(freq):
        phase = float(np.float32(position) * f) * (-1 if inverse else 1)
        a, b = x[first + 2 * i], x[first + 2 * i + 1]
        out[first + 2 * i] = a * math.cos(phase) - b * math.sin(phase)
        out[first + 2 * i + 1] = a * math.sin(phase) + b * math.cos(phase)
    return out


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def rms(x: Array, eps: float) -> float:
    return math.sqrt(np.mean(x * x) + eps)


def sinkhorn(logits: Array, iterations: int, eps: float) -> Array:
    """Row softmax, columns, then 19 times rows and columns; every step with its eps."""
    m = softmax(logits, axis=1) + eps
    m = m / (m.sum(axis=0, keepdims=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(axis=1, keepdims=True) + eps)
        m = m / (m.sum(axis=0, keepdims=True) + eps)
    return m


def mhc_read(
    streams: Array, fn: Array, base: Array, scale: Array, config: ModelConfig
) -> tuple[Array, Array, Array]:
    """One token's streams [4, d] -> sublayer input [d], post [4], comb [4, 4]."""
    flat = streams.ravel()
    m = (fn @ flat) / rms(flat, config.rms_norm_eps)
    n = len(streams)
    pre = sigmoid(m[:n] * scale[0] + base[:n]) + config.hc_eps
    post = 2 * sigmoid(m[n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (m[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n)
    x = sum(pre[i] * streams[i] for i in range(n))
    return x, post, sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps)


def mhc_write(y: Array, streams: Array, post: Array, comb: Array) -> Array:
    """New stream j = post_j * y + sum_i comb[i, j] * stream i."""
    n = len(streams)
    return np.stack(
        [post[j] * y + sum(comb[i, j] * streams[i] for i in range(n)) for j in range(n)]
    )


def mhc_head(streams: Array, fn: Array, base: Array, scale: Array, config: ModelConfig) -> Array:
    """One token's streams [4, d] merged to [d]."""
    flat = streams.ravel()
    weights = sigmoid((fn @ flat) / rms(flat, config.rms_norm_eps) * scale + base) + config.hc_eps
    return sum(weights[i] * streams[i] for i in range(len(streams)))


@dataclass
class Oracle:
    """A model of `weights` under their official names, routed experts stacked, all float64."""

    config: ModelConfig
    weights: Mapping[str, Array]
    rounds_cache: bool = False
    rounds_inputs: bool = False
    rounds_rotated: bool = False  # the rotated part of an entry is stored as BF16

    # The whole model ------------------------------------------------------------------------

    def logits(self, tokens: list[int]) -> Array:
        """[tokens, vocab], every position."""
        return self.head(self.streams(tokens))

    def streams(self, tokens: list[int]) -> Array:
        """The residual streams after the last block: [tokens, 4, d]."""
        embedded = self.weights["embed.weight"][tokens]
        streams = np.stack([embedded] * self.config.hc_mult, axis=1)
        for layer in range(self.config.num_hidden_layers):
            streams = self.block(layer, streams, tokens)
        return streams

    def head(self, streams: Array) -> Array:
        """Logits from the last streams."""
        hidden = [self.norm("norm", self.merge("", s)) for s in streams]
        return np.stack([self.weights["head.weight"] @ h for h in hidden])

    def merge(self, prefix: str, streams: Array) -> Array:
        """One token's streams [4, d] -> [d]."""
        return mhc_head(streams, *self.site(prefix + "hc_head"), self.config)

    def block(self, layer: int, streams: Array, tokens: list[int]) -> Array:
        """One main layer over [tokens, 4, d]."""
        ratio = self.config.compress_ratios[layer]
        hashed = layer < self.config.num_hash_layers
        return self.any_block(f"layers.{layer}", streams, tokens, ratio, hashed)

    def mtp(self, streams: Array, next_tokens: list[int]) -> tuple[Array, Array]:
        """(logits [tokens, vocab], own streams); row p reads stream p and token p + 1."""
        mixed = []
        for s, token in zip(streams, next_tokens, strict=True):
            embedded = self.weights["embed.weight"][token]
            e = self.linear("mtp.0.e_proj", self.norm("mtp.0.enorm", embedded))
            mixed.append([e + self.linear("mtp.0.h_proj", self.norm("mtp.0.hnorm", x)) for x in s])
        after = self.any_block("mtp.0", np.array(mixed), next_tokens, 0, False)
        hidden = [self.norm("mtp.0.norm", self.merge("mtp.0.", s)) for s in after]
        return np.stack([self.weights["head.weight"] @ h for h in hidden]), after

    def any_block(
        self, p: str, streams: Array, tokens: list[int], ratio: int, hashed: bool
    ) -> Array:
        reads = [mhc_read(s, *self.site(f"{p}.hc_attn"), self.config) for s in streams]
        inputs = [self.norm(f"{p}.attn_norm", x) for x, _, _ in reads]
        y = self.attention(f"{p}.attn", ratio, inputs)
        streams = np.stack([mhc_write(y[t], streams[t], *reads[t][1:]) for t in range(len(tokens))])
        out = []
        for s, token in zip(streams, tokens, strict=True):
            x, post, comb = mhc_read(s, *self.site(f"{p}.hc_ffn"), self.config)
            y = self.moe(f"{p}.ffn", self.norm(f"{p}.ffn_norm", x), token, hashed)
            out.append(mhc_write(y, s, post, comb))
        return np.stack(out)

    # Attention ------------------------------------------------------------------------------

    def attention(self, p: str, ratio: int, xs: list[Array]) -> Array:
        """Normed inputs [tokens][d] -> outputs [tokens, d]."""
        c = self.config
        freq = frequencies(c, ratio != 0)
        raw = []
        for t, x in enumerate(xs):
            kv = self.norm(f"{p}.kv_norm", self.linear(f"{p}.wkv", x))
            raw.append(self.stored(rotate(kv, t, freq)))
        entries = []
        if ratio:
            entries = [self.stored(e) for e in self.compress(f"{p}.compressor", ratio, xs)]
        latents = [self.norm(f"{p}.q_norm", self.linear(f"{p}.wq_a", x)) for x in xs]
        keys = self.index_keys(p, xs) if ratio == 4 else []
        out = []
        for t, x in enumerate(xs):
            chosen = list(range((t + 1) // ratio)) if ratio else []
            if ratio == 4:
                chosen = self.pick(self.index_scores(p, x, latents[t], t, keys), len(chosen))
            window = raw[max(0, t - c.sliding_window + 1) : t + 1]
            seen = np.stack(window + [entries[i] for i in chosen])
            queries = self.linear(f"{p}.wq_b", latents[t]).reshape(c.num_attention_heads, -1)
            heads = []
            for h, q in enumerate(queries):
                q = rotate(q / rms(q, c.rms_norm_eps), t, freq)
                scores = seen @ q / math.sqrt(c.head_dim)
                e = np.exp(scores - scores.max())
                sink = math.exp(self.weights[f"{p}.attn_sink"][h] - scores.max())
                heads.append(rotate(e @ seen / (e.sum() + sink), t, freq, inverse=True))
            out.append(self.output(p, np.concatenate(heads)))
        return np.stack(out)

    def output(self, p: str, heads: Array) -> Array:
        """Concatenated heads through wo_a, one slice of it per group, and wo_b."""
        groups = self.config.o_groups
        slices = self.weights[f"{p}.wo_a.weight"].reshape(groups, self.config.o_lora_rank, -1)
        low = [slices[g] @ part for g, part in enumerate(np.split(heads, groups))]
        return self.linear(f"{p}.wo_b", np.concatenate(low))

    def stored(self, kv: Array) -> Array:
        """An entry as its stored form gives it back: FP8 in groups of 64, but the rotated part."""
        if not self.rounds_cache:
            return kv
        still = len(kv) - self.config.qk_rope_head_dim
        rotated = bf16(kv[still:]) if self.rounds_rotated else kv[still:]
        return np.concatenate([fp8(kv[:still], 64), rotated])

    def compress(self, p: str, ratio: int, xs: list[Array]) -> list[Array]:
        """The entries of all complete windows, normed and rotated."""
        kv = [self.weights[f"{p}.wkv.weight"] @ x for x in xs]
        gate = [
            self.weights[f"{p}.wgate.weight"] @ x + self.weights[f"{p}.ape"][t % ratio]
            for t, x in enumerate(xs)
        ]
        width = len(self.weights[f"{p}.norm.weight"])
        freq = frequencies(self.config, True)
        entries = []
        for i in range(len(xs) // ratio):
            own = range(ratio * i, ratio * (i + 1))
            before = range(ratio * (i - 1), ratio * i) if ratio == 4 and i > 0 else range(0)
            # With overlap a token's first half belongs to the next entry, its second to this one.
            start = width if ratio == 4 else 0
            values = [kv[t][:width] for t in before] + [kv[t][start:] for t in own]
            weights = [gate[t][:width] for t in before] + [gate[t][start:] for t in own]
            entry = (softmax(np.stack(weights), axis=0) * np.stack(values)).sum(axis=0)
            entries.append(rotate(self.norm(f"{p}.norm", entry), ratio * i, freq))
        return entries

    # The lightning indexer --------------------------------------------------------------------

    def index_keys(self, p: str, xs: list[Array]) -> list[Array]:
        return [self.turned(k) for k in self.compress(f"{p}.indexer.compressor", 4, xs)]

    def index_scores(self, p: str, x: Array, qr: Array, t: int, keys: list[Array]) -> Array:
        """Scores of every entry for the query at t, seen or not."""
        c = self.config
        weights = self.weights[f"{p}.indexer.weights_proj.weight"] @ x
        weights = weights * c.index_head_dim**-0.5 * c.index_n_heads**-0.5
        queries = self.linear(f"{p}.indexer.wq_b", qr).reshape(c.index_n_heads, -1)
        freq = frequencies(c, True)
        turned = [self.turned(rotate(q, t, freq)) for q in queries]
        return np.array(
            [sum(w * max(q @ k, 0.0) for w, q in zip(weights, turned, strict=True)) for k in keys]
        )

    def turned(self, x: Array) -> Array:
        return fp4(hadamard_matrix(len(x)) @ x) if self.rounds_cache else x

    def pick(self, scores: Array, visible: int) -> list[int]:
        """The best of the first `visible` entries, equal scores in the order of the entries."""
        ordered = sorted(range(visible), key=lambda i: (-scores[i], i))
        return ordered[: self.config.index_topk]

    # Experts ----------------------------------------------------------------------------------

    def route(self, p: str, x: Array, token: int, hashed: bool) -> tuple[list[int], list[float]]:
        """(experts, weights) of one token."""
        c = self.config
        scores = np.sqrt(np.logaddexp(0, self.weights[f"{p}.gate.weight"] @ x))
        if hashed:
            chosen = [int(e) for e in self.weights[f"{p}.gate.tid2eid"][token]]
        else:
            biased = scores + self.weights[f"{p}.gate.bias"]
            chosen = [int(e) for e in np.argsort(-biased)[: c.num_experts_per_tok]]
        total = sum(scores[e] for e in chosen)
        return chosen, [scores[e] / total * c.routed_scaling_factor for e in chosen]

    def moe(self, p: str, x: Array, token: int, hashed: bool) -> Array:
        """Routed experts plus the shared one, for one token."""
        shared = [self.weights[f"{p}.shared_experts.w{i}.weight"] for i in (1, 2, 3)]
        y = self.expert(x, *shared, 1.0)
        for e, weight in zip(*self.route(p, x, token, hashed), strict=True):
            routed = [self.weights[f"{p}.experts.w{i}"][e] for i in (1, 2, 3)]
            y = y + self.expert(x, *routed, weight)
        return y

    def expert(self, x: Array, w1: Array, w2: Array, w3: Array, weight: float) -> Array:
        limit = self.config.swiglu_limit
        x = self.rounded(x)
        gate = np.minimum(w1 @ x, limit)
        up = np.clip(w3 @ x, -limit, limit)
        return w2 @ self.rounded(gate * sigmoid(gate) * up * weight)

    # Small parts ------------------------------------------------------------------------------

    def site(self, prefix: str) -> tuple[Array, Array, Array]:
        return tuple(self.weights[f"{prefix}_{part}"] for part in ("fn", "base", "scale"))

    def norm(self, name: str, x: Array) -> Array:
        return x / rms(x, self.config.rms_norm_eps) * self.weights[f"{name}.weight"]

    def linear(self, name: str, x: Array) -> Array:
        """A linear whose stored weight is quantised, so that its input is too."""
        return self.weights[f"{name}.weight"] @ self.rounded(x)

    def rounded(self, x: Array) -> Array:
        return fp8(x, 128) if self.rounds_inputs else x
