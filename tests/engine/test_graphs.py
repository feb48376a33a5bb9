"""Graphs of a runner: what CUDA forbids while a stream is captured never happens, whoever drops
engines meanwhile, and a capture that fails costs nothing but its graph.

Without a GPU CUDA is pretended, with this rule; with one the engine itself is tried.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fathom.engine import graphs
from fathom.engine.engine import Engine
from fathom.engine.graphs import ATTEMPTS, Graphs
from fathom.kernels import use_backend
from fathom.model import Transformer
from tests.engine.helpers import bits, engine, finish, greedy, model, prompt, sampled, stored_model

CUDA = torch.device("cuda")


class Graph:
    """As CUDA's: it may not be destroyed by the thread that is capturing."""

    capturing: int | None = None  # the thread that does
    spoilt = False
    alive = 0

    def __init__(self) -> None:
        type(self).alive += 1
        self.replays = 0

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert Graph.capturing is None, "two captures at once"
        assert capture_error_mode == "thread_local"
        Graph.capturing, Graph.spoilt = threading.get_ident(), False

    def capture_end(self) -> None:
        Graph.capturing = None
        if Graph.spoilt:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.replays += 1

    def __del__(self) -> None:
        type(self).alive -= 1
        if Graph.capturing == threading.get_ident():
            Graph.spoilt = True


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "CUDAGraph": Graph,
        "Stream": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph_pool_handle": object,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    gc.collect()
    Graph.alive = 0
    yield
    gc.collect()
    assert Graph.alive == 0
    assert gc.isenabled()
    assert not graphs._unwanted


def captured(count: int = 3) -> Graphs:
    made = Graphs(CUDA)
    for key in range(count):
        made.run(key, lambda given: given + 1, torch.ones(2))
    assert len(made._captured) == count
    return made


@pytest.mark.usefixtures("pretended")
def test_computed_once_then_replayed() -> None:
    made, seen = Graphs(CUDA), []

    def call(given: torch.Tensor, more: int) -> torch.Tensor:
        seen.append(given.data_ptr())
        return given * more

    results = [made.run("a", call, torch.full((2,), float(i)), 3) for i in range(3)]
    assert results[0].tolist() == [0.0, 0.0]
    assert len(seen) == 2  # as it stands and in the capture, at one address
    assert len(set(seen)) == 1
    assert made._captured["a"][0].replays == 2  # type: ignore[attr-defined]
    assert made._inputs["a"].tolist() == [2.0, 2.0]
    made.clear()
    assert Graph.alive == 0
    made.run("a", call, torch.ones(2), 3)
    assert len(seen) == 4


def test_on_a_cpu_everything_is_computed() -> None:
    made = Graphs(torch.device("cpu"))
    assert [made.run("a", lambda given: given + 1, torch.ones(1) * i).item() for i in range(3)] == [
        1.0, 2.0, 3.0,
    ]  # fmt: skip


def in_a_cycle() -> Any:
    cycle: list[Any] = [captured()]
    cycle.append(cycle)
    return cycle


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("how", ["collector", "reference", "clear", "thread"])
def test_others_may_go_while_something_is_captured(how: str) -> None:
    others = [in_a_cycle() if how == "collector" else captured()]
    alive = Graph.alive

    def drop() -> None:
        if how == "clear":
            others[0].clear()
        others.clear()

    def call(given: torch.Tensor) -> torch.Tensor:
        if Graph.capturing is not None and others:
            if how == "thread":
                thread = threading.Thread(target=drop)
                thread.start()
                thread.join()
            else:
                drop()
                gc.collect()
            assert Graph.alive == alive + 1  # handed over, and still there
        return given

    made = Graphs(CUDA)
    made.run("a", call, torch.ones(1))
    assert "a" in made._captured
    assert not made._failed
    assert Graph.alive == 1  # and gone right afterwards


@pytest.mark.usefixtures("pretended")
def test_the_collector_rests_while_something_is_captured() -> None:
    seen = []

    def call(given: torch.Tensor) -> torch.Tensor:
        seen.append((Graph.capturing is not None, gc.isenabled()))
        return given

    Graphs(CUDA).run("a", call, torch.ones(1))
    assert seen == [(False, True), (True, False)]
    gc.disable()
    try:
        Graphs(CUDA).run("a", call, torch.ones(1))
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


