"""How fast one GPU fills the cache through V4-Flash layers, against what its matrix units allow.

Synthetic layers of exact shape, an empty cache, random streams; a prompt is fed in chunks. The
floor of a chunk is its operations at the rate of BF16 matrix products, or its bytes at the rate of
a copy, both measured in the same run, whichever takes longer.

Paper: §3.1 (fused kernels); §2.3.4 (efficiency).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fathom.eval.gpu_speed import NAMES, kernels_of, layer_flops, times_ms
from fathom.kernels import operation
from fathom.model.config import ModelConfig
from fathom.model.prefill_memory import MemoryPlan, check_memory, plan_prefill
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import SLAB_TOKENS, StoredCache
from fathom.model.stored_forward import run_layers
from fathom.model.stored_work import Chunk

_chunk_moe = operation("chunk_moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTime:
    """A prompt through some layers. Times in milliseconds; bytes above weights and cache."""

    kind: str
    tokens: int
    chunk: int
    median: float
    least: float
    flops: float
    floor: float
    planned: int
    peak: int
    routing: str
    launches: int
    num_bytes: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.median * 1e3


def run_prompt(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    cache: StoredCache,
    chunks: Sequence[Chunk],
    streams: torch.Tensor,
) -> None:
    """Feed all chunks. streams: [tokens, streams, hidden] of the whole prompt."""
    for chunk in chunks:
        own = streams[chunk.start : chunk.start + len(chunk.token_ids)]
        run_layers(config, layers, cache, chunk, own)


def prefill_time(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    tokens: int,
    chunk: int,
    rates: tuple[float, float],
    repeat: int = 5,
    show: Callable[[MemoryPlan], None] | None = None,
    routing: str = "own router",
) -> PrefillTime:
    """A prompt of `tokens` from nothing. rates: FLOP/s and bytes/s measured in this run; `show`
    gets the memory plan before anything is allocated. Raises ConfigError where it does not fit.
    """
    plan = plan_prefill(config, layers, min(chunk, tokens), tokens)
    if show is not None:
        show(plan)
    free, _ = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    check_memory(config, layers, plan, free + held + plan.weights)
    ratios = [layer.ratio for layer in layers]
    cache = StoredCache.empty(config, ratios, 1, -(-tokens // SLAB_TOKENS), "cuda")
    ids = torch.arange(tokens, device="cuda") * 997 % config.vocab_size
    chunks = [
        Chunk.create(config, cache, 0, start, ids[start : start + chunk])
        for start in range(0, tokens, chunk)
    ]
    streams = torch.randn(
        tokens, config.hc_mult, config.hidden_size, device="cuda", dtype=torch.bfloat16
    )
    given = streams[:chunk].nbytes
    run_prompt(config, layers, cache, chunks, streams)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = times_ms(lambda: run_prompt(config, layers, cache, chunks, streams), repeat)
    peak = torch.cuda.max_memory_allocated() - before + given
    launches = kernels_of(lambda: run_prompt(config, layers, cache, chunks, streams))
    flops = sum(
        layer_flops(config, layer, c.start, len(c.token_ids)) for layer in layers for c in chunks
    )
    weight_bytes = sum(layer.num_bytes() for layer in layers) * len(chunks)
    return PrefillTime(
        kind=NAMES[ratios[0]] if len(layers) == 1 else "all",
        tokens=tokens,
        chunk=chunk,
        median=statistics.median(times),
        least=min(times),
        flops=flops,
        floor=1e3 * max(flops / rates[0], weight_bytes / rates[1]),
        planned=plan.working,
        peak=peak,
        routing=routing,
        launches=launches,
        num_bytes=weight_bytes,
    )


def expert_time(
    config: ModelConfig, layer: StoredLayer, tokens: int, uniform: bool
) -> tuple[float, float]:
    """(milliseconds, FLOP/s) of router, routed and shared experts of a chunk of random inputs.

    uniform: every expert is as likely as any other; otherwise the layer's own router decides, whose
    random weights and bias load a few experts with most tokens.
    """
    x = torch.randn(tokens, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    ids, table, topk = torch.arange(tokens, device="cuda"), layer.table, config.num_experts_per_tok
    if uniform:
        table = torch.rand(tokens, config.n_routed_experts, device="cuda").topk(topk).indices
    elif table is not None:
        ids = ids * 997 % config.vocab_size

    def call() -> object:
        return _chunk_moe(
            x, ids, layer.gate, layer.routed, layer.shared, topk=topk,
            scaling_factor=config.routed_scaling_factor, limit=config.swiglu_limit,
            bias=layer.bias, table=table,
        )  # fmt: skip

    median = statistics.median(times_ms(call, 10))
    each = (topk + 1) * 6.0 * config.hidden_size * config.moe_intermediate_size
    return median, each * tokens / (median / 1e3)


def kernel_times(
    config: ModelConfig, layers: Sequence[StoredLayer], tokens: int
) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds) of one chunk through all layers, longest first."""
    ratios = [layer.ratio for layer in layers]
    cache = StoredCache.empty(config, ratios, 1, -(-tokens // SLAB_TOKENS), "cuda")
    ids = torch.arange(tokens, device="cuda") * 997 % config.vocab_size
    chunk = Chunk.create(config, cache, 0, 0, ids)
    streams = torch.randn(
        tokens, config.hc_mult, config.hidden_size, device="cuda", dtype=torch.bfloat16
    )
    run_layers(config, layers, cache, chunk, streams)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_layers(config, layers, cache, chunk, streams)
        torch.cuda.synchronize()
    rows = [
        (event.key, event.count, event.self_device_time_total)
        for event in profile.key_averages()
        if event.device_type.name == "CUDA"
    ]
    return sorted(rows, key=lambda row: -row[2])
