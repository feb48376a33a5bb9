"""What random traffic and close reading found: each of these once gave a wrong answer or stuck."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import numpy as np
import pytest

from fathom.engine import LLM
from fathom.engine.disk_cache import DiskCache
from fathom.engine.kv_cache import SLAB_TOKENS
from fathom.engine.request import Status
from fathom.engine.sampler import SamplingParams
from fathom.engine.scheduler import Budget
from fathom.errors import CacheError, CacheFull, ConfigError, FathomError, GenerationError
from fathom.kernels import use_backend
from fathom.model import Transformer
from tests.engine import fuzz
from tests.engine.helpers import (
    REPLAY,
    bits,
    drop_host,
    engine,
    finish,
    greedy,
    model,
    prompt,
    sampled,
)
from tests.engine.test_speculative import Oracle


@pytest.fixture(scope="module")
def net() -> Transformer:
    return model(num_nextn_predict_layers=1)


def alone(net: Transformer, tokens: list[int], params: SamplingParams) -> list[object]:
    served = engine(net, checkpoint_spacing=0)
    request = served.submit(tokens, params)
    finish(served, request)
    return list(bits(request))


@pytest.mark.parametrize("seed", range(1, 7))
def test_random_traffic(seed: int) -> None:
    """The long form: python -m tests.engine.fuzz --seeds 1000 --steps 120."""
    fuzz.run(seed, 50)


class TestAnswers:
    def test_a_prompt_that_is_asked_again_after_a_preemption(self, net: Transformer) -> None:
        """Its checkpoint once got the hidden state of a later token."""
        tight = engine(net, cache_tokens=SLAB_TOKENS * 2, host_bytes=0)
        request = tight.submit(prompt(300), greedy(6))
        while len(request.output) < 3:
            tight.step()
        tight.pause(request)
        drop_host(tight)
        finish(tight, tight.submit(prompt(400, 9), greedy(1)))  # what was kept goes
        tight.resume(request)
        while request.status is not Status.RUNNING or request.pending > 1:
            tight.step()
        tight.pause(request)
        again = tight.submit(prompt(300), greedy(6))
        finish(tight, again)
        assert bits(again) == alone(net, prompt(300), greedy(6))

    def test_a_stop_hook_sees_every_token_of_a_draft(self, net: Transformer) -> None:
        expected = [d.token for d in alone(net, prompt(60), greedy(30))]  # type: ignore[attr-defined]
        for stop_at in (None, 10, 11, 12, 13):
            seen: list[int] = []

            def stop(token: int, seen: list[int] = seen, at: int | None = stop_at) -> bool:
                seen.append(token)
                return len(seen) == at

            quick = engine(net, drafts=5, drafts_adaptive=False)
            request = quick.submit(prompt(60), greedy(30), stop=stop)
            Oracle(expected, 5).attach(request)
            finish(quick, request)
            assert seen == [d.token for d in request.output] == expected[: stop_at or 30]

    def test_exports_have_no_gaps(self, net: Transformer) -> None:
        """With drafts, with a cached prompt, and after a preemption."""
        expected = [d.token for d in alone(net, prompt(300), greedy(20))]  # type: ignore[attr-defined]
        quick = engine(net, drafts=3, drafts_adaptive=False)
        finish(quick, quick.submit(prompt(300), greedy(1)))
        request = quick.submit(prompt(300), greedy(20), export=True)
        Oracle(expected, 2).attach(request)
        while len(request.output) < 8:
            quick.step()
        quick.pause(request)
        quick.resume(request)
        finish(quick, request)
        count = 0
        for part in request.exports:
            assert part.first == count
            count += len(part.hidden)
            assert part.routing.shape[1] == part.selection.shape[1] == len(part.hidden)
        assert count == len(request.tokens) - 1
        logits = quick.runner.head(np.concatenate([p.hidden for p in request.exports]))
        assert [int(row.argmax()) for row in logits[299:]] == [d.token for d in request.output]

    def test_a_known_prompt_that_ends_with_a_slab(self, net: Transformer) -> None:
        """All of it was computed again, every time."""
        served = engine(net, checkpoint_spacing=0)
        finish(served, served.submit([*prompt(512), 5, 6, 7], greedy(1)))
        served.cache.openings.clear()
        first = served.submit(prompt(512), greedy(4))
        finish(served, first)
        assert first.cached_tokens == 511 - REPLAY
        again = served.submit(prompt(512), greedy(4))
        finish(served, again)
        assert again.cached_tokens == 512
        assert bits(first) == bits(again) == alone(net, prompt(512), greedy(4))

    def test_a_group_with_one_prompt_computes_it_once(self, net: Transformer) -> None:
        served = engine(net, budget=Budget(tokens=128))
        runs = [served.submit(prompt(500), sampled(6, seed=i)) for i in range(4)]
        finish(served, *runs)
        assert served.metrics.computed_tokens <= 500 + 4 * 6
        for i, request in enumerate(runs):
            assert bits(request) == alone(net, prompt(500), sampled(6, seed=i))

    def test_long_prompts_through_the_reference(self) -> None:
        """A step that draws nothing once failed there."""
        plain = model(quantized=False)
        with use_backend("reference"):
            served = engine(plain, budget=Budget(tokens=64))
            request = served.submit(prompt(150), greedy(3))
            finish(served, request)
        assert [d.token for d in request.output] == [
            d.token
            for d in alone(plain, prompt(150), greedy(3))  # type: ignore[attr-defined]
        ]

    def test_the_reference_exports_what_compiled_rows_do(self) -> None:
        plain, found = model(quantized=False), []
        for backend in ("numba", "reference"):
            with use_backend(backend):
                served = engine(plain, budget=Budget(tokens=64))
                request = served.submit(prompt(150), greedy(4), export=True)
                finish(served, request)
            parts = request.exports
            found.append(
                (
                    np.concatenate([p.hidden for p in parts]),
                    np.concatenate([p.routing for p in parts], axis=1),
                    np.concatenate([p.selection for p in parts], axis=1),
                )
            )
        (hidden, routing, selection), reference = found
        assert reference[0] == pytest.approx(hidden, abs=1e-3)
        assert np.array_equal(reference[1], routing)
        assert np.array_equal(reference[2], selection)


class TestHooks:
    def test_a_hook_that_fails_ends_its_request_alone(self, net: Transformer) -> None:
        def broken(token: int) -> bool:
            raise IndexError("a hook's own mistake")

        class Mask:
            def allowed(self) -> bytes:
                raise ValueError("a mask's own mistake")

            def accept(self, token: int) -> None: ...

        served = engine(net)
        bad = [served.submit(prompt(20), greedy(5), stop=broken)]
        bad.append(served.submit(prompt(21), greedy(5), mask=Mask()))
        good = served.submit(prompt(22), greedy(5))
        finish(served, *bad, good)
        assert [r.finish_reason for r in bad] == ["error", "error"]
        assert bits(good) == alone(net, prompt(22), greedy(5))

    def test_a_hook_that_cancels(self, net: Transformer) -> None:
        """Itself and another of the same step: neither leaves a damaged checkpoint."""
        served = engine(net, budget=Budget(tokens=400, beside_streams=300))

        def stop(token: int) -> bool:
            served.cancel(long)
            served.cancel(short)
            return False

        short = served.submit(prompt(20), greedy(5), stop=stop)
        long = served.submit(prompt(900, 1), greedy(5))
        finish(served, short, long)
        assert [short.finish_reason, long.finish_reason] == ["cancelled", "cancelled"]
        assert served.metrics.finished == {"cancelled": 2}
        again = served.submit(prompt(900, 1), greedy(5))
        finish(served, again)
        assert bits(again) == alone(net, prompt(900, 1), greedy(5))

    @pytest.mark.parametrize("call", ["step", "pause", "save_session", "update_weights"])
    def test_a_hook_that_calls_what_it_must_not(
        self, net: Transformer, tmp_path: Path, call: str
    ) -> None:
        served = engine(net, disk=tmp_path)

        def stop(token: int) -> bool:
            method = getattr(served, call)
            method(request) if call in ("pause", "save_session") else method()
            return False

        request = served.submit(prompt(300), greedy(5), stop=stop)
        good = served.submit(prompt(300), greedy(5))
        finish(served, request, good)
        assert "stop hook" in str(request.error)
        assert bits(good) == alone(net, prompt(300), greedy(5))


class TestImpossible:
    @pytest.mark.parametrize(
        "value",
        [
            {"seed": 1.5}, {"top_k": 2.5}, {"stop_token_ids": ("a",)}, {"max_tokens": 3.5},
            {"logit_bias": {"5": 1.0}}, {"temperature": "hot"}, {"top_logprobs": True},
        ],
    )  # fmt: skip
    def test_values_of_the_wrong_kind(self, net: Transformer, value: dict[str, object]) -> None:
        with pytest.raises(GenerationError):
            SamplingParams(**value)  # type: ignore[arg-type]

    def test_a_priority_that_is_none(self, net: Transformer) -> None:
        served = engine(net)
        with pytest.raises(GenerationError, match="priority"):
            served.submit(prompt(5), priority="high")  # type: ignore[arg-type]
        finish(served, served.submit(prompt(5), greedy(2)))

    @pytest.mark.parametrize("name", [5, "a\ud800"])
    def test_an_id_that_is_no_text(self, net: Transformer, tmp_path: Path, name: object) -> None:
        served = engine(net, wal=tmp_path)
        with pytest.raises(GenerationError, match="id is text"):
            served.submit(prompt(5), request_id=name)  # type: ignore[arg-type]
        served.close()
        assert list(tmp_path.glob("*.wal")) == []

    def test_more_memory_than_there_is(self, net: Transformer) -> None:
        with pytest.raises(ConfigError, match="cache_tokens"):
            engine(net, cache_tokens=10**16)
        with pytest.raises(ConfigError, match="host_bytes"):
            engine(net, host_bytes=-1)

    def test_memory_that_runs_out_in_a_step(
        self, net: Transformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        served = engine(net)
        stream = served.submit(prompt(20), greedy(30))
        while not stream.output:
            served.step()
        forward = served.runner.forward

        def small(batch: object) -> None:
            if len(batch) > 50:  # type: ignore[arg-type]
                raise MemoryError
            forward(batch)  # type: ignore[arg-type]

        monkeypatch.setattr(served.runner, "forward", small)
        large = served.submit(prompt(700, 1), greedy(5))
        finish(served, stream, large)
        assert isinstance(large.error, CacheFull)
        assert "memory ran out" in str(large.error)
        assert bits(stream) == alone(net, prompt(20), greedy(30))
        assert served.cache.available() == served.memory.slabs.count


class TestLog:
    def test_ids_of_two_processes_never_meet(self, net: Transformer, tmp_path: Path) -> None:
        first = engine(net, wal=tmp_path)
        old = first.submit(prompt(9), sampled(20))
        first.step()
        first.close()
        import itertools

        import fathom.engine.request as module

        module._numbers = itertools.count(old.number)  # as in a new process
        second = engine(net, wal=tmp_path)
        new = second.submit(prompt(9), sampled(20))
        finish(second, new, *second.recover())
        assert len({old.id, new.id}) == 2

    def test_a_name_that_has_a_log_is_refused(self, net: Transformer, tmp_path: Path) -> None:
        """The tokens of the second were once written where nobody reads them."""
        served = engine(net, wal=tmp_path)
        finish(served, served.submit(prompt(9), greedy(3), request_id="a"))
        with pytest.raises(CacheError, match="another request of this name"):
            served.submit(prompt(9), greedy(5), request_id="a")
        assert served.wal is not None
        served.wal.forget("a")
        again = served.submit(prompt(9), greedy(5), request_id="a")
        finish(served, again)
        (logged,), _ = served.wal.read()
        assert len(logged.output) == 5

    def test_new_weights_and_a_restart(self, tmp_path: Path) -> None:
        changing, second = model(1), model(2)
        served = engine(changing, wal=tmp_path)
        request = served.submit(prompt(40), sampled(12), request_id="a")
        while len(request.output) < 4:
            served.step()
        changing.load_state_dict(second.state_dict())
        served.update_weights()
        while len(request.output) < 8:
            served.step()
        served.close()
        later = engine(changing, wal=tmp_path)
        (again,) = later.recover()
        finish(later, again)
        served = engine(second)
        rest = served.submit(request.tokens[:44], SamplingParams(temperature=0.0, max_tokens=1))
        finish(served, rest)
        assert [d.token for d in again.output[:8]] == [d.token for d in request.output]
        assert len(again.output) == 12

    def test_a_log_is_open_in_one_process_only(
        self, net: Transformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        served = engine(net, wal=tmp_path)
        request = served.submit(prompt(9), greedy(12))
        served.step()
        other = engine(net, wal=tmp_path)
        with caplog.at_level(logging.WARNING):
            assert other.recover() == []
        assert "in use by another process" in caplog.text
        finish(served, request)
        (logged,), _ = served.wal.read()  # type: ignore[union-attr]
        assert [d.token for d in logged.output] == [d.token for d in request.output]

    def test_a_stop_hook_is_told_all_tokens_again(self, net: Transformer, tmp_path: Path) -> None:
        heard: list[int] = []

        def stop(token: int) -> bool:
            heard.append(token)
            return len(heard) == 9

        served = engine(net, wal=tmp_path)
        request = served.submit(prompt(9), sampled(20), stop=stop)
        while len(request.output) < 5:
            served.step()
        served.close()
        heard.clear()
        later = engine(net, wal=tmp_path)
        (again,) = later.recover(lambda name: (None, stop))
        finish(later, again)
        assert again.finish_reason == "stop"
        assert heard == [d.token for d in again.output]
        assert len(heard) == 9

    def test_a_header_that_cannot_be_written_leaves_nothing(
        self, net: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        served = engine(net, wal=tmp_path)
        before = len(os.listdir("/proc/self/fd"))

        def full(*args: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as m:
            m.setattr("fathom.engine.wal.os.write", full)
            with pytest.raises(CacheError, match="No space"):
                served.submit(prompt(9), request_id="a")
        assert served.requests == []
        assert list(tmp_path.iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) == before
        finish(served, served.submit(prompt(9), greedy(2), request_id="a"))

    def test_what_a_completion_leaves_behind(self, net: Transformer, tmp_path: Path) -> None:
        """Closed early or not, its log goes."""
        from fathom.chat import Tokenizer
        from fathom.chat.generation import GenerationRequest
        from fathom.engine.backend import LocalBackend
        from fathom.engine.engine import EngineConfig

        tokenizer = Tokenizer.train(["some words to learn from, and a few more words"] * 3, 400)
        backend = LocalBackend(LLM(net, tokenizer, engine=EngineConfig(wal=tmp_path)))

        async def main() -> None:
            run = backend.generate(GenerationRequest(prompt=prompt(9), max_tokens=900))
            await anext(run)
            assert len(os.listdir(tmp_path)) == 1
            await run.aclose()
            asked = GenerationRequest(prompt=prompt(9), max_tokens=3)
            assert len([item async for item in backend.generate(asked)]) == 5
            with pytest.raises(FathomError):
                async for _ in backend.generate(GenerationRequest(prompt=[5], max_tokens="x")):  # type: ignore[arg-type]
                    pass
            await backend.metrics_text()
            await backend.aclose()

        anyio.run(main)
        assert os.listdir(tmp_path) == []


class TestThreads:
    def test_streams_that_end_while_others_compute(self, net: Transformer) -> None:
        """Closing one stream once changed the engine under another's step."""
        llm = LLM(net, None)
        expected = {i: LLM(net, None).generate(prompt(30, i), 25, seed=i).token_ids for i in (0, 1)}
        found: dict[int, list[int]] = {}

        async def whole(i: int) -> None:
            found[i] = [p.token_id async for p in llm.astream(prompt(30, i), 25, seed=i)]

        async def early(i: int) -> None:
            for seed in range(6):
                run = llm.astream(prompt(200, i + seed), 50, seed=seed)
                async for _ in run:
                    break
                await run.aclose()  # type: ignore[attr-defined]

        async def main() -> None:
            async with anyio.create_task_group() as group:
                for i in (0, 1):
                    group.start_soon(whole, i)
                    group.start_soon(early, 10 * i + 2)

        anyio.run(main)
        assert found == expected
        assert llm.engine.requests == []
        assert llm.engine.memory.slots.free == llm.engine.memory.slots.count

    def test_threads_share_an_engine(self, net: Transformer) -> None:
        llm = LLM(net, None)
        expected = {
            i: LLM(net, None).generate(prompt(50, i), 20, seed=i).logprobs for i in range(4)
        }
        found: dict[int, list[float]] = {}

        def work(i: int) -> None:
            found[i] = llm.generate(prompt(50, i), 20, seed=i).logprobs

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == expected

    def test_dropping_a_stream_within_a_step(self, net: Transformer) -> None:
        """The collector may run at any moment, also inside a step."""
        llm = LLM(net, None)
        held = [llm.stream(prompt(300), 50, temperature=0)]
        next(held[0])
        served = llm.engine

        def stop(token: int) -> bool:
            held.clear()
            gc.collect()
            return False

        request = served.submit(prompt(40), greedy(5), stop=stop)
        finish(served, request)
        assert bits(request) == alone(net, prompt(40), greedy(5))
        assert served.requests == []
        again = llm.generate(prompt(300), 5, temperature=0)
        assert again.token_ids == [
            d.token
            for d in alone(net, prompt(300), greedy(5))  # type: ignore[attr-defined]
        ]


