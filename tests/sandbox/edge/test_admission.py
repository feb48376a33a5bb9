"""Admission: by number and by memory, with what is being made at the same moment counted."""

from __future__ import annotations

import pytest

from fathom.errors import PolicyDenied
from fathom.sandbox import Container
from fathom.sandbox.edge import admission
from fathom.sandbox.edge.admission import Admission

SPEC = Container(memory="160MiB")  # its first pages are taken for a sixteenth


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    left = [100 << 20]
    monkeypatch.setattr(admission, "_available_memory", lambda: left[0])
    monkeypatch.setattr(admission, "_FRESH", -1.0)
    return left


def test_by_number():
    there = 3
    made = Admission(5, 0, lambda: there)
    with made.admit(SPEC):
        with made.admit(SPEC), pytest.raises(PolicyDenied, match="5 sandboxes of 5"):
            made.admit(SPEC).__enter__()
        with pytest.raises(PolicyDenied), made.admit(SPEC, 2):
            pass
    with made.admit(SPEC, 2):
        pass
    with pytest.raises(PolicyDenied), made.admit(SPEC, 3):
        pass


def test_by_memory(free: list[int]):
    made = Admission(1000, 50 << 20, lambda: 0)
    with made.admit(SPEC, 5):  # 50 MiB beside the 50 that stay free
        with pytest.raises(PolicyDenied, match="100 MiB of memory left and needs 110"):
            made.admit(SPEC).__enter__()
    with pytest.raises(PolicyDenied), made.admit(SPEC, 6):
        pass
    free[0] = 59 << 20
    with pytest.raises(PolicyDenied), made.admit(SPEC):
        pass
    free[0] = 60 << 20
    with made.admit(SPEC):
        pass


def test_room_is_given_back_when_making_fails():
    made = Admission(1, 0, lambda: 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), made.admit(SPEC):
            raise ZeroDivisionError
    with made.admit(SPEC):
        pass


def test_what_this_machine_says():
    assert 0 < Admission(1, 0, lambda: 0).available() < 1 << 50
