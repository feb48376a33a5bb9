"""Read a checkpoint's bytes as a StoredModel, onto a device, without dequantising anything.

Every tensor has its place before it is read: matrices that a layer holds as one lie one behind the
other, all experts' of a kind in one. At no time is there more than the model, what a single tensor
takes to be checked, and one slice of a file on the host.

Paper: §3.4 (weights are stored in FP8 and FP4).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from fathom.checkpoint.container import TORCH_DTYPES, read_into, shown
from fathom.checkpoint.manifest import Matrix, TensorSpec, matrix_tensors, modules
from fathom.checkpoint.reader import Checkpoint, open_checkpoint
from fathom.errors import CheckpointError, ConfigError
from fathom.model.config import ModelConfig
from fathom.model.stored import NEIGHBOURS, MergeSite, StoredDraft, StoredLayer, StoredModel, Table

SLICE_BYTES = 2**26  # of a file on the host at once
MTP_RATIO = 0  # an MTP block's attention has no compressed entries


def load_stored(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    device: torch.device | str,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> StoredModel:
    """The model of a checkpoint (its folder, or opened already) as its files store it.

    `layers`: these of the main layers alone, ascending; the model's `config` is then that of a
    model that has no others. `dtype` is the arithmetic of activations, in which the embedding is
    held. Raises CheckpointError, naming tensor, found and wanted, for a checkpoint that is not
    stored as `unstorable_checkpoint` asks or whose values no operation follows, ConfigError for
    layers that do not exist and the errors of `open_checkpoint`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    reason = unstorable_checkpoint(checkpoint)
    if reason is not None:
        raise CheckpointError(f"{checkpoint.folder}: {reason}")
    config = checkpoint.config
    chosen = _chosen(config, layers)
    reader = _Reader(checkpoint, torch.device(device))
    kept = [spec for spec in modules(config) if isinstance(spec, TensorSpec)]
    whole = reader.read(s for s in kept if not s.name.startswith(("layers.", "mtp.")))
    embed = whole["embed.weight"].to(dtype)
    try:
        return StoredModel(
            config=replace(
                config,
                num_hidden_layers=len(chosen),
                compress_ratios=tuple(config.compress_ratios[index] for index in chosen),
                num_hash_layers=sum(index < config.num_hash_layers for index in chosen),
            ),
            embed=Table(embed),
            layers=[
                StoredLayer.from_tensors(reader.block(name, ratio), ratio, name)
                for index in chosen
                for name, ratio in ((f"layers.{index}.", config.compress_ratios[index]),)
            ],
            merge=MergeSite.from_tensors(whole),
            head=whole["head.weight"],
            mtp=[
                StoredDraft.from_tensors(reader.block(name, MTP_RATIO), name)
                for index in range(config.num_mtp_layers)
                for name in (f"mtp.{index}.",)
            ],
        )
    except CheckpointError as error:
        if str(error).startswith(str(checkpoint.folder)):
            raise
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error


def unstorable_checkpoint(checkpoint: Checkpoint) -> str | None:
    """Why an opened checkpoint cannot be a StoredModel, or None: names of tensors, found, wanted.

    Every tensor has to have the shape and type of the official instruct files: FP8 matrices, wo_a
    among them, FP4 experts, scales in powers of two, the rest in BF16 or float32 as there.
    """
    for item in modules(replace(checkpoint.config, quantized=True, expert_dtype="fp4")):
        for spec in _specs(item):
            tensor = checkpoint.tensors.get(spec.name)
            found = f"{tensor.dtype} {list(tensor.shape)}" if tensor else "missing"
            if tensor is None or (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
                return (
                    f"tensor {shown(spec.name)} is {found}; wanted {spec.dtype} "
                    f"{list(spec.shape)}: what is served as stored has FP8 matrices and FP4 "
                    "experts, as the instruct checkpoints"
                )
    return None


def stored_bytes(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a checkpoint's tensors as `load_stored` holds them on a device."""
    embed = checkpoint.find("embed.weight")
    return checkpoint.nbytes - embed.nbytes + math.prod(embed.shape) * dtype.itemsize


def _specs(item: TensorSpec | Matrix) -> list[TensorSpec]:
    if isinstance(item, TensorSpec):
        return [item]
    return matrix_tensors(item, "fp4" if item.expert else "fp8", "F8_E8M0")


def _chosen(config: ModelConfig, layers: Sequence[int] | None) -> list[int]:
    count = config.num_hidden_layers
    chosen = list(range(count) if layers is None else layers)
    if not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        raise ConfigError(f"layers must be ascending numbers of 0 .. {count - 1}, not {chosen}")
    return chosen


class _Reader:
    """Gives every tensor its place on the device and fills it from the files."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint, self._device = checkpoint, device
        size = SLICE_BYTES if device.type != "cpu" else 0  # there files are read into place
        self._slice = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._blocks: dict[str, list[TensorSpec]] = {}
        for item in modules(checkpoint.config):
            name = item.name.split(".")
            if name[0] in ("layers", "mtp"):
                self._blocks.setdefault(f"{name[0]}.{name[1]}.", []).extend(_specs(item))

    def block(self, name: str, ratio: int) -> dict[str, torch.Tensor]:
        """A block's tensors without `name` before theirs; experts stacked, neighbours together."""
        specs = {spec.name.removeprefix(name): spec for spec in self._blocks[name]}
        found: dict[str, torch.Tensor] = {}
        targets: dict[str, torch.Tensor] = {}  # by name: where the bytes go
        for own, spec in specs.items():
            if own.startswith("ffn.experts."):
                _, _, number, part = own.split(".", 3)
                stacked = f"ffn.experts.{part}"
                if stacked not in found:
                    shape = (self._checkpoint.config.n_routed_experts, *spec.shape)
                    found[stacked] = self._empty(shape, spec.dtype)
                targets[own] = found[stacked][int(number)]
        for names in NEIGHBOURS[ratio].values():
            for part in ("weight", "scale"):
                together = [specs[f"{n}.{part}"] for n in names if f"{n}.{part}" in specs]
                if not together:
                    continue
                rows = sum(spec.shape[0] for spec in together)
                joined = self._empty((rows, *together[0].shape[1:]), together[0].dtype)
                parts = joined.split([spec.shape[0] for spec in together])
                for spec, place in zip(together, parts, strict=True):
                    found[spec.name.removeprefix(name)] = place
        for own, spec in specs.items():
            if own not in targets:
                if own not in found:
                    found[own] = self._empty(spec.shape, spec.dtype)
                targets[own] = found[own]
            self._fill(targets[own], spec)
        return found

    def read(self, specs: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
        """Tensors [...] by their names."""
        found = {}
        for spec in specs:
            found[spec.name] = self._empty(spec.shape, spec.dtype)
            self._fill(found[spec.name], spec)
        return found

    def _empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype], device=self._device)

    def _fill(self, target: torch.Tensor, spec: TensorSpec) -> None:
        stored = self._checkpoint.find(spec.name)
        flat = target.view(-1).view(torch.uint8)
        if flat.device.type == "cpu":
            read_into(self._checkpoint.folder, stored, 0, flat)
            return
        for start in range(0, len(flat), SLICE_BYTES):
            piece = self._slice[: min(SLICE_BYTES, len(flat) - start)]
            read_into(self._checkpoint.folder, stored, start, piece)
            flat[start : start + len(piece)].copy_(piece)