class TestDisk:
    def test_a_record_larger_than_the_cache_removes_nothing(self, tmp_path: Path) -> None:
        cache = DiskCache(tmp_path, b"r" * 16, 10_000)
        for i in range(4):
            cache.write("slab", bytes([i]) * 16, bytes(2000))
        with pytest.raises(CacheError, match="no room"):
            cache.write("slab", b"z" * 16, bytes(20_000))
        assert cache.count("slab") == 4

    def test_forgotten_sessions_make_room_again(self, net: Transformer, tmp_path: Path) -> None:
        served = engine(net, disk=tmp_path)
        slab = served.memory.slabs.layout.slab_bytes
        served = engine(net, disk=tmp_path, disk_bytes=4 * slab + 100_000)
        names = []
        for i in range(2):
            finish(served, served.submit(prompt(500, i), greedy(2)))
            names.append(served.save_session(prompt(500, i)))
        shared = served.submit(prompt(500) + prompt(100, 5), greedy(2), pin=True)
        finish(served, shared)
        served.forget_session(names[0])
        with pytest.raises(CacheError, match="no session"):
            served.load_session(names[0])
        pinned = {p.name for p in tmp_path.glob("*/*.pin")}
        chain = served.cache.chain(prompt(500))
        assert f"slab-{chain[0].hex()}.pin" in pinned  # the other session needs it
        served.forget_session(names[1])
        assert f"slab-{served.cache.chain(prompt(500, 1))[0].hex()}" in {
            p.name for p in tmp_path.glob("*/slab-*")
        }

    def test_a_session_that_finds_no_room_leaves_nothing_pinned(
        self, net: Transformer, tmp_path: Path
    ) -> None:
        served = engine(net, disk=tmp_path, disk_bytes=30_000, cache_tokens=8192)
        finish(served, served.submit(prompt(900), greedy(2)))
        with pytest.raises(CacheError, match="no room"):
            served.save_session(prompt(900))
        assert not list(tmp_path.glob("*/*.pin"))

    def test_pinned_ends_outlive_others_without_a_disk(self, net: Transformer) -> None:
        slab = engine(net).memory.slabs.layout.slab_bytes
        served = engine(net, cache_tokens=1024, host_bytes=4 * slab, checkpoint_bytes=150_000)
        finish(served, served.submit(prompt(600), greedy(1), pin=True))
        for i in range(1, 9):
            finish(served, served.submit(prompt(600, i), greedy(1)))
        again = served.submit(prompt(600), greedy(1))
        finish(served, again)
        assert again.cached_tokens == 600

    def test_many_short_prompts_do_not_slow_down_the_next(
        self, net: Transformer, tmp_path: Path
    ) -> None:
        """Every checkpoint without a slab was once read for every prompt."""
        served = engine(net, disk=tmp_path, checkpoint_bytes=0)
        for i in range(30):
            finish(served, served.submit(prompt(20, i), greedy(1)))
        disk, read = served.cache.disk, []
        assert disk is not None
        original = disk.read
        disk.read = lambda kind, key: read.append(kind) or original(kind, key)  # type: ignore[method-assign, func-returns-value]
        request = served.submit(prompt(20, 3), greedy(1))
        finish(served, request)
        assert request.cached_tokens == 20
        assert len(read) <= 2

    def test_things_that_are_no_files(self, net: Transformer, tmp_path: Path) -> None:
        served = engine(net, disk=tmp_path)
        finish(served, served.submit(prompt(300), greedy(2)))
        own = next(p for p in tmp_path.iterdir() if p.is_dir())
        os.mkfifo(own / f"slab-{'ab' * 16}")
        (own / f"slab-{'cd' * 16}").mkdir()
        later = engine(net, disk=tmp_path)
        assert later.cache.disk is not None
        assert later.cache.disk.count("slab") == 1


