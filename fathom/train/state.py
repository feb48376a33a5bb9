"""Saving a run so that it can go on as if nothing had happened, and exporting its weights.

A state is a folder `step-00001200/` with safetensors (float32 masters, optimiser state, balancing
biases, tables, generators) and one JSON file. It appears under its name only when it is complete.

Paper: none (infrastructure).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fathom.errors import TrainError
from fathom.train.optimizer import Optimizer, split_parameters

KEEP = 2
PIECE_BYTES = 15 << 20
_TENSORS, _META, _PIECES = "state.safetensors", "state.json", "pieces.json"
_SMALL = 1 << 16  # elements up to which an exported tensor keeps float32: biases, norms, gates


@dataclass(slots=True)
class Position:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    elapsed_seconds: float = 0.0
    next_batch: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer, position: Position) -> Path:
    """Write `folder`/step-N, keep the newest two states, return the new one's path.

    Raises TrainError when the disk refuses.
    """
    final = folder / f"step-{position.step:08d}"
    partial = folder / f".partial-{position.step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_to_cpu(_tensors(model, optimizer)), partial / _TENSORS)
        meta = json.dumps(dataclasses.asdict(position), indent=1)
        (partial / _META).write_text(meta + "\n", encoding="utf-8")
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
    except OSError as e:
        raise TrainError(f"cannot save the training state in {folder}: {e.strerror or e}") from e
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_state(folder: Path) -> Path | None:
    """The newest complete state in `folder`, or None."""
    states = sorted(p for p in folder.glob("step-*") if (p / _META).is_file())
    return states[-1] if states else None


def load_state(path: Path, model: nn.Module, optimizer: Optimizer) -> Position:
    """Put a saved state (a `step-N` folder) into a model and its optimiser, in place.

    Raises TrainError when it is damaged or belongs to another model.
    """
    try:
        position = Position(**json.loads((path / _META).read_text(encoding="utf-8")))
        saved = load_file(path / _TENSORS)
    except (OSError, ValueError, TypeError) as e:
        raise TrainError(f"cannot read the training state {path}: {e}") from e
    except Exception as e:  # safetensors raises its own type for a damaged file
        raise TrainError(f"{path / _TENSORS} is damaged: {e}") from e
    generators = {n: saved.pop(n) for n in [n for n in saved if n.startswith("generator.")]}
    extra = _extra_tensors(model)
    fits = {n for n in extra.keys() & saved.keys() if extra[n].shape == saved[n].shape}
    missing = sorted(extra.keys() - fits)
    if missing:
        raise TrainError(
            f"the state {path} lacks {missing[0]} of that shape: it belongs to another model"
        )
    if "generator.cpu" not in generators:
        raise TrainError(f"the state {path} lacks its generators: it is damaged")
    with torch.no_grad():
        for name, tensor in extra.items():
            tensor.copy_(saved.pop(name))
    optimizer.load(saved)
    torch.set_rng_state(generators["generator.cpu"])
    if "generator.cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["generator.cuda"])
    return position


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    out = optimizer.state() | _extra_tensors(model)
    out["generator.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        out["generator.cuda"] = torch.cuda.get_rng_state()
    return out


def _extra_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What changes or was drawn at random but is no business of the optimiser."""
    out = {f"balanced.{name}": p.detach() for name, p in split_parameters(model).balanced}
    return out | {f"buffer.{name}": b for name, b in model.named_buffers()}


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # A copy even on the CPU: views of one flat buffer share memory, which safetensors refuses.
    return {n: t.detach().to("cpu", copy=True).contiguous().clone() for n, t in tensors.items()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def export_compact(model: nn.Module, path: Path) -> None:
    """Write the weights alone: matrices in bfloat16, small tensors in float32, tables as is."""
    tensors = {n: p.detach() for n, p in model.named_parameters()} | dict(model.named_buffers())
    out = {}
    for name, t in tensors.items():
        if t.is_floating_point():
            t = t.to(torch.float32 if t.numel() <= _SMALL else torch.bfloat16)
        out[name] = t
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_to_cpu(out), path)


def load_compact(model: nn.Module, path: Path) -> None:
    """Read `export_compact` back, in place. Raises TrainError when names or shapes differ."""
    try:
        saved = load_file(path)
    except Exception as e:  # safetensors raises its own type for a damaged file
        raise TrainError(f"cannot read the weights {path}: {e}") from e
    own = {n: p.detach() for n, p in model.named_parameters()} | dict(model.named_buffers())
    wrong = sorted(own.keys() ^ saved.keys())
    wrong += [n for n in own.keys() & saved.keys() if own[n].shape != saved[n].shape]
    if wrong:
        raise TrainError(f"{path} does not fit this model: {len(wrong)} differ, first {wrong[0]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def pieces(folder: Path, into: Path, *, max_bytes: int = PIECE_BYTES) -> list[Path]:
    """Split every file of `folder` into parts of at most `max_bytes`, with their checksums.

    Returns the parts and, last, the list `pieces.json` that `join_pieces` needs.
    """
    into.mkdir(parents=True, exist_ok=True)
    table: dict[str, list[dict[str, Any]]] = {}
    out = []
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        table[file.name] = []
        for number, block in enumerate(_blocks(file, max_bytes)):
            part = into / f"{file.name}.{number:03d}"
            part.write_bytes(block)
            table[file.name].append(
                {"name": part.name, "sha256": hashlib.sha256(block).hexdigest()}
            )
            out.append(part)
    (into / _PIECES).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return [*out, into / _PIECES]


def join_pieces(folder: Path, into: Path) -> Path:
    """Undo `pieces`. Raises TrainError when a part is missing or damaged.

    A file appears under its name only when it is whole, and none outside the two folders is touched
    whatever the list says.
    """
    partial = into / ".partial"
    try:
        table = json.loads((folder / _PIECES).read_text(encoding="utf-8"))
        into.mkdir(parents=True, exist_ok=True)
        for name, parts in table.items():
            with open(partial, "wb") as f:
                for part in parts:
                    source = folder / _plain(part["name"])
                    block = source.read_bytes()
                    if hashlib.sha256(block).hexdigest() != part["sha256"]:
                        raise TrainError(f"{source} is damaged: copy it again")
                    f.write(block)
            partial.rename(into / _plain(name))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise TrainError(f"cannot join the pieces in {folder}: {e}") from e
    finally:
        partial.unlink(missing_ok=True)
    return into


def _plain(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no name of a file")
    return name


def _blocks(file: Path, size: int) -> Iterator[bytes]:
    with open(file, "rb") as f:
        first = f.read(size)
        yield first  # an empty file is one empty part
        while block := f.read(size):
            yield block
