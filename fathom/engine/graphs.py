"""Computations at fixed addresses as CUDA graphs: captured once, then replayed.

While a stream is captured CUDA forbids much to its thread, and whoever does it all the same ends
the capture. To destroy another graph is among it, and Python's cyclic collector may do that at any
moment, on behalf of an engine that is long gone. Hence graphs are destroyed here only, when nothing
is captured: finalisers hand over what they had, and whoever holds the lock destroys it.

Paper: none (engine).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

_log = logging.getLogger(__name__)

ATTEMPTS = 3  # failed captures of a runner until it computes without graphs

_capturing = threading.Lock()  # held by whoever captures or destroys: one at a time in a process
_unwanted: deque[torch.cuda.CUDAGraph] = deque()


class Graphs:
    """What a runner computes again and again, by key. On a CPU it is computed anew every time.

    No graph outlives this object by more than the capture that may be under way elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._used = device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if self._used else None
        self._stream: Any = torch.cuda.Stream(device) if self._used else None
        self._failed = 0
        self._inputs: dict[Hashable, torch.Tensor] = {}
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._held: list[torch.cuda.CUDAGraph] = []  # also by the finaliser, so never by it alone
        weakref.finalize(self, _let_go, self._held)

    def run(self, key: Hashable, call: Callable[..., Any], given: torch.Tensor, *more: Any) -> Any:
        """`call(given, *more)`, whose result is valid until the next run of any key.

        given: a table [6, tokens] or bytes [tokens * 20], of one shape for a key. `more` and what
        `call` reads besides must be the same whenever `key` is. The first time it is computed as it
        stands and captured afterwards: if that fails, nothing of it is lost.
        """
        if not self._used:
            return call(given, *more)
        fixed = self._inputs.get(key)
        if fixed is None:
            fixed = torch.empty(given.shape, dtype=given.dtype, device=given.device)
            self._inputs[key] = fixed
        fixed.copy_(given)
        if key in self._captured:
            graph, result = self._captured[key]
            graph.replay()
            return result
        found = call(fixed, *more)  # compiles what has to be compiled
        if self._failed < ATTEMPTS:
            self._try_to_capture(key, lambda: call(fixed, *more))
        return found

    def clear(self) -> None:
        """Let go of all graphs; what is run again is captured again."""
        self._captured.clear()
        self._inputs.clear()
        _let_go(self._held)

    def _try_to_capture(self, key: Hashable, call: Callable[[], Any]) -> None:
        graph = torch.cuda.CUDAGraph()
        self._held.append(graph)
        try:
            result = self._capture(graph, call)
        except Exception as error:  # memory, or what somebody did in this thread meanwhile
            self._failed += 1
            what = "again next time" if self._failed < ATTEMPTS else "without graphs from now on"
            _log.warning(
                "event=graph_failed key=%r attempt=%d next=%r detail=%r",
                key, self._failed, what, str(error),
            )  # fmt: skip
            self._abandon(graph)
        else:
            self._captured[key] = graph, result
        finally:
            _destroy_unwanted()  # what was handed over meanwhile

    def _capture(self, graph: torch.cuda.CUDAGraph, call: Callable[[], Any]) -> Any:
        """Not by `torch.cuda.graph`, which empties the allocators' caches before every capture and
        leaves its own stream current if the end of one fails.
        """
        with _capturing, _no_collection(), torch.cuda.stream(self._stream):
            # Other threads go on: what they allocate, copy or destroy is no business of this one.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                return call()
            finally:
                graph.capture_end()

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a failure the allocator may still believe in the capture and its pool."""
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        self._held.remove(graph)
        _let_go([graph])
        gc.collect()  # the next attempt finds as little as can be to trip over


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Whatever else the collector would find, such as graphs that are not ours."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _let_go(graphs: list[torch.cuda.CUDAGraph]) -> None:
    _unwanted.extend(graphs)
    graphs.clear()
    _destroy_unwanted()


def _destroy_unwanted() -> None:
    """Now, unless something is captured: then at its end. Never waits, as finalisers must not."""
    while _unwanted and _capturing.acquire(blocking=False):
        try:
            while _unwanted:
                _unwanted.popleft()
        finally:
            _capturing.release()
