"""What a host remembers of a container: what it was made from, for its copies.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fathom.sandbox.images import Image
from fathom.sandbox.substrates.choice import Name
from fathom.sandbox.types import Caps, Container


@dataclass(slots=True)
class Known:
    """A container of a host. `ids`: the host's id of root inside; `phases`: policies so far."""

    spec: Container
    name: Name
    program: str
    image: Path | Image
    ids: int
    caps: Caps
    phases: int = 0
