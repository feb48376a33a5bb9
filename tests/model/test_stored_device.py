"""V4-Flash's layers on a GPU against the CPU path: streams of each kind of layer, and logits.

Both begin with the same weights and the same cache of 4,096 tokens, full of random valid entries.
The yardstick is the formats' own rounding: the CPU path in BF16 differs from itself in float32 by
so much, and the GPU may differ from that float32 by hardly more.

Medians over tokens are compared: now and then an expert's choice falls the other way and moves a
token altogether, in BF16 on any device.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from fathom.kernels import operation, use_backend
from fathom.model.config import ModelConfig
from fathom.model.stored import MergeSite, StoredLayer
from fathom.model.stored_cache import LayerState, StoredCache
from fathom.model.stored_forward import run_layers
from fathom.model.stored_work import Chunk, Step

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from fathom.eval import gpu_speed  # noqa: E402  (needs triton)

CONTEXT, TOKENS = 4096, 6
EXPERTS, VOCABULARY = 32, 4096  # of 256 and 129,280: what a CPU does in seconds
KINDS = {"SWA": [0], "CSA": [1], "HCA": [2], "all three": [0, 1, 2]}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    flash = gpu_speed.three_layers(ModelConfig.preset("flash"))
    return replace(flash, n_routed_experts=EXPERTS, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def layers(config: ModelConfig) -> list[StoredLayer]:
    return gpu_speed.stored_layers(config)


def moved(value: Any, device: str) -> Any:
    """Weights, states and tuples of them on another device; copies, where they are there."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    if isinstance(value, (StoredLayer, MergeSite, LayerState)) or hasattr(value, "fn"):
        own = {f.name: moved(getattr(value, f.name), device) for f in fields(value)}
        return type(value)(**own)
    return value


def moved_cache(cache: StoredCache, device: str) -> StoredCache:
    return StoredCache(
        cache.offsets, moved(cache.layers, device), cache.pool.to(device, copy=True),
        cache.table.to(device, copy=True), cache.key_format,
    )  # fmt: skip


def work_of(config: ModelConfig, way: str, cache: StoredCache, device: str) -> Step | Chunk:
    """The last token of each sequence, or the last tokens of the first."""
    ids = (torch.arange(TOKENS) * 997 % VOCABULARY).to(device)
    if way == "prefill":
        return Chunk.create(config, cache, 0, CONTEXT - TOKENS, ids)
    return Step.create(config, cache, [CONTEXT - 1] * TOKENS, ids, CONTEXT)


def logits(streams: torch.Tensor, merge: MergeSite, head: torch.Tensor, c: ModelConfig):
    places = torch.arange(len(streams), dtype=torch.int32, device=streams.device)
    weights = (merge.fn, merge.base, merge.scale, merge.norm)
    hidden = operation("stream_head")(
        streams, places, *weights, eps=c.hc_eps, norm_eps=c.rms_norm_eps
    )
    return operation("head_logits")(hidden, head)


def merge_and_head(c: ModelConfig) -> tuple[MergeSite, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    n, hidden = c.hc_mult, c.hidden_size

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    merge = MergeSite(
        fn=normal(n, n * hidden, scale=(n * hidden) ** -0.5),
        base=normal(n),
        scale=normal(1).abs(),
        norm=torch.ones(hidden, dtype=torch.bfloat16),
    )
    return merge, normal(VOCABULARY, hidden, scale=hidden**-0.5).bfloat16()


def errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """||found - expected|| / ||expected|| of each token; NaN is far."""
    found, expected = found.cpu().double().flatten(1), expected.double().flatten(1)
    value = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return torch.where(value.isnan(), torch.inf, value)


@pytest.mark.parametrize("way", ["decode", "prefill"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_agrees_with_the_cpu_path(
    config: ModelConfig, layers: list[StoredLayer], kind: str, way: str
) -> None:
    own = [layers[index] for index in KINDS[kind]]
    cache = gpu_speed.filled_cache(config, [layer.ratio for layer in own], TOKENS, CONTEXT)
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(TOKENS, config.hc_mult, config.hidden_size, generator=generator).bfloat16()
    merge, head = merge_and_head(config)

    def run(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        mine = moved_cache(cache, device)
        work = work_of(config, way, mine, device)
        streams = given.to(device, dtype)
        with torch.inference_mode(), use_backend("triton" if device == "cuda" else "reference"):
            out = run_layers(config, moved(own, device), mine, work, streams).streams_now()
            return out, logits(out, moved(merge, device), head.to(device), config)

    exact = run("cpu", torch.float32)
    on_cpu = run("cpu", torch.bfloat16)
    on_gpu = run("cuda", torch.bfloat16)
    for name, expected, cpu, gpu in zip(("streams", "logits"), exact, on_cpu, on_gpu, strict=True):
        noise, found, apart = errors(cpu, expected), errors(gpu, expected), errors(gpu, cpu)
        shown = f"{name} of single tokens: CPU {noise}, GPU {found}, between them {apart}"
        assert found.median() < 1.3 * noise.median(), shown
        assert apart.median() < noise.median(), shown  # they round at the same places


LONG = 130  # tokens: more than the 64 up to which a chunk uses decode's kernels


@pytest.mark.parametrize("kind", ["SWA", "CSA", "HCA"])
def test_a_long_chunk_agrees_with_decoding_it(
    config: ModelConfig, layers: list[StoredLayer], kind: str
) -> None:
    """The kernels of many tokens against those of few, which the CPU path is compared with above,
    and both against the references in float32 on the device.

    Either differs from float32 by the formats' rounding. They round at the same places, but not the
    same last bits, so that they differ from one another by about as much. Choices of experts and
    entries that fall the other way move a few tokens altogether.
    """
    own = [layers[index] for index in KINDS[kind]]
    cache = gpu_speed.filled_cache(config, [layer.ratio for layer in own], 1, CONTEXT)
    generator = torch.Generator("cuda").manual_seed(3)
    shape = (LONG, config.hc_mult, config.hidden_size)
    given = torch.randn(shape, generator=generator, device="cuda").bfloat16()
    ids = torch.arange(LONG, device="cuda") * 997 % VOCABULARY
    start = CONTEXT - LONG

    def as_chunk(backend: str, streams: torch.Tensor) -> torch.Tensor:
        mine = moved_cache(cache, "cuda")
        chunk = Chunk.create(config, mine, 0, start, ids)
        with torch.inference_mode(), use_backend(backend):
            return run_layers(config, own, mine, chunk, streams).streams_now()

    exact = as_chunk("reference", given.float()).cpu()
    found = as_chunk("triton", given)
    mine, rows = moved_cache(cache, "cuda"), []
    with torch.inference_mode(), use_backend("triton"):
        for i in range(LONG):
            step = Step.create(config, mine, [start + i], ids[i : i + 1], CONTEXT)
            rows.append(run_layers(config, own, mine, step, given[i : i + 1]).streams_now())
    decoded = torch.cat(rows)
    noise, many, apart = errors(decoded, exact), errors(found, exact), errors(found, decoded.cpu())
    levels = torch.tensor([0.5, 0.9], dtype=torch.float64)
    shown = "\n".join(f"{x.quantile(levels)} {x.max()}" for x in (noise, many, apart))
    assert (many.quantile(levels) < 1.15 * noise.quantile(levels)).all(), shown
    assert (apart.quantile(levels) < 1.15 * noise.quantile(levels)).all(), shown
