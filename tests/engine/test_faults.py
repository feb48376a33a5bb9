"""What fails beside the model costs time, not answers: copies to the host, logs, saved sessions."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest

from fathom.engine.engine import Engine, EngineConfig
from fathom.engine.kv_cache import SLAB_TOKENS, SlabPool
from fathom.engine.request import Status
from fathom.engine.sampler import Drawn, SamplingParams
from fathom.engine.scheduler import Budget
from fathom.engine.state_cache import SlotPool
from fathom.errors import CacheError
from fathom.model import Transformer
from tests.engine.helpers import bits, engine, finish, greedy, model, prompt, sampled


@pytest.fixture(scope="module")
def net() -> Transformer:
    return model()


@pytest.fixture(scope="module")
def expected(net: Transformer) -> list[list[Drawn]]:
    served = engine(net)
    runs = [served.submit(prompt(300, i), greedy(40)) for i in range(2)]
    finish(served, *runs)
    return [list(bits(run)) for run in runs]


# The second is what torch raises for memory that it cannot pin.
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory")])
def test_a_host_without_memory_for_checkpoints_serves_all_the_same(
    net: Transformer,
    expected: list[list[Drawn]],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts ended with an error, and a request that was set back was lost with its memory."""

    def full(*args: Any) -> bytes:
        raise error

    monkeypatch.setattr(SlotPool, "read", full)
    monkeypatch.setattr(SlabPool, "read", full)
    served = engine(net, cache_tokens=3 * SLAB_TOKENS, max_sequences=2)
    runs = [served.submit(prompt(300, i), greedy(40), priority=i) for i in range(2)]
    while runs[0].status is not Status.RUNNING or runs[0].pending > 1:
        served.step()
    served.pause(runs[0])
    served.resume(runs[0])
    finish(served, *runs)
    assert [bits(run) for run in runs] == expected
    assert served.memory.slots.free == served.memory.slots.count
    assert served.cache.available() == served.memory.slabs.count


def test_memory_that_runs_out_in_a_step_hides_no_token(
    net: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others had drawn in that step was not among what it told."""
    served = engine(net)
    stream, broken = (served.submit(prompt(30, i), greedy(30)) for i in range(2))
    while len(broken.output) < 2:
        served.step()
    take_note = served._postprocess

    def fail(share: Any) -> Any:
        if share.request is broken:
            raise MemoryError
        return take_note(share)

    monkeypatch.setattr(served, "_postprocess", fail)
    told = dict(served.step())
    assert told == {stream: stream.output[-1:], broken: []}


def test_a_step_has_no_more_rows_than_its_runner_has_room_for(net: Transformer) -> None:
    """Beside a stream a prompt took 128 of them, whatever the budget: past the end of a buffer."""
    served = engine(net, budget=Budget(tokens=4), max_sequences=2)
    stream = served.submit(prompt(4), greedy(30))
    while not stream.output:
        served.step()
    served.submit(prompt(100, 1), greedy(1))
    served.step()
    assert served.metrics.last_batch == 1 + 4 <= served.config.max_rows


class Told:
    """A mask that counts what it is told."""

    rules = "told"

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def allowed(self) -> None:
        return None

    def accept(self, token: int) -> None:
        self.tokens.append(token)


def interrupted(net: Transformer, folder: Path) -> Engine:
    """An engine that was closed in the middle of a masked request."""
    served = Engine(net, EngineConfig(wal=folder, cache_tokens=1024))
    request = served.submit(prompt(20), sampled(30), mask=Told())
    while len(request.output) < 5:
        served.step()
    return served


def test_a_mask_whose_log_is_taken_is_told_nothing(net: Transformer, tmp_path: Path) -> None:
    """Who is refused asks anew with the same mask, which once stood where the other request was."""
    first = interrupted(net, tmp_path)
    other = Engine(net, EngineConfig(wal=tmp_path, cache_tokens=1024))
    (logged,) = other.interrupted()
    mask = Told()
    with pytest.raises(CacheError, match="in use by another process"):
        other.go_on(logged, mask)
    assert mask.tokens == []
    first.close()
    assert len(other.go_on(logged, mask).output) == len(mask.tokens) == 5
    other.close()


def test_a_log_that_moved_on_is_not_cut_off(net: Transformer, tmp_path: Path) -> None:
    """It lost what another process had added between looking and taking it up."""
    first = interrupted(net, tmp_path)
    other = Engine(net, EngineConfig(wal=tmp_path, cache_tokens=1024))
    (old,) = other.interrupted()
    first.step()
    first.close()
    with pytest.raises(CacheError, match="was changed by another process"):
        other.go_on(old, Told())
    (new,) = other.interrupted()
    assert new.output[: len(old.output)] == old.output
    assert len(new.output) == len(old.output) + 1
    other.close()


def test_a_log_without_memory_ends_its_request_alone(
    net: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the log was then written to memory that was gone, which broke the step."""
    served = Engine(net, EngineConfig(wal=tmp_path, cache_tokens=1024))
    request = served.submit(prompt(20), SamplingParams(max_tokens=1500))
    while not request.output:
        served.step()
    log: Any = request.log
    log.end = log.at  # as if its room were used up

    def full(*args: Any) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    served.step()
    assert isinstance(request.error, CacheError)
    assert request.finished
    assert served.requests == []


def test_saving_again_in_vain_leaves_what_was_saved(
    net: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = engine(net, disk=tmp_path)
    finish(served, served.submit(prompt(600), greedy(2)))
    name = served.save_session(prompt(600))
    pinned = sorted(path.name for path in tmp_path.glob("*/*.pin"))

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(CacheError, match="No space left"):
            served.save_session(prompt(600))
    assert served.load_session(name) == prompt(600)
    assert sorted(path.name for path in tmp_path.glob("*/*.pin")) == pinned
