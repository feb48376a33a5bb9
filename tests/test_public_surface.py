"""What `import fathom` offers, and how little it costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import typing
from importlib import import_module
from pathlib import Path

import pytest

import fathom

PACKAGES = [
    "agent",
    "chat",
    "checkpoint",
    "engine",
    "eval",
    "kernels",
    "model",
    "quant",
    "sandbox",
    "server",
    "train",
]


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_type_checkers_of_users_read_the_annotations():
    assert (Path(fathom.__file__).parent / "py.typed").is_file()


def test_all_is_the_namespace():
    shown = {name for name in dir(fathom) if not name.startswith("_")}
    # Subpackages that something imported are attributes too, and so are the module's own imports.
    extra = {*PACKAGES, "cli", "errors", "import_module", "TYPE_CHECKING", "Any"}
    assert shown - extra == set(fathom.__all__) - {"__version__"}
    assert fathom.__all__ == sorted(fathom.__all__, key=lambda n: (not n.isupper(), n))


@pytest.mark.parametrize("name", fathom.__all__)
def test_every_name_resolves(name):
    assert getattr(fathom, name) is not None


def test_type_checkers_see_the_same_names():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(fathom.__file__).read_text())
    guarded = next(n for n in tree.body if isinstance(n, ast.If))
    static = {
        alias.asname or alias.name: statement.module
        for statement in guarded.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert static == fathom._HOMES
    assert {*static, "__version__"} == set(fathom.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'fathom' has no attribute 'Model'"):
        fathom.Model  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_state_their_names(package):
    module = import_module(f"fathom.{package}")
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None, f"fathom.{package}.__all__ names {name}"


def test_version_is_the_project_version(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert fathom.__version__ == project["version"]


@pytest.mark.parametrize(
    "statement",
    [
        "import fathom",
        "import fathom; fathom.FathomError, fathom.ModelConfig",
        "import fathom.chat, fathom.agent, fathom.sandbox",
        "import fathom; fathom.Agent, fathom.SyncClient, fathom.Container",
        "import fathom.cli.main",
        "import fathom.server.run, fathom.server.gateway, fathom.server.scripted",
        "import fathom.model.cost, fathom.eval.efficiency",
    ],
)
def test_imports_without_torch(statement):
    assert run(f"{statement}\nimport sys; print('torch' in sys.modules)") == "False"


def test_import_loads_nothing_else():
    loaded = run(
        "import sys; before = set(sys.modules); import fathom; "
        "print(sorted(m for m in set(sys.modules) - before if m.startswith('fathom')))"
    )
    assert loaded == "['fathom']"


def test_annotations_of_the_surface_resolve():
    for name in ("Completion", "ModelConfig", "Container"):
        assert typing.get_type_hints(getattr(fathom, name))
