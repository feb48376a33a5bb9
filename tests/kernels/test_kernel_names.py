"""A launched kernel has a name of its own: profilers and the project's tables show no more."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TRITON = Path(__file__).resolve().parents[2] / "fathom" / "kernels" / "triton"


def launched(tree: ast.Module) -> Iterator[str]:
    """Kernels of a module, each as often as the module has it and launches it at all."""
    calls = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in calls:
            if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield node.name


def test_no_two_launched_kernels_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted(TRITON.glob("*.py")):
        for name in launched(ast.parse(path.read_text(encoding="utf-8"))):
            places.setdefault(name, []).append(path.stem)
    assert {"mhc_read", "chunk_mhc_read", "index_scores", "chunk_index_scores"} <= set(places)
    assert len(places) >= 40
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
    assert [name for name in places if name.startswith("_")] == []


@pytest.mark.parametrize("decorator", ["triton.jit", 'triton.jit(do_not_specialize=["n"])'])
def test_what_counts_as_launched(decorator: str) -> None:
    text = f"@{decorator}\ndef own(n):\n    pass\n@{decorator}\ndef part(n):\n    pass\n"
    text += "def host(n):\n    own[(1,)](n)\n    part(n)\n    table[n](n)\n"
    assert list(launched(ast.parse(text))) == ["own"]
