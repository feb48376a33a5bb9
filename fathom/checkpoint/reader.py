"""Open a checkpoint folder: find its files, name its tensors, and read them when asked.

Opening reads headers only: a 160 GB checkpoint costs megabytes. Official, transformers-named and
mixed files all come out under the official names; stacked experts are split into ranges of bytes.

Paper: none (file format).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch

from fathom.checkpoint import validate
from fathom.checkpoint.container import (
    MAX_CONFIG_BYTES,
    TORCH_DTYPES,
    Problem,
    StoredTensor,
    read_bytes,
    read_header,
    read_index,
    shown,
)
from fathom.checkpoint.manifest import FP8_BLOCK, Matrix, formats
from fathom.checkpoint.names import Stacked, official_name, other_model
from fathom.errors import CheckpointError, ConfigError, UnsupportedModelError
from fathom.model.config import ModelConfig
from fathom.quant import fp4, fp8

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_TENSORS = 500_000  # that stacks may be cut into; V4-Pro has 145,116
MAX_PROBLEMS = 1000  # collected; beyond that only a damaged or hostile file goes
CHECKED_WHEN_OPENED = 16 * 2**20  # bytes of scales and tables that opening may read to check them


@dataclass(slots=True)
class Checkpoint:
    """An opened checkpoint. `tensors` maps official names to where they lie; nothing is in memory.

    `config` is what the tensors were found to be: variant and MTP block included. `form` is
    "official" or "transformers". `problems` is empty unless `scan` was asked to go on regardless.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    form: str = "official"
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: str = SINGLE  # the file that lists the tensors
    unreadable: bool = False  # some file could not be listed, so absent tensors prove nothing

    @property
    def names(self) -> list[str]:
        """Official names of all tensors, sorted."""
        return sorted(self.tensors)

    @property
    def kind(self) -> str:
        """The variant: "instruct" (FP4 experts), "base" (FP8 experts) or "bf16"."""
        return {"fp4": "instruct", "fp8": "base", "bf16": "bf16"}[formats(self.config)[1]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(t.nbytes for t in self.tensors.values())

    def find(self, name: str) -> StoredTensor:
        """Where the tensor with this official name lies. Raises CheckpointError if nowhere."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: there is no tensor {shown(name)}") from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A stored tensor, or its rows from `start` to `stop`: [...] in the dtype of the file.

        Raises CheckpointError when it does not exist or cannot be read.
        """
        tensor = self.find(name)
        dtype, shape = TORCH_DTYPES.get(tensor.dtype), tensor.shape
        if dtype is None:
            raise CheckpointError(
                f"{self.folder}: tensor {shown(name)} has dtype {tensor.dtype}, as no V4 tensor has"
            )
        if not shape:
            return read_bytes(self.folder, tensor).view(dtype).reshape(shape)
        start, stop, _ = slice(start, stop).indices(shape[0])
        width = tensor.nbytes // shape[0] if shape[0] else 0
        raw = read_bytes(self.folder, tensor, start * width, stop * width)
        return raw.view(dtype).reshape(stop - start, *shape[1:])

    def weight_format(self, matrix: str) -> str:
        """How the matrix with this module name is stored: "fp8", "fp4" or "bf16"."""
        dtype = self.find(f"{matrix}.weight").dtype
        return {"F8_E4M3": "fp8", "I8": "fp4"}.get(dtype, "bf16")

    def matrix_rows(self, matrix: Matrix, start: int, stop: int) -> torch.Tensor:
        """Rows of a matrix, dequantised: [rows, cols] float32 (bfloat16 where stored so).

        `start` must be a multiple of 128. Raises CheckpointError for damaged data.
        """
        weight_format = self.weight_format(matrix.name)
        weight = self.read(f"{matrix.name}.weight", start, stop)
        if weight_format == "bf16":
            return weight
        scale = f"{matrix.name}.scale"
        try:
            if weight_format == "fp4":
                return fp4.dequantize(weight, self.read(scale, start, stop))
            tiles = self.read(scale, start // FP8_BLOCK, -(-stop // FP8_BLOCK))
            return fp8.dequantize_weight(weight, tiles)
        except ValueError as e:
            where = self.find(scale)
            raise CheckpointError(
                f"{self.folder}: tensor {shown(where.stored)} in {where.file}: {e}"
            ) from e

    def validate(self) -> None:
        """Check every name, shape, type, scale and routing table. Raises CheckpointError.

        Only scales and tables are read; no memory is spent on weights.
        """
        raise_first(self, self.problems or self.value_problems())

    def value_problems(self) -> list[Problem]:
        """Damaged scales and routing tables, at most MAX_PROBLEMS."""
        return list(islice(validate.check_values(self), MAX_PROBLEMS))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder of safetensors files with its config.json (or one such file).

    Every name, shape and type is checked against the configuration; small checkpoints have their
    scales checked too, `Checkpoint.validate` checks those of any. Raises CheckpointError naming the
    first damaged, missing or unexpected tensor and its file, ConfigError for an unusable
    config.json and UnsupportedModelError for V4.1 and DSpark.
    """
    checkpoint = scan(path)
    raise_first(checkpoint, checkpoint.problems)
    if validate.value_bytes(checkpoint) <= CHECKED_WHEN_OPENED:
        checkpoint.validate()
    return checkpoint


def scan(path: str | os.PathLike[str]) -> Checkpoint:
    """As `open_checkpoint`, but damage is collected in `problems` instead of raised.

    Raises CheckpointError where there is no checkpoint at all, and the configuration's errors.
    """
    folder, source = _locate(Path(path))
    checkpoint = Checkpoint(folder, _read_config(folder), source=source)
    if source == INDEX:
        _list_shards(checkpoint)
    else:
        tensors, problems = read_header(folder / source)
        checkpoint.files = [source]
        checkpoint.unreadable = bool(problems and not tensors)
        checkpoint.problems += problems
        for tensor in tensors:
            _add(checkpoint, tensor)
    _refuse_other_models(checkpoint)
    _resolve(checkpoint)
    found = validate.check_tensors(checkpoint)
    checkpoint.problems += islice(found, MAX_PROBLEMS)
    return checkpoint


def raise_first(checkpoint: Checkpoint, problems: list[Problem]) -> None:
    """Raise CheckpointError with the first problem in full and the number of others."""
    if not problems:
        return
    others = len(problems) - 1
    more = f" ({others:,} more: `fathom inspect` lists them)" if others else ""
    raise CheckpointError(f"{checkpoint.folder}: {problems[0]}{more}")


def _locate(path: Path) -> tuple[Path, str]:
    """(folder, name of the file that lists the tensors)."""
    if path.is_file() and path.name.endswith(".safetensors"):
        return path.parent, path.name
    if path.is_file() and path.name in (INDEX, "config.json"):
        path = path.parent
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}: give the folder that holds config.json")
    for name in (INDEX, SINGLE):
        if (path / name).exists():
            return path, name
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise CheckpointError(
            f"{path} has no {SINGLE} but {pickled[0]}: pickled files can run code and are never "
            "opened. Convert it to safetensors where you trust it"
        )
    raise CheckpointError(f"{path} is not a checkpoint: it has neither {INDEX} nor {SINGLE}")


def _read_config(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{file} is larger than the {MAX_CONFIG_BYTES:,} bytes that are accepted")
    try:
        return ModelConfig.from_json(file)
    except RecursionError:
        raise ConfigError(f"{file} is nested too deeply") from None
    except ConfigError as e:
        raise e if str(file) in str(e) else type(e)(f"{file}: {e}") from None


def _list_shards(checkpoint: Checkpoint) -> None:
    weight_map, problems = read_index(checkpoint.folder / INDEX)
    checkpoint.problems += problems
    checkpoint.unreadable = bool(problems)
    expected = Counter(weight_map.values())
    checkpoint.files = sorted(expected)
    for file in checkpoint.files:
        tensors, problems = read_header(checkpoint.folder / file)
        if problems and not tensors:
            checkpoint.unreadable = True
            message = f"{problems[0].message} ({expected.pop(file):,} tensors should be in it)"
            problems = [replace(problems[0], message=message)]
        checkpoint.problems += problems
        for tensor in tensors:
            stated = weight_map.get(tensor.stored)
            fresh = _add(checkpoint, tensor)
            if stated == file:
                del weight_map[tensor.stored]
            elif fresh:
                where = f"is listed for {stated}" if stated else "is not listed"
                _refuse(checkpoint, tensor, f"{where} in {INDEX}")
    for name, file in weight_map.items():
        if file in expected and len(checkpoint.problems) < MAX_PROBLEMS:
            message = f"is missing, although {INDEX} lists it there"
            checkpoint.problems.append(Problem(file, name, message))


def _refuse(checkpoint: Checkpoint, tensor: StoredTensor, message: str) -> None:
    if len(checkpoint.problems) < MAX_PROBLEMS:
        checkpoint.problems.append(Problem(tensor.file, tensor.stored, message))


def _add(checkpoint: Checkpoint, tensor: StoredTensor) -> bool:
    """Enter a stored tensor under its official name or names; whether that went well."""
    name = official_name(tensor.stored)
    if name is None:
        return True
    if isinstance(name, str):
        if name == tensor.stored:
            tensor = tensor._replace(stored=name)
        elif not tensor.stored.endswith(".weight_scale_inv"):
            checkpoint.form = "transformers"
        entries: Iterator[tuple[str, StoredTensor]] = iter([(name, tensor)])
    else:
        checkpoint.form = "transformers"
        message = _stack_problem(checkpoint, name, tensor)
        if message:
            checkpoint.unreadable = True
            _refuse(checkpoint, tensor, message)
            return False
        entries = _unstack(name, tensor)
    for official, part in entries:
        other = checkpoint.tensors.setdefault(official, part)
        if other is not part:
            message = f"is stored twice: also as {shown(other.stored)} in {other.file}"
            _refuse(checkpoint, part, message)
            return False
    return True


def _stack_problem(checkpoint: Checkpoint, stack: Stacked, tensor: StoredTensor) -> str | None:
    """Why a stacked tensor cannot be cut into experts, or None."""
    config, parts = checkpoint.config, len(stack.matrices)
    inner = config.moe_intermediate_size
    if len(tensor.shape) != 3 or tensor.shape[0] != config.n_routed_experts:
        return (
            f"has shape {list(tensor.shape)}; expected {config.n_routed_experts} experts in front"
        )
    # A header of a few bytes may state any number of experts.
    if len(checkpoint.tensors) + tensor.shape[0] * parts > MAX_TENSORS:
        return f"would be cut into {tensor.shape[0] * parts:,} tensors, more than are accepted"
    if tensor.shape[1] % parts:
        return f"has shape {list(tensor.shape)}, whose rows do not split into {parts} matrices"
    tiles = stack.leaf == "scale" and tensor.shape[1] < parts * inner
    if tiles and parts > 1 and inner % FP8_BLOCK:
        return f"cannot be split: {inner} rows per matrix are not whole tiles of {FP8_BLOCK}"
    return None


def _unstack(stack: Stacked, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """The matrices inside a stacked tensor: contiguous ranges of its bytes."""
    experts, rows, cols = tensor.shape
    parts = len(stack.matrices)
    shape = (rows // parts, cols)
    size = tensor.nbytes // max(1, experts * parts)
    for index in range(experts * parts):
        leaf = stack.matrices[index % parts]
        start = tensor.start + index * size
        name = f"{stack.prefix}{index // parts}.{leaf}.{stack.leaf}"
        yield name, tensor._replace(shape=shape, start=start, stop=start + size)


_OTHER_MODELS = {
    "DSpark": "a DSpark checkpoint, whose three-stage drafter fathom does not implement. Use the "
    "launch checkpoint of the same model, which drafts with one MTP block",
    "V4.1": "DeepSeek-V4.1, another architecture. Use a DeepSeek-V4 checkpoint",
}


def _refuse_other_models(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        other = other_model(name)
        if other:
            raise UnsupportedModelError(
                f"{checkpoint.folder}: tensor {shown(tensor.stored)} in {tensor.file} belongs to "
                f"{_OTHER_MODELS[other]}"
            )


def _resolve(checkpoint: Checkpoint) -> None:
    """Complete the configuration by what the tensors are, wherever the file leaves it open."""
    config = checkpoint.config
    experts: Counter[str] = Counter()
    linears: Counter[str] = Counter()
    has_mtp = False
    for name, tensor in checkpoint.tensors.items():
        has_mtp = has_mtp or name.startswith("mtp.")
        if ".ffn.experts." in name and name.endswith(".weight"):
            experts[{"I8": "fp4", "F8_E4M3": "fp8"}.get(tensor.dtype, "bf16")] += 1
        elif name.endswith(".attn.wq_a.weight"):
            linears[tensor.dtype] += 1
    quantized = config.quantized
    if not quantized and linears:
        quantized = linears.most_common(1)[0][0] == "F8_E4M3"
        if quantized:
            checkpoint.notes.append("config.json has no quantization_config; the matrices are FP8")
    expert_dtype = config.expert_dtype
    if expert_dtype is None and experts:
        expert_dtype = experts.most_common(1)[0][0]
        if expert_dtype == "bf16" and not quantized:
            expert_dtype = None
    mtp = config.num_nextn_predict_layers
    if mtp and not has_mtp and checkpoint.form == "transformers" and not checkpoint.unreadable:
        mtp = 0
        checkpoint.notes.append("the file has no MTP block (transformers does not keep it)")
    checkpoint.config = replace(
        config, quantized=quantized, expert_dtype=expert_dtype, num_nextn_predict_layers=mtp
    )
