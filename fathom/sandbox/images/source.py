"""Trees from folders of this machine: a prepared folder, or the writes of a sandbox.

Files are read through descriptors that follow no link, so a tenant that swaps a folder for a link
meanwhile gains nothing. Contents go into the layer's data blob as they are found, in the order of
names, so the same folder gives the same bytes.

Paper: §5.2.5 (layers from what a sandbox wrote).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from fathom.sandbox.images.blobs import BlobWriter
from fathom.sandbox.images.errors import ImageError, ImageTooLarge
from fathom.sandbox.images.tree import MAX_DEPTH, OPAQUE, Node

# What overlayfs notes for itself in its upper folder; only the first says something about files.
_OVERLAY = ("trusted.overlay.", "user.overlay.")
_KEPT = ("user.", "trusted.", "security.", "system.posix_acl_access", "system.posix_acl_default")
_READ = 1 << 20
# The most bytes of a folder, holes included, where nothing else is said.
LIMIT = 64 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """How owners on disk become owners in the layer.

    `base`, `count`: numbers from `base` on, `count` of them, are 0 and up in the layer (a sandbox's
    own range of users); `everybody`: one (uid, gid) for all files instead.
    """

    base: int = 0
    count: int = 1 << 32
    everybody: tuple[int, int] | None = None

    def translate(self, uid: int, gid: int) -> tuple[int, int]:
        """Return the owner in the layer. Numbers outside the range become nobody (65534)."""
        if self.everybody is not None:
            return self.everybody
        return tuple(  # type: ignore[return-value]
            n - self.base if 0 <= n - self.base < self.count else 65534 for n in (uid, gid)
        )


def is_root() -> bool:
    """Tell whether this process may give files any owner: root, and not of a user namespace."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map") as file:
        return file.read().split() == ["0", "0", "4294967295"]


