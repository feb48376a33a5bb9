"""Errors of images and layers, each with a stable code.

    SandboxError
    +-- ImageError               an image or layer cannot be made or used
        +-- ImageMissing            no such image, layer or blob in this store
        +-- ImageDamaged            bytes do not match their digest, or a file is malformed
        +-- ArchiveRefused          an archive holds something that no image may hold
        +-- ImageTooLarge           an archive or layer exceeds its limit
        +-- StoreFull               no room left; nothing half-made stays behind
        +-- BuildFailed             an instruction of a recipe failed
        +-- RegistryError           a registry did not answer properly

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fathom.errors import SandboxError


class ImageError(SandboxError):
    """An image or layer cannot be made or used."""

    code = "image_failed"


class ImageMissing(ImageError):
    """No image, layer or blob of this name is in the store."""

    code = "image_missing"


class ImageDamaged(ImageError):
    """Stored or received bytes do not match their digest, or are not what they claim to be."""

    code = "image_damaged"


class ArchiveRefused(ImageError):
    """An archive holds an entry that no image may hold: a way out of it, a device, a forgery."""

    code = "image_refused"


class ImageTooLarge(ImageError):
    """An archive or layer exceeds the limit that was set for it."""

    code = "image_too_large"


class StoreFull(ImageError):
    """There is no room left where images are kept."""

    code = "image_store_full"


class BuildFailed(ImageError):
    """An instruction of a recipe failed or is not supported; the message names the line."""

    code = "image_build_failed"


class RegistryError(ImageError):
    """A registry refused, was unreachable, or answered something unreadable."""

    code = "image_registry"


@contextmanager
def store_errors(what: str, where: Path) -> Generator[None]:
    """Turn an OSError of the enclosed block into a typed error that names `what` and `where`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFull(
                f"{what}: no room left in {where} ({error.strerror}); free some space, remove "
                "images with `fathom sandbox images rm` and `gc`, or use another folder"
            ) from error
        raise ImageError(f"{what}: {error}") from error
