"""A training recipe: one TOML file, five tables, every value with its meaning.

Paper: §4.2.1 and §4.2.2 (what a set-up consists of).
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.errors import TrainError
from fathom.train.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPart:
    """Which model, and the arithmetic of its activations on a GPU (a CPU always uses float32)."""

    preset: str = "nano"
    dtype: str = "bfloat16"
    override: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig to change
    init: str = ""  # weights.safetensors of an earlier run to begin with, relative to the recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPart:
    """Batches: how many tokens, in rows of which lengths (`longer_rows` in the schedule)."""

    tokenizer: str = ""  # folder with tokenizer.json, relative to the recipe
    tokens: int = 65536
    seq_len: tuple[int, ...] = (2048,)
    workers: int = 14  # processes that make episodes; 0: the trainer does

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.workers < 0:
            raise TrainError(
                "[data] needs tokens from 1 and workers from 0, "
                f"not {self.tokens} and {self.workers}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerPart:
    """Peak learning rates and the guard rails of the optimisers."""

    muon_lr: float = 2e-3
    adamw_lr: float = 2e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    balance_speed: float = 0.001
    balance_weight: float = 1e-4
    indexer_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPart:
    """The budget (whichever of steps and minutes is used up first) and the bookkeeping."""

    seed: int = 0
    processes: int = 1  # one for each GPU, sharing every batch (fathom/train/parallel.py)
    steps: int | None = None
    minutes: float | None = None
    save_every_minutes: float = 5.0
    log_every: int = 20  # steps between two fetches of metrics from the device

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise TrainError(f"[run] processes is {self.processes}: give a number from 1 up")
        if self.minutes is not None and not 0 <= self.minutes < math.inf:
            raise TrainError(f"[run] minutes is {self.minutes}: give a finite number from 0 up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that defines a run."""

    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    schedule: Schedule = field(default_factory=Schedule)
    run: RunPart = field(default_factory=RunPart)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a TOML file. Raises TrainError when it is unreadable or has unusable values."""
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise TrainError(f"cannot read recipe {path}: {e.strerror or e}") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise TrainError(f"{path} is not valid TOML: {e}") from e
        recipe = cls.from_dict(raw, str(path))
        tokenizer = recipe.data.tokenizer
        if tokenizer:
            absolute = str((path.parent / tokenizer).resolve())
            recipe = dataclasses.replace(
                recipe, data=dataclasses.replace(recipe.data, tokenizer=absolute)
            )
        if recipe.model.init:
            absolute = str((path.parent / recipe.model.init).resolve())
            recipe = dataclasses.replace(
                recipe, model=dataclasses.replace(recipe.model, init=absolute)
            )
        return recipe

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "the recipe") -> Recipe:
        """Build from the parsed tables. Raises TrainError for unknown or wrong values."""
        parts = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        unknown = sorted(raw.keys() - parts.keys())
        if unknown:
            raise TrainError(f"{where} has unknown tables: {', '.join(unknown)}")
        return cls(
            **{name: _part(parts[name], raw.get(name, {}), f"{where} [{name}]") for name in parts}
        )

    def to_dict(self) -> dict[str, Any]:
        """The parsed tables again, as JSON values."""
        return dataclasses.asdict(self)


# Annotation of a field (as written) -> the types that TOML may hold for it.
_ACCEPTED: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "tuple[int, ...]": (list, tuple),
    "tuple[float, ...]": (list, tuple),
    "dict[str, Any]": (dict,),
}


def _part(kind: Any, values: Any, where: str) -> Any:
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    if not isinstance(values, dict):
        raise TrainError(f"{where} must be a table")
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise TrainError(
            f"{where} has unknown keys: {', '.join(unknown)}; known: {', '.join(sorted(fields))}"
        )
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, _ACCEPTED[fields[name]]):
            raise TrainError(f"{where}: {name} must be {fields[name]}, not {value!r}")
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