def own_files() -> Owners:
    """Return how owners are read when nothing else is said.

    Root's files keep their owners. A user has no files but his own, so they become root's.
    """
    return Owners() if is_root() else Owners(everybody=(0, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Taking:
    """What to take from a folder and how.

    `owners`: as they are on disk for root, all root's for others, if not given. `upper`: the folder
    is the upper one of an overlay, so its marks mean something; otherwise a device 0:0 is refused.
    `mtime`: one time for all files, their own when not given. `devices`: whether devices are taken
    at all (sockets never are). `exclude`: paths to leave out, each with a slash before it.
    `limit`: the most bytes that all files may have together. Holes count: 1 TiB of nothing takes no
    room where it lies, and whoever reads it later would read all of it.
    """

    owners: Owners = field(default_factory=own_files)
    upper: bool = False
    mtime: int | None = None
    devices: bool = False
    exclude: frozenset[str] = frozenset()
    limit: int = LIMIT


def from_folder(path: Path, blob: BlobWriter, taking: Taking) -> Node:
    """Return the tree of the folder `path`; contents are appended to `blob`.

    Raises ImageError for what no layer can hold, for a file that changed while it was read,
    ImageTooLarge beyond the limit, and OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        walker = _Walker(blob, taking)
        node = walker.node(os.fstat(fd), _names(fd, None))
        walker.fill(fd, node, "", 0)
        return node
    finally:
        os.close(fd)


def from_path(path: Path, blob: BlobWriter, taking: Taking, where: str = "") -> Node:
    """Return the tree of one file or folder; `where` is its path as `taking.exclude` names it.

    Raises as `from_folder`.
    """
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        walker = _Walker(blob, taking)
        found = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            return walker.folder(parent, path.name, where, 0)
        node = walker.leaf(parent, path.name, found, where or f"/{path.name}")
        if node is None:
            raise ImageError(f"{path} is a socket: a layer holds none")
        return node
    finally:
        os.close(parent)


class _Walker:
    def __init__(self, blob: BlobWriter, taking: Taking) -> None:
        self.blob = blob
        self.taking = taking
        self.linked: dict[tuple[int, int], Node] = {}
        self.size = 0

    def node(self, found: os.stat_result, xattrs: dict[str, bytes]) -> Node:
        uid, gid = self.taking.owners.translate(found.st_uid, found.st_gid)
        mtime = int(found.st_mtime) if self.taking.mtime is None else self.taking.mtime
        return Node(mode=found.st_mode, uid=uid, gid=gid, mtime=mtime, xattrs=self._xattrs(xattrs))

    def _xattrs(self, found: dict[str, bytes]) -> dict[str, bytes]:
        kept: dict[str, bytes] = {}
        for name, value in found.items():
            if name.startswith(_OVERLAY):
                last = name.rpartition(".")[2]
                if self.taking.upper and last == "opaque" and value in (b"y", b"x"):
                    kept[OPAQUE] = b"y"
                elif last in ("redirect", "metacopy") and self.taking.upper:
                    raise ImageError(
                        f"the overlay was mounted with {last}: mount it with redirect_dir=nofollow "
                        "and metacopy=off to make layers of it"
                    )
            elif name.startswith(_KEPT):
                kept[name] = value
        return kept

    def fill(self, fd: int, parent: Node, path: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ImageError(f"{path}: folders are nested more than {MAX_DEPTH} deep")
        for name in sorted(os.listdir(fd), key=os.fsencode):
            where = f"{path}/{name}"
            if where in self.taking.exclude:
                continue
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            key = os.fsencode(name)
            if stat.S_ISDIR(found.st_mode):
                parent.children[key] = self.folder(fd, name, where, depth + 1)
            else:
                child = self.leaf(fd, name, found, where)
                if child is not None:
                    parent.children[key] = child

    def folder(self, fd: int, name: str, where: str, depth: int) -> Node:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        below = os.open(name, flags, dir_fd=fd)
        try:
            node = self.node(os.fstat(below), _names(below, None))
            self.fill(below, node, where, depth)
            return node
        finally:
            os.close(below)

    def leaf(self, fd: int, name: str, found: os.stat_result, where: str) -> Node | None:
        if stat.S_ISSOCK(found.st_mode):
            return None
        identity = (found.st_dev, found.st_ino)
        if found.st_nlink > 1 and identity in self.linked:
            return self.linked[identity]
        if stat.S_ISREG(found.st_mode):
            node = self._file(fd, name, where)
        else:
            node = self.node(found, _names(fd, name))
            if stat.S_ISLNK(found.st_mode):
                node.target = os.fsencode(os.readlink(name, dir_fd=fd))
            elif stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
                node.rdev = _encode_device(found.st_rdev)
                if node.is_whiteout:
                    if not self.taking.upper:
                        raise ImageError(f"{where} is a device 0:0, the mark of a deleted file")
                    # Who deleted something, and when, is no part of the result.
                    node.mode, node.uid, node.gid, node.mtime = stat.S_IFCHR, 0, 0, 0
                    node.xattrs = {}
                elif not self.taking.devices:
                    raise ImageError(f"{where} is a device: a layer holds none")
        if found.st_nlink > 1 and not node.is_whiteout:
            self.linked[identity] = node
        return node

    def _file(self, fd: int, name: str, where: str) -> Node:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=fd)
        try:
            before = os.fstat(file)
            if not stat.S_ISREG(before.st_mode):
                raise ImageError(f"{where} changed while it was packed: freeze its writers first")
            self.size += before.st_size
            if self.size > self.taking.limit:
                raise ImageTooLarge(
                    f"{where} has {before.st_size} bytes, and with it the files have more than "
                    f"{self.taking.limit}, holes included: remove or shorten it"
                )
            node = self.node(before, _names(file, None))
            node.size = before.st_size
            if before.st_size:
                offset = self.blob.add(_pieces(file, before.st_size), before.st_size)
                node.data = (0, offset)
            after = os.fstat(file)
            same = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (
                before.st_size,
                before.st_mtime_ns,
                before.st_ctime_ns,
            )
            if not same or self.blob.short:
                raise ImageError(f"{where} changed while it was packed: freeze its writers first")
            return node
        finally:
            os.close(file)


def _pieces(fd: int, size: int) -> Generator[bytes | int]:
    """Yield the contents of a file, and the size of each hole in it; less where it was cut."""
    at = 0
    while at < size:
        start = _seek(fd, at, os.SEEK_DATA)
        if start is None or start > at:
            end = size if start is None else min(start, size)
            yield end - at
            at = end
            continue
        stop = min(_seek(fd, at, os.SEEK_HOLE) or size, size)
        while at < stop:
            piece = os.pread(fd, min(stop - at, _READ), at)
            if not piece:
                return
            at += len(piece)
            yield piece


def _seek(fd: int, at: int, what: int) -> int | None:
    """Return where the next data or hole begins, None when there is no more of it."""
    try:
        return os.lseek(fd, at, what)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if what == os.SEEK_DATA and error.errno == errno.EINVAL:
            return at  # a file system that knows of no holes
        raise


def _names(fd: int, name: str | None) -> dict[str, bytes]:
    """Return the attributes of an open file, or of the entry `name` of a folder, as far as told."""
    target: int | str = fd if name is None else f"/proc/self/fd/{fd}/{name}"
    try:
        if name is None:
            return {n: os.getxattr(target, n) for n in os.listxattr(target)}
        return {
            n: os.getxattr(target, n, follow_symlinks=False)
            for n in os.listxattr(target, follow_symlinks=False)
        }
    except OSError:
        return {}


def _encode_device(number: int) -> int:
    """Return a device number as the kernel stores it on disk."""
    major, minor = os.major(number), os.minor(number)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
