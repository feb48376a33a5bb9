"""What intrinsics are written with: vectors of eight lanes, loads, stores and loops in LLVM's IR.

Paper: none (infrastructure).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 8  # of one vector
FLOAT, I8, I16, I32, I64 = (ir.FloatType(), *(ir.IntType(n) for n in (8, 16, 32, 64)))
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)
ZERO = ir.Constant(I64, 0)


def pointer(builder: Any, address: Any, kind: Any = I8) -> Any:
    """An address, a 64-bit number, as a pointer."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: Any, pointer: Any, offset: Any, kind: Any) -> Any:
    """A value of any alignment, `offset` items behind a pointer."""
    address = builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())
    return builder.load(address, align=1)


def store(builder: Any, value: Any, pointer: Any, offset: Any) -> None:
    """Write a value `offset` items behind a pointer."""
    address = builder.bitcast(builder.gep(pointer, [offset]), value.type.as_pointer())
    builder.store(value, address, align=1)


def splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    """A vector with the same number in all lanes."""
    kind = ir.VectorType(scalar.type, lanes)
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        first, nothing, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    )


def every(value: float) -> Any:
    """A vector constant with the same number in all lanes: FLOATS of a float, INTS of an int."""
    return ir.Constant(FLOATS if isinstance(value, float) else INTS, [value] * LANES)


def function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """One of LLVM's own functions."""
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, arguments), f"llvm.{name}"
    )


def loop(
    builder: Any,
    count: Any,
    begin: Sequence[Any],
    body: Callable[[Any, list[Any]], list[Any]],
    step: int = 1,
) -> list[Any]:
    """`body(i, values)` gives the next values, for i = 0, step .. below `count`; the last ones.

    The body runs once at least.
    """
    before, inside = builder.basic_block, builder.append_basic_block()
    after = builder.append_basic_block()
    builder.branch(inside)
    builder.position_at_end(inside)
    i, values = builder.phi(I64), [builder.phi(value.type) for value in begin]
    grown = body(i, values)
    following = builder.add(i, ir.Constant(I64, step))
    for phi, first, then in zip([i, *values], [ZERO, *begin], [following, *grown], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, builder.basic_block)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    return grown


def either(
    builder: Any, condition: Any, otherwise: Sequence[Any], then: Callable[[], list[Any]]
) -> list[Any]:
    """The values of `then` if a condition holds, else others."""
    before, inside = builder.basic_block, builder.append_basic_block()
    after = builder.append_basic_block()
    builder.cbranch(condition, inside, after)
    builder.position_at_end(inside)
    found = then()
    last = builder.basic_block
    builder.branch(after)
    builder.position_at_end(after)
    values = [builder.phi(value.type) for value in otherwise]
    for phi, other, own in zip(values, otherwise, found, strict=True):
        phi.add_incoming(other, before)
        phi.add_incoming(own, last)
    return values
