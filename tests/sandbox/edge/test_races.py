"""Sandboxes that are stopped in the very moment in which somebody takes them over."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import SandboxLost
from fathom.sandbox import nodelink, plain, state
from fathom.sandbox.edge import tending
from fathom.sandbox.edge.entry import NOTE
from fathom.sandbox.edge.keeper import Keeper
from fathom.sandbox.host import LocalHost
from fathom.sandbox.substrates.choice import program_of, suited

Keep = Callable[[], Keeper]


@pytest.fixture
def keep(runtime_dir: Path, cache_dir: Path) -> Iterator[Keep]:
    """Make keepers of one folder, one after the other; each leaves its sandboxes to the next."""
    if not any(program_of(name) for name in suited()):
        pytest.skip("no sandbox on this machine")
    runtime_dir.mkdir(mode=0o711, exist_ok=True)
    made: list[Keeper] = []

    def make() -> Keeper:
        if made:
            made[-1].host.link.close()
        made.append(Keeper(LocalHost("auto", cache_dir, runtime_dir), spare=0))
        return made[-1]

    yield make
    for name in [*made[-1].entries, *made[-1].tending.left]:
        made[-1].end(name, "stopped")
    made[-1].host.link.close()


def create(keeper: Keeper) -> str:
    return str(keeper.do("create", {"spec": plain.spec_in({"type": "container"})})["id"])


class Slowly:
    """Calls a function while somebody else does something: before it, or before it returns."""

    def __init__(self, real: Callable[..., Any], first: bool) -> None:
        self.real = real
        self.first = first
        self.inside = threading.Event()

    def __call__(self, *values: Any) -> Any:
        found = None if self.first else self.real(*values)
        self.inside.set()
        time.sleep(0.5)
        return self.real(*values) if self.first else found


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_one_that_is_stopped_while_a_daemon_takes_it_over_is_gone(
    keep: Keep, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, first: bool
):
    name = create(keep())
    note = runtime_dir / name / NOTE
    text = note.read_text()
    note.write_text("{}")
    keeper = keep()
    keeper.adopt()
    assert list(keeper.tending.left) == [name]
    note.write_text(text)
    slowly = Slowly(tending.adopt_one, first)
    monkeypatch.setattr(tending, "adopt_one", slowly)
    tends = threading.Thread(target=keeper.tend)
    tends.start()
    assert slowly.inside.wait(20)
    assert keeper.do("destroy", {"id": name}) == {"ended": True}
    tends.join(20)
    assert not (runtime_dir / name).exists()
    assert keeper.entries == keeper.tending.left == {}
    with pytest.raises(SandboxLost):
        keeper.find(name)
    keeper.tend()
    assert keeper.do("list", {}) == {"sandboxes": [], "left": {}}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_one_that_is_stopped_while_a_node_takes_it_over_is_gone(
    keep: Keep, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, first: bool
):
    keeper = keep()
    name = create(keeper)
    link = keeper.host.link
    process = link._process  # pyright: ignore[reportPrivateUsage]
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    slowly = Slowly(nodelink._exchange, first)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(nodelink, "_exchange", slowly)
    tends = threading.Thread(target=keeper.tend)
    tends.start()
    assert slowly.inside.wait(20)
    assert keeper.do("destroy", {"id": name}) == {"ended": True}
    tends.join(20)
    assert not (runtime_dir / name).exists()
    assert not state.lives(runtime_dir / name)
    assert keeper.entries == {}
