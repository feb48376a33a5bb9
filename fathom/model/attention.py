"""The three kinds of attention layer. They share everything but their compressed entries.

There is one key-value head, whose head_dim dimensions are [unrotated | rope_dim]. Throughout:

    x: [batch, seq, hidden], the normed input; qr: [batch, seq, rows], the normed query latent
    q, out: [batch, seq, heads, head_dim], rotated queries and the attention's outputs
    kv: [batch, seq, head_dim], the raw entries of this call's tokens
    window_kv: [batch, window - 1 + seq, head_dim], the same after those that still count
    entries: [batch, entries, head_dim], all compressed entries so far
    picks: [batch, seq, topk] int64, the entries chosen for each query, -1 = none
    visible: [batch or 1, seq, entries] bool, the entries that a query attends to

Paper: §2.3 (hybrid attention), §2.3.1 CSA, eq. 9-19; §2.3.2 HCA, eq. 20-26; §2.3.3 (details).
"""

from __future__ import annotations

import torch
from torch import nn

from fathom.kernels import operation
from fathom.model.cache import LayerCache
from fathom.model.compressor import Compressor
from fathom.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fathom.model.context import Context, LayerSignals
from fathom.model.indexer import LightningIndexer
from fathom.model.layers import Linear, RMSNorm
from fathom.quant import kv_pack

_grouped_linear = operation("grouped_linear")
_head_rmsnorm = operation("head_rmsnorm")
_hybrid_attention = operation("hybrid_attention")
_rope = operation("rope")
_sparse_attention = operation("sparse_attention")

FEW_QUERIES = 4  # up to here gathering the chosen entries is cheaper than masking all of them


