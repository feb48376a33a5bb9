"""Where a request lives: memory is given with what is known of it, grown, kept, taken back.

Paper: §3.5 (KV cache and state cache; prefix reuse).
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from fathom.engine.batch import Memory
from fathom.engine.checkpoints import Checkpoint
from fathom.engine.kv_cache import NO_MEMORY, SLAB_TOKENS, slabs_for
from fathom.engine.metrics import Metrics
from fathom.engine.prefix_cache import Hit, PrefixCache
from fathom.engine.request import Request, Status
from fathom.errors import CacheError, CacheFull

_log = logging.getLogger(__name__)


class Residence:
    """Moves requests into an engine's memory and out of it.

    `spacing`: tokens between checkpoints in long prompts, 0 for none.
    """

    def __init__(self, memory: Memory, cache: PrefixCache, metrics: Metrics, spacing: int) -> None:
        self._memory, self._cache, self._metrics, self._spacing = memory, cache, metrics, spacing
        self._refused = (0, 0, 0)  # the request that found no room, and what room there was

    def check_fits(self, request: Request) -> None:
        """Raises CacheFull for a request that no room would be enough for."""
        room = self._memory.slabs.count
        if slabs_for(len(request.tokens) + 1) > room:
            raise CacheFull(
                f"{len(request.tokens)} tokens and one more do not fit into a cache of "
                f"{room * SLAB_TOKENS}: raise cache_tokens, or ask for less"
            )

    def admit(self, request: Request) -> bool:
        """Give a request its slot and what is known of its tokens; False while there is no room.

        Raises CacheFull as `check_fits`.
        """
        self.check_fits(request)
        slots, slabs = self._memory.slots, self._memory.slabs
        asked = (request.number, slots.free, slabs.releases)
        if not slots.free or asked == self._refused:
            return False
        while True:
            hit = self._cache.find(request.tokens, slots.layout.replay_tokens(), request.export)
            needed = slabs_for(len(request.tokens) + 1) - self._cache.held(hit.chain)
            if self._cache.available() < needed:
                self._refused = asked
                return False
            if self._move_in(request, hit):
                break
        self._admitted(request, hit)
        return True

    def _move_in(self, request: Request, hit: Hit) -> bool:
        """Take the memory of a hit. False when part of it was damaged: it is gone then."""
        request.slot = self._memory.slots.take()
        try:
            slabs = self._cache.acquire(hit.chain)
            if slabs is not None:
                request.slabs = slabs
                self._restore(request, hit)
                return True
        except ValueError as error:  # a record of another shape: it is worth nothing
            _log.warning("event=checkpoint_refused detail=%r", str(error))
            self._cache.checkpoints.forget(hit.key)
        except BaseException:
            self.release(request)
            raise
        self.release(request)
        return False

    def _restore(self, request: Request, hit: Hit) -> None:
        slot, checkpoint = request.slot, hit.checkpoint
        assert slot is not None
        self._memory.slots.data[slot].zero_()
        request.computed = request.checkpointed = hit.start
        request.known, request.chain, request.found = hit.known, list(hit.chain), len(hit.chain)
        if checkpoint is not None:
            self._memory.slots.write(slot, checkpoint.state, checkpoint.position)
            begun = checkpoint.position % SLAB_TOKENS
            if begun and checkpoint.position // SLAB_TOKENS == len(request.slabs):
                request.slabs.append(self._cache.take_slab())
                self._memory.slabs.write(request.slabs[-1], checkpoint.entries, begun)
            if checkpoint.position == len(request.tokens):
                width = self._memory.slabs.layout.config.hidden_size
                request.remembered = np.frombuffer(checkpoint.hidden, np.float32).reshape(1, width)
        table = torch.tensor(request.slabs, dtype=torch.int32)
        self._memory.tables[slot, : len(request.slabs)] = table

    def _admitted(self, request: Request, hit: Hit) -> None:
        prompt = len(request.prompt)
        request.admissions += 1
        request.exports.clear()  # all of them come again
        if request.admissions == 1:
            request.cached_tokens = min(hit.start, prompt)
            self._metrics.prompt_tokens += prompt
            self._metrics.cached_tokens += request.cached_tokens
        spacing, openings = self._spacing, self._cache.openings
        request.checkpoints = {prompt}
        if spacing:
            request.checkpoints |= set(range(spacing, len(request.tokens), spacing))
        opening = openings.shared(request.tokens, hit.start)
        if opening:
            request.checkpoints.add(opening)
        openings.add(request.tokens)

    def grow(self, request: Request, tokens: int) -> bool:
        """Slabs for a sequence of this length; False when there are none left."""
        assert request.slot is not None
        while len(request.slabs) < slabs_for(tokens):
            try:
                slab = self._cache.take_slab()
            except CacheFull:
                return False
            self._memory.tables[request.slot, len(request.slabs)] = slab
            request.slabs.append(slab)
        return True

    def set_back(self, request: Request, keep: bool = True) -> None:
        """Take a running request's memory; with `keep`, what it computed stays in the cache for as
        long as there is room.
        """
        if keep:
            self.checkpoint(request)
        self.release(request)
        request.preemptions += 1
        self._metrics.preemptions += 1

    def release(self, request: Request) -> None:
        """Take a request's slot and slabs."""
        for slab in request.slabs:
            self._memory.slabs.release(slab)
        if request.slot is not None:
            self._memory.slots.release(request.slot)
        request.slot, request.remembered = None, None
        request.slabs, request.chain, request.draft = [], [], []
        request.computed = request.known = 0

    def commit(self, request: Request) -> None:
        """Share the slabs that the request has filled."""
        full = request.computed // SLAB_TOKENS
        if request.status is not Status.RUNNING or full <= len(request.chain):
            return
        done = len(request.chain)
        request.chain = self._cache.chain(request.tokens[: full * SLAB_TOKENS], request.chain)
        for i in range(done, full):
            self._cache.keep_slab(request.chain[i], request.slabs[i])

    def checkpoint_if_due(self, request: Request, hidden: np.ndarray | None) -> None:
        """Keep the state where a checkpoint is wanted; hidden: as for `checkpoint`."""
        due = request.computed in request.checkpoints or (
            self._spacing and request.computed % self._spacing == 0
        )
        if due and request.computed != request.checkpointed:
            self.checkpoint(request, hidden)

    def checkpoint(self, request: Request, hidden: np.ndarray | None = None) -> None:
        """Keep the state after the tokens computed so far, if the host has memory for it: without
        it time is lost, and nothing else.

        hidden: [rows, hidden], the first of the last of these tokens; kept at the prompt's end.
        """
        if not request.computed or request.slot is None or request.computed < request.known:
            return
        self.commit(request)
        try:
            self._keep_state(request, hidden)
        except NO_MEMORY as error:
            _log.warning("event=checkpoint_not_kept detail=%r", repr(error))

    def _keep_state(self, request: Request, hidden: np.ndarray | None) -> None:
        assert request.slot is not None
        position = request.computed
        full, begun = divmod(position, SLAB_TOKENS)
        last = b""
        if position == len(request.prompt) and hidden is not None:
            last = hidden[0].astype(np.float32).tobytes()
        parent = request.chain[full - 1] if full else self._cache.root
        key = self._cache.checkpoints.keep(
            parent,
            Checkpoint(
                position=position,
                tail=tuple(request.tokens[full * SLAB_TOKENS : position]),
                state=self._memory.slots.read(request.slot, position),
                entries=self._memory.slabs.read(request.slabs[full], begun) if begun else b"",
                hidden=last,
            ),
        )
        request.checkpointed = position
        request.kept.append(key)

    def save(self, request: Request) -> bytes:
        """Write a request's conversation so far to disk, as PrefixCache.save."""
        if request.status is not Status.RUNNING:
            return self._cache.save(request.tokens)
        self.checkpoint(request)
        return self._cache.save(request.tokens[: request.computed])

    def leave(self, request: Request) -> None:
        """Keep a request's end in the cache, on disk if there is one, as it goes for good."""
        if request.slot is None:
            return
        try:
            if request.computed != request.checkpointed:
                self.checkpoint(request)
            computed = request.tokens[: request.computed]
            self._cache.openings.add(computed)
            full = request.computed // SLAB_TOKENS
            self._cache.persist(request.chain[:full], request.kept, request.found)
            if request.pin and self._cache.disk is not None:
                self._cache.save(computed)
            elif request.pin:
                self._cache.pin(computed)
        except (CacheError, *NO_MEMORY) as error:
            _log.warning("event=cache_not_written detail=%r", str(error))
