"""The engine: whatever the batch, the cutting, the cache tier or an interruption, the same bits."""

from __future__ import annotations

import itertools
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch

from fathom.engine import LLM
from fathom.engine.engine import EngineConfig
from fathom.engine.kv_cache import SLAB_TOKENS, SlabLayout
from fathom.engine.options import MemoryPlan, allocate
from fathom.engine.request import Status
from fathom.engine.scheduler import Budget
from fathom.engine.state_cache import SlotLayout
from fathom.errors import CacheFull, ConfigError, FathomError, GenerationError
from fathom.kernels import use_backend
from fathom.model import ModelConfig, Transformer
from tests.engine.helpers import (
    REPLAY,
    bits,
    drop_device,
    drop_host,
    engine,
    finish,
    greedy,
    model,
    prompt,
    sampled,
)

LENGTH = 700  # two full slabs and a bit


@pytest.fixture(scope="module")
def net(device: str) -> Transformer:
    return model(device=device)


@pytest.fixture(scope="module")
def cold(net: Transformer) -> list[object]:
    """The output that every other path must repeat bit for bit."""
    alone = engine(net, checkpoint_spacing=0)
    request = alone.submit(prompt(LENGTH), sampled(8))
    finish(alone, request)
    return list(bits(request))


PATHS = ("cold", "device", "host", "disk", "preempted", "replayed")
BATCHES = (1, 2, 5)
CUTS = (16, 97, 512)


@pytest.mark.parametrize(("path", "batch", "cut"), list(itertools.product(PATHS, BATCHES, CUTS)))
def test_the_same_bits_on_every_path(
    net: Transformer, cold: list[object], tmp_path: Path, path: str, batch: int, cut: int
) -> None:
    """54 cells; the six of the restart are in test_wal.py."""
    settings = {"budget": Budget(tokens=cut, beside_streams=cut), "checkpoint_spacing": 256}
    if path == "disk":
        settings["disk"] = tmp_path
    if path == "replayed":
        settings["checkpoint_spacing"] = 0
    served = engine(net, **settings)
    if path not in ("cold", "preempted"):
        first = served.submit(prompt(LENGTH), greedy(1))
        finish(served, first)
    if path in ("host", "disk"):
        drop_device(served)
    if path == "disk":
        drop_host(served)
    if path == "replayed":
        drop_host(served)
    others = [
        served.submit(prompt(150 + 40 * i, seed=i + 1), sampled(30)) for i in range(batch - 1)
    ]
    request = served.submit(prompt(LENGTH), sampled(8))
    if path == "preempted":
        while len(request.output) < 3:
            served.step()
        served.pause(request)
        for _ in range(2):
            served.step()
        served.resume(request)
    finish(served, request, *others)
    assert bits(request) == cold
    if path in ("device", "host", "disk"):
        assert request.cached_tokens == LENGTH
        assert getattr(served.cache.stats, path) >= 2 * SLAB_TOKENS
    if path == "replayed":
        assert request.cached_tokens == 512 - REPLAY


def test_the_reference_runs_the_same_engine(net: Transformer) -> None:
    """Any device and arithmetic goes through the torch model; here it checks the compiled one."""
    plain = model(quantized=False)
    compiled, reference = engine(plain), None
    with use_backend("reference"):
        reference = engine(plain)
        runs = []
        for made in (compiled, reference):
            for length in (300, 140):
                request = made.submit(prompt(length), greedy(6))
                finish(made, request)
                again = made.submit([*request.tokens, 5], greedy(6))
                finish(made, again)
                assert again.cached_tokens == length + 5
                runs.append([*bits(request), *bits(again)])
    for a, b in zip(runs[:2], runs[2:], strict=True):
        assert [d.token for d in a] == [d.token for d in b]
        assert [d.logprob for d in a] == pytest.approx([d.logprob for d in b], abs=2e-5)


def test_bfloat16_runs_on_the_reference() -> None:
    net = model(quantized=True, num_nextn_predict_layers=0).to(torch.bfloat16)
    half = Transformer(net.config, dtype=torch.bfloat16, quantized=True)
    half.load_state_dict(net.state_dict())
    served = engine(half)
    first = served.submit(prompt(40), greedy(4))
    finish(served, first)
    again = served.submit(prompt(40), greedy(4))
    finish(served, again)
    assert again.cached_tokens == 40
    assert bits(again) == bits(first)


