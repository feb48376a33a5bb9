"""One request: a prompt, how to sample, what it has generated, and where its memory lies.

Paper: none (engine).
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What a trainer replays, for positions from `first` on: hidden [tokens, hidden] float32,
    routing [layers, tokens, topk] int16, selection [layers, tokens, index_topk] int32.
    """

    first: int
    hidden: np.ndarray
    routing: np.ndarray
    selection: np.ndarray


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """What the engine knows of a request; only the engine changes it.

    What was asked: `prompt`, `params`, `priority` (lower numbers go first), `mask`, `stop`, `pin`,
    `export`. What came of it: `output`, and `tokens` = prompt and output; with `export` also
    `exports`, which cover every token once, in order. `finish_reason`: "stop", "length",
    "cancelled" or "error" (then `error` says why).

    Where it stands: `computed` tokens have passed through the model and are in its `slot` and
    `slabs`; entries of the first `known` were in the cache. `chain` names its full slabs, of which
    the first `found` came from the cache, `kept` its checkpoints, `checkpointed` the length at the
    last one, and `checkpoints` says after how many tokens more are wanted. `remembered`: the final
    hidden state [1, hidden] of the last token when all of them were known.
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
    exports: list[Exported] = field(default_factory=list[Exported])
    status: Status = Status.WAITING
    finish_reason: str | None = None
    error: Exception | None = None

    slot: int | None = None
    slabs: list[int] = field(default_factory=list[int])
    chain: list[bytes] = field(default_factory=list[bytes])
    computed: int = 0
    known: int = 0
    found: int = 0
    cached_tokens: int = 0
    checkpoints: set[int] = field(default_factory=set[int])
    checkpointed: int = 0
    kept: list[bytes] = field(default_factory=list[bytes])
    remembered: np.ndarray | None = None
    draft: list[int] = field(default_factory=list[int])
    preemptions: int = 0
    admissions: int = 0
    log: object = None  # its open log

    arrived: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None

    def __post_init__(self) -> None:
        # Logs outlive processes: a number would name another process's request.
        self.id = self.id or uuid.uuid4().hex
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

    def ending(self) -> str | None:
        """Why it ends with the last token, or None; its stop hook is told the token."""
        token = self.output[-1].token
        if token in self.params.stop_token_ids:
            return "stop"
        if self.stop is not None and self.stop(token):
            return "stop"
        return "length" if len(self.output) >= self.params.max_tokens else None
