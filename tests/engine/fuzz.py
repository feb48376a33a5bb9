"""Random traffic through an engine: whatever happens to it, every request answers as if alone.

    python -m tests.engine.fuzz --seeds 200            # random seeds, printed when one fails
    python -m tests.engine.fuzz --seed 17 --steps 400  # one of them again

A run makes a small engine with random settings and does random things to it: requests with every
kind of parameter, cancelling, pausing, steps that break off, memory and disks that run out, files
that rot, restarts, new weights. At the end every answer is compared bit for bit with that of an
engine that has served nothing else, and all memory must have been given back.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fathom.engine import disk_cache
from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.kv_cache import SLAB_TOKENS
from fathom.engine.request import Request, Status
from fathom.engine.sampler import SamplingParams
from fathom.engine.scheduler import Budget
from fathom.errors import CacheError, FathomError
from fathom.model import Transformer
from tests.engine.helpers import CONFIG, model, prompt

VOCAB = CONFIG.vocab_size


class Residues:
    """A mask: only tokens of one residue may come, another one after each token."""

    def __init__(self, modulus: int) -> None:
        self.modulus, self.at = modulus, 0

    def allowed(self) -> bytes | None:
        if self.at % 3 == 0:
            return None
        bits = (np.arange(VOCAB) % self.modulus) == self.at % self.modulus
        return np.packbits(bits, bitorder="little").tobytes()

    def accept(self, token: int) -> None:
        self.at += 1


class Broken(Residues):
    """A mask that fails at some token."""

    def accept(self, token: int) -> None:
        super().accept(token)
        if self.at == self.modulus:
            raise ValueError("a broken mask")


@dataclass
class Asked:
    """A request and what it needs to be asked again, alone."""

    tokens: list[int]
    params: SamplingParams
    priority: int = 0
    mask: int = 0  # modulus, negative: breaks
    stop_after: int = 0
    pin: bool = False
    export: bool = False
    request: Request | None = None
    updates: list[tuple[int, int]] = field(default_factory=list)  # (tokens by then, new weights)
    heard: list[int] = field(default_factory=list)
    ended: bool = False  # cancelled, or ended by a fault that was planted
    lost_exports: bool = False

    def hooks(self, heard: list[int]) -> dict[str, Any]:
        mask = (Residues(self.mask) if self.mask > 0 else Broken(-self.mask)) if self.mask else None

        def stop(token: int) -> bool:
            heard.append(token)
            return len(heard) == self.stop_after

        return {"mask": mask, "stop": stop if self.stop_after else None}


@functools.cache
def net(weights: int, drafting: bool) -> Transformer:
    """The model under test; its weights change in place."""
    return model(seed=1 + weights, num_nextn_predict_layers=int(drafting))


@functools.cache
def weights_of(weights: int, drafting: bool) -> dict[str, Any]:
    made = model(seed=1 + weights, num_nextn_predict_layers=int(drafting))
    return made.state_dict()


def alone(asked: Asked, weights: int, drafting: bool) -> tuple[Request, list[int]]:
    """The same request on an engine of its own, with the same changes of weights."""
    own = model(seed=1, num_nextn_predict_layers=int(drafting))
    own.load_state_dict(weights_of(weights, drafting))
    engine = Engine(own, EngineConfig(cache_tokens=4096, max_sequences=1, checkpoint_spacing=0))
    heard: list[int] = []
    request = engine.submit(asked.tokens, asked.params, export=asked.export, **asked.hooks(heard))
    for count, new in asked.updates:
        while len(request.output) < count and not request.finished:
            engine.step()
        own.load_state_dict(weights_of(new, drafting))
        engine.update_weights()
    engine.run([request])
    return request, heard


class Traffic:
    """One run."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.random = seed, random.Random(seed)
        r = self.random
        self.drafting = r.random() < 0.4
        self.weights = 0
        self.model = model(seed=1, num_nextn_predict_layers=int(self.drafting))
        self.folder = folder
        self.settings: dict[str, Any] = {
            "cache_tokens": r.choice([512, 768, 1024, 1536, 4096, 16384]),
            "max_sequences": r.choice([1, 2, 4, 7]),
            "host_bytes": r.choice([0, 40_000, 200_000, 2**26]),
            "checkpoint_bytes": r.choice([0, 60_000, 2**26]),
            "checkpoint_spacing": r.choice([0, 256, 512]),
            "budget": Budget(
                tokens=r.choice([1, 16, 97, 300, 1024]), beside_streams=r.choice([1, 30, 200])
            ),
            "disk": folder / "cache" if r.random() < 0.6 else None,
            "disk_bytes": r.choice([0, 150_000, 600_000, 2**28]),
            "wal": folder / "log" if r.random() < 0.6 else None,
            "drafts": r.choice([1, 2, 5, 7]) if self.drafting else 0,
            "drafts_adaptive": r.random() < 0.3,
        }
        self.asked: list[Asked] = []
        self.sessions: dict[bytes, list[int]] = {}
        self.forget_faults = False
        self.engine = self.start()
        pool = [prompt(r.choice([40, 256, 300, 512, 513, 700]), seed=i) for i in range(4)]
        self.pool = [[5], pool[0][:3], *pool]

    def start(self) -> Engine:
        return Engine(self.model, EngineConfig(**self.settings))

    # What can happen.

    def submit(self) -> None:
        r = self.random
        base = r.choice(self.pool)
        tokens = base[: r.choice([len(base), max(1, len(base) - r.randrange(1, 200))])]
        tokens = tokens + prompt(r.choice([0, 0, 0, 1, 4, 60, 256]), seed=r.randrange(3))
        if r.random() < 0.3 and self.asked:
            other = r.choice(self.asked)
            if other.request is not None:
                tokens = list(other.request.tokens)  # a next turn
                tokens += prompt(r.choice([0, 1, 20]), seed=r.randrange(3))
        tokens = tokens[:1100]
        params = SamplingParams(
            temperature=r.choice([0.0, 0.3, 1.0, 2.0]),
            top_p=r.choice([1.0, 0.5]),
            top_k=r.choice([0, 1, 40]),
            min_p=r.choice([0.0, 0.05]),
            repetition_penalty=r.choice([1.0, 1.3]),
            frequency_penalty=r.choice([0.0, 0.4]),
            logit_bias=r.choice([{}, {7: 3.0, 399: -50.0}]),
            seed=r.randrange(2**32),
            max_tokens=r.choice([0, 1, 2, 7, 30, 90]),
            top_logprobs=r.choice([0, 0, 3]),
            stop_token_ids=r.choice([(), (399, 17, 30)]),
        )
        asked = Asked(
            tokens=tokens,
            params=params,
            priority=r.choice([0, 0, 0, 1, -1]),
            mask=r.choice([0, 0, 0, 3, 7, -4]),
            stop_after=r.choice([0, 0, 5]),
            pin=r.random() < 0.1,
            export=r.random() < 0.15,
        )
        if asked.mask < 0 and params.max_tokens >= -asked.mask:
            asked.ended = True
        try:
            asked.request = self.engine.submit(
                tokens,
                params,
                priority=asked.priority,
                pin=asked.pin,
                export=asked.export,
                **asked.hooks(asked.heard),
            )
        except FathomError:
            return
        self.asked.append(asked)

    def submit_group(self) -> None:
        before = self.random.getstate()
        for _ in range(3):
            self.random.setstate(before)
            self.submit()
        self.random.seed(self.random.random())

    def nonsense(self) -> None:
        r = self.random
        for tokens, more in (
            ([], {}),
            (prompt(3000), {}),
            ([VOCAB], {}),
            ([-1], {}),
            ([5.0], {}),
            ([5], {"priority": "x"}),
            ([5], {"request_id": 7}),
        ):
            with contextlib.suppress(FathomError):
                self.engine.submit(tokens, **more)
                raise AssertionError(f"accepted {tokens[:5]} {more}")
        for name, value in (
            ("temperature", r.choice([float("nan"), -1, "1", None])),
            ("seed", r.choice([1.5, -1, 2**64])),
            ("top_k", r.choice([2.5, -1])),
            ("stop_token_ids", ("a",)),
            ("logit_bias", {"5": 1.0}),
        ):
            with contextlib.suppress(FathomError):
                SamplingParams(**{name: value})
                raise AssertionError(f"accepted {name}={value!r}")

    def step(self) -> None:
        streams = [
            (r, len(r.output))
            for r in self.engine.scheduler.running
            if r.pending == 1 and r.output and r.priority <= 0
        ]
        self.engine.step()
        for request, before in streams:
            gained = len(request.output) > before
            moved = request.status is not Status.RUNNING or request.preemptions > 0
            assert gained or moved, f"{request.id} did not get a token"

    def steps(self) -> None:
        for _ in range(self.random.randrange(2, 30)):
            self.step()

    def some(self, *status: Status) -> Asked | None:
        found = [a for a in self.asked if a.request is not None and a.request.status in status]
        return self.random.choice(found) if found else None

    def cancel(self) -> None:
        if asked := self.some(Status.RUNNING, Status.WAITING, Status.PAUSED):
            asked.ended = True
            assert asked.request is not None
            self.engine.cancel(asked.request)

    def pause(self) -> None:
        if asked := self.some(Status.RUNNING, Status.WAITING):
            assert asked.request is not None
            self.engine.pause(asked.request)

    def resume(self) -> None:
        if asked := self.some(Status.PAUSED):
            assert asked.request is not None
            self.engine.resume(asked.request)

    def save(self) -> None:
        asked = self.some(*Status)
        if asked is None or asked.request is None:
            return
        with contextlib.suppress(CacheError):
            name = self.engine.save_session(asked.request)
            tokens = asked.request.tokens
            if asked.request.status is Status.RUNNING:
                tokens = tokens[: asked.request.computed]
            self.sessions[name] = list(tokens)

    def load(self) -> None:
        if self.sessions and self.engine.cache.disk is not None:
            name = self.random.choice(list(self.sessions))
            with contextlib.suppress(CacheError):
                assert self.engine.load_session(name) == self.sessions[name]

    def forget_session(self) -> None:
        if self.sessions and self.engine.cache.disk is not None:
            name = self.random.choice(list(self.sessions))
            with contextlib.suppress(CacheError):
                self.engine.forget_session(name)
                del self.sessions[name]

    def break_step(self) -> None:
        """The runner, the drafter or a draw breaks off, before or after its work."""
        r, kind = self.random, self.random.choice(["forward", "draft", "logits", "append"])
        error: type[BaseException] = r.choice([KeyboardInterrupt, ZeroDivisionError])
        target: Any = self.engine.wal if kind == "append" else self.engine.runner
        if target is None:
            return
        original, late = getattr(target, kind), r.random() < 0.5

        def broken(*args: Any) -> Any:
            if late:
                original(*args)
            raise error

        setattr(target, kind, broken)
        before = {a.request: len(a.request.output) for a in self.asked if a.request is not None}
        try:
            with contextlib.suppress(error):
                self.engine.step()
        finally:
            delattr(target, kind)
        for asked in self.asked:  # an interrupted draw or export ends its request
            if asked.request in before and asked.request.error is not None:
                asked.ended = True

    def run_out(self) -> None:
        """No memory for a step: the largest share's request may end, the others may not notice."""
        runner: Any = self.engine.runner
        runner.forward = _raise(MemoryError())
        try:
            self.engine.step()
        finally:
            del runner.forward
        for asked in self.asked:
            if asked.request is not None and "memory ran out" in str(asked.request.error):
                asked.ended = True

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        original = Path.replace
        Path.replace = _raise(OSError(28, "No space left on device"))  # type: ignore[method-assign]
        try:
            yield
        finally:
            Path.replace = original  # type: ignore[method-assign]

    def steps_on_a_full_disk(self) -> None:
        with self.full_disk():
            self.steps()
            self.save()

    def rot(self) -> None:
        """Files of the cache are damaged behind the engine's back."""
        folder = self.settings["disk"]
        files = sorted(folder.glob("*/*-*")) if folder else []
        for path in self.random.sample(files, min(len(files), self.random.choice([1, 3, 30]))):
            kind = self.random.choice(["flip", "cut", "gone", "swap", "folder"])
            with contextlib.suppress(OSError):
                data = bytearray(path.read_bytes())
                path.unlink()
                if kind == "flip":
                    data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
                elif kind == "cut":
                    del data[self.random.randrange(len(data)) :]
                elif kind == "swap":
                    data = bytearray(self.random.choice(files).read_bytes())
                elif kind == "folder":
                    path.mkdir()
                if not path.exists() and kind != "gone":
                    path.write_bytes(bytes(data))

    def restart(self) -> None:
        """The process ends, without a word; what has a log is taken up again."""
        unfinished = [a for a in self.asked if a.request is not None and not a.request.finished]
        self.engine.close()  # the locks would go with the process
        self.engine = self.start()
        self.check_disk(exact=False)
        if self.engine.wal is None:
            for asked in unfinished:
                asked.ended, asked.request = True, None
            return
        by_id = {a.request.id: a for a in self.asked if a.request is not None}

        def hooks(name: str) -> Any:
            by_id[name].heard.clear()
            made = by_id[name].hooks(by_id[name].heard)
            return made["mask"], made["stop"]

        shown = {a.request.id: list(a.request.output) for a in unfinished if a.request is not None}
        for request in self.engine.recover(hooks):
            asked = by_id[request.id]
            if request.id in shown:
                assert [d.token for d in request.output] == [d.token for d in shown[request.id]]
                asked.request, asked.lost_exports = request, True
            else:
                assert self.engine.wal is not None
                self.engine.wal.forget(request.id)
        assert all(a.request in self.engine.requests or a.request.finished for a in unfinished
                   if a.request is not None)  # fmt: skip

    def new_weights(self) -> None:
        self.weights = 1 - self.weights
        for asked in self.asked:
            if asked.request is not None and not asked.request.finished:
                asked.updates.append((len(asked.request.output), self.weights))
        self.model.load_state_dict(weights_of(self.weights, self.drafting))
        self.engine.update_weights()
        self.sessions.clear()

    # Afterwards.

    def run(self, actions: int) -> None:
        weights = {
            self.submit: 12, self.submit_group: 1, self.nonsense: 0.5, self.step: 8, self.steps: 8,
            self.cancel: 2, self.pause: 2, self.resume: 3, self.save: 1, self.load: 0.5,
            self.forget_session: 0.5, self.break_step: 1.5, self.run_out: 0.7,
            self.steps_on_a_full_disk: 0.5, self.rot: 1, self.restart: 0.7, self.new_weights: 0.4,
        }  # fmt: skip
        started = Counter[int]()
        for _ in range(actions):
            (action,) = self.random.choices(list(weights), list(weights.values()))
            before = len(self.asked)
            action()
            for i in range(before, len(self.asked)):
                started[i] = self.weights
            self.check_memory()
        for asked in self.asked:
            if asked.request is not None and asked.request.status is Status.PAUSED:
                self.engine.resume(asked.request)
        limit = 200_000
        while self.engine.requests:
            self.step()
            limit -= 1
            assert limit, f"stuck: {[(r.id, r.status) for r in self.engine.requests]}"
        self.check_memory()
        self.check_end()
        for i, asked in enumerate(self.asked):
            self.check_answer(asked, started[i])

    def check_answer(self, asked: Asked, weights: int) -> None:
        request = asked.request
        if request is None:
            return
        assert request.finished
        expected, heard = alone(asked, weights, self.drafting)
        if asked.ended or request.finish_reason == "error":
            if not asked.ended:
                assert "cache" in str(request.error), request.error
            assert _same(request.output, expected.output[: len(request.output)])
            return
        assert (request.finish_reason, str(request.error)) == (
            expected.finish_reason, str(expected.error),
        )  # fmt: skip
        assert _same(request.output, expected.output), (request.id, len(request.output))
        assert asked.heard == heard
        if asked.export and not asked.lost_exports and request.output:
            for name, axis in (("hidden", 0), ("routing", 1), ("selection", 1)):
                found, wanted = (
                    np.concatenate([getattr(part, name) for part in r.exports], axis=axis)
                    for r in (request, expected)
                )
                if not asked.updates:
                    assert np.array_equal(found, wanted), name
                assert found.shape[axis] == len(request.tokens) - 1

    def check_memory(self) -> None:
        """Every slab and slot is somebody's, as often as it is counted."""
        engine = self.engine
        slabs, slots, cache = engine.memory.slabs, engine.memory.slots, engine.cache
        holders = Counter(s for r in engine.requests for s in r.slabs) + Counter(
            cache._device.values()
        )
        assert [slabs.references(i) for i in range(slabs.count)] == [
            holders[i] for i in range(slabs.count)
        ]
        assert slabs.free == slabs.count - len(holders)
        taken = [r.slot for r in engine.requests if r.slot is not None]
        assert len(set(taken)) == len(taken) == slots.count - slots.free
        memory = cache.checkpoints.memory
        assert cache._host.size == sum(len(cache._host._values[k][0]) for k in cache._host.keys())
        assert sum(cache.checkpoints._parents.values()) == len(memory)
        assert len(memory) <= 1 or memory.size <= memory.limit

    def check_disk(self, exact: bool = True) -> None:
        disk = self.engine.cache.disk
        if disk is None:
            return
        assert disk.size == sum(f.size for f in disk._files.values())
        assert disk._pinned == sum(f.size for f in disk._files.values() if f.pinned)
        assert not list(disk._own.glob(".tmp-*"))
        if exact:
            assert disk.size <= disk.limit
        for kind in ("slab", "state", "session"):
            assert disk.count(kind) == len(disk.keys(kind))

    def check_end(self) -> None:
        engine = self.engine
        assert engine.memory.slots.free == engine.memory.slots.count
        assert engine.cache.available() == engine.memory.slabs.count
        assert engine.scheduler.waiting == engine.scheduler.running == []
        if engine.wal is not None:
            assert engine.wal._open == {}
        self.check_disk()
        text = dict(
            line.rsplit(" ", 1) for line in engine.metrics_text().splitlines() if line[0] != "#"
        )
        for name in ("running_requests", "waiting_requests", "slots_used", "in_use_tokens"):
            assert float(text[f"fathom_engine_{name}"]) == 0, name
        assert float(text["fathom_engine_hit_rate"]) <= 1
        assert sum(engine.metrics.finished.values()) == engine.metrics.requests
        device = 'fathom_engine_stored_tokens{tier="device"}'
        assert float(text[device]) == len(engine.cache._device) * SLAB_TOKENS


