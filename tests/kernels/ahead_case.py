"""Kernels compiled ahead for a card that is not here: prints what came of it as JSON.

Run by test_ahead.py in a process of its own, whose Triton compiles instead of interpreting.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fathom.kernels.triton as triton_kernels
from fathom.kernels import use_backend
from fathom.kernels.triton import step
from fathom.kernels.triton.ahead import Zeroed, compile_kernel, recorded, sketched
from tests.kernels.sass_cases import prefill_experts


class Card:
    """Compute capability 9.0, as far as a compiler asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def computation() -> None:
    """Launches in several sizes, some of which share a kernel, and one with a tile descriptor."""
    for tokens in (1, 3, 5, 16):
        hidden = torch.zeros(tokens, 128)
        logits = step.head_logits(hidden, torch.zeros(96, 128, dtype=torch.bfloat16))
        step.logit_summary(logits, torch.zeros(2, tokens, dtype=torch.float64))
    step.head_logits(torch.zeros(3 * 128 + 1)[1:].view(3, 128), torch.zeros(96, 128))  # not aligned
    prefill_experts(256, 256, scatter=False)


def badly_named() -> list[str]:
    """Functions without a name in the cache, or with another than after all others were named."""
    path, name = triton_kernels.__path__, triton_kernels.__name__
    modules = [importlib.import_module(f"{name}.{own.name}") for own in pkgutil.iter_modules(path)]
    values = [value for module in modules for value in vars(module).values()]
    functions = [value for value in values if isinstance(value, JITFunction)]
    assert len(functions) > 100
    found = []
    for function in functions:
        before, function.hash = function.hash, None
        if before != function.cache_key:
            found.append(function.fn.__name__)
    return found


def main() -> None:
    unnamed = badly_named()
    driver.set_active(Card())  # type: ignore[arg-type]
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    with use_backend("triton"), Zeroed(), recorded() as launches:
        computation()
        zeroed = not torch.empty(1000).any()
    with use_backend("triton"), Zeroed(), sketched() as sketches:
        computation()
    for sketch in sketches:
        compile_kernel(sketch)
    compiled = len(list(cache.iterdir()))
    kernels: set[Any] = {launch.kernel for launch in launches}
    for kernel in kernels:
        kernel.device_caches.clear()  # so that the launches themselves look on disk
    for launch in launches:
        launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.keywords)
    found = {
        "launches": len(launches),
        "sketches": len(sketches),
        "kernels": sorted(kernel.fn.__name__ for kernel in kernels),
        "compiled": compiled,
        "missed": len(list(cache.iterdir())) - compiled,
        "zeroed": zeroed,
        "unnamed": unnamed,
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
