"""Mount a stack of layers as one file tree, with or without a folder for writes.

Three ways, tried in this order, and `Composed.mode` says which one it is:

    erofs      each layer's metadata image is mounted as it lies, its data blobs are its devices;
               no copy, no loop device. Needs root and Linux 6.12 or newer.
    loop       the same through loop devices, for older kernels. Needs root.
    folders    layers are unpacked once into folders, for users other than root. Owners are then
               those of the user, and `caps` says so.

The kernel's overlay joins the layers. Where it may not be mounted either (a user outside of any
user namespace), `fuse-overlayfs` does it if it works here; without a folder for writes, a joined
copy of hard links needs no mount at all.

Paper: §5.2.5 (layers stacked by an overlay, writes go to the upper folder).
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fathom.errors import Unsupported
from fathom.sandbox.images import layers as layering
from fathom.sandbox.images import mounts, unpack
from fathom.sandbox.images.errors import ImageError
from fathom.sandbox.images.holds import Hold
from fathom.sandbox.images.source import is_root
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.types import Image

LayerMode = Literal["erofs", "loop", "folders"]
JoinMode = Literal["overlay", "fuse-overlayfs", "joined", "single"]
# More layers than this are joined (without copying) before they are mounted: each costs a mount,
# and the kernel takes one page of options.
MAX_STACK = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class StackCaps:
    """What a mounted stack really does.

    `owners`: whether files keep the owners that the image gives them. `writable`: whether there is
    a folder for writes. `on_demand`: whether contents are fetched when they are first read.
    `rootless`: whether it was made without privileges.
    """

    owners: bool
    writable: bool
    on_demand: bool
    rootless: bool


@dataclass(slots=True, kw_only=True)
class Composed:
    """A mounted stack. `close` unmounts everything; it may be called twice.

    `root`: the file tree. `upper`: where writes go, None for a read-only tree. `layers`: the
    mounted layers, the lowest first. `mode`, `join`: how layers and the stack are mounted. `hold`:
    what keeps the layers in their store.
    """

    root: Path
    upper: Path | None
    layers: tuple[Path, ...]
    mode: LayerMode
    join: JoinMode
    caps: StackCaps
    _undo: list[mounts.Mounted] = field(default_factory=list[mounts.Mounted])
    hold: Hold | None = None

    def __enter__(self) -> Composed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def detach(self) -> None:
        """Unmount here what another mount namespace shows as well; the layers stay held.

        Loop devices stay as they are: they would be left to the kernel alone.
        """
        while self.mode != "loop" and self._undo:
            self._undo.pop().close()

    def close(self) -> None:
        """Unmount the stack and its layers and let go of them."""
        while self._undo:
            self._undo.pop().close()
        if self.hold is not None:
            self.hold.close()
            self.hold = None


def compose(
    store: Store,
    image: Image | Sequence[str],
    folder: Path,
    *,
    upper: Path | None = None,
    mode: LayerMode | Literal["auto"] = "auto",
    userns: int | None = None,
    hold_name: str | None = None,
) -> Composed:
    """Mount `image` (or layers, the lowest first) below the folder `folder`, which must exist.

    `upper`: an empty folder, or one of an earlier stack of the same layers, for writes; its file
    system must not be an overlay itself. A sibling named `NAME.work` is made for the kernel.
    `mode`: "auto" takes the best that works; a mode that is named must work. `userns`: descriptor
    of a user namespace by which the layers' owners are translated: their number 0 is then root of
    that namespace. What the sandbox writes has that namespace's numbers on the disk, so give
    `pack_diff` the `owners` that undo it, Owners(base=FIRST, count=65536). `hold_name`: what the
    hold on its layers is called, see `Store.hold`.
    Mounts are made in the mount namespace of the caller. Raises Unsupported, ImageError.
    """
    digests = tuple(image.layers if isinstance(image, Image) else image)
    hold = store.hold(*digests, name=hold_name)
    undo: list[mounts.Mounted] = []
    try:
        if len(digests) > MAX_STACK:
            digests = (digests[0], layering.flatten(store, digests[1:]).digest)
            hold.add(digests[1])
        chosen, paths = _mount_layers(store, digests, folder, mode, undo, userns)
        root, join = _join(store, digests, paths, folder, upper, chosen, undo)
    except BaseException:
        while undo:
            undo.pop().close()
        hold.close()
        raise
    caps = StackCaps(
        owners=chosen != "folders" or is_root(),
        writable=upper is not None,
        on_demand=any(mounted.on_demand for mounted in undo),
        rootless=not is_root(),
    )
    return Composed(
        root=root,
        upper=upper,
        layers=paths,
        mode=chosen,
        join=join,
        caps=caps,
        _undo=undo,
        hold=hold,
    )


def _mount_layers(
    store: Store,
    digests: Sequence[str],
    folder: Path,
    mode: LayerMode | Literal["auto"],
    undo: list[mounts.Mounted],
    userns: int | None,
) -> tuple[LayerMode, tuple[Path, ...]]:
    tried: list[str] = []
    wanted: tuple[LayerMode, ...] = ("erofs", "loop", "folders") if mode == "auto" else (mode,)
    for one in wanted:
        mark = len(undo)
        try:
            if one == "folders":
                return one, tuple(unpack.folder_of(store, digest) for digest in digests)
            return one, tuple(
                _mount_one(store, digest, folder / f"layer{number}", one, undo, userns)
                for number, digest in enumerate(digests)
            )
        except (OSError, Unsupported) as error:
            tried.append(f"{one}: {error}")
            while len(undo) > mark:
                undo.pop().close()
    raise Unsupported(f"the layers cannot be mounted here ({'; '.join(tried)})")


def _mount_one(
    store: Store,
    digest: str,
    target: Path,
    mode: LayerMode,
    undo: list[mounts.Mounted],
    userns: int | None,
) -> Path:
    mounted = mounts.mount_layer(store, store.layer(digest), target, loop=mode == "loop")
    undo.append(mounted)
    if userns is not None:
        undo.append(mounts.bind_mapped(target, target, userns))
    return target


def _join(
    store: Store,
    digests: Sequence[str],
    paths: tuple[Path, ...],
    folder: Path,
    upper: Path | None,
    mode: LayerMode,
    undo: list[mounts.Mounted],
) -> tuple[Path, JoinMode]:
    if upper is None and len(paths) == 1:
        return paths[0], "single"
    root = folder / "root"
    work: Path | None = None
    if upper is not None:
        work = upper.with_name(f"{upper.name}.work")
        work.mkdir(exist_ok=True)
        if not any(upper.iterdir()):
            # The overlay shows the upper folder's own owner and mode at its root.
            top = paths[-1].stat()
            if is_root():
                os.chown(upper, top.st_uid, top.st_gid)
            upper.chmod(stat.S_IMODE(top.st_mode))
    private = mode == "folders" and not is_root()
    try:
        undo.append(mounts.overlay(root, paths, upper, work, user_attributes=private))
        return root, "overlay"
    except OSError as error:
        problem = error
    if not is_root():
        if program := _fuse_overlay():
            undo.append(mounts.fuse_overlay(program, root, paths, upper, work))
            return root, "fuse-overlayfs"
        if upper is None:
            return unpack.joined_folder(store, digests), "joined"
    if isinstance(problem, PermissionError):
        raise Unsupported(
            "this user may not mount an overlay: enter a user namespace and a mount namespace "
            "first, or ask for a tree without a folder for writes"
        ) from problem
    raise ImageError(f"the layers cannot be joined: {problem}") from problem


def _fuse_overlay() -> str | None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return None
    return shutil.which("fuse-overlayfs", path="/usr/local/bin:/usr/bin:/bin")
