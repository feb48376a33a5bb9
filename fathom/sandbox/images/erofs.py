"""Write a file tree as a read-only EROFS image whose file contents lie elsewhere.

The image holds names, owners, times, links and attributes; each file points at one run of blocks on
another device (a data blob). So a tree of gigabytes has an image of kilobytes, which is all that a
mount reads. The same tree gives the same bytes: nothing of this machine or moment goes in.
The kernel's format is described in its documentation; only the parts used here are written.

Paper: none (the report's layered images name the file system, not its layout).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from fathom.sandbox.images.errors import ImageTooLarge
from fathom.sandbox.images.tree import Node, links_of

BLOCK = 4096
BLOCK_BITS = 12
MAGIC = 0xE0F5E1E2
SUPER_OFFSET = 1024
DEVICE_SLOT = 128
SLOT = 32
COMPAT_CHECKSUM = 1
INCOMPAT_CHUNKED = 4
INCOMPAT_DEVICES = 8
FLAT_PLAIN, FLAT_INLINE, CHUNKED = 0, 2, 4
CHUNK_INDEXES = 0x20
MAX_CHUNK_BITS = 31
FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
# Attributes lose their prefix, which becomes a number; the two of access lists have no rest.
PREFIXES = (
    ("system.posix_acl_access", 2),
    ("system.posix_acl_default", 3),
    ("user.", 1),
    ("trusted.", 4),
    ("security.", 6),
)
SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
INODE = struct.Struct("<HHHHQIIIIQII16x")
DIRENT = struct.Struct("<QHBB")


def _crc_table() -> list[int]:
    table: list[int] = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data` without the final inversion, as the superblock wants it."""
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ _CRC[(value ^ byte) & 0xFF]
    return value


@dataclass(slots=True)
class _Inode:
    """A node on its way into the image: its place, what stands behind it, its folder's blocks."""

    node: Node
    number: int
    layout: int = FLAT_PLAIN
    xattrs: bytes = b""
    tail: bytes = b""
    blocks: bytes = b""
    size: int = 0
    value: int = 0
    nid: int = 0
    parent: _Inode | None = None


