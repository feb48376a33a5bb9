"""Running a step's shares: one batch of rows through the model, and what comes of each share.

Paper: none (engine).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fathom.engine.batch import Batch, Piece
from fathom.engine.request import Exported
from fathom.engine.runner import Runner
from fathom.engine.scheduler import Share
from fathom.engine.wal import WriteAheadLog


def execute(runner: Runner, shares: Sequence[Share], device: torch.device) -> int:
    """Compute the shares and write into them what came out; returns the number of rows."""
    pieces, drawn_from, count = [], [], 0
    for share in shares:
        request, end = share.request, share.start + share.count
        if request.remembered is not None:
            share.hidden = request.remembered
            share.logits = runner.head(request.remembered)
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
    runner.forward(Batch.of(pieces, device))
    if drawn_from:
        hidden, logits = runner.logits([row for _, rows in drawn_from for row in rows])
        at = 0
        for share, rows in drawn_from:
            share.hidden = hidden[at : at + len(rows)]
            share.logits = logits[at : at + len(rows)]
            at += len(rows)
    return count


def export(runner: Runner, share: Share) -> Exported | None:
    """What a trainer wants of the rows that a request has taken in, before the next batch runs."""
    if share.row is None:
        return None
    count = share.request.computed - share.start
    rows = slice(share.row, share.row + count)
    return Exported(
        first=share.start,
        hidden=runner.logits(list(range(rows.start, rows.stop)))[0].copy(),
        routing=runner.routing(rows.stop)[:, rows],
        selection=runner.selection(rows.stop)[:, rows],
    )


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
    for row in share.logits:
        drawn = request.sampler.pick(row, request.mask)
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
