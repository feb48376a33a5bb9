"""Checkpoints: what they consist of, reading, writing, converting and inspecting them.

`manifest` needs no torch; everything else is loaded when first used.

Paper: none (file format).
"""

from typing import TYPE_CHECKING, Any

from fathom.checkpoint.manifest import manifest

if TYPE_CHECKING:
    from fathom.checkpoint.convert import convert_checkpoint
    from fathom.checkpoint.inspect import CheckpointReport, inspect_checkpoint
    from fathom.checkpoint.load import load_model
    from fathom.checkpoint.reader import Checkpoint, open_checkpoint
    from fathom.checkpoint.stored import load_stored
    from fathom.checkpoint.writer import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointReport",
    "convert_checkpoint",
    "inspect_checkpoint",
    "load_model",
    "load_stored",
    "manifest",
    "open_checkpoint",
    "save_checkpoint",
]

_HOMES = {
    "Checkpoint": "reader",
    "CheckpointReport": "inspect",
    "convert_checkpoint": "convert",
    "inspect_checkpoint": "inspect",
    "load_model": "load",
    "load_stored": "stored",
    "open_checkpoint": "reader",
    "save_checkpoint": "writer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"fathom.checkpoint.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
