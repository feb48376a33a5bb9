"""A float32 model's parameters laid out for the compiled rows: flat arrays and tables of offsets.

Weights that bfloat16 represents exactly (every stored FP8, FP4 and BF16 weight) are packed as
bfloat16: the same values in half the bytes.

Paper: none (implementation of §2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from fathom.errors import CheckpointError
from fathom.kernels.numba import layout as at
from fathom.kernels.numba.vector import PANEL


class Packed(NamedTuple):
    """Parameters as the compiled functions take them; see at.Env."""

    half: np.ndarray
    full: np.ndarray
    meta: np.ndarray
    hashes: np.ndarray
    embed: np.ndarray


class Packer:
    """Collects parameters, and in `meta` [layers, columns] where they lie."""

    def __init__(self, layers: int) -> None:
        self._parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])  # bfloat16, float32
        self._sizes = [0, 0]
        self.meta = np.zeros((layers, at.COLUMNS), np.int64)

    def matrix(self, layer: int, which: int, weight: torch.Tensor, parts: int = 1) -> None:
        """weight: [rows, cols], or [parts * rows, cols] or [parts, rows, cols] for several."""
        stacked = weight.detach().float().reshape(parts, -1, weight.shape[-1])
        _, count, cols = stacked.shape
        padded = torch.nn.functional.pad(stacked, (0, 0, 0, -count % PANEL))
        panels = padded.reshape(parts, -1, PANEL, cols).transpose(2, 3).contiguous()
        half = panels.to(torch.bfloat16)
        exact = torch.equal(half.float(), panels)
        if exact:
            flat = half.view(torch.int16).flatten().numpy().view(np.uint16)
        else:
            flat = panels.flatten().numpy()
        column = at.matrix_column(which)
        self.meta[layer, column : column + 4] = self._add(flat, not exact), exact, count, cols

    def vector(self, layer: int, which: int, values: torch.Tensor) -> None:
        """values: any shape, flattened, as float32."""
        flat = values.detach().float().flatten().numpy()
        column = at.vector_column(which)
        self.meta[layer, column : column + 2] = self._add(flat, True), flat.size

    def rounds(self, layer: int, *which: bool) -> None:
        """Which inputs are rounded, in the order of at.R_*."""
        self.meta[layer, at.ROUND_0 : at.ROUND_0 + len(which)] = which

    def _add(self, flat: np.ndarray, full: bool) -> int:
        start = self._sizes[full]
        self._parts[full].append(flat)
        self._sizes[full] += flat.size
        return start

    def packed(self, embed: torch.Tensor, hashes: np.ndarray) -> Packed:
        """Everything collected; embed: [vocab, hidden]."""
        half, full = self._parts
        return Packed(
            np.concatenate([*half, np.zeros(PANEL, np.uint16)]),
            np.concatenate([*full, np.zeros(PANEL, np.float32)]),
            self.meta,
            hashes,
            embed.detach().float().flatten().numpy(),
        )


def pack(model: Any) -> Packed:
    """All blocks of a Transformer, MTP blocks after the main ones; the head lies with layer 0.

    Raises CheckpointError for a routing table that names experts that there are not.
    """
    blocks = [*model.layers, *model.mtp]
    packer = Packer(len(blocks))
    for layer, block in enumerate(blocks):
        _pack_block(packer, layer, block, model.quantized)
    _pack_head(packer, 0, model)
    packer.matrix(0, at.HEAD, model.head.weight)
    for layer, block in enumerate(model.mtp, len(model.layers)):
        _pack_head(packer, layer, block)
        packer.matrix(layer, at.E_PROJ, block.e_proj.weight)
        packer.matrix(layer, at.H_PROJ, block.h_proj.weight)
        packer.vector(layer, at.E_NORM, block.enorm.weight)
        packer.vector(layer, at.H_NORM, block.hnorm.weight)
        packer.meta[layer, at.ROUND_0 + at.R_MTP] = block.e_proj.quantize_input
    hashed = [block.ffn.gate.tid2eid.flatten().numpy() for block in blocks if _is_hashed(block)]
    for table in hashed:  # compiled code does not look whether an expert exists
        if table.size and not 0 <= table.min() <= table.max() < model.config.n_routed_experts:
            raise CheckpointError(
                f"a routing table names experts {table.min()} to {table.max()}; the model has "
                f"{model.config.n_routed_experts}: the checkpoint is damaged"
            )
    return packer.packed(model.embed.weight, np.concatenate([*hashed, np.zeros(1, np.int64)]))


def _is_hashed(block: Any) -> bool:
    return hasattr(block.ffn.gate, "tid2eid")


def _pack_head(packer: Packer, layer: int, owner: Any) -> None:
    packer.matrix(layer, at.HEAD_FN, owner.hc_head_fn)
    packer.vector(layer, at.HEAD_BASE, owner.hc_head_base)
    packer.vector(layer, at.HEAD_SCALE, owner.hc_head_scale)
    packer.vector(layer, at.NORM, owner.norm.weight)


def _pack_block(packer: Packer, layer: int, block: Any, quantized: bool) -> None:
    a, ffn = block.attn, block.ffn
    indexer = getattr(a, "indexer", None)
    matrices = {
        at.ATTN_FN: block.hc_attn_fn,
        at.FFN_FN: block.hc_ffn_fn,
        at.WQ_A: a.wq_a.weight,
        at.WQ_B: a.wq_b.weight,
        at.WKV: a.wkv.weight,
        at.WO_B: a.wo_b.weight,
        at.GATE: ffn.gate.weight,
        at.SHARED_1: ffn.shared_experts.w1.weight,
        at.SHARED_2: ffn.shared_experts.w2.weight,
        at.SHARED_3: ffn.shared_experts.w3.weight,
    }
    vectors = {
        at.ATTN_BASE: block.hc_attn_base,
        at.ATTN_SCALE: block.hc_attn_scale,
        at.FFN_BASE: block.hc_ffn_base,
        at.FFN_SCALE: block.hc_ffn_scale,
        at.ATTN_NORM: block.attn_norm.weight,
        at.FFN_NORM: block.ffn_norm.weight,
        at.Q_NORM: a.q_norm.weight,
        at.KV_NORM: a.kv_norm.weight,
        at.SINK: a.attn_sink,
    }
    if a.ratio:
        matrices |= {
            at.COMP_KV: a.compressor.wkv.weight,
            at.COMP_GATE: a.compressor.wgate.weight,
        }
        vectors |= {at.COMP_APE: a.compressor.ape, at.COMP_NORM: a.compressor.norm.weight}
    if indexer is not None:
        matrices |= {
            at.INDEX_KV: indexer.compressor.wkv.weight,
            at.INDEX_GATE: indexer.compressor.wgate.weight,
            at.INDEX_Q: indexer.wq_b.weight,
            at.INDEX_W: indexer.weights_proj.weight,
        }
        vectors |= {
            at.INDEX_APE: indexer.compressor.ape,
            at.INDEX_NORM: indexer.compressor.norm.weight,
        }
    if not _is_hashed(block):
        vectors[at.GATE_BIAS] = ffn.gate.bias
    for which, weight in matrices.items():
        packer.matrix(layer, which, weight)
    for which, values in vectors.items():
        packer.vector(layer, which, values)
    packer.matrix(layer, at.WO_A, a.wo_a.weight, parts=a.groups)
    experts = ffn.experts
    for which, weight in ((at.W1, experts.w1), (at.W2, experts.w2), (at.W3, experts.w3)):
        packer.matrix(layer, which, weight, parts=weight.shape[0])
    packer.rounds(
        layer,
        a.wq_a.quantize_input,
        a.wq_b.quantize_input,
        a.wo_b.quantize_input,
        experts.quantize_input,
        ffn.shared_experts.w1.quantize_input,
        indexer is not None and indexer.wq_b.quantize_input,
        quantized,
    )


def is_uniform(model: Any) -> bool:
    """Whether inputs that compiled rows round once serve matrices that agree on it."""
    for layer in model.layers:
        a, shared = layer.attn, layer.ffn.shared_experts
        pairs = [(a.wq_a, a.wkv), (shared.w1, shared.w2), (shared.w1, shared.w3)]
        indexer = getattr(a, "indexer", None)
        if indexer is not None:
            pairs.append((a.wq_b, indexer.wq_b))
            if indexer.weights_proj.quantize_input:
                return False
        if any(x.quantize_input != y.quantize_input for x, y in pairs):
            return False
        if any(name.endswith("tile_scale") for name, _ in layer.named_buffers()):
            return False  # FP8 tiles with float32 scales: the reference multiplies their codes
        if a.wo_a.quantize_input or any(
            m.simulate_weight for m in (a.wq_a, a.wq_b, a.wkv, a.wo_a, a.wo_b, layer.ffn.experts)
        ):
            return False
    return True
