"""The compiled decoder against the reference: the model's own forward pass, token by token.

Every model here has weights that bfloat16 represents, so that one compiled variant serves the whole
file, the one that shipped models use too. It stays on disk; where it must be compiled first, the
file takes most of a minute longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fathom.checkpoint import load_model
from fathom.checkpoint.tiny import write_tiny
from fathom.errors import KernelError
from fathom.kernels import operation, select, use_backend
from fathom.kernels.numba import decode, primitives, step
from fathom.model import Transformer
from fathom.model.cache import Cache
from fathom.model.decode import decode_step
from fathom.model.layers import Linear
from fathom.model.moe import RoutedExperts
from fathom.quant import fp4, fp8
from tests.model.tiny import RANDOM_CONFIG, random_model

# Two FP8 groups in an entry, two FP4 groups in an index key, a partial group of activations.
CONFIG = replace(RANDOM_CONFIG, hidden_size=160, head_dim=144, index_head_dim=64)
TOKENS = 160  # crosses windows of 4, 16 and 128
PREFILL = 7


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def plain() -> Transformer:
    return bf16_weights(random_model(1, CONFIG))


@pytest.fixture(scope="module")
def quantized() -> Transformer:
    model = bf16_weights(random_model(2, CONFIG, quantized=True))
    model.set_weight_formats(stored_formats(model))
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (1, TOKENS), generator=torch.manual_seed(3))


def bf16_weights(model: Transformer) -> Transformer:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


def stored_formats(model: Transformer) -> dict[str, str]:
    """As in an instruct checkpoint: linears in FP8, but for compressors and head weights."""
    formats = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            formats[name] = "fp4"
        elif isinstance(module, Linear) and "compressor" not in name and "_proj" not in name:
            formats[name] = "fp8"
    return formats


def decode_tokens(
    model: Transformer, tokens: torch.Tensor, cache: Cache, backend: str
) -> torch.Tensor:
    """Feed tokens [1, seq] one by one: logits [seq, vocab]."""
    with use_backend(backend):
        return torch.stack([decode_step(t, model, cache) for t in tokens.split(1, dim=1)])


def prefilled(model: Transformer, tokens: torch.Tensor) -> Cache:
    cache = model.new_cache()
    model(tokens[:, :PREFILL], cache)
    return cache


def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max()
    return float("inf") if difference.isnan() else float(difference)


def test_logits_equal_the_reference(plain: Transformer, tokens: torch.Tensor) -> None:
    cache, rest = prefilled(plain, tokens), tokens[:, PREFILL:]
    compiled = decode_tokens(plain, rest, cache.clone(), "numba")
    assert worst(compiled, decode_tokens(plain, rest, cache, "reference")) < 1e-4
    assert worst(compiled, plain(tokens)[0, PREFILL:]) < 1e-4


def test_a_sequence_may_begin_with_a_decoded_token(
    plain: Transformer, tokens: torch.Tensor
) -> None:
    compiled = decode_tokens(plain, tokens[:, :20], plain.new_cache(), "numba")
    assert worst(compiled, plain(tokens[:, :20])[0]) < 1e-4


@pytest.mark.parametrize("backends", [("numba", "reference"), ("reference", "numba")])
@pytest.mark.parametrize("turn", [9, 18, 127, 130])  # within windows, and on both sides of 128
def test_backends_continue_each_others_caches(
    plain: Transformer, tokens: torch.Tensor, backends: tuple[str, str], turn: int
) -> None:
    begin = turn - 3
    cache = plain.new_cache()
    plain(tokens[:, :begin], cache)
    parts = [tokens[:, begin:turn], tokens[:, turn : turn + 12]]
    found = [
        decode_tokens(plain, part, cache, backend)
        for part, backend in zip(parts, backends, strict=True)
    ]
    assert cache.length == turn + 12
    whole = plain(tokens[:, : turn + 12])[0]
    assert worst(torch.cat(found), whole[begin:]) < 1e-4
    # A prefill of several tokens can follow too.
    more = plain(tokens[:, turn + 12 : turn + 18], cache)[0]
    assert worst(more, plain(tokens[:, : turn + 18])[0, -6:]) < 1e-4


def test_a_clone_is_not_written_to(plain: Transformer, tokens: torch.Tensor) -> None:
    cache = prefilled(plain, tokens)
    kept = cache.clone()
    first = decode_tokens(plain, tokens[:, PREFILL:30], cache, "numba")
    again = decode_tokens(plain, tokens[:, PREFILL:30], kept, "numba")
    assert torch.equal(first, again)


def test_quantised_blocks_equal_the_reference(quantized: Transformer, tokens: torch.Tensor) -> None:
    """Block by block from equal inputs: a sum in another order may push a value over a rounding
    border, which moves that step a lot, so that nearly all steps must be close instead of all.
    """
    cache = prefilled(quantized, tokens)
    packed = step.PackedModel(quantized)
    wrong: list[list[float]] = [[] for _ in packed.blocks]
    for position in range(PREFILL, TOKENS):
        token = tokens[:, position : position + 1]
        context = quantized.context(token, cache)
        streams = quantized.embed(token).unsqueeze(2).repeat(1, 1, CONFIG.hc_mult, 1)
        rotations = step._rotations(quantized, position)
        for index, block in enumerate(packed.blocks):
            own = streams[0, 0].numpy().copy()
            entries = (position + 1) // block.ratio if block.ratio else 0
            state = step._state(cache.layers[index].clone(), entries)
            rotation = rotations[block.ratio]
            decode.decode_block(
                own, int(token), block, state, position, packed.constants, *rotation
            )
            streams = quantized.layers[index](streams, token, context, cache.layers[index])
            error = worst(torch.from_numpy(own), streams[0, 0]) / float(streams.abs().mean())
            wrong[index].append(error)
        cache.length += 1
    for errors in wrong:
        steps = torch.tensor(errors)
        assert float(steps.median()) < 2e-6
        assert float((steps > 1e-4).float().mean()) <= 0.03


def test_quantised_logits_are_those_of_the_reference(
    quantized: Transformer, tokens: torch.Tensor
) -> None:
    """The head and the packing of a quantised model; roundings accumulate over the sequence."""
    cache, rest = prefilled(quantized, tokens), tokens[:, PREFILL:60]
    compiled = decode_tokens(quantized, rest, cache.clone(), "numba")
    expected = decode_tokens(quantized, rest, cache, "reference")
    difference = (compiled - expected).abs().amax(-1)
    assert float(difference[0]) < 1e-4
    assert float(difference.median()) < 0.05 * float(expected.std())


@pytest.mark.parametrize("size", [1, 31, 64, 128, 160, 300])
def test_roundings_are_those_of_the_formats(size: int) -> None:
    """Bit for bit, over many magnitudes, zeros, ties and the ends of the formats' ranges."""
    generator = torch.Generator().manual_seed(size)
    rows = [torch.randn(size, generator=generator) * 2.0**e for e in (-40, -20, -7, 0, 9, 60)]
    rows += [torch.zeros(size), torch.full((size,), 448.0), torch.full((size,), 6.0)]
    ties = torch.arange(size).float() / 32  # halves between codes in both formats
    rows += [ties, -ties, torch.cat((torch.tensor([448.0]), ties[1:]))]
    for row in rows:
        for group in (64, 128):
            own = np.empty(size, np.float32)
            primitives.round_e4m3(row.numpy(), group, own)
            assert torch.equal(torch.from_numpy(own), fp8.simulate(row, group))
        if size % 32 == 0:
            own = np.empty(size, np.float32)
            primitives.round_fp4(row.numpy(), own)
            assert torch.equal(torch.from_numpy(own), fp4.simulate(row))


