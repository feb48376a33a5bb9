"""Running a step's shares: one batch of rows through the model, and what comes of each share.

Paper: none (engine).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fathom.engine.batch import Batch, Piece
from fathom.engine.request import Exported, Request
from fathom.engine.runner import Runner, head_summarised, summarised
from fathom.engine.sampler import Wanted
from fathom.engine.scheduler import Share
from fathom.engine.wal import WriteAheadLog


def execute(runner: Runner, shares: Sequence[Share]) -> int:
    """Compute the shares and write into them what came out; returns the number of rows."""
    pieces, drawn_from, count = [], [], 0
    for share in shares:
        request, end = share.request, share.start + share.count
        if request.remembered is not None:
            share.hidden = request.remembered
            found = head_summarised(runner, share.hidden, _wanted(request, range(1)))
            share.logits, share.summaries = found.logits, found.summaries
            continue
        tokens = request.tokens[share.start : end] + request.draft
        assert request.slot is not None
        pieces.append(
            Piece(slot=request.slot, start=share.start, tokens=tokens, known=request.known)
        )
        share.row = count
        if end == len(request.tokens):
            drawn_from.append((share, range(count + share.count - 1, count + len(tokens))))
        count += len(tokens)
    if not pieces:
        return 0
    runner.export = any(share.request.export for share in shares)
    runner.forward(Batch.of(pieces))
    if drawn_from:
        wanted = [w for share, rows in drawn_from for w in _wanted(share.request, rows)]
        hidden, logits, summaries = summarised(
            runner, [row for _, rows in drawn_from for row in rows], wanted
        )
        at = 0
        for share, rows in drawn_from:
            own = slice(at, at + len(rows))
            share.hidden = hidden[own] if hidden is not None else None
            share.logits = logits[own]
            share.summaries = summaries[own] if summaries is not None else None
            at += len(rows)
    return count


def _wanted(request: Request, rows: range) -> list[Wanted]:
    """What the draws of a request's last rows need, each for the case that all before it stand."""
    ends = len(request.tokens) == len(request.prompt)  # there a checkpoint keeps the hidden state
    masked = request.mask is not None
    return [request.sampler.wanted(masked, ahead, hidden=ends) for ahead in range(len(rows))]


def export(runner: Runner, share: Share) -> Exported | None:
    """What a trainer wants of the rows that a request has taken in, before the next batch runs."""
    if share.row is None:
        return None
    count = share.request.computed - share.start
    rows = slice(share.row, share.row + count)
    return Exported(
        first=share.start,
        hidden=_hidden(runner, rows),
        routing=runner.routing(rows.stop)[:, rows],
        selection=runner.selection(rows.stop)[:, rows],
    )


def _hidden(runner: Runner, rows: slice) -> np.ndarray:
    """Final hidden states [rows, hidden] of rows of the last batch, without their logits."""
    which = list(range(rows.start, rows.stop))
    found = summarised(runner, which, [Wanted(whole=False, hidden=True)] * len(which)).hidden
    assert found is not None
    return found.copy()


def draw(share: Share, wal: WriteAheadLog | None) -> str | None:
    """Draw a token per row while drafts are what is drawn: each is logged, then shown.

    Returns why the request ends, or None. Raises whatever its mask, its stop hook, its logits or
    its log have to say.
    """
    if share.logits is None:
        return None
    request, reason, count = share.request, None, 0
    request.remembered = None
    draft, request.draft = request.draft, []
    share.drafted = len(draft)
    for number, row in enumerate(share.logits):
        summary = share.summaries[number] if share.summaries is not None else None
        drawn = request.sampler.pick(row, request.mask, summary)
        if wal is not None:
            wal.append(request, drawn)
        request.add(drawn)
        count += 1
        reason = request.ending()
        if reason is not None or count > len(draft) or drawn.token != draft[count - 1]:
            break
    request.computed += count - 1
    return reason


def out_of_memory(error: BaseException) -> bool:
    """Whether a step failed because memory ran out, of whatever device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
