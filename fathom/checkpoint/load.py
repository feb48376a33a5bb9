"""Fill a Transformer from a checkpoint, dequantising a few rows at a time.

The model is built without memory, then filled tensor by tensor: at no time is there more than the
model itself and one slice of a stored tensor.

Paper: §3.4 (weights are stored in FP8 and FP4).
"""

from __future__ import annotations

import os

import torch
from torch import nn

from fathom.checkpoint.manifest import FP8_BLOCK, Matrix, TensorSpec, modules
from fathom.checkpoint.reader import Checkpoint, open_checkpoint
from fathom.model import Transformer

# Elements dequantised at once: float32 temporaries stay below 20 MB whatever the tensor.
SLICE_ELEMENTS = 2**20


def load_model(
    source: str | os.PathLike[str] | Checkpoint,
    dtype: torch.dtype = torch.float32,
    quantized: bool | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A Transformer with the weights of a checkpoint (its folder, or opened already).

    `dtype` is the arithmetic of activations, float32 or bfloat16. `quantized` True performs every
    quantisation step of the official path, False none, None whatever the checkpoint was made for.
    The model's `config` is the checkpoint's, completed by what its tensors are. Raises
    CheckpointError before any memory is spent on weights, and the errors of `open_checkpoint`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    checkpoint.validate()
    weight_formats = stored_formats(checkpoint)
    if quantized is None:
        quantized = any(f != "bf16" for f in weight_formats.values())
    with torch.device("meta"):
        model = Transformer(checkpoint.config, dtype=dtype, quantized=quantized)
    with torch.no_grad():
        for item in modules(checkpoint.config):
            if isinstance(item, TensorSpec):
                _fill_tensor(checkpoint, model, item.name, torch.device(device))
            else:
                _fill_matrix(checkpoint, model, item, torch.device(device))
    model.set_weight_formats(weight_formats)
    if quantized:
        _keep_float_scales(checkpoint, model, torch.device(device))
    return model.eval()


def stored_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """How each layer is stored: {"layers.0.attn.wq_a": "fp8", "layers.0.ffn.experts": "fp4"}."""
    table: dict[str, str] = {}
    for item in modules(checkpoint.config):
        if isinstance(item, Matrix):
            table[stacked_place(item)[0] if item.expert else item.name] = checkpoint.weight_format(
                item.name
            )
    return table


def stacked_place(matrix: Matrix) -> tuple[str, int, str]:
    """Where the model holds a routed expert's matrix: (module name, expert, parameter name)."""
    module, index, leaf = matrix.name.rsplit(".", 2)
    return module, int(index), leaf


def _fill_tensor(checkpoint: Checkpoint, model: nn.Module, name: str, device: torch.device) -> None:
    target = _materialise(model, name, device)
    rows = target.shape[0]
    step = max(1, SLICE_ELEMENTS // max(1, target.numel() // max(1, rows)))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        target[start:stop].copy_(checkpoint.read(name, start, stop))


def _fill_matrix(
    checkpoint: Checkpoint, model: nn.Module, matrix: Matrix, device: torch.device
) -> None:
    if matrix.expert:
        module, index, leaf = stacked_place(matrix)
        target = _materialise(model, f"{module}.{leaf}", device)[index]
    else:
        target = _materialise(model, f"{matrix.name}.weight", device)
    step = max(1, SLICE_ELEMENTS // (matrix.cols * FP8_BLOCK)) * FP8_BLOCK
    for start in range(0, matrix.rows, step):
        stop = min(matrix.rows, start + step)
        target[start:stop].copy_(checkpoint.matrix_rows(matrix, start, stop))


def _keep_float_scales(checkpoint: Checkpoint, model: nn.Module, device: torch.device) -> None:
    """Leave float32 tile scales with the layers that multiply stored codes (all but wo_a)."""
    for item in modules(checkpoint.config):
        if not isinstance(item, Matrix) or checkpoint.weight_format(item.name) != "fp8":
            continue
        name = f"{item.name}.scale"
        if checkpoint.find(name).dtype != "F32" or item.name.endswith(".wo_a"):
            continue
        scale = checkpoint.read(name).to(device)
        if not item.expert:
            model.get_submodule(item.name).tile_scale = scale
            continue
        module, index, leaf = stacked_place(item)
        experts = model.get_submodule(module)
        stacked = getattr(experts, f"{leaf}_tile_scale")
        if stacked is None:
            weight = getattr(experts, leaf)
            stacked = torch.ones(weight.shape[0], *scale.shape, device=device)
            setattr(experts, f"{leaf}_tile_scale", stacked)
        stacked[index] = scale


def _materialise(model: nn.Module, name: str, device: torch.device) -> torch.Tensor:
    """The parameter or buffer called `name`, given memory if it had none yet."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor = getattr(module, leaf)
    if tensor.is_meta:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            setattr(module, leaf, nn.Parameter(empty, requires_grad=tensor.requires_grad))
        else:
            setattr(module, leaf, empty)
        tensor = getattr(module, leaf)
    return tensor
