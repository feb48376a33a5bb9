"""The engine: requests in, tokens out. One step is schedule, run, postprocess.

    engine = Engine(model)
    request = engine.submit([5, 6, 7], SamplingParams(temperature=0.0))
    while not request.finished:
        engine.step()
    print([drawn.token for drawn in request.output])

Not safe for threads: one thread at a time calls it (`fathom.engine.backend` gives it one).

Paper: §3.5 (inference: KV cache, prefix reuse); §5.2 (preemptible rollouts).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fathom.chat.generation import TokenMask
from fathom.engine.batch import Batch, Memory, Piece
from fathom.engine.disk_cache import DiskCache
from fathom.engine.kv_cache import SLAB_TOKENS, SlabLayout, SlabPool, slabs_for
from fathom.engine.metrics import Metrics
from fathom.engine.options import EngineConfig, check_tokens, free_bytes
from fathom.engine.prefix_cache import PrefixCache
from fathom.engine.request import Request, Status, StopHook
from fathom.engine.residence import Residence
from fathom.engine.runner import make_runner
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.engine.scheduler import Scheduler, Share
from fathom.engine.speculative import Drafter
from fathom.engine.state_cache import SlotLayout, SlotPool
from fathom.engine.wal import WriteAheadLog
from fathom.errors import CacheError, CacheFull, ConfigError, FathomError, GenerationError
from fathom.model.fingerprint import fingerprint
from fathom.model.stored import StoredModel
from fathom.model.transformer import Transformer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What a trainer replays, for positions from `first` on: hidden [tokens, hidden] float32,
    routing [layers, tokens, topk] int16, selection [layers, tokens, index_topk] int32.
    """

    first: int
    hidden: np.ndarray
    routing: np.ndarray
    selection: np.ndarray


