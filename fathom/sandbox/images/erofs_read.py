"""Read EROFS images back into trees, trusting nothing in them.

Used to check an image before the kernel is asked to mount it, to unpack one where the kernel may
not, to export one and to merge several. Every offset is bounded, folders are sorted and form a
tree, and each file's blocks lie inside its blob; anything else is ImageDamaged. Images that
mkfs.erofs writes with `--chunksize` and `--blobdev` can be read as well, if each file is whole.

Paper: none (the report's layered images name the file system, not its layout).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Sequence

from fathom.sandbox.images import erofs
from fathom.sandbox.images.errors import ArchiveRefused, ImageDamaged
from fathom.sandbox.images.tree import MAX_DEPTH, MAX_TARGET, Node, check_name

_COMPACT = struct.Struct("<HHHHIIIIHHI")
_PREFIX_OF = {index: prefix for prefix, index in erofs.PREFIXES}
_KINDS = frozenset(erofs.FILE_TYPES)
_KNOWN = erofs.INCOMPAT_CHUNKED | erofs.INCOMPAT_DEVICES
_HOLE = 0xFFFFFFFF
# Bytes of attributes and targets of links. Files may share them in the image, and in a hostile one
# a few kilobytes would become gigabytes.
_MOST_WORDS = 256 << 20


def read(image: bytes, blobs: Sequence[int], numbers: Sequence[int] | None = None) -> Node:
    """Return the tree of `image`, whose files lie in blobs of these sizes in bytes.

    `numbers`: what the blobs are called in the tree, their place in the list when not given.
    Raises ImageDamaged.
    """
    try:
        return _Reader(image, blobs, numbers or range(len(blobs))).tree()
    except (struct.error, IndexError, UnicodeDecodeError, ArchiveRefused) as error:
        raise ImageDamaged(f"the layer image is malformed: {error}") from error


class _Reader:
    def __init__(self, image: bytes, blobs: Sequence[int], numbers: Sequence[int]) -> None:
        self.image = image
        self.blobs = blobs
        self.numbers = numbers
        self.nodes: dict[int, Node] = {}
        self.words = 0
        self.known: dict[int, tuple[str, bytes, int]] = {}
        if len(image) < erofs.BLOCK or len(image) % erofs.BLOCK:
            raise ImageDamaged(f"the layer image has {len(image)} bytes, not whole blocks")
        fields = erofs.SUPER.unpack_from(image, erofs.SUPER_OFFSET)
        magic, checksum, compatible, bits, _, root, count = fields[:7]
        meta, xattr, incompatible, devices = fields[10], fields[11], fields[14], fields[16]
        if magic != erofs.MAGIC or bits != erofs.BLOCK_BITS:
            raise ImageDamaged("this is not a layer image with blocks of 4 KiB")
        if incompatible & ~_KNOWN:
            raise ImageDamaged(f"the layer image uses unknown features ({incompatible:#x})")
        if compatible & erofs.COMPAT_CHECKSUM:
            block = bytearray(image[erofs.SUPER_OFFSET : erofs.BLOCK])
            block[4:8] = bytes(4)
            if erofs.crc32c(bytes(block)) != checksum:
                raise ImageDamaged("the checksum of the layer image does not match")
        if devices != len(blobs):
            raise ImageDamaged(f"the layer image names {devices} blobs, the layer {len(blobs)}")
        for number, size in enumerate(blobs):
            at = (fields[17] + number) * erofs.DEVICE_SLOT + 64
            blocks, mapped = struct.unpack_from("<II", image, at)
            if mapped or blocks > -(-size // erofs.BLOCK):
                raise ImageDamaged(f"blob {number} is shorter than the layer image says")
        self.start = meta * erofs.BLOCK
        self.shared = xattr * erofs.BLOCK
        self.root = root
        self.count = count

    def tree(self) -> Node:
        root = self._node(self.root)
        if not root.is_dir:
            raise ImageDamaged("the root of the layer image is not a folder")
        seen = {self.root}
        stack = [(self.root, root, 0)]
        while stack:
            nid, parent, depth = stack.pop()
            if depth > MAX_DEPTH:
                raise ImageDamaged(f"folders are nested more than {MAX_DEPTH} deep")
            for name, child_nid, kind in self._entries(nid):
                child = self._node(child_nid)
                if erofs.FILE_TYPES[stat.S_IFMT(child.mode)] != kind:
                    raise ImageDamaged(f"the entry {name!r} disagrees with its file")
                parent.children[name] = child
                if child.is_dir:
                    if child_nid in seen:
                        raise ImageDamaged(f"the folder {name!r} has two places")
                    seen.add(child_nid)
                    stack.append((child_nid, child, depth + 1))
        return root

    def _inode(self, nid: int) -> tuple[int, ...]:
        """Return layout, count of attributes, mode, size, value, uid, gid, mtime, end of inode."""
        at = self.start + nid * erofs.SLOT
        if at > len(self.image):
            raise ImageDamaged("an entry points out of the layer image")
        (form,) = struct.unpack_from("<H", self.image, at)
        if form & 1:
            _, xattrs, mode, _, size, value, _, uid, gid, mtime, _, _ = erofs.INODE.unpack_from(
                self.image, at
            )
            end = at + erofs.INODE.size
        else:
            _, xattrs, mode, _, size, _, value, _, uid, gid, _ = _COMPACT.unpack_from(
                self.image, at
            )
            mtime, end = 0, at + _COMPACT.size
        return form >> 1 & 7, xattrs, mode, size, value, uid, gid, mtime, end

    def _node(self, nid: int) -> Node:
        if nid in self.nodes:
            return self.nodes[nid]
        if len(self.nodes) > len(self.image) // erofs.SLOT:
            raise ImageDamaged("the layer image has more files than room")
        layout, count, mode, size, value, uid, gid, mtime, end = self._inode(nid)
        if stat.S_IFMT(mode) not in _KINDS:
            raise ImageDamaged(f"a file has the impossible mode {mode:#o}")
        node = Node(mode=mode, uid=uid, gid=gid, mtime=mtime)
        node.xattrs = self._xattrs(end, count)
        if stat.S_ISLNK(mode):
            if size > MAX_TARGET:
                raise ImageDamaged("the target of a link is too long")
            node.target = self._content(nid)
            self._keep(size)
        elif node.is_file:
            node.size = size
            if size:
                if layout != erofs.CHUNKED:
                    raise ImageDamaged("a file's contents are inside the layer image")
                node.data = self._data(end + _xattr_size(count), size, value)
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            node.rdev = value
        self.nodes[nid] = node
        return node

    def _data(self, at: int, size: int, value: int) -> tuple[int, int]:
        """Return blob and offset of a file; its chunks must follow one another."""
        if not value & erofs.CHUNK_INDEXES or value & ~0x3F:
            raise ImageDamaged(f"a file's contents have the unknown form {value:#x}")
        bits = value & 0x1F
        count = -(-size // (erofs.BLOCK << bits))
        at += -at % 8
        if count > len(self.image) // 8:
            raise ImageDamaged("a file has more chunks than the layer image has room")
        found = list(struct.iter_unpack("<HHI", self.image[at : at + 8 * count]))
        if len(found) != count:
            raise ImageDamaged("the chunks of a file run out of the layer image")
        _, device, start = found[0]
        if not 1 <= device <= len(self.blobs):
            raise ImageDamaged(f"a file lies in blob {device}, which the layer does not have")
        expected = [(0, device, start + (index << bits)) for index in range(count)]
        if start == _HOLE or found != expected:
            raise ImageDamaged("the chunks of a file do not follow one another")
        offset = start * erofs.BLOCK
        if offset + size > -(-self.blobs[device - 1] // erofs.BLOCK) * erofs.BLOCK:
            raise ImageDamaged("a file reaches beyond the end of its blob")
        return self.numbers[device - 1], offset

    def _content(self, nid: int) -> bytes:
        layout, count, _, size, value, _, _, _, end = self._inode(nid)
        if size > len(self.image):
            raise ImageDamaged("a folder is larger than the layer image")
        rest = size % erofs.BLOCK if layout == erofs.FLAT_INLINE else 0
        whole = size - rest
        if layout not in (erofs.FLAT_PLAIN, erofs.FLAT_INLINE):
            raise ImageDamaged(f"a folder or link has the unknown layout {layout}")
        content = b""
        if whole:
            content = self.image[value * erofs.BLOCK : value * erofs.BLOCK + whole]
        if rest:
            at = end + _xattr_size(count)
            if at % erofs.BLOCK + rest > erofs.BLOCK:
                raise ImageDamaged("the contents of a folder or link cross a block")
            content += self.image[at : at + rest]
        if len(content) != size:
            raise ImageDamaged("the contents of a folder or link run out of the layer image")
        return content

    def _entries(self, nid: int) -> list[tuple[bytes, int, int]]:
        content = self._content(nid)
        found: list[tuple[bytes, int, int]] = []
        for start in range(0, len(content), erofs.BLOCK):
            found += _block_entries(content[start : start + erofs.BLOCK])
        names = [name for name, _, _ in found]
        if names != sorted(set(names)) or b"." not in names or b".." not in names:
            raise ImageDamaged("the entries of a folder are not in order")
        if dict((n, i) for n, i, _ in found)[b"."] != nid:
            raise ImageDamaged("a folder does not name itself")
        entries = [entry for entry in found if entry[0] not in (b".", b"..")]
        for name, _, _ in entries:
            check_name(name)
        return entries

    def _xattrs(self, at: int, count: int) -> dict[str, bytes]:
        if not count:
            return {}
        end = at + _xattr_size(count)
        shared = self.image[at + 4]
        at += 12
        found: dict[str, bytes] = {}
        for number in struct.unpack_from(f"<{shared}I", self.image, at):
            place = self.shared + number * 4
            if place not in self.known:
                self.known[place] = self._one_xattr(place)
            name, value, _ = self.known[place]
            found[name] = value
        at += 4 * shared
        while at < end:
            name, value, at = self._one_xattr(at)
            found[name] = value
        return found

    def _keep(self, size: int) -> None:
        self.words += size
        if self.words > _MOST_WORDS:
            raise ImageDamaged(
                f"attributes and links in the layer image have more than {_MOST_WORDS} bytes"
            )

    def _one_xattr(self, at: int) -> tuple[str, bytes, int]:
        """Return name and value of the attribute at `at`, and where it ends."""
        length, index, size = struct.unpack_from("<BBH", self.image, at)
        name = self.image[at + 4 : at + 4 + length]
        value = self.image[at + 4 + length : at + 4 + length + size]
        if index not in _PREFIX_OF or len(value) != size:
            raise ImageDamaged("an attribute of a file is malformed")
        self._keep(length + size)
        end = at + 4 + length + size
        return _PREFIX_OF[index] + name.decode(), bytes(value), end + -end % 4


def _xattr_size(count: int) -> int:
    return 12 + 4 * (count - 1) if count else 0


def _block_entries(block: bytes) -> list[tuple[bytes, int, int]]:
    _, first, _, _ = erofs.DIRENT.unpack_from(block)
    if first % erofs.DIRENT.size or not first or first > len(block):
        raise ImageDamaged("a folder's block is malformed")
    heads = [erofs.DIRENT.unpack_from(block, at) for at in range(0, first, erofs.DIRENT.size)]
    found: list[tuple[bytes, int, int]] = []
    for index, (nid, offset, kind, _) in enumerate(heads):
        end = heads[index + 1][1] if index + 1 < len(heads) else len(block)
        name = block[offset:end]
        if index + 1 == len(heads):
            name = name.split(b"\0", 1)[0]
        if offset < first or end < offset:
            raise ImageDamaged("a folder's block is malformed")
        found.append((name, nid, kind))
    return found
