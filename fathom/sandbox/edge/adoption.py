"""Taking over the sandboxes of a daemon that is gone, from the notes in their folders.

Paper: none (a thin form of the report's edge).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from fathom.errors import FathomError
from fathom.sandbox import state
from fathom.sandbox.edge import entry as entries
from fathom.sandbox.edge.entry import Entry
from fathom.sandbox.edge.events import event
from fathom.sandbox.host import LocalHost
from fathom.sandbox.known import Known
from fathom.sandbox.types import Container

_log = logging.getLogger(__name__)


def adopt_all(host: LocalHost) -> list[Entry]:
    """Return the sandboxes that answer; what is left of others is removed."""
    found: list[Entry] = []
    for folder in [path for path in host.runtime.iterdir() if (path / "lock").exists()]:
        try:
            found.append(_adopt(host, folder))
            event(_log, logging.INFO, "adopted", id=folder.name)
        except (FathomError, OSError, ValueError, KeyError, TypeError) as error:
            event(_log, logging.WARNING, "not_adopted", id=folder.name, error=error)
            state.reap_one(folder)
    return found


def _adopt(host: LocalHost, folder: Path) -> Entry:
    entry = entries.read(folder)
    launch = json.loads((folder / state.SESSION).read_text())["launch"]
    if not isinstance(entry.spec, Container):
        host.adopt_machine(folder, entry.spec, entry.caps, launch)
        return entry
    known = Known(
        spec=entry.spec,
        name=launch["substrate"],
        program=launch["program"],
        image=host.image_of(entry.spec.image, launch["rootfs"]),
        ids=int(launch["ids"]),
        caps=entry.caps,
    )
    host.adopt(folder, known)
    return entry
