"""Whose turn it is: calls from several threads run one by one, and never inside a step.

Paper: none (engine).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from fathom.errors import GenerationError

P = ParamSpec("P")
T = TypeVar("T")


class Stepping(Protocol):
    """What takes turns: `stepping` while a step runs, whose state is half moved on."""

    lock: threading.RLock
    stepping: bool

    def settle(self) -> None:
        """Do what had to wait for the end of a step."""
        ...


E = TypeVar("E", bound=Stepping)


def between_steps(method: Callable[Concatenate[E, P], T]) -> Callable[Concatenate[E, P], T]:
    """Let a method run alone. Raises GenerationError when it is called from within a step."""

    @functools.wraps(method)
    def alone(self: E, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock:
            if self.stepping:
                raise GenerationError(
                    f"{method.__name__} was called by a mask or a stop hook: they may submit and "
                    "cancel, nothing else"
                )
            self.settle()
            return method(self, *args, **kwargs)

    return alone
