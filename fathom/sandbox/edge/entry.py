"""What the daemon remembers of a sandbox, and the note in its folder that a later one reads.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.errors import FathomError
from fathom.sandbox import full, plain
from fathom.sandbox.edge.age import Birth
from fathom.sandbox.types import Caps, Kept

NOTE = "edge.json"


@dataclass(slots=True)
class Entry:
    """One sandbox. `environment`: of its commands; `first`: the policy that it was made with."""

    id: str
    spec: Kept
    caps: Caps
    group: str
    key: str
    parent: str
    made: Birth
    paused: bool = False
    phase: str = ""
    net: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
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
            "created": self.made.wall,
            "paused": self.paused,
            "phase": self.phase,
            "net": self.net,
            "environment": self.environment,
        }

    def write(self, runtime: Path) -> None:
        """Write down what a later daemon must know; whole or not at all. Raises MachineFull."""
        path = runtime / self.id / NOTE
        fresh = path.with_suffix(".new")
        values = {"uptime": self.made.uptime, "boot": self.made.boot, "first": self.first}
        try:
            fresh.touch(mode=0o600)
            fresh.write_text(json.dumps(self.plain() | values))
            fresh.rename(path)
        except FileNotFoundError:
            pass  # it ended meanwhile
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise full.explain(error, "note what is to become of a sandbox") from error

    @contextlib.contextmanager
    def changing(self, runtime: Path, **values: Any) -> Generator[None]:
        """Note a change before it is made inside, and undo the note where it could not be made.

        What was noted and not done is done by the next daemon; the other way it would be lost.
        Raises MachineFull.
        """
        former = {name: getattr(self, name) for name in values}

        def put(changed: dict[str, Any]) -> None:
            for name, value in changed.items():
                setattr(self, name, value)

        put(values)
        try:
            self.write(runtime)
            yield
        except BaseException:
            put(former)
            with contextlib.suppress(FathomError):
                self.write(runtime)
            raise


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
        Birth(float(note["created"]), float(note.get("uptime", 0)), str(note.get("boot", ""))),
        paused=bool(note["paused"]),
        phase=str(note["phase"]),
        net=note["net"],
        first=note.get("first"),
        environment=dict(note["environment"]),
    )
