"""A float32 model's parameters laid out for the compiled rows: flat arrays and tables of offsets.

Weights that bfloat16 represents exactly (every stored FP8, FP4 and BF16 weight) are packed as
bfloat16: the same values in half the bytes.

Paper: none (implementation of §2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from fathom.kernels.numba import rows
from fathom.kernels.numba.vector import PANEL


class Packed(NamedTuple):
    """Parameters as the compiled functions take them; see rows.Env."""

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
        self.meta = np.zeros((layers, rows.COLUMNS), np.int64)

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
        column = rows.matrix_column(which)
        self.meta[layer, column : column + 4] = self._add(flat, not exact), exact, count, cols

    def vector(self, layer: int, which: int, values: torch.Tensor) -> None:
        """values: any shape, flattened, as float32."""
        flat = values.detach().float().flatten().numpy()
        column = rows.vector_column(which)
        self.meta[layer, column : column + 2] = self._add(flat, True), flat.size

    def rounds(self, layer: int, *which: bool) -> None:
        """Which inputs are rounded, in the order of rows.R_*."""
        self.meta[layer, rows.ROUND_0 : rows.ROUND_0 + len(which)] = which

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
    """All blocks of a Transformer, MTP blocks after the main ones; the head lies with layer 0."""
    blocks = [*model.layers, *model.mtp]
    packer = Packer(len(blocks))
    for layer, block in enumerate(blocks):
        _pack_block(packer, layer, block, model.quantized)
    _pack_head(packer, 0, model)
    packer.matrix(0, rows.HEAD, model.head.weight)
    for layer, block in enumerate(model.mtp, len(model.layers)):
        _pack_head(packer, layer, block)
        packer.matrix(layer, rows.E_PROJ, block.e_proj.weight)
        packer.matrix(layer, rows.H_PROJ, block.h_proj.weight)
        packer.vector(layer, rows.E_NORM, block.enorm.weight)
        packer.vector(layer, rows.H_NORM, block.hnorm.weight)
        packer.meta[layer, rows.ROUND_0 + rows.R_MTP] = block.e_proj.quantize_input
    hashed = [block.ffn.gate.tid2eid.flatten().numpy() for block in blocks if _is_hashed(block)]
    return packer.packed(model.embed.weight, np.concatenate([*hashed, np.zeros(1, np.int64)]))


def _is_hashed(block: Any) -> bool:
    return hasattr(block.ffn.gate, "tid2eid")


def _pack_head(packer: Packer, layer: int, owner: Any) -> None:
    packer.matrix(layer, rows.HEAD_FN, owner.hc_head_fn)
    packer.vector(layer, rows.HEAD_BASE, owner.hc_head_base)
    packer.vector(layer, rows.HEAD_SCALE, owner.hc_head_scale)
    packer.vector(layer, rows.NORM, owner.norm.weight)


def _pack_block(packer: Packer, layer: int, block: Any, quantized: bool) -> None:
    a, ffn = block.attn, block.ffn
    indexer = getattr(a, "indexer", None)
    matrices = {
        rows.ATTN_FN: block.hc_attn_fn,
        rows.FFN_FN: block.hc_ffn_fn,
        rows.WQ_A: a.wq_a.weight,
        rows.WQ_B: a.wq_b.weight,
        rows.WKV: a.wkv.weight,
        rows.WO_B: a.wo_b.weight,
        rows.GATE: ffn.gate.weight,
        rows.SHARED_1: ffn.shared_experts.w1.weight,
        rows.SHARED_2: ffn.shared_experts.w2.weight,
        rows.SHARED_3: ffn.shared_experts.w3.weight,
    }
    vectors = {
        rows.ATTN_BASE: block.hc_attn_base,
        rows.ATTN_SCALE: block.hc_attn_scale,
        rows.FFN_BASE: block.hc_ffn_base,
        rows.FFN_SCALE: block.hc_ffn_scale,
        rows.ATTN_NORM: block.attn_norm.weight,
        rows.FFN_NORM: block.ffn_norm.weight,
        rows.Q_NORM: a.q_norm.weight,
        rows.KV_NORM: a.kv_norm.weight,
        rows.SINK: a.attn_sink,
    }
    if a.ratio:
        matrices |= {
            rows.COMP_KV: a.compressor.wkv.weight,
            rows.COMP_GATE: a.compressor.wgate.weight,
        }
        vectors |= {rows.COMP_APE: a.compressor.ape, rows.COMP_NORM: a.compressor.norm.weight}
    if indexer is not None:
        matrices |= {
            rows.INDEX_KV: indexer.compressor.wkv.weight,
            rows.INDEX_GATE: indexer.compressor.wgate.weight,
            rows.INDEX_Q: indexer.wq_b.weight,
            rows.INDEX_W: indexer.weights_proj.weight,
        }
        vectors |= {
            rows.INDEX_APE: indexer.compressor.ape,
            rows.INDEX_NORM: indexer.compressor.norm.weight,
        }
    if not _is_hashed(block):
        vectors[rows.GATE_BIAS] = ffn.gate.bias
    for which, weight in matrices.items():
        packer.matrix(layer, which, weight)
    for which, values in vectors.items():
        packer.vector(layer, which, values)
    packer.matrix(layer, rows.WO_A, a.wo_a.weight, parts=a.groups)
    experts = ffn.experts
    for which, weight in ((rows.W1, experts.w1), (rows.W2, experts.w2), (rows.W3, experts.w3)):
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
