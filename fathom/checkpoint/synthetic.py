"""An exact-shape synthetic checkpoint: official names, shapes and formats, of any number of layers.

Seeded, and made on the device where it is needed: `synthetic_checkpoint` all of it,
`synthetic_layer` one block. For measuring at sizes whose weights cannot be had or do not fit.
Nothing in them was learned: every figure from them is about bytes and operations, never about
quality.

Paper: none (measurement material).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from fathom.checkpoint.manifest import TensorSpec, manifest
from fathom.checkpoint.tiny import random_scale, random_values
from fathom.model.config import ModelConfig

PROFILES = ("uniform", "log-normal", "zipf")  # of how often experts are chosen
LOG_NORMAL_SIGMA, ZIPF_EXPONENT = 1.46, 0.87
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(w[123])\.(weight|scale)")
_STACKED = re.compile(r"(.*\.ffn\.experts\.)(w[123]\.(?:weight|scale))")


def synthetic_layer(
    config: ModelConfig, index: int, *, seed: int, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """The tensors of block `index` by their names behind `layers.N.`.

    Routed experts come stacked, [experts, rows, cols], as `ffn.experts.w1.weight` and so on; all
    others have the official names, shapes and dtypes. Equal arguments give equal bits on one kind
    of device.
    """
    generator = torch.Generator(device).manual_seed(seed * 1000 + index)
    return _drawn(_stacked(config, f"layers.{index}."), config, generator)


def synthetic_checkpoint(
    config: ModelConfig, *, seed: int, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Every tensor of `manifest(config)` by its official name, but for the routed experts, which
    come stacked, [experts, rows, cols], as in `synthetic_layer`; its layers are those of
    `synthetic_layer`.

    `unstacked` gives what files hold. Equal arguments give equal bits on one kind of device.
    """
    tensors: dict[str, torch.Tensor] = {}
    for index in range(config.num_hidden_layers):
        layer = synthetic_layer(config, index, seed=seed, device=device)
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in layer.items()}
    generator = torch.Generator(device).manual_seed(seed * 1000 + 999)
    for index in range(config.num_mtp_layers):
        block = _drawn(_stacked(config, f"mtp.{index}."), config, generator)
        tensors |= {f"mtp.{index}.{name}": tensor for name, tensor in block.items()}
    rest = (s for s in manifest(config) if not s.name.startswith(("layers.", "mtp.")))
    return tensors | _drawn(rest, config, generator)


def unstacked(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(official name, tensor) as in files. tensors: stacked experts [experts, rows, cols] come as
    [rows, cols] each, all others in any shape.
    """
    for name, tensor in tensors.items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            yield name, tensor
        else:
            yield from ((f"{stacked[1]}{e}.{stacked[2]}", own) for e, own in enumerate(tensor))


def _drawn(
    specs: Iterable[TensorSpec], config: ModelConfig, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tensors of these specifications; a scale's comes right behind its weight's."""
    tensors: dict[str, torch.Tensor] = {}
    weight = TensorSpec("", (), "")
    for spec in specs:
        if spec.name.endswith(".scale"):
            tensors[spec.name] = random_scale(spec, weight, generator)
        else:
            tensors[spec.name] = random_values(spec, config, generator)
            weight = spec
    return tensors


def _stacked(config: ModelConfig, start: str) -> Iterator[TensorSpec]:
    """A block's part of the manifest, with one stacked tensor in place of each expert's own."""
    for spec in manifest(config):
        if not spec.name.startswith(start):
            continue
        name = spec.name.removeprefix(start)
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            yield TensorSpec(name, spec.shape, spec.dtype)
        elif expert[1] == "0":
            shape = (config.n_routed_experts, *spec.shape)
            yield TensorSpec(f"ffn.experts.{expert[2]}.{expert[3]}", shape, spec.dtype)


def routing_table(
    config: ModelConfig, profile: str, *, seed: int, device: torch.device | str
) -> torch.Tensor:
    """Experts for every token id, drawn by a profile of popularity: [vocab, topk] int64.

    As a layer's hash table it takes the router's place, whose random weights load a few experts
    with most tokens. "log-normal": popularities exp(1.46 z); "zipf": rank ** -0.87, ranks dealt at
    random; a token's experts differ. Raises ValueError for another profile.
    """
    generator = torch.Generator(device).manual_seed(seed)
    experts = config.n_routed_experts
    if profile == "uniform":
        logits = torch.zeros(experts, device=device)
    elif profile == "log-normal":
        logits = LOG_NORMAL_SIGMA * torch.randn(experts, generator=generator, device=device)
    elif profile == "zipf":
        rank = torch.randperm(experts, generator=generator, device=device) + 1
        logits = -ZIPF_EXPONENT * rank.log()
    else:
        raise ValueError(f"no routing profile {profile!r}: name one of {', '.join(PROFILES)}")
    # Adding Gumbel noise and taking the best draws without replacement.
    uniform = torch.rand(config.vocab_size, experts, generator=generator, device=device)
    noise = -(-uniform.clamp(min=1e-20).log()).log()
    return (logits + noise).topk(config.num_experts_per_tok, dim=-1).indices