@pytest.mark.parametrize("size", [2, 32, 64, 128])
def test_hadamard_is_the_reference(size: int) -> None:
    x = torch.randn(50, size, generator=torch.Generator().manual_seed(size))
    with use_backend("reference"):
        expected = operation("hadamard")(x)
    for row, wanted in zip(x, expected, strict=True):
        own = row.numpy().copy()
        primitives.hadamard(own)
        assert torch.equal(torch.from_numpy(own), wanted)


def chosen(token: torch.Tensor, model: Transformer, cache: Cache) -> str:
    """Which backend would decode this call."""
    kernel = select("decode_step", token, model, cache)
    return "numba" if kernel is step.decode_step else "reference"


def test_the_compiled_decoder_is_the_usual_one(plain: Transformer, tokens: torch.Tensor) -> None:
    assert chosen(tokens[:, :1], plain, plain.new_cache()) == "numba"


def test_gradients_go_to_the_reference(plain: Transformer, tokens: torch.Tensor) -> None:
    token, cache = tokens[:, :1], plain.new_cache()
    with torch.enable_grad():
        assert chosen(token, plain, cache) == "reference"
        with use_backend("numba"), pytest.raises(KernelError, match="decode_step"):
            decode_step(token, plain, cache)
    assert cache.length == 0


