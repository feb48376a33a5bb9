"""Whole blocks over the CUDA kernels, in Triton's interpreter, against the references: a prompt's
chunk past a window's end, and a decode step of two sequences, of each kind of layer.

The interpreter computes in float32; tests/model/test_stored_device.py is the same on a GPU, in BF16
at V4-Flash's sizes.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace

import pytest
import torch

from fathom.checkpoint.tiny import random_tensors, tiny_config
from fathom.kernels import use_backend
from fathom.model.config import ModelConfig
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import SLAB_TOKENS, StoredCache
from fathom.model.stored_forward import run_layers
from fathom.model.stored_work import Chunk, Step
from tests.kernels import stored_cases as cases
from tests.kernels.interpreter import interpret
from tests.kernels.poison import _poison  # noqa: F401  (a fixture that applies by itself)
from tests.model.test_stored import SIZES

if torch.cuda.is_available():
    pytest.skip("on a GPU: tests/model/test_stored_device.py", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
interpret()
importlib.import_module("fathom.kernels.triton")

# The interpreter's time is the number of programs: few heads, a short window.
FEWER = {"num_attention_heads": 2, "index_n_heads": 4, "sliding_window": 16}
# V4-Pro's dimensions are no powers of two where V4-Flash's are: hidden 7 * 1024, 3 * 128 experts of
# 3 * 1024 columns, more heads than one program of attention takes, as many picks as are sorted.
ODD_AS_PRO = {
    "hidden_size": 3 * 128, "num_attention_heads": 8, "head_dim": 96, "qk_rope_head_dim": 32,
    "n_routed_experts": 3 * 2, "moe_intermediate_size": 3 * 128, "index_topk": 64,
}  # fmt: skip
CONFIGS = {
    "small": tiny_config("instruct", **{**SIZES, **FEWER}),
    "as odd as V4-Pro": tiny_config("instruct", **{**SIZES, **FEWER, **ODD_AS_PRO}),
}
START, TOKENS = 125, 4  # a chunk past the end of windows of 4 and of 128 tokens
STEP = [START + TOKENS, 6]  # positions of the step behind it


@pytest.fixture(autouse=True)
def _own_kernels_with_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from fathom.kernels.triton import (
        attention,
        chunk_attention,
        chunk_experts,
        chunk_linear,
        few_experts,
        index,
        route,
    )

    monkeypatch.setattr(chunk_experts, "FEW", 0)
    monkeypatch.setattr(chunk_linear, "FEW", 0)
    monkeypatch.setattr(chunk_experts, "TOKENS", 16)
    monkeypatch.setattr(few_experts, "ROWS", 128)
    # More heads than a program's, and 12 experts in two blocks as V4-Pro's 384 are by 256.
    few = {kind: replace(tiles, heads=4) for kind, tiles in attention.TILES.items()}
    monkeypatch.setattr(attention, "TILES", few)
    monkeypatch.setattr(chunk_attention, "HEADS", 4)
    monkeypatch.setattr(route, "EXPERTS", 8)
    for name, size in {"SORTED": 64, "COARSE": 64, "TILE": 32}.items():
        monkeypatch.setattr(index, name, size)


def filled_cache(c: ModelConfig, ratio: int) -> StoredCache:
    """Two sequences of one slab, every byte that of a random valid entry."""
    d = cases.Draw(ratio, torch.float32, "cpu")
    sizes = cases.Sizes(
        window=c.sliding_window, head_dim=c.head_dim, rope_dim=c.qk_rope_head_dim,
        index_dim=c.index_head_dim,
    )  # fmt: skip
    cache = StoredCache.empty(c, [ratio], 2, 1, "cpu")
    own = cache.layers[0]
    own.ring.copy_(cases.ring(d, sizes, 2, spare=0))
    if ratio:
        store = cases.pages(d, sizes, ratio, 2, SLAB_TOKENS // ratio)
        cache.pool.copy_(store.pool[:, : cache.pool.shape[1]])
        assert own.state is not None
        own.state.copy_(cases.compressor(d, ratio, c.head_dim, 2, spare=0)[2])
    if own.index_state is not None:
        own.index_state.copy_(cases.compressor(d, 4, c.index_head_dim, 2, spare=0)[2])
    return cache


@pytest.mark.parametrize(
    ("sizes", "index"), [("small", 0), ("small", 1), ("small", 2), ("as odd as V4-Pro", 1)]
)
def test_blocks_over_the_kernels_equal_the_references(sizes: str, index: int) -> None:
    c = CONFIGS[sizes]
    ratio = c.compress_ratios[index]
    start = f"layers.{index}."
    tensors = {n: t for n, t in random_tensors(c, 3).items() if n.startswith(start)}
    layer = StoredLayer.from_tensors({n.removeprefix(start): t for n, t in tensors.items()}, ratio)
    d = cases.Draw(index, torch.float32, "cpu")
    given = d.normal(TOKENS + 2, c.hc_mult, c.hidden_size)
    ids = d.integers(c.vocab_size, TOKENS + 2, dtype=torch.int64)
    results, before = [], filled_cache(c, ratio)
    for backend in ("reference", "triton"):
        cache = filled_cache(c, ratio)
        with torch.inference_mode(), use_backend(backend):
            chunk = Chunk.create(c, cache, 0, START, ids[:TOKENS])
            read = run_layers(c, [layer], cache, chunk, given[:TOKENS]).streams_now()
            step = Step.create(c, cache, STEP, ids[TOKENS:], 256)
            decoded = run_layers(c, [layer], cache, step, given[TOKENS:]).streams_now()
        results.append((torch.cat((read, decoded)).flatten(1), cache))
    (expected, stored), (found, own) = results
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 1e-5, errors
    assert torch.equal(own.pool, stored.pool)
    assert torch.equal(own.layers[0].ring, stored.layers[0].ring)
    if ratio:  # the window that ends in the chunk, of the first sequence alone
        assert not torch.equal(own.pool[0], before.pool[0])
        assert torch.equal(own.pool[1], before.pool[1])
