"""Layers as folders, where the kernel may not mount their images.

Each layer is unpacked once, into `unpacked/` of the store, and used by all sandboxes of this user.
Only root can give files their owners; for others every file belongs to the user. Marks of deletion
stay marks: a device 0:0, which any user may make, and an attribute that unprivileged overlays read.

Paper: none (a fallback without privileges).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from fathom.sandbox.images import layers as layering
from fathom.sandbox.images import tree
from fathom.sandbox.images.blobs import end_sparsely, write_sparsely
from fathom.sandbox.images.errors import ImageDamaged, store_errors
from fathom.sandbox.images.ondemand import BlobCache
from fathom.sandbox.images.source import is_root
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.tree import OPAQUE, Node
from fathom.sandbox.images.types import Blob

_PRIVATE_OPAQUE = "user.overlay.opaque"
_PIECE = 1 << 20


def folder_of(store: Store, digest: str) -> Path:
    """Return the folder of a layer, unpacking it when that was not done yet. Raises ImageError."""
    return _once(store, "layer", [digest], lambda: layering.joined(store, [digest], bottom=False))


def joined_folder(store: Store, digests: Sequence[str]) -> Path:
    """Return a folder with what a whole stack shows, the lowest layer first. Raises ImageError."""
    return _once(store, "stack", digests, lambda: layering.joined(store, digests, bottom=True))


def _once(
    store: Store,
    kind: str,
    digests: Sequence[str],
    read: Callable[[], tuple[Node, list[Blob]]],
) -> Path:
    key = hashlib.sha256("\n".join((kind, *digests)).encode()).hexdigest()[:40]
    parent = store.folder / "unpacked"
    final = parent / f"{kind}-{key}"
    if final.is_dir():
        os.utime(final)
        return final
    with store_errors("the layer cannot be unpacked", parent):
        parent.mkdir(mode=0o700, exist_ok=True)
        # An image's programs keep the rights of their owners; no user of this machine may run them.
        parent.chmod(0o700)
        work = Path(tempfile.mkdtemp(prefix="make-", dir=parent))
        try:
            root, blobs = read()
            write_tree(store, root, blobs, work / "tree")
            # Which layers this stands for, so that it goes when they go.
            (parent / f"{final.name}.of").write_text("".join(f"{d}\n" for d in digests))
            with contextlib.suppress(OSError):
                (work / "tree").rename(final)
            if not final.is_dir():
                (work / "tree").rename(final)
        finally:
            remove_tree(work)
    return final


def remove_tree(path: Path) -> None:
    """Remove a folder even where its own folders may not be written to."""
    for folder, names, _ in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                below = Path(folder, name)
                if not below.is_symlink():
                    below.chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)


def write_tree(store: Store, root: Node, blobs: Sequence[Blob], target: Path) -> None:
    """Write a tree into the new folder `target`, contents from the store's blobs.

    Raises ImageDamaged, ImageMissing and OSError.
    """
    readers = [_BlobReader(store, blob) for blob in blobs]
    made: dict[int, Path] = {}
    folders: list[tuple[Path, Node]] = []
    try:
        for path, node in tree.walk(root):
            # Names were checked when the tree was read, and every parent is a folder made here.
            place = target / os.fsdecode(path) if path else target
            if id(node) in made:
                os.link(made[id(node)], place, follow_symlinks=False)
                continue
            made[id(node)] = place
            _write_node(node, place, readers)
            if node.is_dir:
                folders.append((place, node))
        for place, node in reversed(folders):
            _finish(place, node)
    finally:
        for reader in readers:
            reader.close()


def _write_node(node: Node, place: Path, readers: Sequence[_BlobReader]) -> None:
    kind = stat.S_IFMT(node.mode)
    if node.is_dir:
        place.mkdir(mode=0o700)
        return
    if node.is_file:
        with place.open("xb") as file:
            if node.data is not None:
                out = cast("BinaryIO", file)
                readers[node.data[0]].copy(node.data[1], node.size, out)
                end_sparsely(out)
    elif kind == stat.S_IFLNK:
        os.symlink(node.target, os.fsencode(place))
    elif node.is_whiteout or is_root():
        minor = node.rdev & 0xFF | node.rdev >> 12 & ~0xFF
        os.mknod(place, node.mode, os.makedev(node.rdev >> 8 & 0xFFF, minor))
    elif kind == stat.S_IFIFO:
        os.mkfifo(place)
    else:
        return
    _finish(place, node)


def _finish(place: Path, node: Node) -> None:
    root = is_root()
    if root:
        os.chown(place, node.uid, node.gid, follow_symlinks=False)
    if not stat.S_ISLNK(node.mode) and not node.is_whiteout:
        mode = stat.S_IMODE(node.mode)
        # Without the owners of the image, these bits would give the rights of this user away.
        place.chmod(mode if root else mode & 0o1777 | (0o700 if node.is_dir else 0o400))
    for name, value in node.xattrs.items():
        # Only root may write any other kind, and a lost capability is better than a failed start.
        if name == OPAQUE and not root:
            os.setxattr(place, _PRIVATE_OPAQUE, value, follow_symlinks=False)
        elif root or name.startswith("user."):
            with contextlib.suppress(OSError):
                os.setxattr(place, name, value, follow_symlinks=False)
    os.utime(place, (node.mtime, node.mtime), follow_symlinks=False)


class _BlobReader:
    """Reads a blob that is here, or fetches what is read of one that is not."""

    def __init__(self, store: Store, blob: Blob) -> None:
        self._name = blob.digest
        self._cache = None if store.has_data(blob.digest) else BlobCache(store, blob)
        self._fd = -1
        if self._cache is None:
            self._fd = os.open(store.data_path(blob.digest), os.O_RDONLY | os.O_CLOEXEC)

    def copy(self, offset: int, size: int, out: BinaryIO) -> None:
        while size:
            length = min(size, _PIECE)
            if self._cache is None:
                piece = os.pread(self._fd, length, offset)
            else:
                piece = self._cache.read(offset, length)
            if not piece:
                raise ImageDamaged(f"the blob {self._name} is shorter than its layer says")
            write_sparsely(out, piece)
            offset += len(piece)
            size -= len(piece)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
        else:
            os.close(self._fd)
