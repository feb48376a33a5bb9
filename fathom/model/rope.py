"""Rotary frequencies: plain in sliding-window layers and MTP, YaRN where there are entries.

Paper: §2.3.3 (partial RoPE); §4.2.2 (context extension).
"""

from __future__ import annotations

import math

import torch

from fathom.model.config import ModelConfig, RopeScaling


def inverse_frequencies(
    theta: float, rope_dim: int, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """Rotation per token of every pair, [rope_dim / 2] float32, in radians.

    With `scaling`, YaRN slows the pairs that turn less than beta_slow times over the original
    context by `factor`, keeps those that turn more than beta_fast times, and blends in between.
    """
    # On the CPU even where a model is being built without memory: nobody fills these in later.
    pairs = torch.arange(0, rope_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (theta ** (pairs / rope_dim))
    if scaling is None:
        return frequencies

    def pair_turning(times: float) -> float:
        per_turn = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return rope_dim * math.log(per_turn) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), rope_dim - 1)
    width = high - low if high != low else 0.001
    order = torch.arange(rope_dim // 2, dtype=torch.float32, device="cpu")
    keep = 1 - ((order - low) / width).clamp(0, 1)
    return frequencies / scaling.factor * (1 - keep) + frequencies * keep


class RotaryTable:
    """Cosines and sines of integer positions for one kind of layer.

    Phases are float32 products of position and frequency, never anything narrower: at 60,000 tokens
    a BF16 position is off by whole turns. Their cosines are rounded once, from float64: vectorised
    float32 ones differ in the last bit from machine to machine, and from the official values.
    """

    CACHED = 8192  # positions kept ready; later ones are computed when asked for

    def __init__(self, config: ModelConfig, compressed: bool) -> None:
        theta = config.compress_rope_theta if compressed else config.rope_theta
        scaling = config.rope_scaling if compressed else None
        self.frequencies = inverse_frequencies(theta, config.qk_rope_head_dim, scaling)
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: [seq] or [batch, seq] int64 -> cos, sin, each [..., rope_dim / 2] float32."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        phase = (positions.float().unsqueeze(-1) * self.frequencies).double()
        return phase.cos().float(), phase.sin().float()

    def span(
        self, start: int, count: int, step: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of positions start, start + step, ...: each [seq, rope_dim / 2] float32."""
        if start + count * step > self.CACHED:
            return self.at(torch.arange(count, device=device) * step + start)
        if self._ready is None or self._ready[0].device != device:
            self._ready = self.at(torch.arange(self.CACHED, device=device))
        cos, sin = self._ready
        rows = slice(start, start + count * step, step)
        return cos[rows], sin[rows]
