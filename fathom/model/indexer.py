"""The lightning indexer: which compressed entries a query of a CSA layer attends to.

Paper: §2.3.1, eq. 13-17.
"""

from __future__ import annotations

import torch
from torch import nn

from fathom.kernels import operation
from fathom.model.cache import LayerCache
from fathom.model.compressor import Compressor
from fathom.model.config import CSA_RATIO, ModelConfig
from fathom.model.context import Context
from fathom.model.layers import Linear
from fathom.quant import fp4, fp8

_hadamard = operation("hadamard")
_index_scores = operation("index_scores")
_rope = operation("rope")
_topk = operation("topk")


class LightningIndexer(nn.Module):
    """Scores every visible entry with its own small queries and keys, and keeps the best.

    `quantized` rotates queries and keys by the Hadamard matrix and rounds them to FP4 (FP8 where
    the cache says so), as they are stored and multiplied; without it neither is done (they cancel
    in exact arithmetic).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, quantized: bool) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.topk = config.index_topk
        self.quantized = quantized
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim, dtype)
        self.weights_proj = Linear(config.hidden_size, self.heads, dtype)
        self.compressor = Compressor(config, CSA_RATIO, self.dim, dtype)

    def forward(
        self, x: torch.Tensor, qr: torch.Tensor, context: Context, cache: LayerCache | None
    ) -> torch.Tensor:
        """Scores of all entries: [batch, seq, entries] in x's dtype (or float32 while training).

        x: [batch, seq, hidden], the normed sublayer input; qr: [batch, seq, rows], the normed query
        latent that the main queries are made of too.
        """
        keys = self.keys(x, context, cache)
        q = self.wq_b(qr).unflatten(-1, (self.heads, self.dim))
        q = self._rotate_and_round(_rope(q, *context.rotation(True)), cache)
        weights = self.weights_proj(x) * (self.dim**-0.5 * self.heads**-0.5)
        return _index_scores(q, keys, weights)

    def keys(self, x: torch.Tensor, context: Context, cache: LayerCache | None) -> torch.Tensor:
        """Index keys of x [batch, seq, hidden] and all before it: [batch, entries, index_dim]."""
        keys = self.compressor(x, context, cache.index_compressor if cache else None)
        keys = self._rotate_and_round(keys, cache)
        if cache is None:
            return keys
        assert cache.index_keys is not None
        return cache.index_keys.append(keys)

    def select(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """The best entries of each query: [batch, seq, min(topk, entries)] int64, -1 = none.

        scores: [batch, seq, entries]; visible: [batch or 1, seq, entries] bool. Best score first.
        """
        return _topk(scores, visible, self.topk)

    def _rotate_and_round(self, x: torch.Tensor, cache: LayerCache | None) -> torch.Tensor:
        if not self.quantized:
            return x
        if cache is not None and cache.key_format == "fp8":
            return fp8.simulate(_hadamard(x), self.dim)
        return fp4.simulate(_hadamard(x))