def write(root: Node, blobs: Sequence[int], *, joined: bool = False) -> bytes:
    """Return the image of the tree `root`, whose files lie in data blobs of `blobs` bytes.

    `joined`: the blobs follow the image directly, one after the other in the same file, each padded
    to whole blocks; without, each blob is a device of its own. Raises ImageTooLarge.
    """
    if joined:
        # Addresses have a fixed width, so a first pass tells how long the image is.
        length = len(_Writer(root, blobs, [0] * len(blobs)).image())
        bases: list[int] = []
        for size in blobs:
            bases.append(length // BLOCK)
            length += -(-size // BLOCK) * BLOCK
        return _Writer(root, blobs, bases).image()
    return _Writer(root, blobs, None).image()


class _Writer:
    def __init__(self, root: Node, blobs: Sequence[int], bases: list[int] | None) -> None:
        self.blobs = blobs
        self.bases = bases
        self.devices = 0 if bases is not None else len(blobs)
        self.links = links_of(root)
        self.inodes: dict[int, _Inode] = {}
        self.order: list[_Inode] = []
        self.root = self._collect(root)

    def _collect(self, root: Node) -> _Inode:
        """Give every node its inode, breadth last, in the order of names."""
        first = self._add(root, None)
        stack = [first]
        while stack:
            parent = stack.pop()
            below: list[_Inode] = []
            for name in sorted(parent.node.children):
                child = parent.node.children[name]
                if id(child) in self.inodes:
                    continue
                inode = self._add(child, parent)
                if child.is_dir:
                    below.append(inode)
            stack.extend(reversed(below))
        return first

    def _add(self, node: Node, parent: _Inode | None) -> _Inode:
        inode = _Inode(node, len(self.order) + 1, parent=parent)
        inode.xattrs = _xattr_area(node.xattrs)
        self.inodes[id(node)] = inode
        self.order.append(inode)
        return inode

    def image(self) -> bytes:
        """Lay everything out, then write it."""
        # The root's number has 16 bits only, and it comes first.
        position = SUPER_OFFSET + 128 + self.devices * DEVICE_SLOT
        position = -(-position // SLOT) * SLOT
        for inode in self.order:
            self._shape(inode)
            length = INODE.size + len(inode.xattrs) + len(inode.tail)
            if inode.layout == CHUNKED:
                length += -(INODE.size + len(inode.xattrs)) % 8
            if position % BLOCK + length > BLOCK and (inode.tail or length <= BLOCK):
                # What stands behind an inode may not cross into another block.
                position = -(-position // BLOCK) * BLOCK
            inode.nid = position // SLOT
            position += -(-length // SLOT) * SLOT
        block = -(-position // BLOCK)
        for inode in self.order:
            if inode.blocks:
                inode.value = block
                block += len(inode.blocks) // BLOCK
        if self.root.nid > 0xFFFF or block > 0xFFFFFFFF:
            raise ImageTooLarge("the layer has too many files for one image")
        out = bytearray(block * BLOCK)
        for inode in self.order:
            self._emit(out, inode)
        self._superblock(out, block)
        return bytes(out)

    def _shape(self, inode: _Inode) -> None:
        node = inode.node
        if node.is_dir:
            # Only lengths matter now; the numbers of the entries are filled in when written.
            self._split(inode, self._folder(inode))
        elif stat.S_ISLNK(node.mode):
            self._split(inode, node.target)
        elif node.is_file and node.data is not None and node.size:
            bits = min(max(0, (node.size - 1).bit_length() - BLOCK_BITS), MAX_CHUNK_BITS)
            inode.layout = CHUNKED
            inode.value = CHUNK_INDEXES | bits
            inode.size = node.size
            inode.tail = self._chunks(node, BLOCK << bits)
        else:
            inode.size = 0
            inode.value = node.rdev if stat.S_IFMT(node.mode) in (stat.S_IFCHR, stat.S_IFBLK) else 0

    def _split(self, inode: _Inode, content: bytes) -> None:
        inode.size = len(content)
        rest = len(content) % BLOCK
        whole = len(content) - rest
        if rest and INODE.size + len(inode.xattrs) + rest <= BLOCK:
            inode.layout, inode.tail, inode.blocks = FLAT_INLINE, content[whole:], content[:whole]
        else:
            inode.layout, inode.tail = FLAT_PLAIN, b""
            inode.blocks = content + bytes(-len(content) % BLOCK)

    def _chunks(self, node: Node, chunk: int) -> bytes:
        assert node.data is not None
        blob, offset = node.data
        device = 0 if self.bases is not None else blob + 1
        start = offset // BLOCK + (self.bases[blob] if self.bases is not None else 0)
        count = -(-node.size // chunk)
        last = start + (count - 1) * (chunk // BLOCK)
        if last > 0xFFFFFFFE:
            raise ImageTooLarge("the layer's data exceeds 16 TiB")
        return b"".join(
            struct.pack("<HHI", 0, device, start + index * (chunk // BLOCK))
            for index in range(count)
        )

    def _folder(self, inode: _Inode) -> bytes:
        """Return a folder's blocks: entries sorted by name, then the names, block by block."""
        parent = inode.parent or inode
        entries = [(b".", inode), (b"..", parent)]
        entries += [(name, self.inodes[id(c)]) for name, c in inode.node.children.items()]
        entries.sort(key=lambda entry: entry[0])
        blocks: list[bytes] = []
        group: list[tuple[bytes, _Inode]] = []
        used = 0
        for entry in entries:
            need = DIRENT.size + len(entry[0])
            if used + need > BLOCK:
                blocks.append(_folder_block(group).ljust(BLOCK, b"\0"))
                group, used = [], 0
            group.append(entry)
            used += need
        return b"".join((*blocks, _folder_block(group)))

    def _emit(self, out: bytearray, inode: _Inode) -> None:
        node = inode.node
        blocks, tail = inode.blocks, inode.tail
        if node.is_dir:
            content = self._folder(inode)
            blocks = content[: len(blocks)].ljust(len(blocks), b"\0")
            tail = content[len(content) - len(tail) :] if tail else b""
        if node.is_dir:
            links = 2 + sum(child.is_dir for child in node.children.values())
        else:
            links = self.links[id(node)]
        at = inode.nid * SLOT
        INODE.pack_into(
            out,
            at,
            1 | inode.layout << 1,
            (len(inode.xattrs) - 12) // 4 + 1 if inode.xattrs else 0,
            node.mode,
            0,
            inode.size,
            inode.value,
            inode.number,
            node.uid,
            node.gid,
            max(node.mtime, 0),
            0,
            links,
        )
        at += INODE.size
        out[at : at + len(inode.xattrs)] = inode.xattrs
        at += len(inode.xattrs)
        if inode.layout == CHUNKED:
            at += -at % 8
        out[at : at + len(tail)] = tail
        if blocks:
            start = inode.value * BLOCK
            out[start : start + len(blocks)] = blocks

    def _superblock(self, out: bytearray, blocks: int) -> None:
        incompatible = INCOMPAT_CHUNKED | (INCOMPAT_DEVICES if self.devices else 0)
        if self.bases is not None:
            blocks += sum(-(-size // BLOCK) for size in self.blobs)
        SUPER.pack_into(
            out,
            SUPER_OFFSET,
            MAGIC,
            0,
            COMPAT_CHECKSUM,
            BLOCK_BITS,
            0,
            self.root.nid,
            len(self.order),
            0,
            0,
            blocks,
            0,
            0,
            bytes(16),
            bytes(16),
            incompatible,
            0,
            self.devices,
            (SUPER_OFFSET + 128) // DEVICE_SLOT if self.devices else 0,
            0,
            0,
            0,
            0,
        )
        for number in range(self.devices):
            at = SUPER_OFFSET + 128 + number * DEVICE_SLOT
            struct.pack_into("<64sII", out, at, b"", -(-self.blobs[number] // BLOCK), 0)
        struct.pack_into("<I", out, SUPER_OFFSET + 4, crc32c(bytes(out[SUPER_OFFSET:BLOCK])))


def _folder_block(group: Sequence[tuple[bytes, _Inode]]) -> bytes:
    head = bytearray()
    offset = len(group) * DIRENT.size
    for name, inode in group:
        head += DIRENT.pack(inode.nid, offset, FILE_TYPES[stat.S_IFMT(inode.node.mode)], 0)
        offset += len(name)
    return bytes(head) + b"".join(name for name, _ in group)


def _xattr_area(xattrs: dict[str, bytes]) -> bytes:
    if not xattrs:
        return b""
    entries = bytearray()
    for name in sorted(xattrs):
        value = xattrs[name]
        prefix, index = next(
            ((p, i) for p, i in PREFIXES if name == p or (p[-1] == "." and name.startswith(p))),
            ("", 0),
        )
        if not index:
            continue
        rest = name[len(prefix) :].encode()
        if len(rest) > 255 or len(value) > 0xFFFF:
            raise ImageTooLarge(f"the attribute {name[:80]!r} is too large for an image")
        entries += struct.pack("<BBH", len(rest), index, len(value)) + rest + value
        entries += bytes(-len(entries) % 4)
    if not entries:
        return b""
    area = bytes(12) + bytes(entries)
    if len(area) > 0xFFFF * 4:
        raise ImageTooLarge("a file has more attributes than an image can hold")
    return area
