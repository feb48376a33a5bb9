"""Memory by its address in compiled code: arrays that lie somewhere, numbers in bytes.

Paper: none (infrastructure).
"""

# numba itself passes an intrinsic its typing context:
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fathom.kernels.numba import llvm
from fathom.kernels.numba.compiled import inner
from fathom.kernels.numba.llvm import FLOAT, I8, I32


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def bits_of_float(typingctx: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), generate


def _make_peek(kind: Any, number: Any) -> Any:
    @intrinsic
    def peek(typingctx: Any, address: Any) -> Any:
        """The number at an address."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return llvm.load(builder, llvm.pointer(builder, args[0]), llvm.ZERO, kind)

        return number(types.int64), generate

    return peek


def _make_poke(number: Any) -> Any:
    @intrinsic
    def poke(typingctx: Any, address: Any, value: Any) -> Any:
        """Write a number at an address."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            llvm.store(builder, args[1], llvm.pointer(builder, args[0]), llvm.ZERO)
            return context.get_dummy_value()

        return types.void(types.int64, number), generate

    return poke


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer, for carray."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return llvm.pointer(builder, args[0])

    return types.voidptr(types.int64), generate


@inner
def address(array: Any) -> Any:
    """Where an array lies, as int64: numba's own number is unsigned, and made float by a sum."""
    return np.int64(array.ctypes.data)


def _make_view(dtype: Any) -> Any:
    @inner
    def view(address: int, count: int) -> Any:
        """The array [count] that lies at an address."""
        return carray(pointer(address), (count,), dtype)

    return view


view_float32, view_int16 = _make_view(np.float32), _make_view(np.int16)
view_int32, view_int64 = _make_view(np.int32), _make_view(np.int64)
view_uint32 = _make_view(np.uint32)
peek_byte, poke_byte = _make_peek(I8, types.uint8), _make_poke(types.uint8)
peek_float, poke_float = _make_peek(FLOAT, types.float32), _make_poke(types.float32)
poke_half = _make_poke(types.uint16)


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address; any address will do."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fetch = llvm.function(builder, "prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
        kinds = (ir.Constant(I32, n) for n in (0, 3, 1))  # to read, keep it close, data
        builder.call(fetch, [llvm.pointer(builder, args[0]), *kinds])
        return context.get_dummy_value()

    return types.void(types.int64), generate
