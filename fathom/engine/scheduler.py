"""Which tokens of which requests the next step computes.

Streams that are decoding come first, one token each; what is left of the step's budget goes to
prompts, in equal parts, so that a long prompt delays neither running streams nor a short prompt by
more than a step. Requests are admitted in order, when there is memory for all of their tokens; one
that asks what a running prompt asks waits for its answer in the cache. When memory runs out later,
the least important request is set back and takes up its work again afterwards.

Paper: none (engine).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fathom.engine.request import Request, Status


@dataclass(slots=True, kw_only=True)
class Share:
    """The tokens of one request in a step: `count` from `start` on, then its drafts.

    Once it has run, `row` is its first row in the batch (None: nothing had to be computed), and
    `logits` (of each row [vocab], or None where its summary is enough) and `summaries` [rows, 6]
    (None where a runner makes none) belong to its last token and the drafts behind it, if a token
    can be drawn there; `hidden` [rows, hidden] where the prompt ends; `drafted` counts the drafts.
    `done`: the request has taken note of it.
    """

    request: Request
    start: int
    count: int
    row: int | None = None
    hidden: np.ndarray | None = None
    logits: Sequence[np.ndarray | None] | np.ndarray | None = None
    summaries: np.ndarray | None = None
    drafted: int = 0
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Tokens of a step: with prompts alone, and of prompts when streams are decoding, which are
    never more.
    """

    tokens: int = 1024
    beside_streams: int = 128


class Scheduler:
    """Keeps requests in order. `grow` takes memory and says whether there was enough."""

    def __init__(
        self,
        budget: Budget,
        grow: Callable[[Request, int], bool],
        preempt: Callable[[Request], None],
    ) -> None:
        self.budget, self._grow, self._preempt = budget, grow, preempt
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.paused: list[Request] = []

    @property
    def requests(self) -> list[Request]:
        """All requests, whatever they are doing."""
        return [*self.running, *self.waiting, *self.paused]

    def add(self, request: Request) -> None:
        """Put a request in line: by priority, then by age."""
        request.status = Status.WAITING
        self.waiting.append(request)
        self.waiting.sort(key=_rank)

    def pause(self, request: Request) -> None:
        """Keep a request out of line until it is added again."""
        self.remove(request)
        request.status = Status.PAUSED
        self.paused.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        for line in (self.waiting, self.running, self.paused):
            if request in line:
                line.remove(request)

    def schedule(self, admit: Callable[[Request], bool]) -> list[Share]:
        """The next step's shares. Admits, and preempts where memory has run out.

        admit: takes memory for a request and says whether there was enough. It is the engine's, and
        not kept: an engine that nobody holds ought to go at once, with its memory.
        """
        self._admit_waiting(admit)
        ranked = sorted(self.running, key=_rank)
        shares = []
        for request in ranked:
            if request.pending <= 1 and self._fits(request, request.pending + len(request.draft)):
                shares.append(Share(request=request, start=request.computed, count=request.pending))
        prompts = [r for r in ranked if r.pending > 1]
        left = self.budget.tokens  # a runner has room for no more
        if shares:
            left = min(left, self.budget.beside_streams)
        for i, request in enumerate(prompts):
            if left <= 0 or request.status is not Status.RUNNING:
                continue
            part = max(1, left // (len(prompts) - i))
            count = self._cut(request, min(part, request.pending))
            if self._fits(request, count):
                shares.append(Share(request=request, start=request.computed, count=count))
                left -= count
        return [s for s in shares if s.request.status is Status.RUNNING]

    def _admit_waiting(self, admit: Callable[[Request], bool]) -> None:
        for request in list(self.waiting):
            if self._is_being_computed(request):
                continue
            if not admit(request):
                break
            if not request.finished:  # it may be one that can never be served
                request.status = Status.RUNNING
                self.waiting.remove(request)
                self.running.append(request)

    def _is_being_computed(self, request: Request) -> bool:
        """Whether a running prompt is this one: when it has been read, this one costs nothing."""
        return not request.export and any(
            other.pending > 1 and other.tokens == request.tokens for other in self.running
        )

    def _fits(self, request: Request, count: int) -> bool:
        """Memory for `count` more tokens, by setting back less important requests if need be."""
        while request.status is Status.RUNNING:
            if self._grow(request, request.computed + count):
                return True
            victim = max(self.running, key=_rank)
            self.running.remove(victim)
            self._preempt(victim)
            self.add(victim)
        return False

    @staticmethod
    def _cut(request: Request, count: int) -> int:
        """End a share where a checkpoint is wanted."""
        end = request.computed + count
        ahead = [p for p in request.checkpoints if request.computed < p < end]
        return min(ahead) - request.computed if ahead else count


def _rank(request: Request) -> tuple[int, int]:
    return request.priority, request.number
