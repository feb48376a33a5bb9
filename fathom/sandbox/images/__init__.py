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
    from fathom.sandbox.images.layers import (
        flatten,
        flatten_small,
        image_of_folder,
        pack_diff,
        pack_folder,
        snapshot,
    )
    from fathom.sandbox.images.source import Owners
    from fathom.sandbox.images.stack import Composed, StackCaps, compose
    from fathom.sandbox.images.store import Hold, Store
    from fathom.sandbox.images.types import Env, Image, Layer, LayerRef, RunConfig

_HOMES = {
    "ArchiveRefused": "errors",
    "BuildFailed": "errors",
    "Composed": "stack",
    "Env": "types",
    "Hold": "store",
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
    "compose": "stack",
    "flatten": "layers",
    "flatten_small": "layers",
    "image_of_folder": "layers",
    "pack_diff": "layers",
    "pack_folder": "layers",
    "snapshot": "layers",
}

__all__ = [
    "ArchiveRefused",
    "BuildFailed",
    "Composed",
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
    "compose",
    "flatten",
    "flatten_small",
    "image_of_folder",
    "pack_diff",
    "pack_folder",
    "snapshot",
]


def __getattr__(name: str) -> object:
    """Load a public name on first use. Raises AttributeError."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
