"""Requests that take long: they hold up neither brief ones nor whoever reads requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from fathom.errors import PolicyDenied
from fathom.sandbox.edge import work
from fathom.sandbox.edge.work import Work


@pytest.fixture
def let_go() -> threading.Event:
    return threading.Event()


def hold(let_go: threading.Event) -> None:
    let_go.wait(30)


@pytest.fixture
def busy(let_go: threading.Event) -> Iterator[Work]:
    """One with two threads of each sort, and all slow ones taken."""
    made = Work(2)
    for _ in range(20):
        made.add("create", partial(hold, let_go), size=1)
    yield made
    let_go.set()
    made.shutdown()


def test_brief_requests_do_not_wait_for_slow_ones(busy: Work):
    done = threading.Event()
    began = time.monotonic()
    busy.add("thaw", done.set, size=1)
    assert done.wait(5)
    assert time.monotonic() - began < 5


def test_too_much_is_refused_at_once(busy: Work, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(work, "MOST", 30)
    monkeypatch.setattr(work, "MOST_BYTES", 100)
    with pytest.raises(PolicyDenied, match="20 requests"):
        busy.add("create", lambda: None, size=81)
    for _ in range(10):
        busy.add("create", lambda: None, size=1)
    with pytest.raises(PolicyDenied, match="30 requests"):
        busy.add("create", lambda: None, size=1)


def test_those_behind_a_key_take_no_thread():
    made, let_go, order = Work(2), threading.Event(), list[int]()

    def first() -> None:
        let_go.wait(30)
        order.append(0)

    made.add("create", first, size=1, key="k")
    for number in range(1, 40):
        made.add("create", lambda number=number: order.append(number), size=1, key="k")
    other = threading.Event()
    made.add("create", other.set, size=1, key="another")
    assert other.wait(5)
    assert order == []
    let_go.set()
    made.shutdown()
    assert order == list(range(40))
    # Nothing is kept of keys.
    assert made._behind == {}  # pyright: ignore[reportPrivateUsage]
