"""Compiling ahead: whatever a compiler does, what is measured goes on, and no process stays."""

from __future__ import annotations

import multiprocessing
from functools import partial
from typing import Any

import pytest

from fathom.cli import compiling
from fathom.cli.compiling import compile_side_by_side

# What a process does with a text, in place of compiling a kernel.
WORKS, FAILS, HANGS = "1", "1 / 0", "__import__('time').sleep(3600)"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COMPILERS", 1)


def told(kernels: set[str], lists: dict[str, Any], **more: float) -> list[str]:
    lines: list[str] = []
    before = multiprocessing.active_children()
    compile_side_by_side(kernels, lists, eval, lines.append, **more)
    assert multiprocessing.active_children() == before
    return lines


def test_a_kernel_that_does_not_compile_keeps_no_other_from_it() -> None:
    lists = {"a model": partial(eval, repr({WORKS, FAILS, "2"}))}
    assert told({WORKS}, lists) == [
        "kernels: a model launches 3 of them",
        "kernels: 2 compiled, 0 left",
        "kernels: division by zero",
    ]


def test_a_compiler_that_hangs_is_ended() -> None:
    assert told({HANGS}, {}, seconds=0) == ["kernels: 0 compiled, 1 left"]


def test_a_list_that_fails_or_hangs_is_told() -> None:
    (line,) = told({HANGS}, {"a model": partial(eval, HANGS)}, seconds=0)
    assert "not compiled ahead: TimeoutError" in line


def test_a_compiler_that_dies_is_told() -> None:
    dies = "__import__('os')._exit(1)"
    first, second = told({dies}, {})
    assert first == "kernels: 0 compiled, 0 left"
    assert "terminated abruptly" in second
