"""Root filesystems for sandboxes: layers by digest, composed, packed and moved between machines.

    store = Store()                                    where images are kept
    image = store.resolve("py311@sha256:...")          or store.environment(Env(base=..., ...))
    with compose(store, image, folder, upper=upper) as stack:
        ... stack.root is the file tree; writes go to upper ...
        diff = pack_diff(store, upper)                 a LayerRef; writers must be frozen
        later = snapshot(store, image, upper, name="job7/s1")      an Image to compose again

Names are loaded on first use: the keeper of a sandbox needs none of the builders.

Paper: §5.2.5.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fathom.sandbox.images.builtin import builtin_image
    from fathom.sandbox.images.care import check, collect
    from fathom.sandbox.images.disk import Disk, write_base
    from fathom.sandbox.images.errors import (
        ArchiveRefused,
        BuildFailed,
        ImageDamaged,
        ImageError,
        ImageMissing,
        ImageTooLarge,
        RegistryError,
        StoreFull,
    )
    from fathom.sandbox.images.export import write_archive
    from fathom.sandbox.images.holds import Hold
    from fathom.sandbox.images.layers import (
        flatten,
        flatten_small,
        image_of_folder,
        pack_diff,
        pack_folder,
        snapshot,
    )
    from fathom.sandbox.images.oci import import_archive
    from fathom.sandbox.images.recipe import build
    from fathom.sandbox.images.registry import pull
    from fathom.sandbox.images.remote import attach, fetch, push
    from fathom.sandbox.images.source import Owners
    from fathom.sandbox.images.stack import Composed, StackCaps, compose
    from fathom.sandbox.images.store import Store
    from fathom.sandbox.images.types import Env, Image, Layer, LayerRef, RunConfig

_HOMES = {
    "ArchiveRefused": "errors",
    "BuildFailed": "errors",
    "Composed": "stack",
    "Disk": "disk",
    "Env": "types",
    "Hold": "holds",
    "Image": "types",
    "ImageDamaged": "errors",
    "ImageError": "errors",
    "ImageMissing": "errors",
    "ImageTooLarge": "errors",
    "Layer": "types",
    "LayerRef": "types",
    "Owners": "source",
    "RegistryError": "errors",
    "RunConfig": "types",
    "StackCaps": "stack",
    "Store": "store",
    "StoreFull": "errors",
    "attach": "remote",
    "build": "recipe",
    "builtin_image": "builtin",
    "check": "care",
    "collect": "care",
    "compose": "stack",
    "fetch": "remote",
    "flatten": "layers",
    "flatten_small": "layers",
    "image_of_folder": "layers",
    "import_archive": "oci",
    "pack_diff": "layers",
    "pack_folder": "layers",
    "pull": "registry",
    "push": "remote",
    "snapshot": "layers",
    "write_archive": "export",
    "write_base": "disk",
}

__all__ = [
    "ArchiveRefused",
    "BuildFailed",
    "Composed",
    "Disk",
    "Env",
    "Hold",
    "Image",
    "ImageDamaged",
    "ImageError",
    "ImageMissing",
    "ImageTooLarge",
    "Layer",
    "LayerRef",
    "Owners",
    "RegistryError",
    "RunConfig",
    "StackCaps",
    "Store",
    "StoreFull",
    "attach",
    "build",
    "builtin_image",
    "check",
    "collect",
    "compose",
    "fetch",
    "flatten",
    "flatten_small",
    "image_of_folder",
    "import_archive",
    "pack_diff",
    "pack_folder",
    "pull",
    "push",
    "snapshot",
    "write_archive",
    "write_base",
]


def __getattr__(name: str) -> object:
    """Load a public name on first use. Raises AttributeError."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
