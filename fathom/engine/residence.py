"""Where a request lives: memory is given with what is known of it, grown, kept, taken back.

Paper: §3.5 (KV cache and state cache; prefix reuse).
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from fathom.engine.batch import Memory
from fathom.engine.kv_cache import SLAB_TOKENS, slabs_for
from fathom.engine.metrics import Metrics
from fathom.engine.prefix_cache import Checkpoint, Hit, PrefixCache
from fathom.engine.request import Request, Status
from fathom.errors import CacheError, CacheFull

_log = logging.getLogger(__name__)


class Residence:
    """Moves requests into an engine's memory and out of it.

    `spacing`: tokens between checkpoints in long prompts, 0 for none. `hidden`: final hidden states
    [1, hidden] of requests whose whole prompt was known; `last_hidden`: of the last row that was
    drawn from.
    """

    def __init__(self, memory: Memory, cache: PrefixCache, metrics: Metrics, spacing: int) -> None:
        self._memory, self._cache, self._metrics, self._spacing = memory, cache, metrics, spacing
        self.hidden: dict[str, np.ndarray] = {}
        self.last_hidden: dict[str, np.ndarray] = {}

    def admit(self, request: Request) -> bool:
        """Give a request its slot and what is known of its tokens; False while there is no room."""
        slots = self._memory.slots
        if not slots.free:
            return False
        hit = self._cache.find(request.tokens, slots.layout.replay_tokens())
        shared = self._cache.held(hit.chain)
        if self._cache.available() < slabs_for(len(request.tokens) + 1) - shared:
            return False
        request.slot = slots.take()
        slots.data[request.slot].zero_()
        request.slabs = []
        for key in hit.chain:
            slab = self._cache.acquire(key)
            if slab is None:  # its file was damaged: look again without it
                self.release(request)
                return self.admit(request)
            request.slabs.append(slab)
        try:
            self._restore(request, hit)
        except ValueError as error:  # a record of another shape: it is worth nothing
            _log.warning("event=checkpoint_refused detail=%r", str(error))
            self.release(request)
            self._cache.forget_checkpoint(hit)
            return self.admit(request)
        self._memory.tables[request.slot, : len(request.slabs)] = torch.tensor(
            request.slabs, dtype=torch.int32
        )
        self._admitted(request, hit)
        return True

    def _restore(self, request: Request, hit: Hit) -> None:
        slot, checkpoint = request.slot, hit.checkpoint
        assert slot is not None
        request.computed, request.known = hit.start, hit.known
        request.chain, request.found = list(hit.chain), len(hit.chain)
        if checkpoint is None:
            return
        self._memory.slots.write(slot, checkpoint.state, checkpoint.position)
        begun = checkpoint.position % SLAB_TOKENS
        if begun and checkpoint.position // SLAB_TOKENS == len(request.slabs):
            request.slabs.append(self._cache.take_slab())
            self._memory.slabs.write(request.slabs[-1], checkpoint.entries, begun)
        if checkpoint.position == len(request.tokens):
            self.hidden[request.id] = np.frombuffer(checkpoint.hidden, np.float32)[None]

    def _admitted(self, request: Request, hit: Hit) -> None:
        prompt = len(request.prompt)
        if request.preemptions == 0:
            request.cached_tokens = min(hit.start, prompt)
            self._metrics.prompt_tokens += prompt
            self._metrics.cached_tokens += request.cached_tokens
        spacing = self._spacing
        request.checkpoints = {prompt}
        if spacing:
            request.checkpoints |= set(range(spacing, len(request.tokens), spacing))
        opening = self._cache.shared_opening(request.tokens, hit.start)
        if opening:
            request.checkpoints.add(opening)

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

    def release(self, request: Request) -> None:
        """Take a request's slot and slabs."""
        for slab in request.slabs:
            self._memory.slabs.release(slab)
        if request.slot is not None:
            self._memory.slots.release(request.slot)
        request.slot, request.slabs, request.chain = None, [], []
        request.computed = request.known = 0
        request.draft = []
        self.hidden.pop(request.id, None)

    def commit(self, request: Request) -> None:
        """Share the slabs that the request has filled."""
        full = request.computed // SLAB_TOKENS
        if request.status is not Status.RUNNING or full <= len(request.chain):
            return
        done = len(request.chain)
        request.chain = self._cache.chain(request.tokens[: full * SLAB_TOKENS], request.chain)
        for i in range(done, full):
            self._cache.keep_slab(request.chain[i], request.slabs[i])

    def checkpoint_if_due(self, request: Request) -> None:
        """Keep the state where a checkpoint is wanted."""
        spacing = self._spacing
        due = request.computed in request.checkpoints or (
            spacing and request.computed % spacing == 0
        )
        if due and request.computed != request.checkpointed and request.computed > request.known:
            self.checkpoint(request)

    def checkpoint(self, request: Request, last: bool = False) -> None:
        """Keep the state after the tokens computed so far."""
        if not request.computed or request.slot is None or request.computed < request.known:
            return
        self.commit(request)
        position = request.computed
        full, begun = divmod(position, SLAB_TOKENS)
        hidden = b""
        if position == len(request.prompt) and request.id in self.last_hidden:
            hidden = self.last_hidden[request.id].astype(np.float32).tobytes()
        parent = request.chain[full - 1] if full else self._cache.root
        key = self._cache.keep_checkpoint(
            parent,
            Checkpoint(
                position=position,
                tail=tuple(request.tokens[full * SLAB_TOKENS : position]),
                state=self._memory.slots.read(request.slot, position),
                entries=self._memory.slabs.read(request.slabs[full], begun) if begun else b"",
                hidden=hidden,
            ),
        )
        request.checkpointed = position
        request.kept.append(key)
        self._cache.remember(request.tokens[:position])
        if last and self._cache.disk is not None:
            try:
                self._cache.persist(request.chain[:full], request.kept, request.pin, request.found)
            except CacheError as error:
                _log.warning("event=cache_not_written detail=%r", str(error))
