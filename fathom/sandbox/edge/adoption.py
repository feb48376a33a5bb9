"""Taking over the sandboxes of a daemon that is gone, from the notes in their folders.

What was never given to anybody, or has died, is removed. What lives and was given out is left alone
whatever goes wrong, reported, and tried again.

Paper: none (a thin form of the report's edge).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.errors import FathomError
from fathom.sandbox import state
from fathom.sandbox.edge import entry as entries
from fathom.sandbox.edge.entry import NOTE, Entry
from fathom.sandbox.edge.events import event
from fathom.sandbox.edge.requests import BOX
from fathom.sandbox.host import LocalHost
from fathom.sandbox.images import Image
from fathom.sandbox.known import Known
from fathom.sandbox.types import Container

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Found:
    """`left`: the names of those that live and could not be taken over, and why."""

    entries: list[Entry] = field(default_factory=list[Entry])
    left: dict[str, str] = field(default_factory=dict[str, str])


def adopt_all(host: LocalHost) -> Found:
    """Take over the sandboxes that answer. Only for a daemon that makes none yet."""
    found = Found()
    for folder in sorted(host.runtime.iterdir()):
        if not BOX.fullmatch(folder.name):
            continue
        if not (folder / "lock").exists():
            # Whoever was to make it is gone, and nothing of it was begun.
            state.remove(folder)
            continue
        adopted = adopt_one(host, folder)
        if isinstance(adopted, Entry):
            found.entries.append(adopted)
        elif adopted:
            found.left[folder.name] = adopted
    return found


def adopt_one(host: LocalHost, folder: Path) -> Entry | str:
    """Return a sandbox that was taken over, or why one that lives was not; "" for no sandbox."""
    try:
        entry = _adopt(host, folder)
        event(_log, logging.INFO, "adopted", id=folder.name)
        return entry
    except (FathomError, OSError, ValueError, KeyError, TypeError) as error:
        if (folder / NOTE).exists() and state.lives(folder):
            event(_log, logging.ERROR, "left_alone", id=folder.name, error=error)
            return str(error) or repr(error)
        event(_log, logging.WARNING, "not_adopted", id=folder.name, error=error)
        state.reap_one(folder)
        return ""


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
        image=_image(launch),
        ids=int(launch["ids"]),
        caps=entry.caps,
    )
    host.adopt(folder, known)
    return entry


def _image(launch: dict[str, Any]) -> Path | Image:
    """Return what a sandbox runs on: as it was then, not what the name means by now."""
    if launch["rootfs"]:
        return Path(launch["rootfs"])
    if description := launch.get("image"):
        return Image.decode(description.encode())
    return Image(layers=tuple(launch["layers"]))
