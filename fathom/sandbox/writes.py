"""What containers wrote, kept: snapshots to start from again, and layers of images.

Paper: §5.2.5 (`pack_diff`; snapshots).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fathom.errors import Unsupported
from fathom.sandbox.images import Image, Owners, Store, builtin_image, pack_diff, snapshot
from fathom.sandbox.images.types import check_new_name
from fathom.sandbox.known import Known
from fathom.sandbox.nodelink import NodeLink
from fathom.sandbox.snapshots import Snapshots
from fathom.sandbox.substrates import container

# A folder that is being made gets its lock within so many seconds.
_ABANDONED = 60.0


class Writes:
    """The snapshots and layers that one host makes in its folder `cache`."""

    def __init__(self, link: NodeLink, cache: Path) -> None:
        self._link = link
        self._cache = cache

    def keep(self, id: str, known: Known) -> dict[str, Any]:
        """Keep what a sandbox has written, as of this moment. Raises SandboxError."""
        folder = self._cache / "snapshots"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"snap-{secrets.token_hex(8)}"
        with _workplace(folder, ".snap-") as work:
            whole = work / "whole"
            whole.mkdir(mode=0o700)
            saved = self._link.request("save", id=id, target=str(whole / "upper"))
            facts = {"image": known.spec.image, "ids": known.ids, "substrate": known.name}
            if isinstance(known.image, Image):
                # The name may mean another image by the time that somebody goes on from here.
                facts["description"] = known.image.encode().decode()
            (whole / "facts.json").write_text(json.dumps(facts))
            whole.rename(folder / name)
        return {"snapshot": name, "size": saved["size"]}

    def find(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Return the folder of a snapshot and its facts. Raises SnapshotMissing."""
        folder = Snapshots(self._cache).path(name)
        return folder, json.loads((folder / "facts.json").read_text())

    def pack(self, id: str, known: Known, name: str | None) -> dict[str, Any]:
        """Make a layer of what a sandbox wrote, and with `name` an image with it on top.

        Raises SandboxError, Unsupported.
        """
        if name is not None:
            check_new_name(name)  # before anything is copied
        with Store(self._cache / "store") as store:
            base = known.image
            if not isinstance(base, Image):
                if known.spec.image not in ("base", "python"):
                    raise Unsupported(f"the image of {id} is not in the store")
                called = "python" if known.spec.image == "python" else "base"
                base = builtin_image(store, called, self._cache)
            with _workplace(self._cache, ".pack-") as work:
                self._link.request("save", id=id, target=str(work / "upper"))
                owners = Owners(base=known.ids, count=container.ID_COUNT)
                # What lies on the disk fits into it; a file that is mostly holes may not.
                limit = known.spec.disk_bytes
                upper = work / "upper"
                if name is None:
                    layer = pack_diff(store, upper, owners=owners, limit=limit).digest
                else:
                    image = snapshot(store, base, upper, name=name, owners=owners, limit=limit)
                    layer = image.layers[-1]
        return {"layer": layer}


@contextmanager
def _workplace(parent: Path, prefix: str) -> Generator[Path]:
    """A folder of its own for something that is being made; gone afterwards.

    It is locked meanwhile, so that what a process left that was killed can be told and removed.
    """
    for left in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                _remove_abandoned(left)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(fd)


def _remove_abandoned(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)
