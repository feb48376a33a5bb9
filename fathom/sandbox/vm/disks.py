"""The disks that machines begin with: an image of the store as one read-only file.

Paper: §5.2.5 (disks of virtual machines).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal

from fathom.sandbox.images import Image, Store, builtin_image, write_base
from fathom.sandbox.vm import system


def image_of(cache: Path, store: Store, name: str) -> Image:
    """Return an image by its name; "base" and "python" are made of this machine's programs."""
    if name in ("base", "python"):
        return builtin_image(store, "python" if name == "python" else "base", cache)
    return store.resolve(name)


def small_disk(cache: Path, name: str) -> Path:
    """Return the disk of a small machine. Raises SandboxError."""
    with Store(cache / "store") as store:
        return _disk(cache, store, image_of(cache, store, name), "erofs", 0)


def small_disk_of(cache: Path, image: Image) -> Path:
    """Return where the disk of a small machine on this image is, or would be."""
    return cache / "vm" / "disks" / f"{_key(image)}.erofs"


def _key(image: Image) -> str:
    return hashlib.blake2b("\n".join(image.layers).encode(), digest_size=12).hexdigest()


def full_disk(cache: Path, name: str, room: int) -> Path:
    """Return the disk of a full machine with `room` bytes to write. Raises SandboxError."""
    with Store(cache / "store") as store:
        image = system.image(store) if name == system.NAME else store.resolve(name)
        return _disk(cache, store, image, "ext4", room)


def _disk(
    cache: Path, store: Store, image: Image, kind: Literal["erofs", "ext4"], room: int
) -> Path:
    key = _key(image)
    folder = cache / "vm" / "disks"
    path = folder / (f"{key}.erofs" if kind == "erofs" else f"{key}-{room >> 20}.ext4")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        # Two processes may make the same one: each under a name of its own first.
        handle, work = tempfile.mkstemp(prefix=".disk-", dir=folder)
        os.close(handle)
        os.unlink(work)
        made = Path(work)
        write_base(store, image, made, kind=kind, room=room)
        made.replace(path)
    return path