class TestWaiting:
    def test_one_that_waits_for_room_costs_nothing(self, net: Transformer) -> None:
        served = engine(net, cache_tokens=1024, budget=Budget(tokens=1024))
        stream = served.submit(prompt(700), greedy(60))
        while len(stream.output) < 2:
            served.step()
        waiting = served.submit(prompt(600, 1), greedy(2))
        looked = []
        find = served.cache.find
        served.cache.find = lambda *a, **k: looked.append(1) or find(*a, **k)  # type: ignore[method-assign, func-returns-value]
        for _ in range(20):
            served.step()
        assert waiting.status is Status.WAITING
        assert len(looked) == 1
        finish(served, stream, waiting)
        assert bits(waiting) == alone(net, prompt(600, 1), greedy(2))

    def test_metrics_when_idle(self, net: Transformer) -> None:
        served = engine(net, drafts=3, drafts_adaptive=False)
        request = served.submit(prompt(60), greedy(40))
        finish(served, request)
        served.step()
        text = served.metrics_text()
        assert "fathom_engine_batch_tokens 0.0\n" in text
        assert "fathom_engine_time_to_first_token_seconds_count 1.0\n" in text
        assert "fathom_engine_inter_token_seconds_count 39.0\n" in text


SCARCE = """
import resource
from tests.engine.helpers import engine, finish, greedy, model, prompt
net = model()
served, alone = (engine(net, checkpoint_spacing=0, cache_tokens=4096) for _ in range(2))
finish(served, served.submit(prompt(20, 3), greedy(3)))
served.runner._allocate(1032)
whole = alone.submit(prompt(1500), greedy(4))
finish(alone, whole)
ended = 0
for spare in range(0, 600_000, 25_000):
    served.cache.clear()
    request = served.submit(prompt(1500), greedy(4))
    size = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, -1))
    try:
        while not request.finished:
            served.step()
    except MemoryError:  # before the model ran
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    ended += request.error is not None
    served.cancel(request)
    assert request.output == whole.output[: len(request.output)], spare
    after = served.submit(prompt(1500), greedy(4))
    finish(served, after)
    assert after.output == whole.output, spare
assert ended, "memory never ran out"
assert served.cache.available() == served.memory.slabs.count
"""


def test_memory_that_runs_out_inside_compiled_code() -> None:
    """It was printed and passed over: the wrong tokens came, and wrong entries stayed."""
    heap = {  # every array takes memory of its own, so that a limit is felt
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "16384",
        "MALLOC_TRIM_THRESHOLD_": "4096",
        "MALLOC_TOP_PAD_": "0",
    }
    subprocess.run(
        [sys.executable, "-c", SCARCE], env={**os.environ, **heap}, check=True, timeout=100
    )