@pytest.mark.usefixtures("pretended")
def test_threads_capture_one_after_the_other() -> None:
    started, errors = threading.Barrier(4), []

    def work() -> None:
        try:
            started.wait()
            for _ in range(20):
                captured(5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def spoil() -> None:
    Graph.spoilt = True


def run_out() -> None:
    raise torch.OutOfMemoryError("no memory for a capture")


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("accident", [spoil, run_out])
def test_a_failed_capture_costs_its_graph_only(
    accident: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    left = 1

    def call(given: torch.Tensor) -> torch.Tensor:
        nonlocal left
        if Graph.capturing is not None and left:
            left -= 1
            accident()
        return given + 1

    made = Graphs(CUDA)
    with caplog.at_level(logging.WARNING):
        assert made.run("a", call, torch.ones(1)).item() == 2.0
    assert "event=graph_failed" in caplog.text
    assert "again next time" in caplog.text
    assert Graph.alive == 0
    assert made.run("a", call, torch.ones(1) * 5).item() == 6.0  # computed, then captured
    assert "a" in made._captured
    left, caplog_before = 10, len(caplog.records)
    for number in range(ATTEMPTS + 3):  # it never succeeds: every result is right all the same
        assert made.run("b", call, torch.ones(1) * number).item() == number + 1.0
    assert len(caplog.records) - caplog_before == ATTEMPTS - 1  # one is spent already
    assert "without graphs from now on" in caplog.records[-1].getMessage()
    assert "a" in made._captured  # what there is stays in use


@pytest.mark.usefixtures("pretended")
def test_an_interrupt_is_none_of_its_business() -> None:
    def call(given: torch.Tensor) -> torch.Tensor:
        if Graph.capturing is not None:
            raise KeyboardInterrupt
        return given

    made = Graphs(CUDA)
    with pytest.raises(KeyboardInterrupt):
        made.run("a", call, torch.ones(1))
    assert Graph.capturing is None
    assert gc.isenabled()
    assert captured()


@pytest.mark.parametrize("kind", ["compiled", "stored"])
def test_an_engine_goes_as_soon_as_nobody_holds_it(kind: str, tmp_path: Any) -> None:
    """Its memory may be most of a device's: it must not wait for the collector."""
    net = stored_model(num_nextn_predict_layers=1)
    gc.collect()
    gc.disable()
    try:
        with use_backend("triton" if kind == "stored" else "numba"):
            served = engine(
                net, drafts=1, drafts_adaptive=False, disk=tmp_path / "disk", wal=tmp_path / "wal"
            )
        request = served.submit(prompt(20), sampled(3))
        finish(served, request)
        left = [weakref.ref(thing) for thing in (served, served.runner, served.memory)]
        del served
        assert [there() for there in left] == [None] * 3
    finally:
        gc.enable()


# On a GPU, with engines.


@pytest.fixture(scope="module")
def on_gpu() -> Transformer:
    return model(device="cuda", num_nextn_predict_layers=1)


def watched(served: Engine, act: Callable[[], None]) -> None:
    """Do something within every capture of a decode step."""
    step = served.runner._step  # type: ignore[attr-defined]

    def _step(table: torch.Tensor, bound: int) -> Any:
        if torch.cuda.is_current_stream_capturing():
            act()
        return step(table, bound)

    served.runner._step = _step  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_the_collector_finds_an_engine_during_a_capture_on_a_gpu(on_gpu: Transformer) -> None:
    """Several engines in one process, each garbage in a cycle by the time the next one captures."""
    found = []
    for _ in range(3):
        served = engine(on_gpu)
        watched(served, gc.collect)
        request = served.submit(prompt(40), sampled(6))
        finish(served, request)
        found.append(bits(request))
        assert served.runner._graphs._failed == 0  # type: ignore[attr-defined]
        served.itself = served  # type: ignore[attr-defined]
        del served, request
    assert found[0] == found[1] == found[2]


@pytest.mark.gpu
def test_a_failed_capture_on_a_gpu(on_gpu: Transformer, caplog: pytest.LogCaptureFixture) -> None:
    """Every kind of accident, and the tokens are the same: first with graphs, then without."""
    plain = engine(on_gpu)
    expected = plain.submit(prompt(40), greedy(8))
    finish(plain, expected)

    def raises() -> None:
        raise RuntimeError("an accident")

    for accident in (torch.cuda.synchronize, raises):
        served = engine(on_gpu)
        watched(served, accident)
        for _ in range(2):
            request = served.submit(prompt(40), greedy(8))
            finish(served, request)
            assert bits(request) == bits(expected)
        made = served.runner._graphs  # type: ignore[attr-defined]
        assert made._failed == ATTEMPTS
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        served.close()
    assert caplog.text.count("event=graph_failed") == 2 * ATTEMPTS
    later = engine(on_gpu)
    request = later.submit(prompt(40), greedy(8))
    finish(later, request)
    assert bits(request) == bits(expected)
    assert later.runner._graphs._failed == 0  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_memory_comes_back_when_an_engine_goes_on_a_gpu(on_gpu: Transformer) -> None:
    def used() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def serve() -> None:
        served = engine(on_gpu, drafts=1, drafts_adaptive=False)
        finish(served, served.submit(prompt(40), greedy(4)))
        assert served.runner._graphs._captured  # type: ignore[attr-defined]

    serve()
    gc.collect()
    before = used()
    gc.disable()
    try:
        serve()
        assert used() <= before
    finally:
        gc.enable()
