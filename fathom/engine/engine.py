"""The engine: requests in, tokens out. One step is schedule, run, postprocess.

    engine = Engine(model)
    request = engine.submit([5, 6, 7], SamplingParams(temperature=0.0))
    while not request.finished:
        engine.step()
    print([drawn.token for drawn in request.output])

Threads may share it: calls take turns. Masks and stop hooks are called in the middle of a step;
they may submit and cancel, nothing else.

Paper: §3.5 (inference: KV cache, prefix reuse); §5.2 (preemptible rollouts).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from fathom.chat.generation import TokenMask
from fathom.engine.disk_cache import DiskCache
from fathom.engine.execution import draw, execute, export, out_of_memory
from fathom.engine.metrics import Metrics
from fathom.engine.options import EngineConfig, allocate, cache_name, check_request
from fathom.engine.prefix_cache import PrefixCache
from fathom.engine.request import Request, Status, StopHook
from fathom.engine.residence import Residence
from fathom.engine.runner import make_runner
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.engine.scheduler import Scheduler, Share
from fathom.engine.speculative import Drafter
from fathom.engine.turns import between_steps
from fathom.engine.wal import WriteAheadLog
from fathom.engine.wal_format import Logged
from fathom.errors import CacheError, CacheFull, ConfigError, FathomError, GenerationError
from fathom.model.stored import StoredModel
from fathom.model.transformer import Transformer

_log = logging.getLogger(__name__)
PROBLEM = "event=log_problem detail=%r"

# Mask and stop hook for a recovered request's id.
Hooks = Callable[[str], tuple[TokenMask | None, StopHook | None]]


class Engine:
    """Serves many requests with one model. Raises ConfigError for settings that cannot be and
    CacheError for folders that cannot be used.
    """

    def __init__(
        self, model: Transformer | StoredModel, config: EngineConfig | None = None
    ) -> None:
        self.model, self.config = model.eval(), config or EngineConfig()
        config = self.config
        if config.drafts > 0 and not model.mtp:
            raise ConfigError("this model has no MTP block to draft with: set drafts to 0")
        self.memory = allocate(config, model)
        self.runner = make_runner(model, self.memory, config.max_rows)
        self.runner.batch_invariant = config.batch_invariant
        root = cache_name(self.runner, self.memory, self.model, self.config)
        self.cache = PrefixCache(
            root,
            self.memory.slabs,
            host_bytes=config.host_bytes,
            checkpoint_bytes=config.checkpoint_bytes,
            disk=DiskCache(config.disk, root, config.disk_bytes) if config.disk else None,
        )
        self.wal = WriteAheadLog(config.wal, root) if config.wal else None
        self.metrics = Metrics()
        self.residence = Residence(self.memory, self.cache, self.metrics, config.checkpoint_spacing)
        self.scheduler = Scheduler(config.budget, self.residence.grow, self.residence.set_back)
        self.drafter = Drafter(
            self.runner, self.memory, config.drafts, self.metrics, config.drafts_adaptive
        )
        self.lock = threading.RLock()
        self.stepping = False
        self._dropped: deque[tuple[Request, bool]] = deque()  # to cancel, and whether to forget

    @property
    def requests(self) -> list[Request]:
        """All requests that have not finished."""
        with self.lock:
            return self.scheduler.requests

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

        priority: lower goes first. stop: told every token, True ends the request. pin: protect its
        end in the cache, on disk as by `save_session` if there is one. export: keep what a trainer
        needs of every token in `exports`; nothing of it is then taken from the cache. Raises
        GenerationError for what cannot be served and CacheError when its log cannot be written.
        """
        check_request(prompt, request_id, priority, self.model.config)
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
        self.residence.check_fits(request)
        with self.lock:
            if any(other.id == request.id for other in self.requests):
                raise GenerationError(f"there is a request {request.id!r} already: use another id")
            if self.wal is not None:
                self.wal.begin(request)
            self.metrics.requests += 1
            self._enter(request)
        return request

    @between_steps
    def step(self) -> list[tuple[Request, list[Drawn]]]:
        """Compute one batch; the tokens that each request gained. Nothing to do: an empty list."""
        started = time.perf_counter()
        shares = self.scheduler.schedule(self._admit)
        self.metrics.last_batch = 0
        if not shares:
            return []
        self.stepping = True
        updates: list[tuple[Request, list[Drawn]]] = []
        try:
            rows = execute(self.runner, shares)
            self.metrics.step_done(rows)
            for share in shares:
                if update := self._postprocess(share):
                    updates.append(update)
            self.drafter.propose(shares)
        except BaseException as error:
            updates += self._failed(shares, error)
        finally:
            self.stepping = False
            self.settle()
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
        """End a request; what it computed stays in the cache. Within a step: after it."""
        self._drop(request, forget=False, wait=True)

    def forget(self, request: Request, *, wait: bool = True) -> None:
        """As `cancel`, and delete its log: nobody needs its tokens any more.

        Without `wait` it may happen a little later: for finalisers, which run at any moment.
        """
        self._drop(request, forget=True, wait=wait)

    def _drop(self, request: Request, forget: bool, wait: bool) -> None:
        self._dropped.append((request, forget))
        if self.lock.acquire(blocking=wait):
            try:
                self.settle()
            finally:
                self.lock.release()

    @between_steps
    def pause(self, request: Request) -> None:
        """Take a request off the device until `resume`; it goes on with the same tokens."""
        if request.finished or request.status is Status.PAUSED:
            return
        if request.status is Status.RUNNING:
            self.residence.set_back(request)
        self.scheduler.pause(request)

    @between_steps
    def resume(self, request: Request) -> None:
        """Let a paused request go on."""
        if request.status is Status.PAUSED:
            self.scheduler.remove(request)
            self.scheduler.add(request)

    @between_steps
    def recover(self, hooks: Hooks | None = None) -> list[Request]:
        """Take up the requests that the log folder holds, finished ones included.

        hooks: mask and stop hook for a request's id, told its tokens so far here. A request that
        had a mask and gets none ends with an error. Logs that are damaged, of other weights, or
        open in another process are reported and left alone. Raises CacheError without a log folder.
        """
        recovered = []
        for logged in self.interrupted():
            mask, stop = hooks(logged.id) if hooks is not None else (None, None)
            try:
                recovered.append(self._go_on(logged, mask, stop))
            except FathomError as error:
                _log.warning(PROBLEM, str(error))
        return recovered

    @between_steps
    def interrupted(self) -> list[Logged]:
        """What the log folder says of requests that are not this engine's, finished ones included;
        others may have some of them open. Raises CacheError without a log folder.
        """
        if self.wal is None:
            raise CacheError("this engine keeps no write-ahead log: set wal to a folder")
        found, problems = self.wal.read()
        for problem in problems:
            _log.warning(PROBLEM, problem)
        mine = {request.id for request in self.requests}
        return [logged for logged in found if logged.id not in mine]

    @between_steps
    def go_on(self, logged: Logged, mask: TokenMask | None = None) -> Request:
        """Take up one of the requests that were interrupted. Raises CacheError when its log is open
        in another process or cannot be written.
        """
        return self._go_on(logged, mask, None)

    def _go_on(self, logged: Logged, mask: TokenMask | None, stop: StopHook | None) -> Request:
        assert self.wal is not None
        running = logged.finish_reason is None
        # First: whoever is refused may ask anew with the same mask, which must not know the tokens.
        log = self.wal.take_up(logged) if running else None
        request, reason = logged.revive(mask, stop)
        if not running:
            request.status, request.finish_reason = Status.FINISHED, logged.finish_reason
            return request
        request.log = log
        self.metrics.requests += 1
        if reason is not None:
            self._finish(request, reason)
        else:
            self._enter(request)
        return request

    @between_steps
    def save_session(self, session: Request | Sequence[int]) -> bytes:
        """Write what is known of a request or of tokens to disk, pinned; the name to load it by.

        Raises CacheError without a disk, when it cannot be written, or if nothing is known of it.
        """
        if not isinstance(session, Request):
            return self.cache.save(session)
        return self.residence.save(session)

    @between_steps
    def load_session(self, name: bytes) -> list[int]:
        """The tokens of a saved session; a prompt that begins with them then costs only its rest.

        Raises CacheError when there is no such session or its file is damaged.
        """
        return self.cache.load(name)

    @between_steps
    def forget_session(self, name: bytes) -> None:
        """Delete a saved session; what no other one needs makes room when room is needed.

        Raises CacheError when there is no such session or its file is damaged.
        """
        self.cache.forget(name)

    @between_steps
    def update_weights(self) -> None:
        """The model's weights have changed: running requests go on with the new ones.

        All their tokens are computed again, since entries of the old weights are worth nothing.
        Raises CacheError when folders cannot be written any more: the engine then goes on without
        the disk cache, and with logs that belong to the old weights.
        """
        for request in list(self.scheduler.running):
            self._lose(request)
        self.runner.reload()
        root = cache_name(self.runner, self.memory, self.model, self.config)
        folder = self.config.disk
        self.cache.clear(root)
        try:
            if folder:
                self.cache.use_disk(DiskCache(folder, root, self.config.disk_bytes))
        finally:
            if self.wal is not None:
                self.wal.rename(root, self.requests)

    def metrics_text(self) -> str:
        """Counters and the state of this moment, in Prometheus' text format."""
        with self.lock:
            return self.metrics.text(self.scheduler, self.memory, self.cache)

    def close(self) -> None:
        """Close logs and let go of graphs; requests that had not finished can be recovered by
        another engine.
        """
        with self.lock:
            self.runner.close()
            if self.wal is not None:
                self.wal.close()

    # What the scheduler asks for, and a step.

    def _admit(self, request: Request) -> bool:
        """Let a request in if there is room; one that can never be served ends here."""
        try:
            return self.residence.admit(request)
        except Exception as error:
            self._fail(request, error)
            return True

    def _lose(self, request: Request) -> None:
        """Take a request's memory without trusting what is in it."""
        if request.status is Status.RUNNING:
            self.residence.set_back(request, keep=False)
            self.scheduler.remove(request)
            self.scheduler.add(request)

    def _postprocess(self, share: Share) -> tuple[Request, list[Drawn]] | None:
        """Let a request take in what was computed, and draw where a token can be drawn."""
        request = share.request
        before, previous = len(request.output), request.last_token
        if share.row is not None:
            request.computed = share.start + share.count
        self.residence.checkpoint_if_due(request, share.hidden)
        try:
            reason = draw(share, self.wal)
            if request.export and (found := export(self.runner, share)):
                request.exports.append(found)
        except Exception as error:  # of its mask, its stop hook, its logits or its log
            request.error, reason = error, "error"
        gained = len(request.output) - before
        if gained:
            self.drafter.judge(share.drafted, gained - 1)
            self.metrics.tokens_drawn(request, gained, previous)
        if reason is None:
            self.residence.commit(request)
        else:
            self._finish(request, reason)
        share.done = True
        return (request, request.output[before:]) if share.logits is not None else None

    def _failed(
        self, shares: Sequence[Share], error: BaseException
    ) -> list[tuple[Request, list[Drawn]]]:
        """After a step that broke off: some layers may have taken tokens in that others have not.

        Whatever had not taken note of its tokens computes them again. When memory ran out, the
        largest share's request ends, and the step counts as done.
        """
        undone = [share for share in shares if not share.done]
        for share in undone:
            self._lose(share.request)
            if share.request.sampler.drawn != len(share.request.output):  # broken off within a draw
                self._fail(share.request, GenerationError(f"{share.request.id} was interrupted"))
        if not out_of_memory(error) or not undone:
            raise error
        victim = max(undone, key=lambda share: (share.count, share.request.number)).request
        ran_out = f"memory ran out in a step ({error}): lower its budget or cache_tokens"
        self._fail(victim, CacheFull(ran_out))
        return [(victim, [])]

    def _enter(self, request: Request) -> None:
        if request.params.max_tokens == 0:
            self._finish(request, "length")
        else:
            self.scheduler.add(request)

    def _fail(self, request: Request, error: Exception) -> None:
        if not request.finished:
            request.error = error
            self._finish(request, "error")

    def _finish(self, request: Request, reason: str) -> None:
        if reason != "error":
            self.residence.leave(request)
        self.residence.release(request)
        self.scheduler.remove(request)
        request.status, request.finish_reason = Status.FINISHED, reason
        self.metrics.finished[reason] += 1
        if self.wal is not None:
            self.wal.end(request)

    def settle(self) -> None:
        """Cancel what was dropped meanwhile."""
        while self._dropped and not self.stepping:
            request, forget = self._dropped.popleft()
            if not request.finished:
                self._finish(request, "cancelled")
            if forget and self.wal is not None:
                self.wal.forget(request.id)
