"""Compiled code that stays on disk until any file of this package changes.

numba looks at the one file that defines a function, not at those that it calls into. Here every
kept function carries the digest of the whole package instead.

Paper: none (infrastructure).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llvmlite import binding
from numba import cfunc, njit, types
from numba.core import caching, config

_config: Any = config  # numba fills it in as it reads the environment
_FILES = sorted(Path(__file__).parent.glob("*.py"))
_DIGEST = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()

# Functions that only compiled code calls. The wrappers that would let Python call each of them, and
# messages about division by zero, take a third of the time of compiling a block.
inner: Any = njit(  # pyright: ignore[reportCallIssue]
    no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy"
)

# Functions that are called in one place: they become part of their caller before it is compiled.
once: Any = njit(  # pyright: ignore[reportCallIssue]
    no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy", inline="always"
)


class _Stamped:
    def get_source_stamp(self) -> Any:
        return _DIGEST


class Chosen(_Stamped, caching.UserProvidedCacheLocator):
    """Below NUMBA_CACHE_DIR, if that is set."""


class Beside(_Stamped, caching.InTreeCacheLocator):
    """Beside the sources, where that can be written."""


class Home(_Stamped, caching.UserWideCacheLocator):
    """Below the user's home."""


@contextlib.contextmanager
def _places() -> Iterator[None]:
    before = _config.CACHE_LOCATOR_CLASSES
    names = [f"{__name__}.{place.__name__}" for place in (Chosen, Beside, Home)]
    _config.CACHE_LOCATOR_CLASSES = before or ",".join(names)
    try:
        yield
    finally:
        _config.CACHE_LOCATOR_CLASSES = before


def compiled(function: Any) -> Any:
    """Compile for callers in Python, without the interpreter's lock, and keep the result on disk.

    Where no place can be written numba refuses to define the function: then every process compiles
    anew.
    """
    try:
        with _places():
            return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)


def must_compile(function: Any) -> bool:
    """Whether the first call of a `compiled` function waits for the compiler: some ten seconds."""
    if function.signatures:
        return False
    folder = getattr(function.stats, "cache_path", None)
    if folder is None:
        return True
    changed = max(file.stat().st_mtime for file in _FILES)
    kept = Path(folder).glob(f"*.{function.__name__}-*.nbi")
    return all(file.stat().st_mtime < changed for file in kept)


_pending: dict[str, tuple[Any, Any]] = {}
_kept: list[Any] = []


def external(name: str, function: Any, arguments: int, fails: bool = False) -> Any:
    """Let compiled code call `function` (integers in, nothing out) by its name, after `link`.

    Callers compile without it: numba would otherwise optimise it again within each of them.
    `fails`: it needs memory of its own. Then it returns 1; callers must look, since where it finds
    none, its error is printed and goes no further, and the call gives 0.
    """
    signature = (types.int64 if fails else types.void)(*[types.int64] * arguments)
    _pending[name] = (function, signature)
    return types.ExternalFunction(name, signature)


def link() -> None:
    """Compile what `external` announced, or load it from disk; once per process."""
    for name, (function, signature) in list(_pending.items()):
        try:
            with _places():
                made = cfunc(signature, cache=True, error_model="numpy")(function)
        except RuntimeError:  # no place to keep it
            made = cfunc(signature, error_model="numpy")(function)
        binding.add_symbol(name, made.address)
        _kept.append(made)
        del _pending[name]
