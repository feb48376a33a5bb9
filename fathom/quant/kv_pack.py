"""The bytes of cache entries, main KV entries and indexer keys, and of blocks and pages of them.

A main entry of 512 dimensions takes 584 bytes: 448 e4m3 codes, 64 rotary dimensions in BF16
(rotation mixes them with position, so they stay precise), 7 ue8m0 bytes for groups of 64 and one
byte of padding. A block of n entries holds all n * 576 data bytes, then all n * 8 scale bytes, then
zeros up to a multiple of 576.

An indexer key of 128 dimensions takes 68 bytes as MXFP4 (64 packed, 4 ue8m0) or 132 as FP8 (128
e4m3, one float32 scale); a page holds all data bytes, then all scales. Other widths follow the same
rules. Multi-byte values are little endian.

Paper: §2.3.4 (mixed precision of KV entries, FP4 indexer); §3.5.1 (KV cache layout).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fathom.quant import fp4, fp8

__all__ = [
    "KV_GROUP",
    "IndexerFormat",
    "indexer_entry_bytes",
    "kv_block_bytes",
    "kv_entry_bytes",
    "pack_indexer_entries",
    "pack_indexer_page",
    "pack_kv_block",
    "pack_kv_entries",
    "ring_entries",
    "simulate_kv",
    "unpack_indexer_entries",
    "unpack_indexer_page",
    "unpack_kv_block",
    "unpack_kv_entries",
]

KV_GROUP = 64
IndexerFormat = Literal["fp4", "fp8"]

_SCALE_ALIGN = 8  # scale bytes of a main entry are padded to this many


def kv_entry_bytes(head_dim: int = 512, rope_dim: int = 64) -> int:
    """Bytes of one main entry: 584 for the released models.

    Raises ValueError when the rotary part leaves nothing to quantise.
    """
    data, scales = _kv_sizes(head_dim, rope_dim)
    return data + scales


def ring_entries(ring: Tensor, head_dim: int = 512, rope_dim: int = 64) -> int:
    """How many main entries a ring has room for: all their data bytes, then all their scale bytes.

    ring: [..., bytes] uint8
    """
    return ring.shape[-1] // kv_entry_bytes(head_dim, rope_dim)


def kv_block_bytes(entries: int, head_dim: int = 512, rope_dim: int = 64) -> int:
    """Bytes of a block: all entries, padded to a multiple of one entry's data bytes (576).

    Raises ValueError for a negative count, or when the rotary part leaves nothing to quantise.
    """
    data, scales = _kv_sizes(head_dim, rope_dim)
    if entries < 0:
        raise ValueError(f"a block cannot hold {entries} entries")
    return -(-entries * (data + scales) // data) * data


def simulate_kv(kv: Tensor, rope_dim: int = 64) -> Tensor:
    """A main entry as the cache would return it, in the arithmetic of the caller.

    FP8 in groups of 64 over all but the last `rope_dim` dimensions, which are left as they are.
    Gradients pass unchanged; the host does not wait for the device.

    kv: [..., head_dim] float32 or bfloat16
    returns: [..., head_dim] in the dtype of kv
    Raises ValueError for another dtype, or when the rotary part leaves nothing to quantise.
    """
    nope = _nope_dim(kv.shape[-1], rope_dim)
    return torch.cat((fp8.simulate(kv[..., :nope], KV_GROUP), kv[..., nope:]), dim=-1)


def pack_kv_entries(kv: Tensor, rope_dim: int = 64) -> tuple[Tensor, Tensor]:
    """Data bytes and scale bytes of main entries.

    kv: [..., head_dim] float32 or bfloat16; the rotary part is stored as bfloat16
    returns: data [..., 576] uint8, scales [..., 8] uint8 (sizes for head_dim 512)
    Raises ValueError for another dtype, or when the rotary part leaves nothing to quantise.
    """
    nope = _nope_dim(kv.shape[-1], rope_dim)
    codes, scale = fp8.quantize_activations(kv[..., :nope], KV_GROUP)
    rope = _bytes(kv[..., nope:].to(torch.bfloat16))
    data = torch.cat((codes.view(torch.uint8), rope), dim=-1)
    scales = fp8.power_of_two_bytes(scale).view(torch.uint8)
    return data, torch.nn.functional.pad(scales, (0, -scales.shape[-1] % _SCALE_ALIGN))


def unpack_kv_entries(
    data: Tensor,
    scales: Tensor,
    rope_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    check: bool = True,
) -> Tensor:
    """Undo `pack_kv_entries`.

    data: [..., 576] uint8
    scales: [..., 8] uint8
    returns: [..., head_dim] in `dtype`
    Raises ValueError when dtypes or sizes do not fit, and for a NaN scale unless `check` is off
    (looking makes the host wait for the device).
    """
    _check_bytes(data, scales)
    nope = data.shape[-1] - 2 * rope_dim
    expected = _kv_sizes(nope + rope_dim, rope_dim)
    if scales.shape != (*data.shape[:-1], expected[1]):
        raise ValueError(
            f"scale bytes of shape {tuple(scales.shape)} do not fit entry data of shape "
            f"{tuple(data.shape)}: expected {expected[1]} bytes for each entry"
        )
    groups = -(-nope // KV_GROUP)
    scale = fp8.decode_e8m0(scales[..., :groups], check=check)
    codes = data[..., :nope].view(torch.float8_e4m3fn)
    values = fp8.dequantize_activations(codes, scale, KV_GROUP).to(dtype)
    rope = _from_bytes(data[..., nope:], torch.bfloat16).to(dtype)
    return torch.cat((values, rope), dim=-1)


def pack_kv_block(kv: Tensor, rope_dim: int = 64) -> Tensor:
    """The bytes of one block per leading index.

    kv: [..., entries, head_dim] float32 or bfloat16
    returns: [..., kv_block_bytes(entries)] uint8
    Raises ValueError for another dtype, or when the rotary part leaves nothing to quantise.
    """
    data, scales = pack_kv_entries(kv, rope_dim)
    total = kv_block_bytes(kv.shape[-2], kv.shape[-1], rope_dim)
    block = torch.cat((data.flatten(-2), scales.flatten(-2)), dim=-1)
    return torch.nn.functional.pad(block, (0, total - block.shape[-1]))


def unpack_kv_block(
    block: Tensor,
    entries: int,
    head_dim: int = 512,
    rope_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    check: bool = True,
) -> Tensor:
    """Undo `pack_kv_block`. The number of entries cannot be told from the size: padding hides it.

    block: [..., kv_block_bytes(entries)] uint8
    returns: [..., entries, head_dim] in `dtype`
    Raises ValueError when dtype or size do not fit, and for a NaN scale unless `check` is off.
    """
    total = kv_block_bytes(entries, head_dim, rope_dim)
    if block.dtype != torch.uint8 or block.shape[-1] != total:
        raise ValueError(
            f"a block of {entries} entries is {total} uint8 bytes, not {block.shape[-1]} of "
            f"{block.dtype}"
        )
    data, scales = _split(block, entries, *_kv_sizes(head_dim, rope_dim))
    return unpack_kv_entries(data, scales, rope_dim, dtype, check=check)


def indexer_entry_bytes(form: IndexerFormat, index_dim: int = 128) -> int:
    """Bytes of one indexer key: 68 as "fp4", 132 as "fp8" for the released models.

    Raises ValueError for another format, or an odd width as "fp4".
    """
    return sum(_indexer_sizes(form, index_dim))


def pack_indexer_entries(
    k: Tensor, form: IndexerFormat, round_scale: bool = True
) -> tuple[Tensor, Tensor]:
    """Data bytes and scale bytes of indexer keys.

    `round_scale=False` (FP8 only) stores amax / 448 itself, as some engines do.

    k: [..., index_dim] float32 or bfloat16
    returns: data [..., 64 or 128] uint8, scales [..., 4] uint8 (sizes for index_dim 128)
    Raises ValueError for another dtype or format, or an odd width as "fp4".
    """
    _indexer_sizes(form, k.shape[-1])
    if form == "fp4":
        packed, scale = fp4.quantize(k)
        return packed.view(torch.uint8), scale.view(torch.uint8)
    codes, scale = fp8.quantize_activations(k, k.shape[-1], round_scale)
    return codes.view(torch.uint8), _bytes(scale)


def unpack_indexer_entries(
    data: Tensor,
    scales: Tensor,
    form: IndexerFormat,
    dtype: torch.dtype = torch.float32,
    *,
    check: bool = True,
) -> Tensor:
    """Undo `pack_indexer_entries`.

    data: [..., 64 or 128] uint8
    scales: [..., 4] uint8
    returns: [..., index_dim] in `dtype`
    Raises ValueError when dtypes or sizes do not fit, and for a NaN scale unless `check` is off.
    """
    _check_bytes(data, scales)
    if form == "fp4":
        return fp4.dequantize(data, scales.view(torch.float8_e8m0fnu), check=check).to(dtype)
    _indexer_sizes(form, data.shape[-1])
    scale = _from_bytes(scales, torch.float32)
    if check and bool((~torch.isfinite(scale)).any()):
        index = fp8.first_index(~torch.isfinite(scale))
        raise ValueError(f"indexer scale at index {index} is not finite: damaged data")
    codes = data.view(torch.float8_e4m3fn)
    return fp8.dequantize_activations(codes, scale, data.shape[-1]).to(dtype)


def pack_indexer_page(k: Tensor, form: IndexerFormat, round_scale: bool = True) -> Tensor:
    """The bytes of one page per leading index: all data, then all scales, no padding.

    k: [..., entries, index_dim] float32 or bfloat16
    returns: [..., entries * indexer_entry_bytes] uint8
    Raises ValueError for another dtype or format, or an odd width as "fp4".
    """
    data, scales = pack_indexer_entries(k, form, round_scale)
    return torch.cat((data.flatten(-2), scales.flatten(-2)), dim=-1)


def unpack_indexer_page(
    page: Tensor,
    form: IndexerFormat,
    index_dim: int = 128,
    dtype: torch.dtype = torch.float32,
    *,
    check: bool = True,
) -> Tensor:
    """Undo `pack_indexer_page`.

    page: [..., entries * indexer_entry_bytes] uint8
    returns: [..., entries, index_dim] in `dtype`
    Raises ValueError when dtype or size do not fit, and for a NaN scale unless `check` is off.
    """
    sizes = _indexer_sizes(form, index_dim)
    if page.dtype != torch.uint8 or page.shape[-1] % sum(sizes):
        raise ValueError(
            f"an indexer page holds uint8 entries of {sum(sizes)} bytes, not {page.shape[-1]} "
            f"bytes of {page.dtype}"
        )
    data, scales = _split(page, page.shape[-1] // sum(sizes), *sizes)
    return unpack_indexer_entries(data, scales, form, dtype, check=check)


def _nope_dim(head_dim: int, rope_dim: int) -> int:
    if rope_dim < 0 or head_dim <= rope_dim:
        raise ValueError(
            f"an entry of {head_dim} dimensions, {rope_dim} of them rotary, has nothing to quantise"
        )
    return head_dim - rope_dim


def _kv_sizes(head_dim: int, rope_dim: int) -> tuple[int, int]:
    nope = _nope_dim(head_dim, rope_dim)
    groups = -(-nope // KV_GROUP)
    return nope + 2 * rope_dim, -(-groups // _SCALE_ALIGN) * _SCALE_ALIGN


def _indexer_sizes(form: str, index_dim: int) -> tuple[int, int]:
    if form == "fp8":
        return index_dim, 4
    if form != "fp4" or index_dim % 2:
        raise ValueError(
            f"no indexer format {form!r} of {index_dim} dimensions: fp8, or fp4 with an even number"
        )
    return index_dim // 2, -(-index_dim // fp4.GROUP)


def _split(block: Tensor, entries: int, data: int, scales: int) -> tuple[Tensor, Tensor]:
    cut, end = entries * data, entries * (data + scales)
    return (
        block[..., :cut].unflatten(-1, (entries, data)),
        block[..., cut:end].unflatten(-1, (entries, scales)),
    )


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    # A fresh copy: a slice of a larger pool may start at an address that the wider type cannot use.
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def _check_bytes(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.uint8:
            raise ValueError(f"cache entries are uint8 bytes, not {tensor.dtype}")
