"""What a daemon does of itself: taking over, trying again, ending what has had its time.

Paper: §5.2.5 (one node: expiry).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fathom.errors import FathomError, SandboxError
from fathom.sandbox import plain, state
from fathom.sandbox.edge import entry as entries
from fathom.sandbox.edge.adoption import adopt_all, adopt_one
from fathom.sandbox.edge.entry import Entry
from fathom.sandbox.edge.events import event
from fathom.sandbox.edge.requests import BOX

if TYPE_CHECKING:
    from fathom.sandbox.edge.keeper import Keeper

_AGAIN = 5.0  # seconds
_log = logging.getLogger(__name__)


class Tending:
    """Looks after the sandboxes of one keeper, from one thread.

    `left`: the names of those that live and could not be taken over, and why.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._host = keeper.host
        self.left: dict[str, str] = {}
        # Held while one is taken over, and while one that was not is ended: never both at once.
        self._settling = threading.Lock()
        self._unset: set[str] = set()
        self._starts = 0
        self._again = 0.0

    def adopt(self) -> None:
        """Take over what an earlier daemon left."""
        found = adopt_all(self._host)
        self.left = found.left
        for entry in found.entries:
            self._take(entry)
        self._set_policies()

    def _take(self, entry: Entry) -> None:
        self._keeper.entries[entry.id] = entry
        self._keeper.counts["adopted"] += 1
        if entry.net is not None:
            self._unset.add(entry.id)
        self._move_on(entry)

    def _move_on(self, entry: Entry) -> None:
        """Let go on what only a copy had stopped, whose maker is gone."""
        if entry.caps.pause and not entry.paused:
            with contextlib.suppress(FathomError):
                self._host.do("thaw", ids=[entry.id])

    def tend(self) -> None:
        """See that a node is there, and end what has had its time. Called again and again."""
        self._tend_node()
        for entry in list(self._keeper.entries.values()):
            gone = not (self._host.runtime / entry.id).exists()
            if gone or _is_late(entry):
                self._keeper.counts["expired"] += not gone
                with contextlib.suppress(SandboxError):
                    self._keeper.end(entry.id, "ended" if gone else "expired")
        if time.monotonic() >= self._again:
            self._again = time.monotonic() + _AGAIN
            self._set_policies()
            self._try_again()
            self._sweep()

    def _tend_node(self) -> None:
        """See that a node is there which knows all sandboxes, and their policies."""
        link = self._host.link
        try:
            link.revive()
        except SandboxError as error:
            event(_log, logging.WARNING, "node_lost", error=error)
            return
        if link.starts == self._starts:
            return
        if link.starts > 1:
            event(_log, logging.WARNING, "node_died", starts=link.starts)
            for entry in list(self._keeper.entries.values()):
                if entry.net is not None:
                    self._unset.add(entry.id)
                self._move_on(entry)
            self._set_policies()
        self._starts = link.starts

    def _set_policies(self) -> None:
        """Set those that a new node does not know. Until then such a sandbox reaches nothing."""
        for name in list(self._unset):
            entry = self._keeper.entries.get(name)
            try:
                if entry is not None and entry.net is not None:
                    self._keeper.set_policy(entry, entry.phase, plain.net_in(entry.net))
                self._unset.discard(name)
            except FathomError as error:
                event(_log, logging.ERROR, "policy_not_set", id=name, error=error)

    def _try_again(self) -> None:
        for name in list(self.left):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, FathomError):
                if _is_late(entries.read(self._host.runtime / name)):
                    self.drop(name)
                    continue
            with self._settling:
                if name in self.left:
                    self._try(name)

    def _try(self, name: str) -> None:
        found = adopt_one(self._host, self._host.runtime / name)
        if isinstance(found, str) and found:
            self.left[name] = found
            return
        if isinstance(found, Entry):
            self._take(found)
        # Only now: one that is stopped meanwhile is in one of the two.
        del self.left[name]

    def left_under(self, key: str) -> str | None:
        """Return the one that was made under a key and could not be taken over."""
        for name in list(self.left):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, FathomError):
                if entries.read(self._host.runtime / name).key == key:
                    return name
        return None

    def drop(self, name: str) -> bool:
        """End one that could not be taken over; False where there is none of that name.

        One that is being taken over right now is, and then it is no longer among these. Raises
        SandboxError where it could not be ended; it is left alone then as before.
        """
        if name not in self.left:
            return False
        with self._settling:
            if name not in self.left:
                return False
            folder = self._host.runtime / name
            if folder.exists() and not state.reap_one(folder):
                raise SandboxError(f"sandbox {name} could not be ended: {folder} is still in use")
            del self.left[name]
        event(_log, logging.INFO, "dropped", id=name)
        return True

    def _sweep(self) -> None:
        """Remove what an earlier daemon was just making, and its node gave up only since."""
        for folder in self._host.runtime.iterdir():
            if not BOX.fullmatch(folder.name) or self._is_ours(folder):
                continue
            if (folder / entries.NOTE).exists() and state.lives(folder):
                self.left.setdefault(folder.name, "it was found only now")
            elif (folder / "lock").exists():
                state.reap_one(folder)
            else:
                state.remove(folder)

    def _is_ours(self, folder: Path) -> bool:
        """Whether this daemon has it, or makes it right now."""
        name = folder.name
        mine = name.startswith(f"sb-{os.getpid()}-")
        return mine or self._host.has(name) or name in self.left


def _is_late(entry: Entry) -> bool:
    return entry.spec.ttl is not None and entry.made.age() > entry.spec.ttl
