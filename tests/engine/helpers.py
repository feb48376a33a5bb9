"""Small engines and prompts that the engine's tests share."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.request import Request
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.model import Transformer
from tests.model.tiny import RANDOM_CONFIG, random_model

CONFIG = replace(RANDOM_CONFIG, vocab_size=400, max_position_embeddings=2048, eos_token_id=399)
# 8 layers' worth of windows fit into a few hundred tokens, so that replays can be tested.
REPLAY = CONFIG.num_hidden_layers * (CONFIG.sliding_window - 1) + CONFIG.sliding_window


def model(seed: int = 1, quantized: bool = True, **changes: Any) -> Transformer:
    """A random model; quantised, so that entries are stored as FP8 and keys as FP4."""
    return random_model(seed, replace(CONFIG, **changes), quantized=quantized)


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
