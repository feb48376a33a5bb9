"""The images that need no download: programs of this machine, packed as one layer.

Paper: none (a base image where there is no registry).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fathom.sandbox import paths
from fathom.sandbox.images import layers as layering
from fathom.sandbox.images import rootfs
from fathom.sandbox.images.oci import own_architecture
from fathom.sandbox.images.source import Owners, Taking
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.types import OWN, Image, RunConfig


def builtin_image(
    store: Store, name: Literal["base", "python"] = "base", cache: Path | None = None
) -> Image:
    """Return the image "base" or "python" of this machine's own programs, packing it if needed.

    It is called `builtin/NAME-DIGITS` in the store, after what went into it. `cache`: where its
    files lie, the user's cache folder when not given. Raises SandboxError.
    """
    folder = rootfs.build(name, cache or paths.cache_folder())
    called = f"{OWN}{folder.name}"
    if called in store.names():
        return store.resolve(called)
    # Times say when the copy was made, and nothing about the programs.
    taking = Taking(owners=Owners(everybody=(0, 0)), mtime=0)
    layer = layering.pack_folder(store, folder, taking)
    run = RunConfig(env=(("PATH", "/usr/bin"),), command=("/usr/bin/bash",))
    image = Image(layers=(layer.digest,), run=run, architecture=own_architecture())
    store.put_image(image, called, own=True)
    return image