class Engine:
    """Serves many requests with one model. Raises CacheError for folders that cannot be used."""

    def __init__(
        self, model: Transformer | StoredModel, config: EngineConfig | None = None
    ) -> None:
        self.model, self.config = model.eval(), config or EngineConfig()
        device = model.embed.weight.device
        drafting = self.config.drafts > 0
        if drafting and not model.mtp:
            raise ConfigError("this model has no MTP block to draft with: set drafts to 0")
        layout = SlabLayout.of(model.config, model.quantized, model.dtype, self.config.indexer)
        slot_layout = SlotLayout(layout, drafting)
        slabs = SlabPool(layout, self._slab_count(layout, device), device)
        slots = SlotPool(slot_layout, self.config.max_sequences, device)
        self.memory = Memory(slabs, slots, model.config.max_position_embeddings)
        rows = self.config.budget.tokens + self.config.max_sequences * (1 + self.config.drafts)
        self.runner = make_runner(model, self.memory, rows)
        self.runner.batch_invariant = self.config.batch_invariant
        self._root = self._name()
        disk = self.config.disk
        self.cache = PrefixCache(
            self._root,
            slabs,
            slots,
            host_bytes=self.config.host_bytes,
            checkpoint_bytes=self.config.checkpoint_bytes,
            disk=DiskCache(disk, self._root, self.config.disk_bytes) if disk else None,
        )
        self.wal = WriteAheadLog(self.config.wal, self._root) if self.config.wal else None
        self.metrics = Metrics()
        self.residence = Residence(
            self.memory, self.cache, self.metrics, self.config.checkpoint_spacing
        )
        self.scheduler = Scheduler(
            self.config.budget, self._admit, self.residence.grow, self._set_back
        )
        self.drafter = Drafter(
            self.runner,
            self.memory,
            self.config.drafts,
            self.metrics,
            self.config.drafts_adaptive,
        )
        self.exports: dict[str, list[Exported]] = {}
        self._paused: list[Request] = []

    @property
    def requests(self) -> list[Request]:
        """All requests that have not finished."""
        return [*self.scheduler.running, *self.scheduler.waiting, *self._paused]

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        priority: int = 0,
        mask: TokenMask | None = None,
        stop: StopHook | None = None,
        pin: bool = False,
        export: bool = False,
    ) -> Request:
        """Put a request in line; `step` works on it.

        priority: lower goes first. stop: told every token, True ends the request. pin: keep its end
        in the cache, on disk if there is one. Raises GenerationError for what cannot be served and
        CacheError when its log cannot be written.
        """
        check_tokens(prompt, self.model.config)
        params = params or SamplingParams()
        room = self.model.config.max_position_embeddings - len(prompt)
        request = Request(
            prompt=list(prompt),
            params=replace(params, max_tokens=min(params.max_tokens, room)),
            id=request_id,
            priority=priority,
            mask=mask,
            stop=stop,
            pin=pin,
            export=export,
        )
        if any(other.id == request.id for other in self.requests):
            raise GenerationError(f"there is a request {request.id!r} already: use another id")
        if slabs_for(len(prompt) + 1) > self.memory.slabs.count:
            raise CacheFull(
                f"a prompt of {len(prompt)} tokens does not fit into a cache of "
                f"{self.memory.slabs.count * SLAB_TOKENS}: raise cache_tokens"
            )
        self.metrics.requests += 1
        if self.wal is not None:
            self.wal.begin(request)
        self._enter(request)
        return request

    def step(self) -> list[tuple[Request, list[Drawn]]]:
        """Compute one batch; the tokens that each request gained. Nothing to do: an empty list."""
        shares = self.scheduler.schedule()
        if not shares:
            return []
        started = time.perf_counter()
        try:
            logits = self._run(shares)
        except BaseException:
            for share in shares:  # some layers may have taken tokens in that others have not
                self._lose(share.request)
            raise
        updates = self._postprocess(shares, logits)
        self.drafter.propose([share.request for share in shares])
        drawn = sum(len(tokens) for _, tokens in updates)
        decoding = all(share.count <= 1 for share in shares)
        self.drafter.step_done(time.perf_counter() - started, drawn, decoding)
        return updates

    def run(self, requests: Sequence[Request]) -> None:
        """Step until all of these have finished."""
        for request in requests:
            while not request.finished:
                self.run_once(request)

    def run_once(self, request: Request) -> None:
        """A step on behalf of a request. Raises GenerationError when it is paused."""
        if request.status is Status.PAUSED:
            raise GenerationError(f"{request.id} is paused: resume it first")
        self.step()

    def cancel(self, request: Request) -> None:
        """End a request; what it computed stays in the cache."""
        if not request.finished:
            self._finish(request, "cancelled")

    def pause(self, request: Request) -> None:
        """Take a request off the device until `resume`; it goes on with the same tokens."""
        if request.finished or request.status is Status.PAUSED:
            return
        if request.status is Status.RUNNING:
            self._set_back(request)
        self.scheduler.remove(request)
        request.status = Status.PAUSED
        self._paused.append(request)

    def resume(self, request: Request) -> None:
        """Let a paused request go on."""
        if request.status is Status.PAUSED:
            self._paused.remove(request)
            self.scheduler.add(request)

    def recover(
        self, hooks: Callable[[str], tuple[TokenMask | None, StopHook | None]] | None = None
    ) -> list[Request]:
        """Take up the requests that the log folder holds, finished ones included.

        hooks: mask and stop hook for a request's id, told its tokens so far here. A request that
        had a mask and gets none ends with an error. Raises CacheError without a log folder.
        """
        if self.wal is None:
            raise CacheError("this engine keeps no write-ahead log: set wal to a folder")
        found, problems = self.wal.read()
        for problem in problems:
            _log.warning("event=log_problem detail=%r", problem)
        recovered = []
        for logged in found:
            if any(other.id == logged.id for other in self.requests):
                continue
            mask, stop = hooks(logged.id) if hooks is not None else (None, None)
            request = Request(
                prompt=logged.prompt,
                params=logged.params,
                id=logged.id,
                priority=logged.priority,
                mask=mask,
                stop=stop,
            )
            for drawn in logged.output:
                request.add(drawn)
                request.sampler.accept(drawn.token)
                if mask is not None:
                    mask.accept(drawn.token)
            recovered.append(request)
            self._take_up(request, logged.finish_reason, logged.masked)
        return recovered

    def _take_up(self, request: Request, finish_reason: str | None, masked: bool) -> None:
        assert self.wal is not None
        if finish_reason is not None:
            request.status, request.finish_reason = Status.FINISHED, finish_reason
            return
        self.metrics.requests += 1
        self.wal.begin(request)
        if masked and request.mask is None:
            request.error = GenerationError(f"{request.id} cannot go on without its mask")
            self._finish(request, "error")
            return
        reason = self._ending(request, request.output[-1]) if request.output else None
        if reason is not None:
            self._finish(request, reason)
        else:
            self._enter(request)

    def save_session(self, session: Request | Sequence[int]) -> bytes:
        """Write what is known of a request or of tokens to disk, pinned; the name to load it by.

        Raises CacheError without a disk, when it cannot be written, or if nothing is known of it.
        """
        if self.cache.disk is None:
            raise CacheError("this engine has no disk cache: set disk to a folder")
        if not isinstance(session, Request):
            return self.cache.save(session)
        if session.status is Status.RUNNING:
            self.residence.checkpoint(session)
            return self.cache.save(session.tokens[: session.computed])
        return self.cache.save(session.tokens)

    def load_session(self, name: bytes) -> list[int]:
        """The tokens of a saved session; a prompt that begins with them then costs only its rest.

        Raises CacheError when there is no such session or its file is damaged.
        """
        if self.cache.disk is None:
            raise CacheError("this engine has no disk cache: set disk to a folder")
        return self.cache.load(name)

    def update_weights(self) -> None:
        """The model's weights have changed: running requests go on with the new ones.

        All their tokens are computed again, since entries of the old weights are worth nothing.
        """
        for request in list(self.scheduler.running):
            self._lose(request)
        self.runner.reload()
        self._root = self._name()
        self.cache.clear(self._root)
        if self.cache.disk is not None:
            self.cache.disk = DiskCache(self.cache.disk.folder, self._root, self.cache.disk.limit)

    def metrics_text(self) -> str:
        """Counters and the state of this moment, in Prometheus' text format."""
        slabs, slots = self.memory.slabs, self.memory.slots
        used = slabs.count - self.cache.available()
        gauges: dict[str, float] = {
            "waiting_requests": len(self.scheduler.waiting),
            "running_requests": len(self.scheduler.running),
            "paused_requests": len(self._paused),
            "batch_tokens": self.metrics.last_batch,
            "slots_used": slots.count - slots.free,
            "slots": slots.count,
            "capacity_tokens": slabs.count * SLAB_TOKENS,
            "capacity_bytes": slabs.count * slabs.layout.slab_bytes,
            "in_use_tokens": used * SLAB_TOKENS,
            "hit_rate": self.metrics.hit_rate,
            "drafting": float(self.metrics.drafting),
            "accepted_draft_length": self.metrics.accepted_length,
        }
        for tier, (tokens, size) in self.cache.occupancy().items():
            gauges[f'cached_tokens{{tier="{tier}"}}'] = tokens
            gauges[f'cached_bytes{{tier="{tier}"}}'] = size
        if self.cache.disk is not None:
            gauges["disk_problems"] = self.cache.disk.problems
        return self.metrics.text(gauges)

    def close(self) -> None:
        """Close logs; requests that had not finished can be recovered by another engine."""
        if self.wal is not None:
            self.wal.close()

    # Memory: what the scheduler asks for.

    def _admit(self, request: Request) -> bool:
        """Let a request in if there is room; one that can never be served ends here."""
        room = self.memory.slabs.count
        if slabs_for(len(request.tokens) + 1) > room:
            request.error = CacheFull(
                f"{request.id} has grown beyond a cache of {room * SLAB_TOKENS} tokens: "
                "raise cache_tokens"
            )
            self._finish(request, "error")
            return True
        return self.residence.admit(request)

    def _set_back(self, request: Request) -> None:
        """Take a request's memory, keeping what it computed in the cache as long as that lasts."""
        self.residence.checkpoint(request)
        self.residence.release(request)
        request.preemptions += 1
        self.metrics.preemptions += 1

    def _lose(self, request: Request) -> None:
        """Take a request's memory without trusting what is in it."""
        if request.slot is None:
            return
        self.residence.release(request)
        request.preemptions += 1
        self.scheduler.remove(request)
        self.scheduler.add(request)

    # A step.

    def _run(self, shares: list[Share]) -> dict[str, np.ndarray]:
        """Logits [rows, vocab] where a next token can be drawn, the rows of drafts behind."""
        pieces, wanted, ready = [], {}, {}
        row = 0
        for share in shares:
            request, end = share.request, share.request.computed + share.count
            if request.id in self.residence.hidden:
                ready[request.id] = self.runner.head(self.residence.hidden[request.id])
                continue
            tokens = request.tokens[request.computed : end] + request.draft
            assert request.slot is not None
            pieces.append(
                Piece(slot=request.slot, start=request.computed, tokens=tokens, known=request.known)
            )
            if end == len(request.tokens):
                wanted[request.id] = list(range(row + share.count - 1, row + len(tokens)))
            row += len(tokens)
        self.metrics.steps += 1
        self.metrics.last_batch = row
        self.metrics.computed_tokens += row
        if not pieces:
            return ready
        self.runner.export = any(share.request.export for share in shares)
        self.runner.forward(Batch.of(pieces, self.memory.slabs.data.device))
        which = [r for rows in wanted.values() for r in rows]
        hidden, logits = self.runner.logits(which)
        at = 0
        for name, rows in wanted.items():
            ready[name] = logits[at : at + len(rows)]
            self.residence.last_hidden[name] = hidden[at : at + 1]
            at += len(rows)
        self._keep_rows(shares)
        return ready

    def _keep_rows(self, shares: list[Share]) -> None:
        """What later needs of the rows just computed: exports, and streams to draft from."""
        row = 0
        for share in shares:
            request = share.request
            if request.id in self.residence.hidden:
                continue
            count = share.count + len(request.draft)
            if request.export:
                hidden, _ = self.runner.logits(list(range(row, row + share.count)))
                self.exports.setdefault(request.id, []).append(
                    Exported(
                        first=request.computed,
                        hidden=hidden.copy(),
                        routing=self.runner.routing(row + share.count)[:, row:],
                        selection=self.runner.selection(row + share.count)[:, row:],
                    )
                )
            if self.drafter.active:
                self.drafter.keep(request, row, count)
            row += count

    def _postprocess(
        self, shares: list[Share], logits: dict[str, np.ndarray]
    ) -> list[tuple[Request, list[Drawn]]]:
        updates = []
        for share in shares:
            request = share.request
            if request.id not in self.residence.hidden:
                request.computed += share.count
            rows = logits.get(request.id)
            self.residence.checkpoint_if_due(request)
            if rows is None:
                self.residence.commit(request)
                continue
            try:
                drawn = self._draw(request, rows)
            except (FathomError, ArithmeticError) as error:
                request.error = error
                self._finish(request, "error")
                updates.append((request, []))
                continue
            self.residence.hidden.pop(request.id, None)
            updates.append((request, drawn))
            self.residence.commit(request)
            reason = self._ending(request, drawn[-1]) if drawn else "length"
            if reason is not None:
                self._finish(request, reason)
        self._log_timing(updates)
        return updates

    def _draw(self, request: Request, rows: np.ndarray) -> list[Drawn]:
        """Draw a token per row while drafts are what is drawn; log them, then show them."""
        drawn: list[Drawn] = []
        if request.params.max_tokens == 0:
            return drawn
        draft, request.draft = request.draft, []
        first = len(request.output)
        for i in range(len(rows)):
            token = request.sampler.pick(rows[i], request.mask)
            drawn.append(token)
            last = first + len(drawn) >= request.params.max_tokens
            if last or token.token in request.params.stop_token_ids:
                break
            if i >= len(draft) or token.token != draft[i]:
                break
        self.drafter.judge(len(draft), len(drawn) - 1)
        if self.wal is not None:
            self.wal.append(request, drawn, first)
        for token in drawn:
            request.add(token)
        request.computed += len(drawn) - 1
        self.metrics.sampled_tokens += len(drawn)
        return drawn

    def _ending(self, request: Request, drawn: Drawn) -> str | None:
        """Why a request ends after this token, or None."""
        if drawn.token in request.params.stop_token_ids:
            return "stop"
        if request.stop is not None and request.stop(drawn.token):
            return "stop"
        return "length" if len(request.output) >= request.params.max_tokens else None

    def _finish(self, request: Request, reason: str) -> None:
        if request.slot is not None and reason != "error":
            self.residence.checkpoint(request, last=True)
        self.residence.release(request)
        self.scheduler.remove(request)
        if request in self._paused:
            self._paused.remove(request)
        request.status, request.finish_reason = Status.FINISHED, reason
        self.residence.last_hidden.pop(request.id, None)
        self.metrics.finished[reason] = self.metrics.finished.get(reason, 0) + 1
        if self.wal is not None:
            self.wal.end(request)

    def _log_timing(self, updates: list[tuple[Request, list[Drawn]]]) -> None:
        for request, drawn in updates:
            if not drawn or request.last_token is None or request.first_token is None:
                continue
            if len(request.output) == len(drawn):
                self.metrics.time_to_first_token.add(request.first_token - request.arrived)
            elif request.started is not None:
                self.metrics.inter_token.add((request.last_token - request.started) / len(drawn))
            request.started = request.last_token

    def _enter(self, request: Request) -> None:
        if request.params.max_tokens == 0:
            self._finish(request, "length")
        else:
            self.scheduler.add(request)

    def _name(self) -> bytes:
        """Names model, formats and weights; whatever is stored is stored under it."""
        layout = self.memory.slabs.layout
        kind = (
            f"{layout.kv_format} {layout.key_format} {self.config.drafts > 0} "
            f"{type(self.runner).__name__} {self.config.batch_invariant}"
        )
        return fingerprint(self.model, kind)

    def _slab_count(self, layout: SlabLayout, device: torch.device) -> int:
        size = max(1, layout.slab_bytes)
        if self.config.cache_tokens is not None:
            return max(1, slabs_for(self.config.cache_tokens))
        wanted = (
            slabs_for(self.model.config.max_position_embeddings) + 4 * self.config.max_sequences
        )
        return max(1, min(wanted, free_bytes(device) // 4 // size))