def test_batches_go_to_the_reference(plain: Transformer, tokens: torch.Tensor) -> None:
    both = tokens[:, :1].repeat(2, 1)
    cache = plain.new_cache(batch=2)
    assert chosen(both, plain, cache) == "reference"
    with use_backend("numba"), pytest.raises(KernelError):
        decode_step(both, plain, cache)


def test_bfloat16_goes_to_the_reference(tokens: torch.Tensor) -> None:
    model = random_model(1, CONFIG, dtype=torch.bfloat16, quantized=True)
    assert chosen(tokens[:, :1], model, model.new_cache()) == "reference"


@pytest.mark.parametrize(
    ("name", "simulate"),
    [
        ("layers.0.attn.wkv", False),  # its input is rounded once for wq_a and wkv
        ("layers.0.ffn.shared_experts.w2", False),
        ("layers.1.attn.indexer.wq_b", False),
        ("layers.1.attn.indexer.weights_proj", False),
        ("layers.2.attn.wq_b", True),
        ("layers.2.ffn.experts", True),
    ],
)
def test_unusual_mixtures_of_formats_go_to_the_reference(
    tokens: torch.Tensor, name: str, simulate: bool
) -> None:
    model = random_model(1, CONFIG, quantized=True)
    assert chosen(tokens[:, :1], model, model.new_cache()) == "numba"
    model.set_weight_formats({name: "fp8"}, simulate=simulate)
    assert chosen(tokens[:, :1], model, model.new_cache()) == "reference"


def test_float32_scales_go_to_the_reference(tmp_path: Path, tokens: torch.Tensor) -> None:
    base = load_model(write_tiny(tmp_path / "base", "base"))
    assert chosen(tokens[:, :1], base, base.new_cache()) == "reference"
    instruct = load_model(write_tiny(tmp_path / "instruct", "instruct"))
    assert chosen(tokens[:, :1], instruct, instruct.new_cache()) == "numba"


def scale_in_place(model: Transformer) -> None:
    model.head.weight.mul_(2)


def replace_parameter(model: Transformer) -> None:
    model.head.weight = torch.nn.Parameter(2 * model.head.weight)


def load_other_weights(model: Transformer) -> None:
    state = {n: 2 * t if n == "head.weight" else t for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def take_an_optimizer_step(model: Transformer) -> None:
    model.layers[0].attn.wo_b.weight.grad = torch.ones_like(model.layers[0].attn.wo_b.weight)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def change_a_table(model: Transformer) -> None:
    model.layers[0].ffn.gate.tid2eid.copy_(model.layers[0].ffn.gate.tid2eid.flip(0))


@pytest.mark.parametrize(
    "change",
    [
        scale_in_place,
        replace_parameter,
        load_other_weights,
        take_an_optimizer_step,
        change_a_table,
    ],
)
def test_changed_weights_count_at_once(
    tokens: torch.Tensor, change: Callable[[Transformer], None]
) -> None:
    model = bf16_weights(random_model(5, CONFIG))
    before = decode_tokens(model, tokens[:, :2], model.new_cache(), "numba")
    packed = step._packed[model]
    decode_tokens(model, tokens[:, :2], model.new_cache(), "numba")
    assert step._packed[model] is packed  # nothing is packed twice without need
    change(bf16_weights(model))
    bf16_weights(model)
    compiled = decode_tokens(model, tokens[:, :2], model.new_cache(), "numba")
    assert worst(compiled, model(tokens[:, :2])[0]) < 1e-4
    assert worst(compiled, before) > 1e-3


def test_changed_formats_count_at_once(tokens: torch.Tensor) -> None:
    model = bf16_weights(random_model(2, CONFIG, quantized=True))
    before = decode_tokens(model, tokens[:, :2], model.new_cache(), "numba")
    model.set_weight_formats(stored_formats(model))
    compiled = decode_tokens(model, tokens[:, :2], model.new_cache(), "numba")
    assert worst(compiled, decode_tokens(model, tokens[:, :2], model.new_cache(), "reference")) < (
        0.05 * float(before.std())
    )
    assert worst(compiled, before) > 1e-3


def test_models_made_for_inference_only_decode_too(tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        model = bf16_weights(random_model(5, CONFIG))
        compiled = decode_tokens(model, tokens[:, :2], model.new_cache(), "numba")
        assert worst(compiled, model(tokens[:, :2])[0]) < 1e-4
