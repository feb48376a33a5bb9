"""Layers from tar archives and back, as OCI images keep them.

An archive comes from anybody. It is read once, from front to back, into a tree and a data blob;
nothing of it touches this machine's file system, so a path that leads elsewhere has nowhere to go.
What no image may hold is refused by name: `..` in a path, an entry below a link or file, another
name of something outside, devices, forged marks of the overlay, a second file of the same name.
Size, number of entries and depth are bounded while reading.

Paper: §5.2.5 (container images become layers).
"""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from fathom.sandbox.images.blobs import BlobWriter
from fathom.sandbox.images.errors import ArchiveRefused, ImageDamaged, ImageTooLarge
from fathom.sandbox.images.headers import Member
from fathom.sandbox.images.ondemand import BlobCache
from fathom.sandbox.images.packed import Allowance, Reader
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.tree import (
    MAX_DEPTH,
    MAX_TARGET,
    OPAQUE,
    Node,
    check_name,
    folder,
    walk,
    whiteout,
)
from fathom.sandbox.images.types import Blob

_GONE = b".wh."
_HIDES = b".wh..wh..opq"
_OLD_MARKS = (b".wh..wh.aufs", b".wh..wh.orph", b".wh..wh.plnk")
_PIECE = 1 << 20
_XATTR = "SCHILY.xattr."
_TAKEN = ("user.", "security.capability", "system.posix_acl_access", "system.posix_acl_default")
# The devices that every system has; layers are mounted so that none of them works.
_HARMLESS = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)}
_LATEST = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one archive may hold: bytes when unpacked, and entries.

    Entries are those that it says and the folders on their paths that it does not. `words`: bytes
    of names, targets of links and attributes, all of which are held in memory.
    """

    size: int = 64 << 30
    entries: int = 2_000_000
    words: int = 256 << 20


def from_tar(
    stream: Reader,
    blob: BlobWriter,
    limits: Limits | None = None,
    allowance: Allowance | None = None,
) -> Node:
    """Return the tree of the archive `stream`; contents are appended to `blob`.

    `allowance`: for the bytes of files of several archives, in the place of `limits.size`.
    Raises ArchiveRefused, ImageTooLarge, ImageDamaged.
    """
    bounds = limits or Limits()
    loader = _Loader(blob, bounds, allowance or Allowance(bounds.size))
    try:
        with tarfile.open(
            fileobj=cast("Any", stream),
            mode="r|",
            tarinfo=Member,
            encoding="utf-8",
            errors="surrogateescape",
        ) as archive:
            for member in archive:
                loader.add(archive, member)
                # Members are remembered for random access, which a stream does not have.
                archive.members = []  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise ImageDamaged(f"the archive is malformed: {error}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise ArchiveRefused(f"the archive has an impossible header: {error}") from error
    return loader.finish()


class _Loader:
    def __init__(self, blob: BlobWriter, limits: Limits, allowance: Allowance) -> None:
        self.blob = blob
        self.limits = limits
        self.allowance = allowance
        self.root = folder()
        self.gone: list[tuple[Node, bytes]] = []
        self.entries = 0
        self.words = 0

    def _count(self, *words: bytes | str) -> None:
        """Count one more entry and what is kept of its text."""
        self.entries += 1
        if self.entries > self.limits.entries:
            raise ImageTooLarge(f"the archive has more than {self.limits.entries} entries")
        self._keep(*words)

    def _keep(self, *words: bytes | str) -> None:
        self.words += sum(map(len, words))
        if self.words > self.limits.words:
            raise ImageTooLarge(
                f"names and attributes in the archive have more than {self.limits.words} bytes"
            )

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Take one entry."""
        self._count(member.name.rpartition("/")[2], member.linkname)
        parts = _parts(member.name)
        if not parts:
            if not member.isdir():
                raise ArchiveRefused("the archive's root is not a folder")
            self._describe(self.root, member)
            return
        parent = self._parent(parts)
        name = parts[-1]
        if name.startswith(_GONE):
            self._mark(parent, name)
            return
        known = parent.children.get(name)
        if known is not None:
            if not (known.is_dir and member.isdir()):
                raise ArchiveRefused(f"{member.name!r} is in the archive twice")
            self._describe(known, member)
            return
        parent.children[name] = self._node(archive, member)

    def _parent(self, parts: list[bytes]) -> Node:
        node = self.root
        for name in parts[:-1]:
            child = node.children.get(name)
            if child is None:
                self._count(name)
                child = node.children[name] = folder()
            if not child.is_dir:
                path = b"/".join(parts).decode(errors="replace")
                raise ArchiveRefused(f"{path!r} leads through {name!r}, which is not a folder")
            node = child
        return node

    def _mark(self, parent: Node, name: bytes) -> None:
        if name == _HIDES:
            parent.xattrs[OPAQUE] = b"y"
        elif name not in _OLD_MARKS:
            rest = name[len(_GONE) :]
            check_name(rest)
            if rest.startswith(_GONE):
                raise ArchiveRefused(f"{name!r} is a mark of a mark")
            self.gone.append((parent, rest))

    def _node(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> Node:
        if member.islnk():
            return self._twin(member)
        node = Node(mode=0)
        self._describe(node, member)
        if member.isdir():
            node.mode |= stat.S_IFDIR
        elif member.issym():
            node.mode = stat.S_IFLNK | 0o777
            node.target = member.linkname.encode("utf-8", "surrogateescape")
            if not 0 < len(node.target) <= MAX_TARGET or b"\0" in node.target:
                raise ArchiveRefused(f"{member.name!r} is a link to nothing possible")
        elif member.isreg():
            node.mode |= stat.S_IFREG
            self._contents(archive, member, node)
        elif member.isfifo():
            node.mode |= stat.S_IFIFO
        elif member.ischr() and (member.devmajor, member.devminor) in _HARMLESS:
            node.mode |= stat.S_IFCHR
            node.rdev = member.devmajor << 8 | member.devminor
        elif member.ischr() or member.isblk():
            numbers = f"{member.devmajor}:{member.devminor}"
            raise ArchiveRefused(f"{member.name!r} is the device {numbers}: images hold none")
        else:
            raise ArchiveRefused(f"{member.name!r} is of the unknown kind {member.type!r}")
        return node

    def _twin(self, member: tarfile.TarInfo) -> Node:
        node = self.root
        for name in _parts(member.linkname):
            found = node.children.get(name) if node.is_dir else None
            if found is None:
                raise ArchiveRefused(
                    f"{member.name!r} is another name of {member.linkname!r}, which is not in the "
                    "archive before it"
                )
            node = found
        if node.is_dir:
            raise ArchiveRefused(f"{member.name!r} is another name of a folder")
        return node

    def _contents(self, archive: tarfile.TarFile, member: tarfile.TarInfo, node: Node) -> None:
        self.allowance.take(member.size)
        node.size = member.size
        if not member.size:
            return
        file = archive.extractfile(member)
        if file is None:
            raise ImageDamaged(f"{member.name!r} has no contents")
        # Below its buffer it can go forward in the stream, over the holes of a sparse member.
        raw = cast("BinaryIO", cast("io.BufferedReader", file).raw)
        node.data = (0, self.blob.add(_contents(raw, member), member.size))
        if self.blob.short:
            raise ImageDamaged(f"the archive ends within {member.name!r}")

    def _describe(self, node: Node, member: tarfile.TarInfo) -> None:
        # A folder that was there already keeps what it is, and whether it hides what lies below.
        node.mode = node.mode & stat.S_IFDIR | member.mode & 0o7777
        for number in (member.uid, member.gid):
            if not 0 <= number < 0xFFFFFFFF:
                raise ArchiveRefused(f"{member.name!r} belongs to {number}")
        node.uid, node.gid = member.uid, member.gid
        node.mtime = max(0, min(int(member.mtime), _LATEST))
        for key, value in member.pax_headers.items():
            name = key.removeprefix(_XATTR)
            if name == key:
                continue
            if ".overlay." in name:
                raise ArchiveRefused(f"{member.name!r} has the overlay's own attribute {name!r}")
            if name.startswith(_TAKEN):
                self._keep(name, value)
                node.xattrs[name] = value.encode("utf-8", "surrogateescape")

    def finish(self) -> Node:
        """Apply the marks of deletion, which mean the layers below, and return the tree."""
        for parent, name in self.gone:
            known = parent.children.get(name)
            if known is None:
                parent.children[name] = whiteout()
            elif known.is_dir:
                known.xattrs[OPAQUE] = b"y"
        return self.root


def _contents(file: BinaryIO, member: tarfile.TarInfo) -> Generator[bytes | int]:
    """Yield a member's contents, and the size of each hole of a sparse one."""
    at = 0
    # As (offset, size); the library's reader would make zeros of the holes.
    runs: list[tuple[int, int]] = getattr(member, "sparse", None) or [(0, member.size)]
    for start, size in runs:
        if not size:
            continue  # the old form fills its table with these
        if not at <= start <= start + size <= member.size:
            raise ImageDamaged(f"{member.name!r} has an impossible map of holes")
        if start > at:
            yield start - at
        file.seek(start)
        at = start  # nothing is read for holes
        while at < start + size:
            piece = file.read(min(start + size - at, _PIECE))
            if not piece:
                return
            at += len(piece)
            yield piece
    if at < member.size:
        yield member.size - at


def _parts(path: str) -> list[bytes]:
    """Return the names in a path of an archive. Raises ArchiveRefused."""
    raw = path.encode("utf-8", "surrogateescape")
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    if len(parts) > MAX_DEPTH or len(raw) > 16 * MAX_TARGET:
        raise ArchiveRefused(f"{path[:80]!r}... is nested more than {MAX_DEPTH} deep")
    for part in parts:
        if part == b"..":
            raise ArchiveRefused(f"{path!r} leads out of the archive")
        check_name(part)
    return parts


def to_tar(store: Store, digest: str, out: BinaryIO) -> None:
    """Write a layer as a tar archive with OCI's marks of deletion. The same layer, the same bytes.

    Raises ImageMissing, ImageDamaged, OSError.
    """
    names: dict[int, str] = {}
    with (
        open_blobs(store, store.layer(digest).data) as blobs,
        tarfile.open(
            fileobj=out,
            mode="w|",
            format=tarfile.PAX_FORMAT,
            encoding="utf-8",
            errors="surrogateescape",
        ) as archive,
    ):
        for path, node in walk(store.tree(digest)):
            _write_entry(archive, path.decode("utf-8", "surrogateescape"), node, names, blobs)


def _write_entry(
    archive: tarfile.TarFile,
    path: str,
    node: Node,
    names: dict[int, str],
    blobs: list[BlobFile],
) -> None:
    parent, _, name = path.rpartition("/")
    prefix = f"{parent}/" if parent else ""
    if node.is_whiteout:
        archive.addfile(tarfile.TarInfo(f"{prefix}.wh.{name}"))
        return
    member = tarfile.TarInfo(path or "./")
    member.mode, member.uid, member.gid = stat.S_IMODE(node.mode), node.uid, node.gid
    member.mtime = node.mtime
    member.pax_headers = {
        _XATTR + key: value.decode("utf-8", "surrogateescape")
        for key, value in sorted(node.xattrs.items())
        if key != OPAQUE
    }
    kinds = {
        stat.S_IFDIR: tarfile.DIRTYPE,
        stat.S_IFREG: tarfile.REGTYPE,
        stat.S_IFLNK: tarfile.SYMTYPE,
        stat.S_IFCHR: tarfile.CHRTYPE,
        stat.S_IFBLK: tarfile.BLKTYPE,
        stat.S_IFIFO: tarfile.FIFOTYPE,
    }
    member.type = kinds[stat.S_IFMT(node.mode)]
    if id(node) in names:
        member.type, member.linkname = tarfile.LNKTYPE, names[id(node)]
        archive.addfile(member)
        return
    names[id(node)] = path
    member.linkname = node.target.decode("utf-8", "surrogateescape")
    member.devmajor, member.devminor = node.rdev >> 8 & 0xFFF, node.rdev & 0xFF
    if node.data is not None:
        member.size = node.size
        archive.addfile(member, cast("Any", blobs[node.data[0]].at(node.data[1])))
    else:
        archive.addfile(member)
    if node.is_opaque:
        archive.addfile(tarfile.TarInfo(f"{path}/{_HIDES.decode()}" if path else _HIDES.decode()))


@contextmanager
def open_blobs(store: Store, blobs: Sequence[Blob]) -> Generator[list[BlobFile]]:
    """Open data blobs for reading. Raises ImageMissing, ImageDamaged."""
    opened: list[BlobFile] = []
    try:
        for blob in blobs:
            opened.append(BlobFile(store, blob))
        yield opened
    finally:
        for one in opened:
            one.close()


class BlobFile:
    """Reads one blob of a layer like a file, from the disk or on demand."""

    def __init__(self, store: Store, blob: Blob) -> None:
        here = store.has_data(blob.digest)
        self._file = store.data_path(blob.digest).open("rb") if here else None
        self._cache = None if here else BlobCache(store, blob)
        self._position = 0

    def at(self, offset: int) -> BlobFile:
        """Continue at `offset`."""
        self._position = offset
        return self

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        if self._file is not None:
            self._file.seek(self._position)
            data = self._file.read(size)
        else:
            assert self._cache is not None
            data = self._cache.read(self._position, size)
        self._position += len(data)
        return data

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        elif self._cache is not None:
            self._cache.close()
