"""What an engine is told when it is made, and what it accepts.

Paper: none (engine).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fathom.engine.batch import Memory
from fathom.engine.kv_cache import SLAB_TOKENS, SlabLayout, SlabPool, slabs_for
from fathom.engine.runner import Runner
from fathom.engine.runner_memory import Part, runner_parts
from fathom.engine.scheduler import Budget
from fathom.engine.state_cache import DRAFT_ROOM, SlotLayout, SlotPool
from fathom.engine.stored_fit import refusal
from fathom.errors import ConfigError, GenerationError
from fathom.model.config import ModelConfig
from fathom.model.fingerprint import fingerprint
from fathom.model.stored import StoredModel
from fathom.model.stored_work import MOST_TOKENS
from fathom.model.transformer import Transformer

MIB = 2**20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much memory an engine takes and what it keeps.

    cache_tokens: room for compressed entries on the device (default: one whole context and some, or
    a quarter of the free memory if that is less). checkpoint_spacing: tokens between checkpoints of
    the sliding windows within long prompts; 256 is every slab ("full"), 0 none but at turn ends.
    drafts: tokens that the MTP block drafts per step, 0 for none; `drafts_adaptive` stops drafting
    while it does not pay. indexer: "fp4" or "fp8" keys. batch_invariant: False lets a GPU's prompts
    go through matrix products whose bits depend on the cutting; the CPU has no such way.
    prompt_rows: how many tokens of one sequence a step may compute at once where batch-invariant
    prompts go through a GPU's steps: 8 to 64 (default: 64 there, 8 elsewhere), for which every
    sequence's slot has room. Raises ConfigError for values that cannot be.
    """

    max_sequences: int = 16
    cache_tokens: int | None = None
    host_bytes: int = 512 * MIB
    checkpoint_bytes: int = 512 * MIB
    checkpoint_spacing: int = 4096
    budget: Budget = field(default_factory=Budget)
    disk: Path | None = None
    disk_bytes: int = 16 * 1024 * MIB
    wal: Path | None = None
    drafts: int = 0
    drafts_adaptive: bool = True
    indexer: str = "fp4"
    batch_invariant: bool = True
    prompt_rows: int | None = None

    def __post_init__(self) -> None:
        if self.max_sequences < 1 or self.budget.tokens < 1 or self.budget.beside_streams < 1:
            raise ConfigError("an engine needs room for one sequence and a budget of one token")
        for name in ("cache_tokens", "host_bytes", "checkpoint_bytes", "disk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must not be negative, but is {value}")
        if self.checkpoint_spacing < 0 or self.checkpoint_spacing % SLAB_TOKENS:
            raise ConfigError(
                f"checkpoint_spacing must be a multiple of {SLAB_TOKENS} or 0, not "
                f"{self.checkpoint_spacing}"
            )
        if not 0 <= self.drafts < DRAFT_ROOM:
            raise ConfigError(f"drafts must lie in 0 .. {DRAFT_ROOM - 1}, not {self.drafts}")
        if not DRAFT_ROOM <= (self.prompt_rows or DRAFT_ROOM) <= MOST_TOKENS:
            raise ConfigError(
                f"prompt_rows must lie in {DRAFT_ROOM} .. {MOST_TOKENS}, not {self.prompt_rows}"
            )

    @property
    def max_rows(self) -> int:
        """The most rows of a batch: a step's tokens, and each sequence's next one with drafts."""
        return self.budget.tokens + self.max_sequences * (1 + self.drafts)

    def slot_room(self, device: torch.device) -> int:
        """Tokens that a slot's rings hold beyond what the next one looks at."""
        if self.prompt_rows is not None:
            return self.prompt_rows
        return MOST_TOKENS if device.type == "cuda" and self.batch_invariant else DRAFT_ROOM


def check_request(
    prompt: Sequence[int], request_id: str, priority: int, config: ModelConfig
) -> None:
    """Raises GenerationError for what no request can be asked with."""
    check_tokens(prompt, config)
    # Half of a surrogate pair is no text, and could name no log.
    if not isinstance(request_id, str) or any("\ud800" <= c <= "\udfff" for c in request_id):
        raise GenerationError(f"a request's id is text, not {request_id!r}")
    if not isinstance(priority, int):
        raise GenerationError(f"a priority is a whole number, not {priority!r}")


