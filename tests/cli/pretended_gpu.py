"""Lets the GPU's measurements run their whole way on a CPU: tiny layers, clocks that stand still.

Nothing about speed can be learned; what would break after minutes on a device breaks here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fathom.checkpoint.tiny import tiny_config
from fathom.eval import gpu_launches
from fathom.eval.gpu_launches import Launched
from fathom.model import config as configurations

# Of every kind a layer, and sizes that the stored runner takes.
CONFIG = tiny_config(
    hidden_size=128, num_attention_heads=4, head_dim=96, qk_rope_head_dim=32, q_lora_rank=128,
    o_groups=1, o_lora_rank=128, index_n_heads=8, index_head_dim=64, index_topk=4,
    vocab_size=400, num_nextn_predict_layers=1,
)  # fmt: skip
MIB = 2**20


class OnTheCpu(TorchFunctionMode):
    """Whatever is made for a GPU is made for the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Event:
    def __init__(self, **_: Any) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: Event) -> float:
        return 0.5


class Graph:
    def replay(self) -> None: ...


LAUNCHED = [
    Launched("fp8_linear", "SWA low", 8 << 20),
    Launched("mhc_read", "", 0),
    Launched("fp8_linear", "CSA low, plain", 16 << 20),
    Launched("router_choose", "CSA bias", 1024),
    Launched("topk_choose", "", 0),
    Launched("head_products", "head", 1 << 30),
]  # of one step


class Profile:
    """Every launch of LAUNCHED, each 20 microseconds, and a copy between."""

    def __init__(self, **_: Any) -> None: ...
    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def key_averages(self) -> list[Any]:
        device = SimpleNamespace(name="CUDA")
        return [
            SimpleNamespace(key=name, count=5, self_device_time_total=50.0, device_type=device)
            for name in ("fp8_linear", "Memcpy")
        ]

    def events(self) -> list[Any]:
        found = []
        for launch in LAUNCHED * gpu_launches.REPEAT:
            for name, took in ((launch.kernel, 20.0), ("Memcpy", 5.0)):
                at = SimpleNamespace(start=30.0 * len(found), end=30.0 * len(found) + took)
                device = SimpleNamespace(name="CUDA")
                found.append(SimpleNamespace(name=name, time_range=at, device_type=device))
        return found[::-1]  # a profile is not sorted


@contextlib.contextmanager
def observed(_: Any) -> Iterator[list[Launched]]:
    """The launches of as many steps as are profiled."""
    yield LAUNCHED * gpu_launches.REPEAT


def times(call: Callable[[], object], repeat: int = 3) -> list[float]:
    """Called once, and as if measured so often."""
    call()
    return [0.5] * repeat


@contextlib.contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, torch seems to have a GPU, and V4-Flash is tiny."""
    generator, presets = torch.Generator, configurations.PRESETS
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: "a pretended card",
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda *_, **__: contextlib.nullcontext(),
        "mem_get_info": lambda *_: (64 * 1024 * MIB, 64 * 1024 * MIB),
        "memory_reserved": lambda: 0,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: MIB,
        "reset_peak_memory_stats": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", lambda *_: generator())
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setitem(presets, "flash", CONFIG)
    for module in ("gpu_speed", "gpu_prefill_speed"):
        monkeypatch.setattr(f"fathom.eval.{module}.times_ms", times)
    monkeypatch.setattr("fathom.eval.gpu_engine_speed.WARM", 1)
    monkeypatch.setattr(gpu_launches, "observed", observed)
    monkeypatch.setattr("fathom.eval.gpu_speed.fp8_rate", lambda: 14e14)
    monkeypatch.setattr("fathom.eval.gpu_speed.copy_rate", lambda: 3e12)
    monkeypatch.setattr("fathom.eval.gpu_speed.matmul_rate", lambda: 7.8e14)
    with OnTheCpu():
        yield
