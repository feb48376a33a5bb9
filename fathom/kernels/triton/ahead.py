"""Kernels compiled side by side, before anything waits for them.

A kernel is compiled when it is first launched, each after the one before: a minute for the steps of
one model in one size. `sketched` lists what of a computation's launches matters, and
`compile_kernel` fills Triton's cache on disk from that, in any process.

Paper: none (infrastructure).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, slots=True)
class Launch:
    """One recorded launch of a kernel."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside the block are listed with all that they are given, in place of being done."""
    launches: list[Launch] = []
    with _instead(launches.append):
        yield launches


@contextmanager
def sketched() -> Iterator[set[Sketch]]:
    """Likewise, but nothing of them is kept alive: a computation takes the memory that it takes."""
    sketches: set[Sketch] = set()
    with _instead(lambda launch: sketches.add(Sketch.of(launch))):
        yield sketches


@contextmanager
def _instead(tell: Callable[[Launch], None]) -> Iterator[None]:
    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        tell(Launch(self, arguments, keywords))

    performed, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = performed


class Zeroed(TorchFunctionMode):
    """Within it new memory is zero: what was not computed, as no kernel ran, may be an index."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ZEROED.get(func, func)(*args, **(kwargs or {}))


_ZEROED: dict[Any, Any] = {
    torch.empty: torch.zeros,
    torch.empty_like: torch.zeros_like,
    torch.Tensor.new_empty: torch.Tensor.new_zeros,
}


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor as far as a compiler looks at it: its type, and whether 16 divides its address."""

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        """An address of that kind."""
        return 256 + self.offset

    def ptr_range(self) -> int:
        """Bytes that it reaches; 0: not known."""
        return 0


@dataclass(frozen=True, slots=True)
class Tiled:
    """A tensor descriptor [shape], its rows `strides` apart, by the tile that is copied."""

    base: Pointer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    tile: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sketch:
    """What of a launch decides what is compiled. Equal ones give one kernel."""

    module: str
    name: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, launch: Launch) -> Sketch:
        """The launch without its tensors, and its numbers as far as they matter."""
        params = launch.kernel.params
        arguments = (
            value if p.is_constexpr else _sketched(value)
            for p, value in zip(params, launch.arguments, strict=False)
        )
        fixed = {p.name for p in params if not p.is_constexpr}
        keywords = (
            (name, _sketched(value) if name in fixed else value)
            for name, value in sorted(launch.keywords.items())
        )
        function = launch.kernel.fn
        return cls(function.__module__, function.__name__, tuple(arguments), tuple(keywords))


def _sketched(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16)
    if isinstance(value, TensorDescriptor):
        tile = tuple(value.block_shape)
        return Tiled(_sketched(value.base), tuple(value.shape), tuple(value.strides), tile)
    if type(value) is int and value != 1 and abs(value) < 2**31:
        return 16 if value % 16 == 0 else 3  # nothing else counts
    return value


def compile_kernel(sketch: Sketch) -> None:
    """Into Triton's cache, for the device of this process."""
    kernel = getattr(importlib.import_module(sketch.module), sketch.name)
    arguments = (_described(value) for value in sketch.arguments)
    keywords = {name: _described(value) for name, value in sketch.keywords}
    kernel.warmup(*arguments, grid=(1,), **keywords)


def _described(value: Any) -> Any:
    if not isinstance(value, Tiled):
        return value
    return TensorDescriptor(value.base, list(value.shape), list(value.strides), list(value.tile))