def check_tokens(tokens: Sequence[int], config: ModelConfig) -> None:
    """Raises GenerationError for an empty or too long prompt, or ids outside the vocabulary."""
    if not tokens:
        raise GenerationError("the prompt is empty: give at least one token")
    if len(tokens) > config.max_position_embeddings:
        raise GenerationError(
            f"the prompt has {len(tokens)} tokens, the model's context "
            f"{config.max_position_embeddings}: shorten it"
        )
    for i in tokens:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < config.vocab_size:
            raise GenerationError(
                f"{i!r} is not a token id of this model (0 .. {config.vocab_size - 1})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What an engine takes, known before: `slabs` slabs of compressed entries, `slots` slots of
    windows and tails, and the tables [slots, columns] that say which slab is whose; where a GPU
    serves from stored formats, what its runner needs beside them (`runner`). `weights` are bytes
    that are taken already.
    """

    slab: SlabLayout
    slabs: int
    slot: SlotLayout
    slots: int
    columns: int
    weights: int = 0
    runner: tuple[Part, ...] = ()

    @classmethod
    def of(cls, config: EngineConfig, model: Transformer | StoredModel) -> MemoryPlan:
        """For a model where it lies."""
        device, most = model.embed.weight.device, model.config.max_position_embeddings
        slab = SlabLayout.of(model.config, model.quantized, model.dtype, config.indexer)
        slot = SlotLayout(slab, config.drafts > 0, config.slot_room(device))
        runner: tuple[Part, ...] = ()
        if device.type == "cuda" and refusal(device, model, slab.kv_format) is None:
            runner = runner_parts(
                model,
                max_rows=config.max_rows,
                chunk_tokens=0 if config.batch_invariant else config.budget.tokens,
                columns=Memory.columns(most),
            )
        count = slabs_for(config.cache_tokens or 0)
        if config.cache_tokens is None:
            wanted = slabs_for(most) + 4 * config.max_sequences
            left = free_bytes(device) - config.max_sequences * slot.slot_bytes
            left -= sum(part.size for part in runner)
            count = min(wanted, left // 4 // max(1, slab.slab_bytes))
        return cls(
            slab=slab,
            slabs=max(1, count),
            slot=slot,
            slots=config.max_sequences,
            columns=Memory.columns(most),
            weights=sum(t.nbytes for t in model.state_dict().values()),
            runner=runner,
        )

    @property
    def parts(self) -> list[tuple[str, int]]:
        """(what for, bytes) of everything that sequences take."""
        return [
            (
                f"compressed entries of {self.slabs * SLAB_TOKENS:,} tokens",
                self.slabs * self.slab.slab_bytes,
            ),
            (
                f"windows and tails of {self.slots} sequences with room for {self.slot.room} "
                "tokens of a step",
                self.slots * self.slot.slot_bytes,
            ),
            ("tables", self.slots * self.columns * 4),
        ]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(size for _, size in self.parts)

    @property
    def needed(self) -> int:
        """Bytes that must be free: all parts and what the runner needs."""
        return self.total + sum(part.size for part in self.runner)

    def lines(self) -> list[str]:
        """The plan for a reader, to the byte."""
        runner = [(part.label, part.size) for part in self.runner]
        rows = [*self.parts, *runner, ("total", self.needed)]
        rows.insert(0, ("weights, there already and not in the total", self.weights))
        return [f"{size:>18,}  {label}" for label, size in rows]

    def check(self, free: int) -> None:
        """Raise ConfigError, naming what to change, where `free` bytes do not hold it."""
        if self.needed <= free:
            return
        largest = sorted(self.runner, key=lambda part: -part.size)
        every = [*self.parts, *((part.label, part.size) for part in largest)]
        needed = ", ".join(f"{size:,} for {label}" for label, size in every)
        room = (free - self.needed) // self.slab.slab_bytes + self.slabs
        what = ["cache_tokens", "max_sequences"]
        what += ["prompt_rows"] if self.slot.room > DRAFT_ROOM else []
        what += [part.lower for part in largest if part.lower]
        fits = f"; cache_tokens={room * SLAB_TOKENS} would do" if room > 0 else ""
        raise ConfigError(
            f"the engine needs {self.needed:,} bytes ({needed}), and {free:,} are free: lower "
            f"{' or '.join(dict.fromkeys(what))}{fits}"
        )


def allocate(config: EngineConfig, model: Transformer | StoredModel) -> Memory:
    """An engine's memory where the model lies. Raises ConfigError when there is not enough."""
    device, plan = model.embed.weight.device, MemoryPlan.of(config, model)
    _log.info("event=engine_memory plan=%r", "; ".join(line.strip() for line in plan.lines()))
    if device.type == "cuda":  # elsewhere memory that is never written to costs nothing
        plan.check(free_bytes(device))
    try:
        slabs = SlabPool(plan.slab, plan.slabs, device)
        slots = SlotPool(plan.slot, plan.slots, device)
        return Memory(slabs, slots, model.config.max_position_embeddings)
    except (MemoryError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"no memory for {config.max_sequences} sequences and the cache ({error}): lower "
            "cache_tokens or max_sequences"
        ) from error


def cache_name(
    runner: Runner, memory: Memory, model: Transformer | StoredModel, config: EngineConfig
) -> bytes:
    """Names model, formats and weights; whatever an engine stores is stored under it."""
    layout = memory.slabs.layout
    kind = (
        f"{layout.kv_format} {layout.key_format} {config.drafts > 0} {type(runner).__name__} "
        f"{config.batch_invariant}"
    )
    return fingerprint(model, kind)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nothing uses."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30
