"""What the daemon remembers of a sandbox, and the note in its folder that a later one reads.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.sandbox import plain
from fathom.sandbox.types import Caps, Kept

NOTE = "edge.json"


@dataclass(slots=True)
class Entry:
    """One sandbox. `made`: when, by the wall clock in seconds. `environment`: of its commands."""

    id: str
    spec: Kept
    caps: Caps
    group: str
    key: str
    parent: str
    made: float
    paused: bool = False
    phase: str = ""
    net: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def plain(self) -> dict[str, Any]:
        """Return the entry as JSON."""
        return {
            "id": self.id,
            "spec": plain.spec_out(self.spec),
            "caps": plain.caps_out(self.caps),
            "group": self.group,
            "key": self.key,
            "parent": self.parent,
            "created": self.made,
            "paused": self.paused,
            "phase": self.phase,
            "net": self.net,
            "environment": self.environment,
        }

    def write(self, runtime: Path) -> None:
        """Write down what a later daemon must know; whole or not at all."""
        path = runtime / self.id / NOTE
        fresh = path.with_suffix(".new")
        with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
            fresh.touch(mode=0o600)
            fresh.write_text(json.dumps(self.plain()))
            fresh.rename(path)


def read(folder: Path) -> Entry:
    """Read the note in a sandbox's folder. Raises OSError, ValueError, KeyError, TypeError."""
    note = json.loads((folder / NOTE).read_text())
    return Entry(
        folder.name,
        plain.spec_in(note["spec"]),
        plain.caps_in(note["caps"]),
        str(note["group"]),
        str(note["key"]),
        str(note["parent"]),
        float(note["created"]),
        paused=bool(note["paused"]),
        phase=str(note["phase"]),
        net=note["net"],
        environment=dict(note["environment"]),
    )
