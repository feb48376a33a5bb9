"""The whole model: embedding into residual streams, blocks, stream head, logits; and the MTP block.

Reading order: Transformer.forward -> Block -> attention / moe; mHC in between.

Paper: §2 (architecture), figure 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from fathom.errors import ConfigError
from fathom.model.block import Block
from fathom.model.cache import Cache
from fathom.model.config import ModelConfig
from fathom.model.context import Context, LayerSignals
from fathom.model.layers import Linear, RMSNorm
from fathom.model.mhc import StreamHead
from fathom.model.moe import RoutedExperts
from fathom.model.mtp import MTPBlock
from fathom.model.rope import RotaryTable

WEIGHT_FORMATS = ("bf16", "fp8", "fp4")


class Embedding(nn.Module):
    """Token embedding; weight: [vocab, hidden]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [batch, seq] int64. Returns [batch, seq, hidden]."""
        return F.embedding(tokens, self.weight)


class Head(nn.Module):
    """The output head, computed in float32; weight: [vocab, hidden]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden]. Returns [..., vocab] float32."""
        return F.linear(x.float(), self.weight)


class Transformer(nn.Module):
    """A DeepSeek-V4 model. Parameters have the official tensor names; routed experts are stacked.

    dtype is the arithmetic of activations (float32 or bfloat16); `quantized` performs every
    quantisation step of the official path: FP8 inputs of the linears whose weights are stored
    quantised, FP8 key-value entries, Hadamard and FP4 in the indexer. Parameters are uninitialised:
    call `initialize` or load a checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        quantized: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"dtype must be torch.float32 or torch.bfloat16, not {dtype}")
        self.config, self.dtype, self.quantized = config, dtype, quantized
        self.formats_revision = 0  # counts calls of `set_weight_formats`
        self.embed = Embedding(config, dtype)
        self.layers = nn.ModuleList(
            Block(config, ratio, index < config.num_hash_layers, dtype, quantized)
            for index, ratio in enumerate(config.compress_ratios)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = Head(config)
        self.mtp = nn.ModuleList(
            MTPBlock(config, dtype, quantized) for _ in range(config.num_mtp_layers)
        )
        self._stream_head = StreamHead(self, config)
        self._rotary = {compressed: RotaryTable(config, compressed) for compressed in (False, True)}

    def forward(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Logits of every position: tokens [batch, seq] int64 -> [batch, seq, vocab] float32.

        With a cache the tokens continue its sequences, and it is updated: prefill, chunked prefill
        and decode are this same call.
        """
        return self.head(self.hidden(self.streams(tokens, cache)))

    def streams(
        self,
        tokens: torch.Tensor,
        cache: Cache | None = None,
        context: Context | None = None,
        signals: list[LayerSignals] | None = None,
    ) -> torch.Tensor:
        """tokens: [batch, seq] -> streams after the last block, [batch, seq, streams, hidden].

        `signals`, one object per layer, is filled in for a trainer.
        """
        if context is None:
            context = self.context(tokens, cache)
        streams = self.embed(tokens).unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        for index, layer in enumerate(self.layers):
            layer_cache = cache.layers[index] if cache else None
            layer_signals = signals[index] if signals else None
            streams = layer(streams, tokens, context, layer_cache, layer_signals)
        if cache is not None:
            cache.length += tokens.shape[1]
        return streams

    def hidden(self, streams: torch.Tensor) -> torch.Tensor:
        """What the head reads: streams [batch, seq, streams, hidden] -> [batch, seq, hidden]."""
        return self.norm(self._stream_head.merge(self, streams))

    def mtp_hidden(
        self,
        streams: torch.Tensor,
        next_tokens: torch.Tensor,
        context: Context | None = None,
        signals: LayerSignals | None = None,
    ) -> torch.Tensor:
        """The MTP block's hidden states: position p reads stream p and token p + 1, predicts p + 2.

        streams: [batch, seq, streams, hidden] of positions 0 .. seq - 1; next_tokens: [batch, seq]
        int64. Returns [batch, seq, hidden]. Raises ConfigError when the model has no MTP block.
        """
        if not self.mtp:
            raise ConfigError("this model has no MTP block (num_nextn_predict_layers is 0)")
        if context is None:
            context = self.context(next_tokens)
        block = self.mtp[0]
        assert isinstance(block, MTPBlock)
        embedded = self.embed(next_tokens)
        return block.predict(streams, embedded, next_tokens, context, None, signals)[0]

    def mtp_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [batch, seq] -> [batch, seq - 1, vocab] float32; row p predicts token p + 2."""
        streams = self.streams(tokens)[:, :-1]
        return self.head(self.mtp_hidden(streams, tokens[:, 1:]))

    def context(
        self,
        tokens: torch.Tensor,
        cache: Cache | None = None,
        documents: torch.Tensor | None = None,
        dense: bool | torch.Tensor = False,
    ) -> Context:
        """What the layers share in a pass over tokens [batch, seq].

        documents: [batch, seq] int, or None for one; dense: a bool, or a tensor of shape [].
        """
        start = cache.length if cache is not None else 0
        return Context.create(
            start,
            tokens.shape[1],
            self.config.sliding_window,
            tokens.device,
            self._rotary,
            documents,
            dense,
        )

    def new_cache(self, batch: int = 1) -> Cache:
        """An empty cache on the model's device, in its dtype."""
        return Cache.empty(self.config, batch, self.dtype, self.embed.weight.device)

    def set_weight_formats(self, formats: Mapping[str, str], simulate: bool = False) -> None:
        """Say how weights are stored: {"layers.0.attn.wq_a": "fp8", "layers.0.ffn.experts": "fp4"}.

        In a quantised model this turns on the FP8 rounding of those layers' inputs (never wo_a's).
        `simulate` also rounds the weights at every call. Float32 scales kept from a checkpoint are
        dropped. Raises ConfigError for unknown names and formats.
        """
        self.formats_revision += 1
        modules = dict(self.named_modules())
        for name, weight_format in formats.items():
            module = modules.get(name)
            if not isinstance(module, Linear | RoutedExperts):
                raise ConfigError(f"{name!r} names no linear layer and no routed experts")
            if weight_format not in WEIGHT_FORMATS:
                raise ConfigError(
                    f"{name} cannot be {weight_format!r}: choose one of {', '.join(WEIGHT_FORMATS)}"
                )
            module.weight_format = weight_format
            stored = weight_format != "bf16"
            module.quantize_input = self.quantized and stored and not name.endswith(".wo_a")
            module.simulate_weight = simulate and stored
            for scale in dict(module.named_buffers(recurse=False)):
                setattr(module, scale, None)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Random parameters for training; float32 draws on the CPU: the same bits on any device."""
        from fathom.model.initialize import initialize

        initialize(self, generator)
