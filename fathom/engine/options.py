"""What an engine is told when it is made, and what it accepts.

Paper: none (engine).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fathom.engine.batch import Memory
from fathom.engine.kv_cache import SLAB_TOKENS, SlabLayout, SlabPool, slabs_for
from fathom.engine.runner import Runner
from fathom.engine.scheduler import Budget
from fathom.engine.state_cache import DRAFT_ROOM, SlotLayout, SlotPool
from fathom.errors import ConfigError, GenerationError
from fathom.model.config import ModelConfig
from fathom.model.fingerprint import fingerprint
from fathom.model.stored import StoredModel
from fathom.model.transformer import Transformer

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much memory an engine takes and what it keeps.

    cache_tokens: room for compressed entries on the device (default: one whole context and some, or
    a quarter of the free memory if that is less). checkpoint_spacing: tokens between checkpoints of
    the sliding windows within long prompts; 256 is every slab ("full"), 0 none but at turn ends.
    drafts: tokens that the MTP block drafts per step, 0 for none; `drafts_adaptive` stops drafting
    while it does not pay. indexer: "fp4" or "fp8" keys. batch_invariant: False lets a GPU's prompts
    and large batches go through matrix products whose bits depend on the cutting; the CPU has no
    such way.
    Raises ConfigError for values that cannot be.
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


def check_request(
    prompt: Sequence[int], request_id: str, priority: int, config: ModelConfig
) -> None:
    """Raises GenerationError for what no request can be asked with."""
    check_tokens(prompt, config)
    if not isinstance(request_id, str):
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


def allocate(config: EngineConfig, model: Transformer | StoredModel) -> Memory:
    """An engine's memory where the model lies. Raises ConfigError when there is not enough."""
    device, most = model.embed.weight.device, model.config.max_position_embeddings
    layout = SlabLayout.of(model.config, model.quantized, model.dtype, config.indexer)
    count = slabs_for(config.cache_tokens or 0)
    if config.cache_tokens is None:
        wanted = slabs_for(most) + 4 * config.max_sequences
        count = min(wanted, free_bytes(device) // 4 // max(1, layout.slab_bytes))
    try:
        slabs = SlabPool(layout, max(1, count), device)
        slots = SlotPool(SlotLayout(layout, config.drafts > 0), config.max_sequences, device)
        return Memory(slabs, slots, most)
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
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30
