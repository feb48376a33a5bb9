"""Write checkpoints in the official form: names, types, shards, index and config.json.

Every shard's header is laid out before any weight is touched, so tensors stream to their places
one at a time. All files are finished under a temporary name first; a reader sees the whole
checkpoint or none.

Paper: §3.4 (stored precisions).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch

from fathom.checkpoint.container import TORCH_DTYPES
from fathom.checkpoint.load import stacked_place
from fathom.checkpoint.manifest import (
    DTYPE_BYTES,
    Matrix,
    TensorSpec,
    default_scale_dtype,
    formats,
    matrix_tensors,
    modules,
)
from fathom.checkpoint.reader import INDEX, SINGLE
from fathom.checkpoint.requantize import encode
from fathom.errors import CheckpointError
from fathom.model import ModelConfig, Transformer

SHARDS = "model*.safetensors"
MAX_SHARD_BYTES = 5 * 10**9

# What `write_checkpoint` asks for: the tensors of one item of `modules`, by leaf ("weight",
# "scale") for a Matrix, under "" for a TensorSpec.
Source = Callable[[TensorSpec | Matrix], dict[str, torch.Tensor]]


@dataclass(slots=True)
class _Shard:
    """The items of one file and where their tensors go."""

    items: list[TensorSpec | Matrix] = field(default_factory=list)
    tensors: list[TensorSpec] = field(default_factory=list)
    nbytes: int = 0


def save_checkpoint(
    model: Transformer,
    folder: str | os.PathLike[str],
    expert_dtype: str | None = None,
    quantized: bool | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    scale_dtype: str | None = None,
) -> Path:
    """Write a model as an official checkpoint; returns the folder.

    Without `expert_dtype` ("fp4", "fp8", "bf16") and `quantized` the model's config decides. With
    `expert_dtype` alone, "bf16" means nothing is quantised, the others that all matrices are. FP8
    scales are float32 when experts are FP8, else e8m0, unless `scale_dtype` ("F32", "F8_E8M0")
    says. Weights that the format can hold come back bit for bit; others are rounded to nearest. An
    existing checkpoint in `folder` is replaced once the new one is complete; other files stay.
    Raises CheckpointError for weights that are not finite, contradicting options and when writing
    fails, and ConfigError when the sizes of the model do not fit FP4.
    """
    config = variant(model.config, expert_dtype, quantized)
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    scales = scale_dtype or default_scale_dtype(config)
    linear, expert = formats(config)

    def source(item: TensorSpec | Matrix) -> dict[str, torch.Tensor]:
        if isinstance(item, TensorSpec):
            values = parameters[item.name].detach().cpu()
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise CheckpointError(f"will not save {item.name}: it holds a NaN or an infinity")
            return {"": values.to(TORCH_DTYPES[item.dtype])}
        if item.expert:
            module, index, leaf = stacked_place(item)
            weight = parameters[f"{module}.{leaf}"][index]
        else:
            weight = parameters[f"{item.name}.weight"]
        return encoded(item, weight.detach().cpu(), expert if item.expert else linear, scales)

    return write_checkpoint(folder, config, source, scales, max_shard_bytes)


def variant(
    config: ModelConfig, expert_dtype: str | None = None, quantized: bool | None = None
) -> ModelConfig:
    """The configuration of the files to write. Raises CheckpointError for contradicting options."""
    if expert_dtype not in (None, "fp4", "fp8", "bf16"):
        raise CheckpointError(f"expert_dtype must be fp4, fp8 or bf16, not {expert_dtype!r}")
    if quantized is None:
        quantized = config.quantized if expert_dtype is None else expert_dtype != "bf16"
    if not quantized:
        if expert_dtype in ("fp4", "fp8"):
            raise CheckpointError(
                f"expert_dtype={expert_dtype!r} contradicts quantized=False: leave one of them out"
            )
        return replace(config, quantized=False, expert_dtype=None)
    stated = expert_dtype or config.expert_dtype or "fp4"
    return replace(config, quantized=True, expert_dtype=stated)


def encoded(
    matrix: Matrix, weight: torch.Tensor, weight_format: str, scale_dtype: str
) -> dict[str, torch.Tensor]:
    """`encode` with the matrix named in the error. weight: [rows, cols] float32 or bfloat16."""
    try:
        return encode(weight, weight_format, scale_dtype)
    except ValueError as e:
        raise CheckpointError(f"will not save {matrix.name}: {e}") from e


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    source: Source,
    scale_dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: tuple[Path, ...] = (),
) -> Path:
    """Write the files of `config`, asking `source` for one item's tensors at a time.

    `extra_files` are copied beside them. Raises CheckpointError when a tensor is not what the
    manifest says or the disk refuses.
    """
    folder = Path(folder)
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be at least 1, not {max_shard_bytes}")
    shards = _plan(config, scale_dtype, max_shard_bytes)
    try:
        with _staging(folder) as stage:
            names = _file_names(len(shards))
            for name, shard in zip(names, shards, strict=True):
                with open(stage / name, "wb") as f:
                    _write_shard(f, shard, source)
            if len(shards) > 1:
                _write_json(stage / INDEX, _index(names, shards))
            for extra in extra_files:
                shutil.copyfile(extra, stage / extra.name)
            _write_json(stage / "config.json", config.to_json())
            _publish(stage, folder)
    except OSError as e:
        raise CheckpointError(f"cannot write {folder}: {e.strerror or e}") from e
    return folder


def _plan(config: ModelConfig, scale_dtype: str, max_shard_bytes: int) -> list[_Shard]:
    """Items in file order, cut into shards; a matrix and its scale stay together."""
    linear, expert = formats(config)
    shards = [_Shard()]
    for item in modules(config):
        if isinstance(item, TensorSpec):
            specs = [item]
        else:
            specs = matrix_tensors(item, expert if item.expert else linear, scale_dtype)
        nbytes = sum(_nbytes(spec) for spec in specs)
        if shards[-1].items and shards[-1].nbytes + nbytes > max_shard_bytes:
            shards.append(_Shard())
        shards[-1].items.append(item)
        shards[-1].tensors += specs
        shards[-1].nbytes += nbytes
    return shards


def _nbytes(spec: TensorSpec) -> int:
    count = DTYPE_BYTES[spec.dtype]
    for size in spec.shape:
        count *= size
    return count


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _index(names: list[str], shards: list[_Shard]) -> dict[str, object]:
    files = zip(names, shards, strict=True)
    weight_map = {tensor.name: name for name, shard in files for tensor in shard.tensors}
    total = sum(shard.nbytes for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_shard(f: BinaryIO, shard: _Shard, source: Source) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    # Wide types first, so that every tensor starts at a multiple of its element size.
    for spec in sorted(shard.tensors, key=lambda t: -DTYPE_BYTES[t.dtype]):
        places[spec.name], end = end, end + _nbytes(spec)
        offsets = [places[spec.name], end]
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    f.write(len(raw).to_bytes(8, "little") + raw)
    f.truncate(8 + len(raw) + end)
    specs = {spec.name: spec for spec in shard.tensors}
    for item in shard.items:
        for leaf, values in source(item).items():
            name = f"{item.name}.{leaf}" if leaf else item.name
            spec = specs.pop(name)
            if tuple(values.shape) != spec.shape or values.dtype != TORCH_DTYPES[spec.dtype]:
                raise CheckpointError(
                    f"will not save {name}: it is {values.dtype} {list(values.shape)}, the "
                    f"configuration asks for {spec.dtype} {list(spec.shape)}"
                )
            f.seek(8 + len(raw) + places[name])
            f.write(values.contiguous().flatten().view(torch.uint8).numpy().data)
    if specs:
        raise CheckpointError(f"will not save: nothing was given for {next(iter(specs))}")
    f.flush()
    os.fsync(f.fileno())


def _write_json(path: Path, value: object) -> None:
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same file system, gone afterwards unless it was renamed."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot write a checkpoint to {folder}: it is not a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    parent = folder if folder.is_dir() else folder.parent
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.saving-", dir=parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, folder: Path) -> None:
    """Move the finished files into place.

    A new folder appears by one rename. In an existing one config.json goes first and comes last,
    unless a single file replaces its like under the same configuration: without config.json nothing
    is taken for a checkpoint, so no mixture of old and new ever is.
    """
    if not folder.exists():
        stage.chmod(0o777 & ~_umask())
        stage.rename(folder)
        return
    fresh = sorted(p.name for p in stage.iterdir())
    config = folder / "config.json"
    stale = [p for p in folder.glob(SHARDS) if p.name not in fresh]
    if INDEX not in fresh and (folder / INDEX).exists():
        stale.append(folder / INDEX)
    unchanged = config.exists() and config.read_bytes() == (stage / "config.json").read_bytes()
    if stale or INDEX in fresh or not unchanged:
        config.unlink(missing_ok=True)
    for path in stale:
        path.unlink()
    for name in sorted(fresh, key=lambda n: (n == "config.json", n == INDEX)):
        os.replace(stage / name, folder / name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
