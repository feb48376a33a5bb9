"""Logits of every position of one prompt, from a stored model and without an engine.

Reading order: prompt_logits -> _layers -> run_layers of fathom/model/stored_forward.py.

Paper: §2 (architecture).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fathom.errors import ConfigError
from fathom.kernels import operation
from fathom.model.stored import MergeSite, StoredModel
from fathom.model.stored_cache import SLAB_TOKENS, StoredCache
from fathom.model.stored_forward import run_layers
from fathom.model.stored_work import Chunk, frequencies

_chunk_linear = operation("chunk_linear")
_head_logits = operation("head_logits")
_step_streams = operation("step_streams")
_stream_head = operation("stream_head")

CHUNK = 4096  # tokens that go through the layers together
READ = 256  # rows of logits that are on the device together

Tensor = torch.Tensor


@torch.inference_mode()
def prompt_logits(model: StoredModel, token_ids: Tensor) -> Tensor:
    """token_ids: [tokens] int64 on the model's device. Returns [tokens, vocab] float32, on the CPU.

    A result depends within the formats' rounding on the chunks that a prompt is cut into.
    """
    parts = [_logits(model, streams, model.merge) for streams in _layers(model, token_ids)]
    return torch.cat(parts)


@torch.inference_mode()
def prompt_mtp_logits(model: StoredModel, token_ids: Tensor) -> Tensor:
    """token_ids: [tokens] int64 on the model's device. Returns [tokens - 1, vocab] float32, on the
    CPU: row p reads p + 1 and predicts p + 2. Raises ConfigError for a model without MTP block.
    """
    if not model.mtp:
        raise ConfigError("this model has no MTP block (num_nextn_predict_layers is 0)")
    c, block, following = model.config, model.mtp[0], token_ids[1:]
    cache, turns = _cache(model, (block.layer.ratio,), len(following)), _turns(model)
    at, parts = 0, []
    for streams in _layers(model, token_ids[:-1]):
        ids = following[at : at + len(streams)]
        embedded = _step_streams(ids, model.embed.weight, 1)[:, 0]
        eps = c.rms_norm_eps
        own, _ = _chunk_linear(embedded, *block.e_proj, norm=block.enorm, norm_eps=eps)
        rows = streams.flatten(0, 1)
        before, _ = _chunk_linear(rows, *block.h_proj, norm=block.hnorm, norm_eps=eps)
        chunk = Chunk.create(c, cache, 0, at, ids, turns=turns)
        given = own.unsqueeze(1) + before.view_as(streams)
        found = run_layers(c, [block.layer], cache, chunk, given).streams_now()
        parts.append(_logits(model, found, block.merge))
        at += len(ids)
    return torch.cat(parts)


def _layers(model: StoredModel, token_ids: Tensor) -> Iterator[Tensor]:
    """Chunk by chunk the streams after the last layer, [tokens, streams, hidden]."""
    c = model.config
    cache, turns = _cache(model, c.compress_ratios, len(token_ids)), _turns(model)
    for start in range(0, len(token_ids), CHUNK):
        ids = token_ids[start : start + CHUNK]
        chunk = Chunk.create(c, cache, 0, start, ids, turns=turns)
        streams = _step_streams(ids, model.embed.weight, c.hc_mult)
        yield run_layers(c, model.layers, cache, chunk, streams).streams_now()


def _cache(model: StoredModel, ratios: tuple[int, ...], tokens: int) -> StoredCache:
    slabs = -(-tokens // SLAB_TOKENS)
    return StoredCache.empty(model.config, ratios, 1, slabs, model.embed.weight.device)


def _turns(model: StoredModel) -> Tensor:
    return frequencies(model.config, model.embed.weight.device)


def _logits(model: StoredModel, streams: Tensor, site: MergeSite) -> Tensor:
    c, found = model.config, torch.empty(len(streams), len(model.head))
    weights = (site.fn, site.base, site.scale, site.norm)
    for first in range(0, len(streams), READ):
        rows = range(first, min(first + READ, len(streams)))
        places = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=streams.device)
        hidden = _stream_head(streams, places, *weights, eps=c.hc_eps, norm_eps=c.rms_norm_eps)
        found[rows.start : rows.stop].copy_(_head_logits(hidden, model.head))
    return found
