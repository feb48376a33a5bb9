"""How fast one GPU decodes V4-Flash layers, against what its memory allows.

Everything runs on exact-shape synthetic layers (fathom/checkpoint/synthetic.py) and caches filled
with random valid entries; a decode step is replayed as one CUDA graph. The floor of a layer is the
bytes that a step must read, divided by the copy rate measured in the same run.

Paper: §3.1 (fused kernels); §2.3.4 (efficiency).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fathom.checkpoint.synthetic import routing_table, synthetic_layer
from fathom.eval.gpu_goals import FAMILIES
from fathom.kernels import operation
from fathom.model.config import CSA_RATIO, ModelConfig
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import SLAB_TOKENS, SlabLayout, StoredCache
from fathom.model.stored_forward import run_layers
from fathom.model.stored_work import Step
from fathom.quant import kv_pack
from fathom.quant.kv_pack import IndexerFormat

_index_scores_paged = operation("index_scores_paged")
_topk_positions = operation("topk_positions")

NAMES = {0: "SWA", 4: "CSA", 128: "HCA"}
DISTINCT_SLABS = 16  # random slabs that a long cache repeats


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

    parts = []
    for ratio in ratios:
        if ratio:
            parts.append(entries(DISTINCT_SLABS, SLAB_TOKENS // ratio))
        if ratio == 4:
            values = normal(DISTINCT_SLABS, SLAB_TOKENS // ratio, config.index_head_dim)
            parts += [p.flatten(1) for p in kv_pack.pack_indexer_entries(values, keys)]
    if parts:
        slabs = torch.cat(parts, dim=1)
        assert slabs.shape[1] == SlabLayout.of(config, ratios, keys).num_bytes
        rows = torch.arange(cache.pool.shape[0], device="cuda") % DISTINCT_SLABS
        cache.pool.copy_(slabs[rows])
    for layer in cache.layers:
        layer.ring.copy_(entries(tokens, config.sliding_window))
        if layer.state is not None:
            layer.state.copy_(torch.randn_like(layer.state).abs() + 1)
    return cache


def layer_flops(config: ModelConfig, layer: StoredLayer, start: int, tokens: int) -> float:
    """Operations of one layer's chunk, two for each multiplication, that any version must do."""
    c, ratio = config, layer.ratio
    weights = sum(t[0].numel() for t in (layer.low, layer.high, layer.wo_a, layer.wo_b))
    weights += layer.shared[0].numel() + layer.shared[2].numel() + layer.gate.numel()
    weights += layer.plain.numel() if layer.plain is not None else 0
    weights += 3 * c.num_experts_per_tok * c.hidden_size * c.moe_intermediate_size
    weights += 2 * layer.attn_site.fn.numel()
    total = 2.0 * tokens * weights
    positions = range(start + 1, start + tokens + 1)
    keys = sum(min(n, c.sliding_window) for n in positions)
    if ratio:
        most = c.index_topk if layer.index_compressor is not None else start + tokens
        keys += sum(min(n // ratio, most) for n in positions)
    total += 4.0 * keys * c.num_attention_heads * c.head_dim
    if layer.index_compressor is not None:
        visible = sum(n // ratio for n in positions if n // ratio > c.index_topk)
        total += 2.0 * visible * c.index_n_heads * c.index_head_dim
    return total


def step_bytes(
    config: ModelConfig,
    layer: StoredLayer,
    tokens: int,
    context: int,
    touched: int | None = None,
    keys: IndexerFormat = "fp4",
) -> int:
    """Bytes that one step of one layer must read: weights once, entries of every sequence.

    touched: how many routed experts were chosen; otherwise what uniform routing gives on average.
    """
    c, ratio = config, layer.ratio
    routed = sum(t.numel() for t in layer.routed)
    share = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** tokens
    if touched is not None:
        share = touched / c.n_routed_experts
    total = layer.num_bytes() - routed + int(routed * share)
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
    """One step of `tokens` sequences at the end of `context` through the layers, as one graph.

    rate: bytes per second of a copy; kind, routing: what the result is called by; keys: the format
    of index keys.
    """
    cache = filled_cache(config, [layer.ratio for layer in layers], tokens, context, keys)
    step = decode_step(config, tokens, context)
    streams = torch.randn(tokens, config.hc_mult, config.hidden_size, device="cuda").bfloat16()
    graph, launches = captured(lambda: run_layers(config, layers, cache, step, streams))
    times = times_ms(graph.replay, repeat)
    num_bytes, flops = 0, 0.0
    for layer in layers:
        touched = None
        if layer.table is not None:
            touched = layer.table[step.token_ids.long()].unique().numel()
        num_bytes += step_bytes(config, layer, tokens, context, touched, keys)
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


def decode_step(config: ModelConfig, tokens: int, context: int) -> Step:
    """A step at the last position of `context`."""
    positions = torch.full((tokens,), context - 1, dtype=torch.int32, device="cuda")
    ids = torch.arange(tokens, device="cuda") * 997 % config.vocab_size
    return Step.create(config, positions, ids, context)


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


def family_bytes(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    context: int,
    keys: IndexerFormat = "fp4",
) -> dict[str, int]:
    """Bytes that each of FAMILIES must read for one token behind `context` others."""
    share = config.num_experts_per_tok / config.n_routed_experts
    found = dict.fromkeys(FAMILIES, 0)
    for layer in layers:
        w1, s1, w3, s3, w2, s2 = (t.numel() for t in layer.routed)
        plain = [layer.gate] + ([layer.plain] if layer.plain is not None else [])
        linears = [*layer.low, *layer.high, *layer.wo_a, *layer.wo_b, *layer.shared[:2], *plain]
        found["linears, router logits, shared up"] += sum(
            t.numel() * t.element_size() for t in linears
        )
        found["experts up"] += int(share * (w1 + s1 + w3 + s3))
        found["experts down"] += int(share * (w2 + s2)) + sum(t.numel() for t in layer.shared[2:])
        if layer.ratio == CSA_RATIO:
            key = kv_pack.indexer_entry_bytes(keys, config.index_head_dim)
            found["index scores"] += context // CSA_RATIO * key
    return found


def profile_kernels(
    config: ModelConfig,
    layers: Sequence[StoredLayer],
    tokens: int,
    context: int,
) -> list[tuple[str, int, float]]:
    """(kernel, calls, microseconds) of one step of all layers, longest first."""
    cache = filled_cache(config, [layer.ratio for layer in layers], tokens, context)
    step = decode_step(config, tokens, context)
    streams = torch.randn(tokens, config.hc_mult, config.hidden_size, device="cuda").bfloat16()
    for _ in range(3):
        run_layers(config, layers, cache, step, streams)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run_layers(config, layers, cache, step, streams)
        torch.cuda.synchronize()
    rows = [
        (event.key, event.count // 5, event.self_device_time_total / 5)
        for event in profile.key_averages()
        if event.device_type.name == "CUDA"
    ]
    return sorted(rows, key=lambda row: -row[2])
