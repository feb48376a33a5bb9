"""What containers wrote, kept: snapshots to start from again, and layers of images.

Paper: §5.2.5 (`pack_diff`; snapshots).
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fathom.errors import Unsupported
from fathom.sandbox.images import Image, Owners, Store, builtin_image, pack_diff, snapshot
from fathom.sandbox.known import Known
from fathom.sandbox.nodelink import NodeLink
from fathom.sandbox.snapshots import Snapshots
from fathom.sandbox.substrates import container


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
        work = folder / f".{name}"
        work.mkdir(mode=0o700)
        try:
            self._link.request("save", id=id, target=str(work / "upper"))
            facts = {"image": known.spec.image, "ids": known.ids, "substrate": known.name}
            (work / "facts.json").write_text(json.dumps(facts))
            size = sum(path.lstat().st_size for path in (work / "upper").rglob("*"))
            work.rename(folder / name)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        return {"snapshot": name, "size": size}

    def find(self, name: str) -> tuple[Path, dict[str, Any]]:
        """Return the folder of a snapshot and its facts. Raises SnapshotMissing."""
        folder = Snapshots(self._cache).path(name)
        return folder, json.loads((folder / "facts.json").read_text())

    def pack(self, id: str, known: Known, name: str | None) -> dict[str, Any]:
        """Make a layer of what a sandbox wrote, and with `name` an image with it on top.

        Raises SandboxError, Unsupported.
        """
        with Store(self._cache / "store") as store:
            base = known.image
            if not isinstance(base, Image):
                if known.spec.image not in ("base", "python"):
                    raise Unsupported(f"the image of {id} is not in the store")
                base = builtin_image(store, "python" if known.spec.image == "python" else "base")
            work = Path(tempfile.mkdtemp(prefix=".pack-", dir=self._cache))
            try:
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
            finally:
                shutil.rmtree(work, ignore_errors=True)
        return {"layer": layer}
