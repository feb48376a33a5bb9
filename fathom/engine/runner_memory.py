"""What a runner from stored formats takes on a GPU beside weights and caches, known before.

Paper: none (engine).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fathom.checkpoint.manifest import DTYPE_BYTES, manifest
from fathom.engine.kv_cache import SLAB_TOKENS
from fathom.engine.stored_steps import BUCKETS, bounds
from fathom.model.config import ModelConfig
from fathom.model.prefill_memory import prefill_operations
from fathom.model.step_memory import head_bytes, plan_step, results
from fathom.model.stored import StoredModel
from fathom.model.stored_work import MOST_TOKENS
from fathom.model.transformer import Transformer

# Not counted one by one: nodes of graphs, kernels' code, what the allocator rounds up.
RESERVE = 256 * 2**20

CONTEXT = "the model's max_position_embeddings"
ROWS = "budget.tokens"


class Part(NamedTuple):
    """Bytes, what they are for, and what makes them fewer, if anything does."""

    label: str
    size: int
    lower: str = ""


def runner_parts(
    model: Transformer | StoredModel,
    *,
    max_rows: int,
    chunk_tokens: int,
    columns: int,
) -> tuple[Part, ...]:
    """For a model that is served from stored formats on a GPU.

    max_rows: of a batch; chunk_tokens: of the longest chunk of a prompt, 0 where prompts go through
    steps; columns: slabs of the longest sequence.
    """
    c, context = model.config, columns * SLAB_TOKENS
    parts = []
    if not isinstance(model, StoredModel):
        parts.append(Part("weights in their stored formats, a second copy", stored_bytes(model)))
    streams = max_rows * c.hc_mult * c.hidden_size * model.dtype.itemsize
    kept = streams * (2 if c.num_mtp_layers else 1)
    parts.append(Part(f"streams of {max_rows:,} rows", kept, ROWS))
    choices = max_rows * c.num_hidden_layers * (c.num_experts_per_tok + c.index_topk) * 4
    parts.append(Part("choices, once a trainer asks for them", choices, ROWS))
    step = plan_step(c, MOST_TOKENS, context, model.dtype)
    label = f"a step of {MOST_TOKENS} rows up to {context:,} positions"
    parts.append(Part(f"{label}, in the graphs' pool ({step.largest[0]})", step.working, CONTEXT))
    parts.append(Part("what graphs leave", _left_by_graphs(c, context), CONTEXT))
    # Steps run once before they are captured, in memory that chunks of prompts take afterwards.
    once = Part(f"{label}, once before it is captured", step.working, CONTEXT)
    if chunk_tokens:
        name, chunk = _chunk(c, chunk_tokens, context)
        if chunk > once.size:
            once = Part(f"a chunk of {chunk_tokens:,} tokens ({name})", chunk, ROWS)
    parts += [once, Part("reserve", RESERVE)]
    return tuple(parts)


def stored_bytes(model: Transformer) -> int:
    """Bytes of a Transformer's weights as a checkpoint of its formats holds them."""
    embed = model.config.vocab_size * model.config.hidden_size
    total = embed * (model.dtype.itemsize - torch.bfloat16.itemsize)
    for spec in manifest(model.config):
        count = DTYPE_BYTES[spec.dtype]
        for size in spec.shape:
            count *= size
        total += count
    return total


def _chunk(c: ModelConfig, tokens: int, context: int) -> tuple[str, int]:
    """(the operation that needs most, its bytes)."""
    operations = prefill_operations(c, c.compress_ratios, tokens, context)
    name, own = max(operations, key=lambda item: sum(item[1].values()))
    return name, sum(own.values()) + results(c, tokens, c.num_hidden_layers)


def _left_by_graphs(c: ModelConfig, context: int) -> int:
    """A graph for every number of rows: of steps for every bound, of heads for every merge."""
    rows, merges = sum(BUCKETS), 1 + c.num_mtp_layers
    steps = len(bounds(context)) * results(c, rows, c.num_hidden_layers)
    return steps + merges * head_bytes(c, rows)
