"""transformers' deepseek_v4 on one GPU: three layers at V4-Flash's sizes fill a cache and decode.

`fathom bench gpu --against transformers`, with or without `--prefill`, starts this module with two
numbers: the tokens of a prompt, and those of the context in which single tokens are decoded. The
weights are random BF16 numbers (it has no FP4 path for these layers), the arithmetic is BF16. Where
the memory does not suffice the prompt is halved. Times are the host's, around eager calls, with
embeddings, mask, final merge and norm. Prints one JSON object, after every measurement what there
is by then, and writes it to the file that a third argument names.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.transformers_side import settings
from fathom.eval.gpu_speed import three_layers
from fathom.model import ModelConfig

VOCABULARY = 1024  # embeddings have no part in the time


def build() -> Any:
    """The model without a head, BF16, on the device, with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.deepseek_v4 import DeepseekV4Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Model

    shape = replace(three_layers(ModelConfig.preset("flash")), vocab_size=VOCABULARY)
    config = DeepseekV4Config(**settings(shape), attn_implementation="eager")
    with torch.device("meta"):
        model = DeepseekV4Model(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                pairs = torch.arange(value.numel(), device="cuda", dtype=torch.float32)
                value.copy_(10000.0 ** (-pairs / value.numel()))
            elif value.is_floating_point():
                value.normal_(std=0.02)
            else:
                value.zero_()
    return model


@torch.inference_mode()
def seconds(model: Any, tokens: int, repeat: int = 5) -> list[float]:
    """Times of prefills from nothing, after one to warm up."""
    ids = torch.arange(tokens, device="cuda")[None] * 997 % VOCABULARY
    times = []
    for _ in range(repeat + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(ids, use_cache=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


@torch.inference_mode()
def decode_seconds(model: Any, tokens: int, repeat: int = 10) -> list[float]:
    """Times of single tokens behind a prompt, after two to warm up."""
    ids = torch.arange(tokens, device="cuda")[None] * 997 % VOCABULARY
    cache = model(ids, use_cache=True).past_key_values
    times = []
    for _ in range(repeat + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[2:]


def _tell(report: dict[str, Any]) -> None:
    print(json.dumps(report), flush=True)
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(json.dumps(report))


def main() -> None:
    """Measure the numbers of tokens given, or the largest halves of them that fit."""
    import transformers

    tokens = int(sys.argv[1])
    context = int(sys.argv[2]) if len(sys.argv) > 2 else tokens
    model = build()
    weights = torch.cuda.memory_allocated()
    while tokens >= 128:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            times = seconds(model, tokens)
        except torch.cuda.OutOfMemoryError:
            tokens //= 2
            continue
        report = {
            "version": transformers.__version__,
            "tokens": tokens,
            "seconds": statistics.median(times),
            "repeats": len(times),
            "experts": getattr(model.config, "_experts_implementation", None),
            "attention": model.config._attn_implementation,
            "weights_bytes": weights,
            "peak_bytes": torch.cuda.max_memory_allocated() - weights,
        }
        report["context"] = min(context, tokens)
        _tell(report)  # in case that what follows is cut off
        report["seconds_a_token"] = statistics.median(decode_seconds(model, report["context"]))
        _tell(report)
        return
    raise SystemExit("no prompt of 128 tokens fits this device")


if __name__ == "__main__":
    main()
