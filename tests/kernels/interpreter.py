"""Triton's interpreter, with three of its habits mended that take most of its time.

It patches the whole language anew at every call of one device function by another, reduces one
number at a time by any function that it does not know (a sort is made of reductions by "exclusive
or"), and makes a table of all types to look one up. What is computed, and in which order, is the
same here.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np


def interpret() -> None:
    """Have kernels run in the interpreter; before any of them is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if interpreter.ReduceOps.generic_reduce is _reduce_slices:
        return
    interpreter.ReduceOps.generic_reduce = _reduce_slices
    interpreter._get_np_dtype = _looked_up_once(interpreter.tl.dtype, interpreter._get_np_dtype)
    interpreter._patch_lang = _patch_once(interpreter, interpreter._patch_lang)


def _looked_up_once(scalar: type, look_up: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known = functools.cache(look_up)
    return lambda dtype: known(dtype) if type(dtype) is scalar else look_up(dtype)


def _patch_once(interpreter: Any, patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    language = interpreter.tl

    def patch_language(function: Any) -> Any:
        known = (language, language.core)
        named = [v for v in function.__globals__.values() if any(v is one for one in known)]
        if named and not any(language.core.is_builtin(one.load) for one in named):
            return interpreter._LangPatchScope()  # with nothing to restore
        return patch(function)

    return patch_language


def _reduce_slices(self: Any, given: tuple[Any, ...]) -> list[Any]:
    """given: tensors of one shape, reduced together along `self.axis`, or as a whole (None)."""
    rank = len(given[0].handle.data.shape)
    given, axis = self.unravel(given, self.axis)
    arrays = [one.handle.data for one in given]
    whole = [one.dtype for one in given]

    def packed(values: list[Any]) -> tuple[Any, ...]:
        return tuple(self.to_tensor(v, dtype) for v, dtype in zip(values, whole, strict=True))

    found = [array.take(0, axis) for array in arrays]
    shape = found[0].shape
    for number in range(1, arrays[0].shape[axis]):
        later = packed([array.take(number, axis) for array in arrays])
        combined = self.combine_fn.fn(*packed(found), *later)
        combined = combined if isinstance(combined, tuple) else (combined,)
        # One number comes back as an array of one.
        found = [one.handle.data.reshape(shape) for one in combined]
    if self.keep_dims:
        kept = tuple(range(rank)) if self.axis is None else axis
        found = [np.expand_dims(one, kept) for one in found]
    elif self.axis is None:
        found = [one.item() for one in found]
    return list(packed(found))
