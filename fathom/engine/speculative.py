"""Drafting with the MTP block: guesses for the next tokens, checked by the model in one step.

Lossless by construction: the engine draws every token from the model's own logits, with the same
random number as without drafts, and a draft only decides whether the next row is already there.
Rejected tokens leave nothing behind, since all state is addressed by position.

Drafting costs time even when it fails. Unless told otherwise, it measures tokens per second with
and without drafts now and then, and keeps to what is faster.

Paper: §2.1 (Multi-Token Prediction).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fathom.engine.batch import Batch, Memory, Piece
from fathom.engine.metrics import Metrics
from fathom.engine.request import Request, Status
from fathom.engine.runner import Runner, draft_summarised
from fathom.engine.scheduler import Share

PROBE = 48  # steps that a trial of either kind lasts
KEEP = 2000  # steps until the next trial
WORTH = 1.03  # drafts must be this much faster to be used


class Trial:
    """Whether drafts pay: steps with drafts, steps without, then the better of both for a while."""

    def __init__(self, adaptive: bool) -> None:
        self.on = True
        self._adaptive = adaptive
        self._phase, self._left = "with", PROBE
        self._seconds = {"with": 0.0, "without": 0.0}
        self._tokens = {"with": 0, "without": 0}

    def count(self, seconds: float, tokens: int) -> None:
        """Take note of a step that only decoded."""
        if not self._adaptive:
            return
        if self._phase in self._seconds:
            self._seconds[self._phase] += seconds
            self._tokens[self._phase] += tokens
        self._left -= 1
        if self._left:
            return
        if self._phase == "with":
            self._phase, self._left, self.on = "without", PROBE, False
        elif self._phase == "without":
            rate = {p: self._tokens[p] / max(self._seconds[p], 1e-9) for p in self._seconds}
            self.on = rate["with"] > WORTH * rate["without"]
            self._phase, self._left = "keep", KEEP
        else:
            self._phase, self._left, self.on = "with", PROBE, True
            self._seconds = {"with": 0.0, "without": 0.0}
            self._tokens = {"with": 0, "without": 0}


class Drafter:
    """Writes `request.draft`: at most `count` tokens after the last one drawn."""

    def __init__(
        self, runner: Runner, memory: Memory, count: int, metrics: Metrics, adaptive: bool = True
    ) -> None:
        self._runner, self._memory, self._count, self._metrics = runner, memory, count, metrics
        self._window = memory.slots.layout.slabs.config.sliding_window
        self.trial = Trial(adaptive)
        metrics.drafting = count > 0

    def judge(self, proposed: int, accepted: int) -> None:
        """Take note of how many drafts were what the model drew."""
        self._metrics.drafts += proposed > 0
        self._metrics.drafted_tokens += proposed
        self._metrics.accepted_tokens += accepted

    def step_done(self, seconds: float, tokens: int, decoding: bool) -> None:
        """Take note of a step; `decoding`: it had no prompts."""
        if self._count and decoding and tokens:
            self.trial.count(seconds, tokens)
            self._metrics.drafting = self.trial.on

    def propose(self, shares: Sequence[Share]) -> None:
        """Bring the MTP block's window up to date, and draft for requests that are decoding.

        shares: what the last step ran; the runner still holds its rows.
        """
        if not self._count or not self.trial.on:
            return
        pieces: list[Piece] = []
        given: list[int] = []  # rows whose streams the block reads
        owners: list[Request] = []
        for share in shares:
            request = share.request
            if share.row is None or request.status is not Status.RUNNING or request.slot is None:
                continue
            end = min(request.computed, len(request.tokens) - 1)  # the block reads the next token
            first = max(share.start, end - self._window)
            if first >= end:
                continue
            given += range(share.row + first - share.start, share.row + end - share.start)
            following = request.tokens[first + 1 : end + 1]
            pieces.append(Piece(slot=request.slot, start=first, tokens=following))
            owners.append(request)
        room = {r.id: self._room(r) for r in owners}
        for ahead in range(self._count):
            if not pieces:
                return
            ends = (np.cumsum([len(p.tokens) for p in pieces]) - 1).tolist()
            wanted = [request.sampler.wanted(False, ahead) for request in owners]
            found = draft_summarised(self._runner, Batch.of(pieces), given, ends, wanted)
            drafting, (pieces, given, owners) = owners, ([], [], [])
            for number, request in enumerate(drafting):
                if ahead >= room[request.id] or request.slot is None:
                    continue
                summary = found.summaries[number] if found.summaries is not None else None
                token = request.sampler.guess(found.logits[number], ahead, summary)
                request.draft.append(token)
                start = request.computed + ahead
                pieces.append(Piece(slot=request.slot, start=start, tokens=[token]))
                given.append(ends[number])
                owners.append(request)

    def _room(self, request: Request) -> int:
        """How many drafts the request can use."""
        if request.pending != 1:
            return 0
        end = self._memory.slots.layout.slabs.config.max_position_embeddings
        left = request.params.max_tokens - len(request.output) - 1
        return max(0, min(self._count, left, end - len(request.tokens) - 1))