class TestScheduling:
    def test_streams_go_on_beside_a_long_prompt(self, net: Transformer) -> None:
        served = engine(net, budget=Budget(tokens=64, beside_streams=32))
        stream = served.submit(prompt(20), greedy(200))
        while not stream.output:
            served.step()
        long, short = (
            served.submit(prompt(900, 1), greedy(4)),
            served.submit(prompt(30, 2), greedy(4)),
        )
        steps = 0
        while not short.finished:
            before = len(stream.output)
            served.step()
            assert len(stream.output) == before + 1
            assert served.metrics.last_batch <= 32 + 3
            steps += 1
        assert steps <= 8  # the short prompt shares each step with the long one
        assert not long.output
        finish(served, long, stream)

    def test_priorities(self, net: Transformer) -> None:
        served = engine(net, max_sequences=1)
        late = [served.submit(prompt(20, i), greedy(3), priority=p) for i, p in ((1, 5), (2, 0))]
        served.step()
        assert [r.status for r in late] == [Status.WAITING, Status.RUNNING]
        finish(served, *late)
        assert late[0].first_token > late[1].last_token  # type: ignore[operator]

    def test_memory_that_runs_out_sets_back_the_least_important(self, net: Transformer) -> None:
        expected = []
        for i in range(3):
            alone = engine(net)
            request = alone.submit(prompt(250, i), sampled(40))
            finish(alone, request)
            expected.append(list(bits(request)))
        tight = engine(net, cache_tokens=4 * SLAB_TOKENS, checkpoint_bytes=1)
        runs = [tight.submit(prompt(250, i), sampled(40)) for i in range(3)]
        finish(tight, *runs)
        assert [bits(r) for r in runs] == expected
        assert tight.metrics.preemptions > 0
        assert runs[0].preemptions == 0
        assert tight.cache.available() == tight.memory.slabs.count
        assert tight.memory.slots.free == tight.memory.slots.count

    def test_cancelling_frees_everything(self, net: Transformer) -> None:
        served = engine(net)
        runs = [served.submit(prompt(300, i), greedy(50)) for i in range(3)]
        for _ in range(3):
            served.step()
        for request in runs:
            served.cancel(request)
            served.cancel(request)  # twice does no harm
        assert {r.finish_reason for r in runs} == {"cancelled"}
        assert served.requests == []
        assert served.step() == []
        assert served.memory.slots.free == served.memory.slots.count
        assert served.cache.available() == served.memory.slabs.count

    def test_a_paused_request_waits(self, net: Transformer) -> None:
        served = engine(net)
        request = served.submit(prompt(20), greedy(5))
        served.step()
        served.pause(request)
        assert served.step() == []
        with pytest.raises(GenerationError, match="paused"):
            served.run([request])
        served.resume(request)
        finish(served, request)
        assert len(request.output) == 5

    def test_a_stop_hook_sees_every_token(self, net: Transformer) -> None:
        seen: list[int] = []

        def stop(token: int) -> bool:
            seen.append(token)
            return len(seen) == 4

        served = engine(net)
        request = served.submit(prompt(20), greedy(50), stop=stop)
        finish(served, request)
        assert seen == [d.token for d in request.output]
        assert request.finish_reason == "stop"
        assert len(seen) == 4


