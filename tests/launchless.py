"""Run CUDA operations on tensors without memory: everything happens but the kernels themselves."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fathom.checkpoint.container import TORCH_DTYPES
from fathom.checkpoint.manifest import manifest
from fathom.kernels import use_backend
from fathom.model.config import ModelConfig
from fathom.model.stored import StoredModel


def needs_triton() -> None:
    """Skip a module where the operations cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed", allow_module_level=True)


@contextmanager
def no_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's operations, whose kernels do nothing when they are launched."""
    importlib.import_module("fathom.kernels.triton")
    jit = importlib.import_module("triton.runtime.jit")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    # As on a GPU, where BF16 matrices are multiplied without widening them.
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for kind in (jit.KernelInterface, jit.JITFunction, interpreter.InterpretedFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda *_: _nothing, raising=False)
    with torch.inference_mode(), use_backend("triton"):
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """A launch."""


def meta_model(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> StoredModel:
    """A model of exact shapes that takes no memory, experts stacked as they are loaded."""
    for check in ("check_fp8", "check_fp4", "check_table"):
        monkeypatch.setattr(f"fathom.model.stored.{check}", _nothing)
    tensors: dict[str, torch.Tensor] = {}
    for spec in manifest(config):
        own, shape = spec.name, spec.shape
        if ".ffn.experts." in own:
            block, _, rest = own.partition(".ffn.experts.")
            number, _, part = rest.partition(".")
            if number != "0":
                continue
            own, shape = f"{block}.ffn.experts.{part}", (config.n_routed_experts, *shape)
        tensors[own] = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")
    return StoredModel.from_tensors(config, tensors)