def _same(a: list[Any], b: list[Any]) -> bool:
    """Alternatives are not logged, and log-probabilities as 32 bits."""
    short = [[(d.token, np.float32(d.logprob)) for d in drawn] for drawn in (a, b)]
    return short[0] == short[1]


def _raise(error: BaseException) -> Any:
    def raising(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raising


def run(seed: int, actions: int) -> Traffic:
    """One run; raises AssertionError, with the seed, for whatever is wrong."""
    assert disk_cache.MAGIC
    with tempfile.TemporaryDirectory() as folder:
        traffic = Traffic(seed, Path(folder))
        try:
            traffic.run(actions)
        except BaseException as error:
            error.add_note(f"seed {seed}, {actions} actions, settings {traffic.settings}")
            raise
        return traffic


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Random traffic through an engine.")
    parser.add_argument("--seeds", type=int, default=100, help="how many runs")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--steps", type=int, default=60, help="actions of a run")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new run after this time")
    chosen = parser.parse_args()
    first = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(2**32)
    begun, failed = time.monotonic(), 0
    for number in range(first, first + (1 if chosen.seed is not None else chosen.seeds)):
        if time.monotonic() - begun > chosen.seconds:
            break
        try:
            done = run(number, chosen.steps)
            steps = done.engine.metrics.steps
            sys.stdout.write(f"{number}: {len(done.asked)} requests, {steps} steps\n")
            sys.stdout.flush()
        except Exception:
            failed += 1
            traceback.print_exc()
    sys.exit(f"{failed} runs failed" if failed else 0)
