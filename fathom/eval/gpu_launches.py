"""Each kernel of a decode step by itself: its part of a layer, its time, the bytes it must read.

Calls of one kernel are told apart by their order: launches are listed while a profile runs, and
what a launch is handed (a matrix of a layer, a ring, the pool) says what it is for.

Paper: §3.1 (fused kernels); §2.3.4 (efficiency).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fathom.model.config import CSA_RATIO, ModelConfig
from fathom.model.stored import MixSite, StoredLayer
from fathom.model.stored_cache import StoredCache
from fathom.quant import kv_pack
from fathom.quant.kv_pack import IndexerFormat

NAMES = {0: "SWA", 4: "CSA", 128: "HCA"}
HEAD = "head"
BOUNDARY = "mhc_"  # what names of the kernels that make an mHC boundary begin with
REPEAT = 5


@dataclass(frozen=True, slots=True)
class Launched:
    """A launch as it was called. part: what of a model it reads, "" for intermediate results alone;
    num_bytes: of weights and of the cache that it must read.
    """

    kernel: str
    part: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """A kernel in one part of the model. us: median of one call; num_bytes: that it must read."""

    kernel: str
    part: str
    calls: int
    us: float
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepKernels:
    """The kernels of one step, and microseconds of one mHC boundary."""

    kernels: list[KernelTime]
    boundary: float


@dataclass(slots=True)
class Model:
    """What launches are recognised by: which memory belongs to which part, and what is read of it.

    parts: by address of a tensor's memory (layer's kind or "", part, share of it that is read).
    """

    config: ModelConfig
    context: int
    key_format: IndexerFormat
    parts: dict[int, tuple[str, str, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        layers: Sequence[StoredLayer],
        cache: StoredCache,
        context: int,
        head: torch.Tensor | None = None,
    ) -> Model:
        """For one token behind `context` - 1 others, which chooses as many experts as any. head:
        [vocab, hidden].
        """
        found = cls(config, context, cache.key_format)
        share = config.num_experts_per_tok / config.n_routed_experts
        for layer in layers:
            for name in StoredLayer.__slots__:
                value = getattr(layer, name)
                if isinstance(value, MixSite):
                    value = (value.fn, value.base, value.scale, value.norm)
                tensors = value if isinstance(value, tuple) else (value,)
                for index, tensor in enumerate(tensors):
                    if not isinstance(tensor, torch.Tensor):
                        continue
                    part, read = name.replace("_", " "), 1.0
                    if name == "routed":
                        part, read = ("experts down" if index > 3 else "experts up"), share
                    elif name == "shared":
                        part = "shared down" if index > 1 else "shared up"
                    elif name == "table":
                        read = 1 / len(tensor)
                    found.parts[_address(tensor)] = NAMES[layer.ratio], part, read
        for own, layer in zip(cache.layers, layers, strict=True):
            found.parts[_address(own.ring)] = NAMES[layer.ratio], "ring", 0.0
        if head is not None:
            found.parts[_address(head)] = "", HEAD, 1.0
        return found

    def launched(self, kernel: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """What a launch is for. kernel: Triton's; arguments: tensors, descriptors, numbers."""
        name, kinds, parts, size = kernel.fn.__name__, [], [], 0.0
        seen: set[tuple[int, int]] = set()
        for value in (*arguments, *keywords.values()):
            tensor = getattr(value, "base", value)  # of a descriptor
            if not isinstance(tensor, torch.Tensor):
                continue
            known = self.parts.get(_address(tensor))
            here = (tensor.data_ptr(), tensor.numel())
            if known is None or here in seen:
                continue
            seen.add(here)
            kind, part, read = known
            if name.startswith(BOUNDARY) and not part.endswith("site"):
                continue  # named for those that come after it
            kinds += [kind] if kind not in kinds else []
            parts += [part] if part not in parts else []
            size += read * tensor.numel() * tensor.element_size()
        if name == "index_scores":
            kinds, parts, size = ["CSA"], ["index keys"], float(self._keys())
        elif name == "attention_attend":
            parts, size = ["entries"], float(self._entries(keywords["KIND"]))
        return Launched(name, " ".join([*kinds, ", ".join(parts)]).strip(), int(size))

    def _keys(self) -> int:
        key = kv_pack.indexer_entry_bytes(self.key_format, self.config.index_head_dim)
        return self.context // CSA_RATIO * key

    def _entries(self, ratio: int) -> int:
        c, count = self.config, min(self.context, self.config.sliding_window)
        if ratio:
            far = self.context // ratio
            count += min(far, c.index_topk) if ratio == CSA_RATIO else far
        return count * kv_pack.kv_entry_bytes(c.head_dim, c.qk_rope_head_dim)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def observed(model: Model) -> Iterator[list[Launched]]:
    """Triton's launches inside the block, in their order; they are performed."""
    from triton.runtime.jit import JITFunction

    launches: list[Launched] = []
    performed = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        launches.append(model.launched(self, arguments, keywords))
        return performed(self, *arguments, grid=grid, warmup=warmup, **keywords)

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = performed


def step_kernels(call: Callable[[], object], model: Model, boundaries: int) -> StepKernels:
    """Every kernel of a call that was made before, longest first; boundaries: of mHC in it.

    Raises RuntimeError where the profile holds other kernels than were launched.
    """
    torch.cuda.synchronize()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
        observed(model) as launches,
    ):
        for _ in range(REPEAT):
            call()
        torch.cuda.synchronize()
    events = sorted(
        (
            (event.time_range.start, event.time_range.end, event.name)
            for event in profile.events() or ()
            if event.device_type.name == "CUDA"
        ),
    )
    return _matched(launches, events, boundaries)


def _matched(
    launches: Sequence[Launched], events: Sequence[tuple[float, float, str]], boundaries: int
) -> StepKernels:
    """events: (start, end, kernel) of REPEAT calls, by their starts; launches: as many calls'."""
    names = {launch.kernel for launch in launches}
    timed = [(name, end - start) for start, end, name in events if name in names]
    if [name for name, _ in timed] != [launch.kernel for launch in launches]:
        raise RuntimeError(
            f"{len(launches)} launches of Triton's kernels, of which the profile shows {len(timed)}"
            " or in another order: kernels cannot be told apart"
        )
    found: dict[Launched, list[float]] = {}
    for launch, (_, us) in zip(launches, timed, strict=True):
        found.setdefault(launch, []).append(us)
    rows = [
        KernelTime(
            kernel=launch.kernel,
            part=launch.part,
            calls=len(times) // REPEAT,
            us=statistics.median(times),
            num_bytes=launch.num_bytes,
        )
        for launch, times in found.items()
    ]
    rows.sort(key=lambda row: -row.calls * row.us)
    own = sum(row.calls * row.us for row in rows if row.kernel.startswith(BOUNDARY))
    return StepKernels(kernels=rows, boundary=own / boundaries)
