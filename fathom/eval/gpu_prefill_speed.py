"""How fast one GPU fills the cache through V4-Flash layers, against what its matrix units allow.

Synthetic layers of exact shape, an empty cache, random streams; a prompt is fed in chunks, which
the clock sees made, computed and written. The floor of a prompt is its operations, each at the
quickest rate of matrix products for how its operands are stored (FP8 or BF16), or its bytes at the
rate of a copy, all measured in the same run, whichever takes longer. Without an FP8 rate there is
no floor.

Paper: §3.1 (fused kernels); §2.3.4 (efficiency).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fathom.eval.gpu_launches import NAMES
from fathom.eval.gpu_speed import kernels_of, layer_operations, times_ms, writing
from fathom.kernels import operation
from fathom.model.config import ModelConfig
from fathom.model.prefill_memory import MemoryPlan, check_memory, plan_prefill
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import SLAB_TOKENS, StoredCache
from fathom.model.stored_work import Chunk

CALLS = 8  # of the experts that are timed in a row
_chunk_moe = operation("chunk_moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTime:
    """A prompt through some layers. Times in milliseconds; floor: None where the card's FP8 rate is
    not known; at_bf16: all operations at the BF16 rate; bytes above weights and cache.
    """

    kind: str
    tokens: int
    chunk: int
    median: float
    least: float
    flops: float
    floor: float | None
    at_bf16: float
    planned: int
    peak: int
    routing: str
    launches: int
    num_bytes: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.median * 1e3

    @property
    def fraction(self) -> float | None:
        """The floor's share of the time."""
        return None if self.floor is None else self.floor / self.median


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of this device in this run: FLOP/s of BF16 and FP8 matrix products, bytes/s of a copy."""

    bf16: float
    fp8: float | None
    copy: float


def run_prompt(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    cache: StoredCache,
    ids: torch.Tensor,
    chunk: int,
    streams: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Make and feed all chunks. ids: [tokens] int64; streams: [tokens, streams, hidden] of the
    whole prompt; out: [chunk, streams, hidden], which every chunk's are written to.
    """
    for start in range(0, len(ids), chunk):
        work = Chunk.create(config, cache, 0, start, ids[start : start + chunk])
        own = streams[start : start + len(work.token_ids)]
        writing(config, layers, cache, work, own, out)()


def prefill_time(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    tokens: int,
    chunk: int,
    rates: Rates,
    repeat: int = 5,
    show: Callable[[MemoryPlan], None] | None = None,
    routing: str = "own router",
) -> PrefillTime:
    """A prompt of `tokens` from nothing. `show` gets the memory plan before anything is allocated.
    Given and written streams of a chunk count as memory. Raises ConfigError where it does not fit.
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
    streams = torch.randn(
        tokens, config.hc_mult, config.hidden_size, device="cuda", dtype=torch.bfloat16
    )
    out = torch.empty_like(streams[:chunk])

    def prompt() -> None:
        run_prompt(config, layers, cache, ids, chunk, streams, out)

    prompt()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = times_ms(prompt, repeat)
    peak = torch.cuda.max_memory_allocated() - before + 2 * out.nbytes
    launches = kernels_of(prompt)
    work = [layer_operations(config, layer, 0, tokens) for layer in layers]
    flops = sum(one.fp8 + one.others for one in work)
    weight_bytes = sum(layer.num_bytes() for layer in layers) * -(-tokens // chunk)
    floor = None
    if rates.fp8 is not None:
        least = sum(one.seconds((max(rates.fp8, rates.bf16), rates.bf16)) for one in work)
        floor = 1e3 * max(least, weight_bytes / rates.copy)
    return PrefillTime(
        kind=NAMES[ratios[0]] if len(layers) == 1 else "all",
        tokens=tokens,
        chunk=chunk,
        median=statistics.median(times),
        least=min(times),
        flops=flops,
        floor=floor,
        at_bf16=1e3 * flops / rates.bf16,
        planned=plan.working + out.nbytes,
        peak=peak,
        routing=routing,
        launches=launches,
        num_bytes=weight_bytes,
    )


def touch_prompt(
    config: ModelConfig, layers: Sequence[StoredLayer], tokens: int, chunk: int
) -> None:
    """Launch the kernels of such a prompt's first and last chunk, upon an empty cache."""
    ratios = [layer.ratio for layer in layers]
    cache = StoredCache.empty(config, ratios, 1, -(-tokens // SLAB_TOKENS), "cuda")
    streams = torch.zeros(
        min(chunk, tokens), config.hc_mult, config.hidden_size, device="cuda", dtype=torch.bfloat16
    )
    for start in sorted({0, (tokens - 1) // chunk * chunk}):
        ids = torch.arange(start, min(tokens, start + chunk), device="cuda") % config.vocab_size
        work, own = Chunk.create(config, cache, 0, start, ids), streams[: len(ids)]
        writing(config, layers, cache, work, own, torch.empty_like(own))()


def expert_time(
    config: ModelConfig, layer: StoredLayer, tokens: int, uniform: bool
) -> tuple[float, float]:
    """(milliseconds, FLOP/s) of router, routed and shared experts of a chunk of random inputs.

    As in a prompt, where layers follow one another: CALLS are timed in a row, so that the device
    does not wait for a host that starts some fifty small operations.

    uniform: every expert is as likely as any other; otherwise the layer's own router decides, whose
    random weights and bias load a few experts with most tokens.
    """
    x = torch.randn(tokens, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    ids, table, topk = torch.arange(tokens, device="cuda"), layer.table, config.num_experts_per_tok
    if uniform:
        table = torch.rand(tokens, config.n_routed_experts, device="cuda").topk(topk).indices
    elif table is not None:
        ids = ids * 997 % config.vocab_size

    def calls() -> None:
        for _ in range(CALLS):
            _chunk_moe(
                x, ids, layer.gate, layer.routed, layer.shared, topk=topk,
                scaling_factor=config.routed_scaling_factor, limit=config.swiglu_limit,
                bias=layer.bias, table=table,
            )  # fmt: skip

    median = statistics.median(times_ms(calls, 5)) / CALLS
    each = (topk + 1) * 6.0 * config.hidden_size * config.moe_intermediate_size
    return median, each * tokens / (median / 1e3)


def kernel_times(
    config: ModelConfig, layers: Sequence[StoredLayer], tokens: int
) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds) of one chunk through all layers, longest first."""
    ratios = [layer.ratio for layer in layers]
    cache = StoredCache.empty(config, ratios, 1, -(-tokens // SLAB_TOKENS), "cuda")
    ids = torch.arange(tokens, device="cuda") * 997 % config.vocab_size
    streams = torch.randn(
        tokens, config.hc_mult, config.hidden_size, device="cuda", dtype=torch.bfloat16
    )
    out = torch.empty_like(streams)
    run_prompt(config, layers, cache, ids, tokens, streams, out)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_prompt(config, layers, cache, ids, tokens, streams, out)
        torch.cuda.synchronize()
    rows = [
        (event.key, event.count, event.self_device_time_total)
        for event in profile.key_averages()
        if event.device_type.name == "CUDA"
    ]
    return sorted(rows, key=lambda row: -row[2])
