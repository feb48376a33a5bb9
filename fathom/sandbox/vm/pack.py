"""What a small machine wrote, taken out by its agent as an archive and made into a layer.

Paper: §5.2.5 (`pack_diff`).
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

from fathom.errors import SandboxError
from fathom.sandbox import frames
from fathom.sandbox.frames import Tag
from fathom.sandbox.images import Image, Store, tarball
from fathom.sandbox.images import layers as layering
from fathom.sandbox.images.blobs import BlobWriter
from fathom.sandbox.images.packed import Reader
from fathom.sandbox.images.tarball import Limits
from fathom.sandbox.images.types import check_new_name
from fathom.sandbox.types import MicroVM
from fathom.sandbox.vm import disks, talk

_TIMEOUT = 600.0


def pack(
    cache: Path, spec: MicroVM, disk: str, folder: Path, secret: bytes, name: str | None
) -> str:
    """Make a layer and return its digest; `name`: also an image with it on top.

    `disk`: what the machine runs on. Raises SandboxError.
    """
    if name is not None:
        check_new_name(name)
    # Heads of entries come on top of what the guest may have written.
    limit = 2 * spec.disk_bytes + (64 << 20)
    with Store(cache / "store") as store, tempfile.TemporaryFile(dir=cache) as archive:
        _fetch(folder, secret, cast("BinaryIO", archive), limit, 2 * spec.disk_bytes)
        archive.seek(0)
        with store.making("the machine's writes cannot be packed") as work:
            with (work / "data").open("wb") as out:
                blob = BlobWriter(out)
                reader = Reader(cast("BinaryIO", archive), limit)
                root = tarball.from_tar(reader, blob, Limits(size=limit))
            layer = layering.publish(store, root, work / "data", blob)
        if name is not None:
            base = disks.image_of(cache, store, spec.image)
            if disks.small_disk_of(cache, base) != Path(disk):
                raise SandboxError(
                    f"{spec.image!r} means another image now than this machine runs on: pack it "
                    "without a name, or give the former image a name again"
                )
            image = Image(
                layers=(*base.layers, layer.digest), run=base.run, architecture=base.architecture
            )
            store.put_image(image, name)
        return layer.digest


def _fetch(folder: Path, secret: bytes, archive: BinaryIO, limit: int, most: int) -> None:
    # The agent refuses files with more bytes: only holes, or many names of one file, make so many.
    end = talk.execute(
        folder,
        secret,
        "archive",
        builtin=True,
        timeout=_TIMEOUT,
        cap=limit,
        output=archive.write,
        argument=str(most),
    )
    problem = frames.text_of(end.get(Tag.PROBLEM))
    if problem or frames.number_of(end.get(Tag.EXIT)):
        number = int(problem[1:]) if problem[1:].isdigit() else 0
        if number == errno.EFBIG:
            raise SandboxError(
                f"the machine's files have more than {most} bytes, twice its disk, holes included "
                "and every name of a file counted: remove or shorten some"
            )
        if number == errno.ELOOP:
            raise SandboxError("the machine's folders are nested more than 200 deep")
        raise SandboxError(f"the machine's writes cannot be read: {os.strerror(number)}")
    if frames.number_of(end.get(Tag.STDOUT_TOTAL)) > limit:
        raise SandboxError(f"the machine's writes are more than {limit >> 20} MiB as an archive")
