"""Every stateless operation against values of the official implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fathom.kernels import operation
from fathom.kernels.reference import mhc
from fathom.model.config import RopeScaling
from fathom.model.rope import inverse_frequencies
from fathom.quant import fp4, fp8
from tests.kernels.compare import bf16_ulps, max_over_mean, mean_over_mean

CASES = (0, 1)


def case(vectors: Path, name: str, index: int) -> dict[str, torch.Tensor]:
    tensors = load_file(vectors / "model" / "ops" / f"{name}.safetensors")
    prefix = f"case{index}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def absolute(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    return float((actual.double() - expected.double()).abs().max())


@pytest.mark.parametrize("index", CASES)
def test_hadamard(vectors: Path, index: int) -> None:
    t = case(vectors, "hadamard", index)
    hadamard = operation("hadamard")
    assert max_over_mean(hadamard(t["x"]), t["y"]) < 1e-6
    assert max_over_mean(hadamard(t["x64"]), t["y64"]) < 1e-6
    assert bf16_ulps(hadamard(t["xb"]), t["yb"]) <= 1


@pytest.mark.parametrize("index", CASES)
@pytest.mark.parametrize("kind", ["main", "compress"])
def test_rope(vectors: Path, index: int, kind: str) -> None:
    t = case(vectors, "rope", index)
    theta, scaling = (10000.0, None) if kind == "main" else (160000.0, RopeScaling())
    own = inverse_frequencies(theta, 64, scaling)
    ulps = own.view(torch.int32) - t[f"{kind}_inv_freq"].view(torch.int32)
    assert int(ulps.abs().max()) <= 1
    phase = t["positions"].float().unsqueeze(-1) * t[f"{kind}_inv_freq"]
    cos, sin = phase.cos(), phase.sin()
    assert absolute(cos, t[f"{kind}_cos"]) < 1e-6
    assert absolute(sin, t[f"{kind}_sin"]) < 1e-6
    rope = operation("rope")
    cos, sin = t[f"{kind}_cos"], t[f"{kind}_sin"]
    turned = rope(t["x"][None], cos, sin)[0]
    assert max_over_mean(turned, t[f"{kind}_y"]) < 1e-6
    assert max_over_mean(rope(t["x"][None], cos, sin, inverse=True)[0], t[f"{kind}_inverse"]) < 1e-6
    assert bf16_ulps(rope(t["xb"][None], cos, sin)[0], t[f"{kind}_yb"]) <= 1


@pytest.mark.parametrize("index", CASES)
def test_mhc_mixing(vectors: Path, index: int) -> None:
    t = case(vectors, "mhc", index)
    mixes = mhc.mixing_logits(t["streams"][None], t["fn"], 1e-6)[0]
    assert max_over_mean(mixes, t["mixes"]) < 1e-5
    pre, post, comb = mhc.mixing_weights(t["mixes"], t["base"], t["scale"], 20, 1e-6)
    assert absolute(pre, t["pre"]) < 3e-7
    assert absolute(post, t["post"]) < 3e-7
    assert absolute(comb, t["comb"]) < 3e-7
    pre, post, comb = mhc.mixing_weights(t["mixes"], t["base_extreme"], t["scale"], 20, 1e-6)
    assert ((pre - t["extreme_pre"]).abs() / t["extreme_pre"]).max() < 1e-3
    assert absolute(post, t["extreme_post"]) < 3e-7
    assert absolute(comb, t["extreme_comb"]) < 3e-7


@pytest.mark.parametrize("index", CASES)
@pytest.mark.parametrize("suffix", ["", "_bf16"])
def test_mhc_step(vectors: Path, index: int, suffix: str) -> None:
    t = case(vectors, "mhc", index)
    streams, sublayer = t["streams" + suffix][None], t["sublayer" + suffix][None]
    x, post, comb = operation("mhc_pre")(streams, t["fn"], t["base"], t["scale"], 20, 1e-6, 1e-6)
    out = operation("mhc_post")(sublayer, streams, post, comb)
    assert absolute(post[0], t["post" + suffix]) < 3e-6
    assert absolute(comb[0], t["comb" + suffix]) < 3e-6
    if suffix:
        assert bf16_ulps(x[0], t["pre_out_bf16"]) <= 1
        assert bf16_ulps(out[0], t["streams_out_bf16"]) <= 1
    else:
        assert max_over_mean(x[0], t["pre_out"]) < 1e-5
        assert max_over_mean(out[0], t["streams_out"]) < 1e-5


@pytest.mark.parametrize("index", CASES)
def test_stream_head(vectors: Path, index: int) -> None:
    t = case(vectors, "hc_head", index)
    head = operation("mhc_head")
    parameters = (t["fn"], t["base"], t["scale"], 1e-6, 1e-6)
    assert max_over_mean(head(t["streams"][None], *parameters)[0], t["out"]) < 1e-5
    assert bf16_ulps(head(t["streams_bf16"][None], *parameters)[0], t["out_bf16"]) <= 1


@pytest.mark.parametrize("index", CASES)
def test_router(vectors: Path, index: int) -> None:
    t = case(vectors, "router", index)
    scores = operation("router_scores")(t["x"], t["weight"])
    assert max_over_mean(scores, t["scores"]) < 1e-6
    k, factor = t["topk_indices"].shape[1], float(t["routed_scaling_factor"])
    route = operation("route")
    indices, weights = route(scores, t["bias"], None, k, factor)
    assert torch.equal(indices, t["topk_indices"])
    assert absolute(weights, t["topk_weights"]) < 1e-6
    indices, weights = route(scores, None, t["tid2eid"][t["token_ids"]], k, factor)
    assert torch.equal(indices, t["hash_indices"])
    assert absolute(weights, t["hash_weights"]) < 1e-6


def stored_weight(t: dict[str, torch.Tensor], name: str, kind: str) -> torch.Tensor:
    if kind == "bf16":
        return t[name]
    if kind == "fp4":
        return fp4.dequantize(t[name], t[f"{name}_scale"])
    return fp8.dequantize_weight(t[name], t[f"{name}_scale"])


@pytest.mark.parametrize("index", CASES)
@pytest.mark.parametrize("kind", ["fp8", "base", "fp4"])
def test_quantised_linear(vectors: Path, index: int, kind: str) -> None:
    t = case(vectors, "quant_linear", index)
    stored, scale = t[f"{kind}_weight"], t[f"{kind}_scale"]
    if kind == "fp4":
        ones = torch.full_like(scale.view(torch.uint8), 127).view(torch.float8_e8m0fnu)
        codes, block, weight = fp4.dequantize(stored, ones), 32, fp4.dequantize(stored, scale)
    else:
        codes, block, weight = stored.float(), 128, fp8.dequantize_weight(stored, scale)
    official, held = operation("quant_linear"), operation("linear")
    wide = t["x"].float()
    assert max_over_mean(official(wide, codes, scale.float(), block), t[f"{kind}_y_f32"]) < 2e-6
    assert bf16_ulps(official(t["x"], codes, scale.float(), block), t[f"{kind}_y"]) <= 1
    # The model's form: dequantised weights, with the tiles' scales where these are float32.
    tile_scale = scale if kind == "base" else None
    found = held(wide, weight, True, tile_scale)
    assert max_over_mean(found, t[f"{kind}_y_f32"]) < 2e-6
    for stored_as in (weight, weight.bfloat16()):
        assert bf16_ulps(held(t["x"], stored_as, True, tile_scale), t[f"{kind}_y"]) <= 1


@pytest.mark.parametrize("index", CASES)
@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp4"])
@pytest.mark.parametrize("weighted", [False, True])
def test_expert(vectors: Path, index: int, kind: str, weighted: bool) -> None:
    t = case(vectors, "expert", index)
    names = (f"{kind}_w1", f"{kind}_w2", f"{kind}_w3")
    w1, w2, w3 = (stored_weight(t, name, kind).bfloat16()[None] for name in names)
    rows = t["x"].shape[0]
    weights = t["weights"] if weighted else torch.ones(rows, 1)
    limit = float(t["swiglu_limit"])
    indices = torch.zeros(rows, 1, dtype=torch.int64)
    y = operation("experts")(t["x"], w1, w2, w3, indices, weights, limit, kind != "bf16")
    expected = t[f"{kind}_y_weighted" if weighted else f"{kind}_y"]
    assert mean_over_mean(y, expected) < 5e-3
    assert max_over_mean(y, expected) < 0.1


@pytest.mark.parametrize("index", CASES)
def test_sparse_attention(vectors: Path, index: int) -> None:
    t = case(vectors, "sparse_attn", index)
    attend = operation("sparse_attention")
    indices, sink = t["indices"][None], t["sink"]
    q, kv = t["q"][None], t["kv"][None]
    out = attend(q.float(), kv.float(), indices, sink, 144**-0.5)
    assert max_over_mean(out[0], t["out_f32"]) < 2e-5
    assert bf16_ulps(attend(q, kv, indices, sink, 144**-0.5)[0], t["out_bf16"]) <= 1
