"""One name for a kernel in Triton's cache on disk, whatever a process launched first.

Before Triton 3.9 a kernel's name in that cache holds the constants of the functions that it calls
only if those were named before it (triton-lang/triton, pull request 10494). Processes that launch
in another order then do not find what was compiled: a server compiles anew after a restart, and
what `ahead` compiled is of no use to others. Here those that are called are named first.

Paper: none (infrastructure).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType

from triton.runtime.jit import JITFunction


def name_kernels(modules: Iterable[ModuleType]) -> None:
    """Give every compiled function of these modules its name: 50 ms for all there are."""
    named: set[int] = set()
    for module in modules:
        for value in list(vars(module).values()):
            if isinstance(value, JITFunction):
                _name(value, named)


def _name(function: JITFunction, named: set[int]) -> None:
    if id(function) in named:
        return
    named.add(id(function))
    for other in called(function):
        _name(other, named)
    _ = function.cache_key  # Triton keeps it


def called(function: JITFunction) -> Iterator[JITFunction]:
    """Functions that the text of this one names, by themselves or in a module; some twice."""
    names = function.fn.__code__.co_names
    for name in names:
        value = function.fn.__globals__.get(name)
        if isinstance(value, ModuleType):
            parts = (getattr(value, part, None) for part in names)
            yield from (part for part in parts if isinstance(part, JITFunction))
        elif isinstance(value, JITFunction):
            yield value