class SlidingWindowAttention(nn.Module):
    """Multi-query attention over the last `sliding_window` tokens and the entries of a subclass.

    `quantized` rounds the stored key-value entries to FP8 (all but their rotated part).
    """

    ratio = 0

    def __init__(self, config: ModelConfig, dtype: torch.dtype, quantized: bool) -> None:
        super().__init__()
        c = config
        self.heads, self.head_dim = c.num_attention_heads, c.head_dim
        self.rope_dim, self.window = c.qk_rope_head_dim, c.sliding_window
        self.groups, self.eps = c.o_groups, c.rms_norm_eps
        self.scale = c.head_dim**-0.5
        self.quantized = quantized
        self.attn_sink = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank, dtype)
        self.q_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps, dtype)
        self.wq_b = Linear(c.q_lora_rank, self.heads * c.head_dim, dtype)
        self.wkv = Linear(c.hidden_size, c.head_dim, dtype)
        self.kv_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype)
        self.wo_a = Linear(c.group_width, c.o_groups * c.o_lora_rank, dtype)
        self.wo_b = Linear(c.o_groups * c.o_lora_rank, c.hidden_size, dtype)

    def forward(
        self,
        x: torch.Tensor,
        context: Context,
        cache: LayerCache | None = None,
        signals: LayerSignals | None = None,
    ) -> torch.Tensor:
        """x: [batch, seq, hidden], normed. Returns the same shape; updates `cache` if given."""
        rotation = context.rotation(self.ratio != 0)
        qr = self.q_norm(self.wq_a(x))  # [batch, seq, q_lora_rank]
        q = self.wq_b(qr).unflatten(-1, (self.heads, self.head_dim))
        q = _rope(_head_rmsnorm(q, self.eps), *rotation)
        kv = self.store(_rope(self.kv_norm(self.wkv(x)), *rotation))  # [batch, seq, head_dim]
        window_kv = self.extend_window(kv, cache)
        out = self.attend(q, window_kv, x, qr, context, cache, signals)
        return self.project(_rope(out, *rotation, inverse=True))

    def store(self, kv: torch.Tensor) -> torch.Tensor:
        """kv: [..., head_dim] as reading it back from its stored form would give it."""
        return kv_pack.simulate_kv(kv, self.rope_dim) if self.quantized else kv

    def extend_window(self, kv: torch.Tensor, cache: LayerCache | None) -> torch.Tensor:
        """The raw entries that this call's queries may see: [batch, window - 1 + seq, head_dim]."""
        if cache is None:
            return torch.nn.functional.pad(kv, (0, 0, self.window - 1, 0))
        window_kv = torch.cat((cache.window, kv), dim=1)
        cache.window = window_kv[:, kv.shape[1] :]
        return window_kv

    def attend(
        self,
        q: torch.Tensor,
        window_kv: torch.Tensor,
        x: torch.Tensor,
        qr: torch.Tensor,
        context: Context,
        cache: LayerCache | None,
        signals: LayerSignals | None,
    ) -> torch.Tensor:
        """Attention outputs [batch, seq, heads, head_dim]; here over the window alone."""
        entries = window_kv[:, :0]
        return self.joint_attention(q, window_kv, entries, None, context)

    def joint_attention(
        self,
        q: torch.Tensor,
        window_kv: torch.Tensor,
        entries: torch.Tensor,
        picks: torch.Tensor | None,
        context: Context,
    ) -> torch.Tensor:
        """One softmax over the window, the picked entries (None: all visible ones) and the sink.

        Returns [batch, seq, heads, head_dim].
        """
        if use_gathered(q):
            indices = self.gather_list(q, entries, picks, context)
            kv = torch.cat((window_kv, entries), dim=1)
            return _sparse_attention(q, kv, indices, self.attn_sink, self.scale)
        visible = self.visible(entries, picks, context)
        return self.masked_attention(q, window_kv, entries, visible, context)[0]

    def masked_attention(
        self,
        q: torch.Tensor,
        window_kv: torch.Tensor,
        entries: torch.Tensor,
        visible: torch.Tensor,
        context: Context,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, probability per entry [batch, seq, entries]) for an explicit visibility mask."""
        return _hybrid_attention(
            q, window_kv, context.segments, entries, visible, self.attn_sink, self.scale
        )

    def visible(
        self, entries: torch.Tensor, picks: torch.Tensor | None, context: Context
    ) -> torch.Tensor:
        """Mask of the entries to attend to: [batch or 1, seq, entries] bool."""
        if self.ratio == 0:
            return torch.zeros(1, context.seq, 0, dtype=torch.bool, device=entries.device)
        if picks is None:
            return context.visible_entries(self.ratio)
        chosen = torch.zeros(
            *picks.shape[:2], entries.shape[1] + 1, dtype=torch.bool, device=picks.device
        )
        return chosen.scatter_(2, picks.remainder(entries.shape[1] + 1), True)[..., :-1]

    def gather_list(
        self, q: torch.Tensor, entries: torch.Tensor, picks: torch.Tensor | None, context: Context
    ) -> torch.Tensor:
        """Rows of cat(window_kv, entries) for each query: [batch, seq, topk] int64, -1 = none.

        In the official order, which decides what shares a block of the BF16 softmax: the window's
        tokens, oldest first, then gaps where it is not full yet, then the entries.
        """
        batch, seq = q.shape[:2]
        places = torch.arange(seq, device=q.device)[:, None] + self.window - 1  # each token's own
        oldest = (places - self.window + 1).clamp(min=self.window - 1 - context.start)
        width = self.window if context.start else min(seq, self.window)
        rows = oldest + torch.arange(width, device=q.device)
        rows = rows.masked_fill(rows > places, -1).expand(batch, seq, -1)
        if entries.shape[1] == 0:
            return rows
        if picks is None:
            every = torch.arange(entries.shape[1], device=q.device)
            picks = torch.where(context.visible_entries(self.ratio), every, -1).expand(
                batch, seq, -1
            )
        shifted = torch.where(picks >= 0, picks + self.window - 1 + seq, -1)
        return torch.cat((rows, shifted), dim=-1)

    def project(self, out: torch.Tensor) -> torch.Tensor:
        """Grouped output projection of `out`, turned back already. Returns [batch, seq, hidden].

        Each group concatenates consecutive heads and meets its own rows of wo_a; wo_b joins them.
        wo_a is stored in FP8 but expanded by the official converter: its input stays unquantised.
        """
        grouped = out.flatten(-2).unflatten(-1, (self.groups, -1))  # [batch, seq, groups, width]
        wo_a = self.wo_a.effective_weight().unflatten(0, (self.groups, -1))
        return self.wo_b(_grouped_linear(grouped, wo_a).flatten(-2))


class HeavilyCompressedAttention(SlidingWindowAttention):
    """The window plus every visible entry, each made of 128 tokens."""

    ratio = HCA_RATIO

    def __init__(self, config: ModelConfig, dtype: torch.dtype, quantized: bool) -> None:
        super().__init__(config, dtype, quantized)
        self.compressor = Compressor(config, self.ratio, config.head_dim, dtype)

    def entries(self, x: torch.Tensor, context: Context, cache: LayerCache | None) -> torch.Tensor:
        """Compressed entries up to this call's last complete window [batch, entries, head_dim]."""
        entries = self.compressor(x, context, cache.compressor if cache else None)
        entries = self.store(entries)
        if cache is None:
            return entries
        assert cache.entries is not None
        return cache.entries.append(entries)

    def attend(
        self,
        q: torch.Tensor,
        window_kv: torch.Tensor,
        x: torch.Tensor,
        qr: torch.Tensor,
        context: Context,
        cache: LayerCache | None,
        signals: LayerSignals | None,
    ) -> torch.Tensor:
        """Attention over the window and all visible entries: [batch, seq, heads, head_dim]."""
        entries = self.entries(x, context, cache)
        return self.joint_attention(q, window_kv, entries, None, context)


