"""One request: a prompt, how to sample, what it has generated, and where its memory lies.

Paper: none (engine).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from fathom.chat.generation import TokenMask
from fathom.engine.sampler import Drawn, Sampler, SamplingParams

_numbers = itertools.count(1)

# Told every token as soon as it is safe to show; True ends the request ("stop").
StopHook = Callable[[int], bool]


class Status(StrEnum):
    """Where a request stands. One that was set back waits like a new one."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """What the engine knows of a request; only the engine changes it.

    `priority`: lower numbers go first. `computed` tokens of prompt and output have passed through
    the model and are in its slot and slabs; entries of the first `known` were in the cache. `chain`
    names its full slabs, of which the first `found` came from the cache, `kept` its checkpoints,
    and `checkpoints` says after how many tokens more are wanted. `finish_reason`: "stop", "length",
    "cancelled" or "error" (then `error` says why).
    """

    prompt: list[int]
    params: SamplingParams
    id: str = ""
    priority: int = 0
    mask: TokenMask | None = None
    stop: StopHook | None = None
    pin: bool = False
    export: bool = False

    number: int = field(default_factory=lambda: next(_numbers))
    sampler: Sampler = field(init=False)
    output: list[Drawn] = field(default_factory=list[Drawn])
    tokens: list[int] = field(init=False)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    error: Exception | None = None

    slot: int | None = None
    slabs: list[int] = field(default_factory=list[int])
    chain: list[bytes] = field(default_factory=list[bytes])
    computed: int = 0
    known: int = 0
    cached_tokens: int = 0
    checkpoints: set[int] = field(default_factory=set[int])
    checkpointed: int = 0
    found: int = 0
    kept: list[bytes] = field(default_factory=list[bytes])
    preemptions: int = 0
    draft: list[int] = field(default_factory=list[int])

    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def __post_init__(self) -> None:
        self.id = self.id or f"request-{self.number}"
        self.sampler = Sampler(self.params, self.prompt)
        self.tokens = list(self.prompt)

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen yet; 1 for a request that is decoding."""
        return len(self.tokens) - self.computed

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.status is Status.FINISHED

    def add(self, drawn: Drawn) -> None:
        """Take note of a sampled token."""
        self.output.append(drawn)
        self.tokens.append(drawn.token)
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
