"""`fathom inspect` and `fathom convert` on shipped models, and what a first run waits for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from fathom.checkpoint import inspect_checkpoint
from fathom.checkpoint.tiny import write_tiny
from fathom.cli import models
from fathom.cli.convert import convert
from fathom.cli.inspect import inspect
from fathom.errors import CheckpointError, ConfigError, UnsupportedModelError
from fathom.kernels.numba import rows


def test_a_shipped_model_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    inspect(Path("nano"), json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["whole"] is True
    convert(Path("nano"), tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out").tensors == report["tensors"]
    (tmp_path / "nano").mkdir()  # a folder of the user's comes first
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        inspect(Path("nano"))
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(Path("../nano-of-mine"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_hidden_layers": -1}, ConfigError),
        ({"model_type": "llama"}, ConfigError),
        ({"dspark_block_size": 5}, UnsupportedModelError),
    ],
)
def test_errors_of_the_configuration_name_its_file(
    tmp_path: Path, change: dict[str, object], error: type[Exception]
) -> None:
    file = write_tiny(tmp_path / "t", "instruct") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(error) as caught:
        inspect_checkpoint(file.parent)
    assert str(caught.value).count(str(file)) == 1


class Block:
    """What numba tells of a compiled function."""

    __name__ = "forward"

    def __init__(self, folder: Path, signatures: tuple[object, ...] = ()) -> None:
        self.signatures = signatures
        self.stats = type("Stats", (), {"cache_path": str(folder)})


def test_only_a_terminal_hears_of_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(terminal: bool) -> bool:
        monkeypatch.setattr(models, "console", lambda **_: Console(force_terminal=terminal))
        models.announce_compiling()
        return "compiling" in capsys.readouterr().out

    monkeypatch.setattr(rows, "forward", Block(tmp_path))
    assert told(True)
    assert not told(False)
    (tmp_path / "rows.forward-1.py311.nbi").touch()
    assert not told(True)
    monkeypatch.setattr(rows, "forward", Block(tmp_path / "none", signatures=((),)))
    assert not told(True)


def test_where_compiled_code_lies_is_where_numba_puts_it() -> None:
    """The file names are numba's own: a change there would make the notice wrong."""
    names = rows.forward._cache._impl.filename_base
    assert names.startswith("rows.forward-")
