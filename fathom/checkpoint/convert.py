"""Rewrite a checkpoint of any accepted form as an official one, a tensor at a time.

Matrices that are already in the wanted format are copied; FP4 experts become FP8 without changing a
value, or the conversion is refused; everything else is dequantised and rounded anew.

Paper: §3.4 (lossless FP4-to-FP8 step).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fathom.checkpoint.container import TORCH_DTYPES
from fathom.checkpoint.manifest import Matrix, TensorSpec, default_scale_dtype, formats
from fathom.checkpoint.reader import Checkpoint, open_checkpoint
from fathom.checkpoint.writer import (
    MAX_SHARD_BYTES,
    SHARDS,
    encoded,
    variant,
    write_checkpoint,
)
from fathom.errors import CheckpointError
from fathom.quant import fp4, fp8

# Copied along: they describe the text side of the model and pass unread.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def convert_checkpoint(
    source: str | os.PathLike[str] | Checkpoint,
    folder: str | os.PathLike[str],
    expert_dtype: str | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    scale_dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `source` in the official form to `folder`; returns the folder.

    A checkpoint that is there already is replaced only with `overwrite`, once the new one is whole.

    `expert_dtype` "fp4" or "fp8" quantises routed experts so and all other matrices to FP8, "bf16"
    dequantises everything, None keeps the variant. FP8 scales are float32 when experts are FP8,
    else e8m0, unless `scale_dtype` says. Raises CheckpointError when FP4 experts cannot be repacked
    to FP8 without loss, for damaged sources, for a folder that is taken and when writing fails.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    checkpoint.validate()
    if Path(folder).resolve() == checkpoint.folder.resolve():
        raise CheckpointError(
            f"{folder} is the checkpoint itself: choose another folder to write to"
        )
    there = [path.name for name in ("config.json", SHARDS) for path in Path(folder).glob(name)]
    if there and not overwrite:
        raise CheckpointError(
            f"{folder} holds a {there[0]} already: choose another folder, or say overwrite"
        )
    config = variant(checkpoint.config, expert_dtype)
    scales = scale_dtype or default_scale_dtype(config)
    linear, expert = formats(config)

    def produce(item: TensorSpec | Matrix) -> dict[str, torch.Tensor]:
        if isinstance(item, TensorSpec):
            return {"": checkpoint.read(item.name).to(TORCH_DTYPES[item.dtype])}
        return _convert(checkpoint, item, expert if item.expert else linear, scales)

    found = (checkpoint.folder / name for name in COMPANIONS)
    companions = tuple(path for path in found if path.is_file())
    return write_checkpoint(folder, config, produce, scales, max_shard_bytes, companions)


def _convert(
    checkpoint: Checkpoint, matrix: Matrix, weight_format: str, scale_dtype: str
) -> dict[str, torch.Tensor]:
    stored = checkpoint.weight_format(matrix.name)
    weight = checkpoint.read(f"{matrix.name}.weight")
    if stored == "bf16":
        return encoded(matrix, weight, weight_format, scale_dtype)
    scale = checkpoint.read(f"{matrix.name}.scale")
    if stored == "fp4" and weight_format == "fp8":
        try:
            weight, scale = fp4.to_fp8(weight, scale)
        except ValueError as e:
            raise CheckpointError(f"cannot repack {matrix.name} from FP4 to FP8: {e}") from e
        stored = "fp8"
    if stored == weight_format:
        converted = scale if stored == "fp4" else _scale_as(scale, scale_dtype)
        if converted is not None:
            return {"weight": weight, "scale": converted}
    values = (
        fp4.dequantize(weight, scale) if stored == "fp4" else fp8.dequantize_weight(weight, scale)
    )
    return encoded(matrix, values, weight_format, scale_dtype)


def _scale_as(scale: torch.Tensor, scale_dtype: str) -> torch.Tensor | None:
    """The same FP8 scales in another type, or None when that cannot hold them."""
    wanted = TORCH_DTYPES[scale_dtype]
    if scale.dtype == wanted:
        return scale
    if scale.dtype == torch.float8_e8m0fnu:
        return fp8.decode_e8m0(scale)
    try:
        return fp8.encode_e8m0(scale)
    except ValueError:
        return None