class TestBadInput:
    def test_prompts_that_cannot_be(self, net: Transformer) -> None:
        served = engine(net)
        for ids, message in (([], "empty"), (prompt(3000), "context"), ([5, 400], "token id")):
            with pytest.raises(GenerationError, match=message):
                served.submit(ids)
        good = served.submit(prompt(5), greedy(2))
        finish(served, good)

    def test_a_prompt_larger_than_the_memory(self, net: Transformer) -> None:
        served = engine(net, cache_tokens=512)
        with pytest.raises(CacheFull, match="cache_tokens"):
            served.submit(prompt(600))
        good = served.submit(prompt(400), greedy(2))
        finish(served, good)

    def test_growing_beyond_the_memory_ends_that_request_alone(self, net: Transformer) -> None:
        served = engine(net, cache_tokens=512)
        endless = served.submit(prompt(490), greedy(200))
        finish(served, endless)
        assert endless.finish_reason == "error"
        assert isinstance(endless.error, CacheFull)
        good = served.submit(prompt(40), greedy(2))
        finish(served, good)

    def test_two_requests_of_one_name(self, net: Transformer) -> None:
        served = engine(net)
        served.submit(prompt(5), request_id="a")
        with pytest.raises(GenerationError, match="another id"):
            served.submit(prompt(5), request_id="a")

    def test_a_mask_that_allows_nothing_ends_its_request_alone(self, net: Transformer) -> None:
        class Nothing:
            def allowed(self) -> bytes:
                return bytes(50)

            def accept(self, token: int) -> None:
                raise AssertionError

        served = engine(net)
        bad = served.submit(prompt(5), greedy(5), mask=Nothing())
        good = served.submit(prompt(5), greedy(5))
        finish(served, bad, good)
        assert "allows no token" in str(bad.error)
        assert len(good.output) == 5

    def test_an_interrupted_step_is_computed_again(
        self, net: Transformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        served, other = engine(net), engine(net)
        request = served.submit(prompt(300), sampled(8))
        while len(request.output) < 3:
            served.step()
        forward = served.runner.forward

        def broken(batch: object) -> None:
            forward(batch)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(served.runner, "forward", broken)
            with pytest.raises(KeyboardInterrupt):
                served.step()
        finish(served, request)
        same = other.submit(prompt(300), sampled(8))
        finish(other, same)
        assert bits(request) == bits(same)

    @pytest.mark.parametrize(
        "settings",
        [{"max_sequences": 0}, {"checkpoint_spacing": 100}, {"drafts": 8}, {"indexer": "int8"}],
    )
    def test_impossible_settings(self, net: Transformer, settings: dict[str, object]) -> None:
        with pytest.raises(ConfigError):
            engine(net, **settings)


def test_exports_for_a_trainer(net: Transformer) -> None:
    served = engine(net, checkpoint_spacing=0)
    request = served.submit(prompt(120), greedy(4), export=True)
    beside = served.submit(prompt(50, 1), greedy(4))
    finish(served, request, beside)
    parts = request.exports
    tokens = request.tokens[:-1]
    assert [p.first for p in parts][:2] == [0, 120]
    hidden = np.concatenate([p.hidden for p in parts])
    routing = np.concatenate([p.routing for p in parts], axis=1)
    selection = np.concatenate([p.selection for p in parts], axis=1)
    assert hidden.shape == (len(tokens), net.config.hidden_size)
    topk = net.config.index_topk
    assert routing.shape == (4, len(tokens), 2)
    assert selection.shape == (4, len(tokens), topk)
    logits = served.runner.head(hidden)
    assert [int(row.argmax()) for row in logits[119:]] == [d.token for d in request.output]
    table = net.layers[0].ffn.gate.tid2eid  # type: ignore[union-attr]
    assert np.array_equal(routing[0], table[torch.tensor(tokens)].cpu().numpy())
    for t in (3, 40, len(tokens) - 1):
        visible = (t + 1) // 4
        picked = selection[1, t][selection[1, t] >= 0]
        assert len(picked) == min(topk, visible)
        assert np.all(np.diff(picked) > 0)
        assert np.all(picked < visible)
    assert np.all(selection[0] == -1)


def test_new_weights_in_place(device: str) -> None:
    net, other = model(1, device=device), model(2, device=device)
    served = engine(net)
    before = served.submit(prompt(300), greedy(4))
    finish(served, before)
    running = served.submit(prompt(300, 3), greedy(6))
    while len(running.output) < 2:
        served.step()
    net.load_state_dict(other.state_dict())
    served.update_weights()
    finish(served, running)
    after = served.submit(prompt(300), greedy(4))
    finish(served, after)
    assert after.cached_tokens == 0
    fresh = engine(other)
    same = fresh.submit(prompt(300), greedy(4))
    rest = fresh.submit(running.tokens[:302], greedy(4))
    finish(fresh, same, rest)
    assert bits(after) == bits(same)
    assert bits(running)[2:] == bits(rest)


def test_metrics(net: Transformer) -> None:
    served = engine(net)
    for _ in range(2):
        finish(served, served.submit(prompt(300), greedy(4)))
    text = served.metrics_text()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    values = {name: float(value) for name, value in lines}
    assert values["fathom_engine_requests_total"] == 2
    assert values["fathom_engine_prompt_tokens_total"] == 600
    assert values["fathom_engine_cached_tokens_total"] == 300
    assert values["fathom_engine_hit_rate"] == 0.5
    assert values["fathom_engine_computed_tokens_total"] == 300 + 3 + 3
    assert values['fathom_engine_finished_total{reason="length"}'] == 2
    assert values["fathom_engine_capacity_tokens"] == 8192
    assert values['fathom_engine_stored_tokens{tier="device"}'] == 256
    assert values["fathom_engine_time_to_first_token_seconds_count"] == 2
    assert values["fathom_engine_inter_token_seconds_count"] == 6


class TestLayouts:
    def test_the_released_models_bytes(self) -> None:
        flash = ModelConfig.preset("flash")
        fp8 = SlabLayout.of(flash, True, torch.bfloat16, "fp8")
        fp4 = SlabLayout.of(flash, True, torch.bfloat16)
        assert fp8.slab_bytes == 985_664
        assert fp4.slab_bytes == 985_664 - 21 * 64 * 64
        assert fp8.slab_bytes / SLAB_TOKENS <= 3.9e3
        assert fp8.kv_sizes == (576, 8)
        for position in (128, 4096, 128 * 77):
            assert SlotLayout(fp8).checkpoint_bytes(position) <= 4.1e6

    def test_an_engines_memory_is_planned_to_the_byte(self, net: Transformer) -> None:
        for settings in ({}, {"prompt_rows": 64, "drafts": 1, "indexer": "fp8"}):
            if settings:
                net = model(num_nextn_predict_layers=1)
            config = EngineConfig(cache_tokens=4096, max_sequences=3, **settings)
            plan, memory = MemoryPlan.of(config, net), allocate(config, net)
            tensors = (memory.slabs.data, memory.slots.data, memory.tables)
            assert [size for _, size in plan.parts] == [t.nbytes for t in tensors]
            assert plan.total == sum(t.nbytes for t in tensors)
            assert f"{plan.total:,}" in plan.lines()[-1]
            plan.check(plan.total)
            with pytest.raises(ConfigError, match="lower cache_tokens or max_sequences") as told:
                plan.check(plan.total - 1)
            assert ("prompt_rows" in str(told.value)) == (plan.slot.room > 8)

    def test_room_for_a_prompts_rows_costs_each_slot(self) -> None:
        slabs = SlabLayout.of(ModelConfig.preset("flash"), True, torch.bfloat16)
        assert SlotLayout(slabs).slot_bytes == 7_961_792
        assert SlotLayout(slabs, room=64).slot_bytes == 28_291_584
        for rows in (7, 65):
            with pytest.raises(ConfigError, match="prompt_rows"):
                EngineConfig(prompt_rows=rows)

    def test_the_parts_of_a_slab_do_not_overlap(self) -> None:
        for name in ("flash", "pro", "nano", "micro"):
            layout = SlabLayout.of(ModelConfig.preset(name), True, torch.bfloat16)
            ranges = sorted(layout.used_ranges(SLAB_TOKENS - 1))
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
            assert ranges[-1][1] <= layout.slab_bytes


class TestLLM:
    def test_a_list_of_prompts_gives_what_each_gives_alone(self, net: Transformer) -> None:
        llm = LLM(net, None, engine=EngineConfig(cache_tokens=8192, max_sequences=2))
        prompts = [prompt(30 + 50 * i, i) for i in range(4)]
        together = llm.generate(prompts, 6, seed=3)
        alone = [LLM(net, None).generate(p, 6, seed=3) for p in prompts]
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        assert [c.logprobs for c in together] == [c.logprobs for c in alone]

    def test_streams_in_turns(self, net: Transformer) -> None:
        llm = LLM(net, None)
        runs = [llm.stream(prompt(20, i), 8, temperature=0) for i in range(2)]
        pieces = list(zip(*runs, strict=True))
        for i in range(2):
            alone = LLM(net, None).generate(prompt(20, i), 8, temperature=0)
            assert [p[i].token_id for p in pieces] == alone.token_ids

    def test_a_stream_for_an_event_loop(self, net: Transformer) -> None:
        llm = LLM(net, None)

        async def collect() -> list[int]:
            return [piece.token_id async for piece in llm.astream(prompt(20), 6, temperature=0)]

        found = anyio.run(collect)
        assert found == llm.generate(prompt(20), 6, temperature=0).token_ids

    def test_unknown_settings(self, net: Transformer) -> None:
        with pytest.raises(GenerationError, match="no such setting"):
            LLM(net, None).generate([5], 4, creativity=1.0)

    def test_an_engine_that_fails_tells_its_caller(self, net: Transformer) -> None:
        llm = LLM(net, None, engine=EngineConfig(cache_tokens=256))
        with pytest.raises(FathomError):
            llm.generate(prompt(600), 4)
        assert len(llm.generate(prompt(20), 4, temperature=0).token_ids) == 4
