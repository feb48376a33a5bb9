"""Compiled functions on disk: never out of date, and not needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fathom.kernels.numba import compiled


def triple(x):
    return 3 * x


def read_anew(folder: Path, name: str) -> ModuleType:
    """The module `compiled` of a copied package, as another process would import it."""
    spec = importlib.util.spec_from_file_location(name, folder / "compiled.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compiled_code_is_dropped_when_any_file_changes(tmp_path: Path):
    for file in Path(compiled.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = read_anew(tmp_path, "copied_once")
    assert first._DIGEST == compiled._DIGEST
    with (tmp_path / "entries.py").open("a") as file:
        file.write("# changed\n")
    assert read_anew(tmp_path, "copied_again")._DIGEST != first._DIGEST


def test_kept_functions_carry_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    made = compiled.compiled(triple)
    assert compiled.must_compile(made)
    assert made(2) == 6
    assert not compiled.must_compile(compiled.compiled(triple))
    (kept,) = tmp_path.rglob("*.nbi")
    assert compiled._DIGEST.encode() in kept.read_bytes()


def test_functions_compile_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch):
    for place in (compiled.Chosen, compiled.Beside, compiled.Home):
        monkeypatch.setattr(place, "from_function", lambda *_: None)
    made = compiled.compiled(triple)
    assert compiled.must_compile(made)
    assert made(2) == 6
    assert not compiled.must_compile(made)
