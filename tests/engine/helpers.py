"""Small engines and prompts that the engine's tests share."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.request import Request
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.model import Transformer
from fathom.model.layers import Linear
from fathom.model.moe import RoutedExperts
from fathom.quant import fp4, fp8
from tests.model.tiny import RANDOM_CONFIG, random_model

CONFIG = replace(RANDOM_CONFIG, vocab_size=400, max_position_embeddings=2048, eos_token_id=399)
# 8 layers' worth of windows fit into a few hundred tokens, so that replays can be tested.
REPLAY = CONFIG.num_hidden_layers * (CONFIG.sliding_window - 1) + CONFIG.sliding_window


def model(
    seed: int = 1, quantized: bool = True, device: str = "cpu", **changes: Any
) -> Transformer:
    """A random model; quantised, so that entries are stored as FP8 and keys as FP4.

    On a GPU it is one whose weights are stored too, in BF16 arithmetic.
    """
    if device != "cpu":
        return stored_model(seed, torch.bfloat16, device, **changes)
    return random_model(seed, replace(CONFIG, **changes), quantized=quantized)


# As small as the tiles of the CUDA operations allow, with the dimensions of the shipped models.
STORED = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 96,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 1,
    "o_lora_rank": 128,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 4,
    "moe_intermediate_size": 128,
    "expert_dtype": "fp4",
    "quantized": True,
}


def stored_model(
    seed: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any
) -> Transformer:
    """A random model whose weights are what FP8 and FP4 can hold."""
    config = replace(CONFIG, **{**STORED, **changes})
    net = random_model(seed, config, quantized=True, dtype=dtype)
    formats = {}
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, RoutedExperts):
                formats[name] = "fp4"
                for weight in (module.w1, module.w2, module.w3):
                    weight.copy_(fp4.dequantize(*fp4.quantize(weight)))
            elif isinstance(module, Linear) and not name.endswith("weights_proj"):
                formats[name] = "fp8"
                module.weight.copy_(fp8.dequantize_weight(*fp8.quantize_weight(module.weight)))
    net.set_weight_formats(formats)
    return net.to(device)


def engine(of: Transformer, **settings: Any) -> Engine:
    """An engine with little memory unless told otherwise."""
    values: dict[str, Any] = {"cache_tokens": 8192, "max_sequences": 8, **settings}
    return Engine(of, EngineConfig(**values))


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Random ids without the end of the sequence."""
    return random.Random(seed).choices(range(2, 390), k=tokens)


def greedy(max_tokens: int = 12, **more: Any) -> SamplingParams:
    """Greedy sampling."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **more)


def sampled(max_tokens: int = 12, seed: int = 7, **more: Any) -> SamplingParams:
    """Sampling with a seed."""
    return SamplingParams(seed=seed, max_tokens=max_tokens, **more)


def bits(request: Request) -> list[Drawn]:
    """Tokens with the exact log-probabilities, which are a fingerprint of the logits."""
    assert request.error is None, request.error
    return request.output


def finish(of: Engine, *requests: Request) -> None:
    """Run until all have finished."""
    of.run(requests)


def drop_device(served: Engine) -> None:
    """Move every slab that no request holds to host memory."""
    served.cache._demote(len(served.cache._device))


def drop_host(served: Engine) -> None:
    """Forget what host memory holds; disk stays."""
    served.cache._host.clear()
    served.cache.checkpoints.clear()