class CompressedSparseAttention(HeavilyCompressedAttention):
    """The window plus the entries (4 tokens each, overlapping) that the lightning indexer picks."""

    ratio = CSA_RATIO

    def __init__(self, config: ModelConfig, dtype: torch.dtype, quantized: bool) -> None:
        super().__init__(config, dtype, quantized)
        self.indexer = LightningIndexer(config, dtype, quantized)

    def attend(
        self,
        q: torch.Tensor,
        window_kv: torch.Tensor,
        x: torch.Tensor,
        qr: torch.Tensor,
        context: Context,
        cache: LayerCache | None,
        signals: LayerSignals | None,
    ) -> torch.Tensor:
        """Attention over the window and the picked entries: [batch, seq, heads, head_dim]."""
        entries = self.entries(x, context, cache)
        if signals is not None:
            return self._attend_and_teach(q, window_kv, entries, x, qr, context, signals)
        if entries.shape[1] <= self.indexer.topk:  # nothing to choose: keep the keys for later
            self.indexer.keys(x, context, cache)
            return self.joint_attention(q, window_kv, entries, None, context)
        scores = self.indexer(x, qr, context, cache)
        picks = self.indexer.select(scores, context.visible_entries(self.ratio))
        return self.joint_attention(q, window_kv, entries, picks, context)

    def _attend_and_teach(
        self,
        q: torch.Tensor,
        window_kv: torch.Tensor,
        entries: torch.Tensor,
        x: torch.Tensor,
        qr: torch.Tensor,
        context: Context,
        signals: LayerSignals,
    ) -> torch.Tensor:
        """Training: the indexer learns to predict where attention went, and sends nothing back."""
        scores = self.indexer(x.detach(), qr.detach(), context, None)
        every = context.visible_entries(self.ratio)
        picks = self.indexer.select(scores.detach(), every)
        visible = every & (self.visible(entries, picks, context) | context.dense)
        out, mass = self.masked_attention(q, window_kv, entries, visible, context)
        signals.index_scores, signals.index_targets = scores, mass.detach()
        signals.index_visible = visible
        return out


def use_gathered(q: torch.Tensor) -> bool:
    """Whether attention over q [batch, seq, heads, head_dim] gathers lists of entries.

    Always in BF16 inference, where the official order of additions counts; never while training;
    otherwise for few queries.
    """
    if torch.is_grad_enabled() and q.requires_grad:
        return False
    return q.dtype == torch.bfloat16 or q.shape[1] <= FEW_QUERIES


def attention_for(ratio: int) -> type[SlidingWindowAttention]:
    """The class of attention that a layer with this compress ratio has."""
    return {
        0: SlidingWindowAttention,
        CSA_RATIO: CompressedSparseAttention,
        HCA_RATIO: HeavilyCompressedAttention,
    }[ratio]
