"""Which models can be served from stored formats on which device, and why others cannot.

Paper: none (engine).
"""

from __future__ import annotations

import torch

from fathom.kernels.device import NEEDED, unfit
from fathom.model.config import ModelConfig
from fathom.model.stored import StoredModel, unstorable
from fathom.model.transformer import Transformer


def refusal(
    device: torch.device, model: StoredModel | Transformer, kv_format: str = "fp8"
) -> str | None:
    """Why no runner from stored formats can serve a model on a device, or None."""
    if kv_format != "fp8":
        return f"cache entries are {kv_format}, not fp8"
    reason = unserved(device, model.config, model.dtype)
    if reason is None and not isinstance(model, StoredModel):
        reason = unstorable(model)
    return reason


def unserved(device: torch.device, config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Why a model of such sizes cannot be served from stored formats on a device, or None."""
    if device.type == "cuda":
        reason = unfit(device, dtype)
        if reason is not None:
            return f"{reason}; the kernels need {NEEDED}"
    reason = misfit(config)
    return None if reason is None else f"the kernels' tiles do not fit this model: {reason}"


def misfit(config: ModelConfig) -> str | None:
    """Which dimension the CUDA operations' tiles do not divide and how, or None."""
    c = config
    tiles = {
        "hidden_size": c.hidden_size,
        "q_lora_rank": c.q_lora_rank,
        "num_attention_heads * head_dim": c.num_attention_heads * c.head_dim,
        "num_attention_heads * head_dim / o_groups": c.group_width,
        "o_groups * o_lora_rank": c.o_groups * c.o_lora_rank,
        "moe_intermediate_size": c.moe_intermediate_size,
    }
    powers = {
        "num_attention_heads": c.num_attention_heads,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "index_n_heads": c.index_n_heads,
        "index_head_dim": c.index_head_dim,
        "index_topk": c.index_topk,
        "hc_mult": c.hc_mult,
    }
    steps = {
        "head_dim - qk_rope_head_dim": (c.head_dim - c.qk_rope_head_dim, 64),
        "head_dim": (c.head_dim, 32),
        "o_lora_rank": (c.o_lora_rank, 32),
    }
    ranges = {
        "index_head_dim": (c.index_head_dim, 32, 128),
        "index_topk": (c.index_topk, 1, 1024),
        "hc_mult": (c.hc_mult, 1, 4),
    }
    for name, size in tiles.items():
        if size % 128:
            return f"{name} is {size}, no multiple of 128"
    for name, size in powers.items():
        if size <= 0 or size & (size - 1):
            return f"{name} is {size}, no power of two"
    for name, (size, step) in steps.items():
        if size % step:
            return f"{name} is {size}, no multiple of {step}"
    for name, (size, least, most) in ranges.items():
        if not least <= size <= most:
            return f"{name} is {size}, not within {least} to {most}"
    return None
