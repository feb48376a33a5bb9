"""How fast one GPU decodes V4-Flash layers, against what its memory allows.

Everything runs on exact-shape synthetic layers (fathom/checkpoint/synthetic.py) and caches filled
with random valid entries; a decode step is replayed as one CUDA graph. The floor of a layer is the
bytes that a step must read, divided by the copy rate measured in the same run; of routed experts
those count that the step's own routers chose.

Paper: §3.1 (fused kernels); §2.3.4 (efficiency).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fathom.checkpoint.synthetic import routing_table, synthetic_layer
from fathom.eval.gpu_launches import Model, StepKernels, step_kernels
from fathom.kernels import operation
from fathom.model.config import CSA_RATIO, ModelConfig
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import SLAB_TOKENS, SlabLayout, StoredCache
from fathom.model.stored_forward import Choices, run_layers
from fathom.model.stored_work import Chunk, Step
from fathom.quant import kv_pack
from fathom.quant.kv_pack import IndexerFormat

_index_scores_paged = operation("index_scores_paged")
_topk_positions = operation("topk_positions")
_head_logits = operation("head_logits")

SLABS_AT_ONCE = 256  # of a cache that are drawn together


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One decode step. Times in milliseconds; floor from bytes alone; flops: operations that any
    version must do.
    """

    kind: str
    tokens: int
    context: int
    routing: str
    keys: IndexerFormat
    median: float
    least: float
    floor: float
    launches: int
    num_bytes: int
    flops: float

    @property
    def fraction(self) -> float:
        """The floor's share of the time: 1 would be the copy rate."""
        return self.floor / self.median


def copy_rate(device: str = "cuda") -> float:
    """Bytes per second, read and written, of a device copy of 2 GiB."""
    source = torch.empty(1 << 30, dtype=torch.int16, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source), 20) / 1e3)


def matmul_rate(device: str = "cuda", size: int = 8192) -> float:
    """FLOP per second of a BF16 matrix product of random data."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / (median_ms(lambda: a @ b, 20) / 1e3)


def fp8_rate(device: str = "cuda", size: int = 8192) -> float | None:
    """FLOP per second of an FP8 matrix product with one scale an operand, of random data: the
    quickest that torch has. None where this card or this torch has none.
    """
    a = torch.randn(size, size, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(size, size, device=device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)

    def call() -> object:
        return torch._scaled_mm(
            a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    try:
        return 2 * size**3 / (median_ms(call, 20) / 1e3)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError):
        return None


def median_ms(call: Callable[[], object], repeat: int = 50) -> float:
    """Median time of a call on the device, after three to warm up."""
    return statistics.median(times_ms(call, repeat))


def times_ms(call: Callable[[], object], repeat: int = 50) -> list[float]:
    """Times of single calls by device events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def kernels_of(call: Callable[[], object]) -> int:
    """How many kernels a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")


def captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, int]:
    """The call as a graph, and how many kernels one replay launches."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    launches = kernels_of(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph, launches


def three_layers(config: ModelConfig) -> ModelConfig:
    """The first SWA, CSA and HCA layers of a configuration, none of them hashed."""
    ratios = (0, 4, 128)
    return replace(config, num_hidden_layers=3, compress_ratios=ratios, num_hash_layers=0)


def filled_cache(
    config: ModelConfig,
    ratios: Sequence[int],
    tokens: int,
    context: int,
    keys: IndexerFormat = "fp4",
) -> StoredCache:
    """A cache of `tokens` sequences of `context` tokens with random valid entries everywhere; keys:
    the format of index keys.
    """
    cache = StoredCache.empty(config, ratios, tokens, -(-context // SLAB_TOKENS), "cuda", keys)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    def entries(*shape: int) -> torch.Tensor:
        kv = normal(*shape, config.head_dim)
        data, scales = kv_pack.pack_kv_entries(kv, config.qk_rope_head_dim)
        return torch.cat((data.flatten(1), scales.flatten(1)), dim=1)

    for pool in cache.pool.split(SLABS_AT_ONCE):
        parts = []
        for ratio in ratios:
            if ratio:
                parts.append(entries(len(pool), SLAB_TOKENS // ratio))
            if ratio == CSA_RATIO:
                values = normal(len(pool), SLAB_TOKENS // ratio, config.index_head_dim)
                parts += [p.flatten(1) for p in kv_pack.pack_indexer_entries(values, keys)]
        if parts:
            slabs = torch.cat(parts, dim=1)
            assert slabs.shape[1] == SlabLayout.of(config, ratios, keys).num_bytes
            pool.copy_(slabs)
    for layer in cache.layers:
        layer.ring.copy_(entries(tokens, config.sliding_window))
        if layer.state is not None:
            layer.state.copy_(torch.randn_like(layer.state).abs() + 1)
    return cache


@dataclass(frozen=True, slots=True)
class Operations:
    """Two for each multiplication. fp8: whose operands are stored in 8 bits or fewer, or may be
    rounded to them as the model does; others: everything else, at best in BF16.
    """

    fp8: float
    others: float

    def seconds(self, rates: tuple[float, float]) -> float:
        """The least time. rates: FLOP/s of FP8 and of BF16 matrix products."""
        return self.fp8 / rates[0] + self.others / rates[1]


def layer_operations(
    config: ModelConfig, layer: StoredLayer, start: int, tokens: int
) -> Operations:
    """Operations of one layer's chunk that any version must do.

    FP8: linears whose input the model rounds, all experts (FP4 codes are FP8 codes too) and the
    index scores. Not wo_a, whose input is never rounded, and not attention, whose queries are not.
    """
    c, ratio = config, layer.ratio
    rounded = sum(t[0].numel() for t in (layer.low, layer.high, layer.wo_b))
    rounded += layer.shared[0].numel() + layer.shared[2].numel()
    rounded += 3 * c.num_experts_per_tok * c.hidden_size * c.moe_intermediate_size
    plain = layer.wo_a[0].numel() + layer.gate.numel() + 2 * layer.attn_site.fn.numel()
    plain += layer.plain.numel() if layer.plain is not None else 0
    fp8, others = 2.0 * tokens * rounded, 2.0 * tokens * plain
    positions = range(start + 1, start + tokens + 1)
    keys = sum(min(n, c.sliding_window) for n in positions)
    if ratio:
        most = c.index_topk if layer.index_compressor is not None else start + tokens
        keys += sum(min(n // ratio, most) for n in positions)
    others += 4.0 * keys * c.num_attention_heads * c.head_dim
    if layer.index_compressor is not None:
        visible = sum(n // ratio for n in positions if n // ratio > c.index_topk)
        fp8 += 2.0 * visible * c.index_n_heads * c.index_head_dim
    return Operations(fp8, others)


def layer_flops(config: ModelConfig, layer: StoredLayer, start: int, tokens: int) -> float:
    """All operations of one layer's chunk that any version must do."""
    found = layer_operations(config, layer, start, tokens)
    return found.fp8 + found.others


def step_bytes(
    config: ModelConfig,
    layer: StoredLayer,
    tokens: int,
    context: int,
    touched: int,
    keys: IndexerFormat = "fp4",
) -> int:
    """Bytes that one step of one layer must read: weights once, entries of every sequence.

    touched: how many of its routed experts the step chose.
    """
    c, ratio = config, layer.ratio
    routed = sum(t.numel() for t in layer.routed)
    total = layer.num_bytes() - routed + routed * touched // c.n_routed_experts
    if layer.table is not None:
        total -= layer.table.numel() * layer.table.element_size()  # a row a token is read
    entry = kv_pack.kv_entry_bytes(c.head_dim, c.qk_rope_head_dim)
    each = min(context, c.sliding_window) * entry
    if ratio == 4:
        each += min(c.index_topk, context // 4) * entry
        each += context // 4 * kv_pack.indexer_entry_bytes(keys, c.index_head_dim)
    elif ratio == 128:
        each += context // 128 * entry
    return total + tokens * each


def routed_by(
    layers: Sequence[StoredLayer], config: ModelConfig, profile: str
) -> list[StoredLayer]:
    """The same layers with a table of a routing profile in place of their routers' choices."""
    return [
        replace(layer, table=routing_table(config, profile, seed=index, device="cuda"), bias=None)
        for index, layer in enumerate(layers)
    ]


def whole_model(config: ModelConfig, layers: Sequence[StoredLayer]) -> list[StoredLayer]:
    """As many layers as a configuration has, each of them the one of `layers` of its kind.

    Layers of a kind share weights, of which a step reads several times what a cache of the device
    holds before it comes to them again.
    """
    by_ratio = {layer.ratio: layer for layer in layers}
    return [by_ratio[r] for r in config.compress_ratios[: config.num_hidden_layers]]


def step_time(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    kind: str,
    tokens: int,
    context: int,
    rate: float,
    repeat: int,
    routing: str = "own router",
    keys: IndexerFormat = "fp4",
) -> StepTime:
    """One step of `tokens` sequences at the end of `context` through the layers, as one graph, from
    given streams to streams that the last layer has written.

    rate: bytes per second of a copy; kind, routing: what the result is called by; keys: the format
    of index keys.
    """
    cache = filled_cache(config, [layer.ratio for layer in layers], tokens, context, keys)
    step = decode_step(config, cache, tokens, context)
    streams = torch.randn(tokens, config.hc_mult, config.hidden_size, device="cuda").bfloat16()
    whole, choices = writing(config, layers, cache, step, streams), Choices()
    graph, launches = captured(whole)
    times = times_ms(graph.replay, repeat)
    run_layers(config, layers, cache, step, streams, choices)
    num_bytes, flops = 0, 0.0
    for layer, experts in zip(layers, choices.experts, strict=True):
        num_bytes += step_bytes(config, layer, tokens, context, experts.unique().numel(), keys)
        flops += tokens * layer_flops(config, layer, context - 1, 1)
    return StepTime(
        kind=kind,
        tokens=tokens,
        context=context,
        routing=routing,
        keys=keys,
        median=statistics.median(times),
        least=min(times),
        floor=num_bytes / rate * 1e3,
        launches=launches,
        num_bytes=num_bytes,
        flops=flops,
    )


def writing(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    cache: StoredCache,
    work: Step | Chunk,
    streams: torch.Tensor,
    out: torch.Tensor | None = None,
) -> Callable[[], None]:
    """A call of all layers with the last one's write. streams: [tokens, streams, hidden]; out:
    [rows, streams, hidden], of which the first tokens' are written, by default new memory.
    """
    target = torch.empty_like(streams) if out is None else out
    places = torch.arange(len(streams), dtype=torch.int32, device="cuda")
    return lambda: run_layers(config, layers, cache, work, streams).write(places, target)


def touch_step(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    tokens: int,
    context: int,
    keys: IndexerFormat = "fp4",
) -> None:
    """Launch the kernels of such a step and of the head once, upon an empty cache."""
    ratios = [layer.ratio for layer in layers]
    cache = StoredCache.empty(config, ratios, tokens, -(-context // SLAB_TOKENS), "cuda", keys)
    streams = torch.zeros(tokens, config.hc_mult, config.hidden_size, device="cuda").bfloat16()
    writing(config, layers, cache, decode_step(config, cache, tokens, context), streams)()
    head = torch.zeros(config.vocab_size, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    _head_logits(torch.zeros(1, config.hidden_size, device="cuda"), head)


def decode_step(config: ModelConfig, cache: StoredCache, tokens: int, context: int) -> Step:
    """A step at the last position of `context`."""
    ids = torch.arange(tokens, device="cuda") * 997 % config.vocab_size
    return Step.create(config, cache, [context - 1] * tokens, ids, context)


def topk_time(entries: int, k: int, repeat: int = 50) -> float:
    """Microseconds of the choice of the k best of random scores of one token, as one graph."""
    scores = torch.randn(1, entries, device="cuda")
    rows = torch.zeros(4, 1, dtype=torch.int32, device="cuda")
    # A step that sees no entries says of groups of what size the scores' kernel leaves maxima.
    rows[0] = -1
    _, none = _index_scores_paged(
        torch.zeros(1, 64, 128, device="cuda", dtype=torch.bfloat16),
        torch.zeros(1, 64, device="cuda"),
        rows,
        torch.zeros(1, 64 * kv_pack.indexer_entry_bytes("fp4", 128), device="cuda").byte(),
        torch.zeros(1, entries, dtype=torch.int32, device="cuda"),
        index_offset=0, page_entries=64, ratio=CSA_RATIO, most_entries=entries,
    )  # fmt: skip
    maxima = scores.view(1, none.shape[1], -1).amax(-1)
    rows[0] = CSA_RATIO * entries - 1
    graph, _ = captured(lambda: _topk_positions(scores, maxima, rows, k=k, ratio=CSA_RATIO))
    return 1e3 * statistics.median(times_ms(graph.replay, repeat))


def stored_layers(config: ModelConfig, seed: int = 1) -> list[StoredLayer]:
    """Synthetic layers of every kind that the configuration has."""
    layers = []
    for index, ratio in enumerate(config.compress_ratios):
        tensors = synthetic_layer(config, index, seed=seed, device="cuda")
        layers.append(StoredLayer.from_tensors(tensors, ratio))
        del tensors
        torch.cuda.empty_cache()
    return layers


def profile_kernels(
    config: ModelConfig, layers: Sequence[StoredLayer], context: int
) -> StepKernels:
    """The kernels of one token behind `context` - 1 others through all layers, and of the head."""
    cache = filled_cache(config, [layer.ratio for layer in layers], 1, context)
    step = decode_step(config, cache, 1, context)
    streams = torch.randn(1, config.hc_mult, config.hidden_size, device="cuda").bfloat16()
    head = torch.randn(config.vocab_size, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(1, config.hidden_size, device="cuda")
    whole = writing(config, layers, cache, step, streams)

    def call() -> None:
        whole()
        _head_logits(hidden, head)

    for _ in range(3):
        call()
    model = Model.of(config, layers, cache, context, head)
    return step_kernels(call, model, boundaries=2 * len(layers))
