"""A file tree in memory: what a layer says about its files, without their contents.

Every source of a layer (a folder, an archive, a sandbox's writes) becomes such a tree, and the
writer of layer images knows only trees. A deleted file is a character device 0:0 and a folder that
hides what lies below carries `trusted.overlay.opaque`, both as the kernel's overlay writes them.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from fathom.sandbox.images.errors import ArchiveRefused

OPAQUE = "trusted.overlay.opaque"
MAX_NAME = 255
MAX_TARGET = 4095
MAX_DEPTH = 512


@dataclass(slots=True, kw_only=True)
class Node:
    """One file, folder, link or device. Two names of one file share one node.

    `mtime`: seconds since 1970. `data`: for a file with contents, the number of its blob in the
    layer's list and the offset there in bytes, a multiple of the block size.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    data: tuple[int, int] | None = None
    target: bytes = b""
    rdev: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict[str, bytes])
    children: dict[bytes, Node] = field(default_factory=lambda: dict[bytes, Node]())

    @property
    def is_dir(self) -> bool:
        """Whether this is a folder."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether this is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_whiteout(self) -> bool:
        """Whether this marks a name of the layers below as deleted."""
        return stat.S_ISCHR(self.mode) and self.rdev == 0

    @property
    def is_opaque(self) -> bool:
        """Whether this folder hides the contents that layers below have for it."""
        return self.is_dir and self.xattrs.get(OPAQUE) == b"y"


def folder(mode: int = 0o755, **values: int) -> Node:
    """Return a new, empty folder."""
    return Node(mode=stat.S_IFDIR | mode, **values)  # type: ignore[arg-type]


def whiteout() -> Node:
    """Return a new mark of a deleted name."""
    return Node(mode=stat.S_IFCHR)


def check_name(name: bytes) -> None:
    """Refuse names that no folder can hold. Raises ArchiveRefused."""
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name or len(name) > MAX_NAME:
        raise ArchiveRefused(f"{name[:300]!r} cannot be the name of a file")


def walk(root: Node) -> Iterator[tuple[bytes, Node]]:
    """Yield every path (without a leading slash, the root's is empty) and its node, sorted."""
    stack: list[tuple[bytes, Node]] = [(b"", root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        prefix = path + b"/" if path else b""
        stack.extend(
            (prefix + name, node.children[name]) for name in sorted(node.children, reverse=True)
        )


def find(root: Node, path: bytes) -> Node | None:
    """Return the node at `path`, or None. Links are not followed."""
    node = root
    for name in path.split(b"/"):
        if name:
            if not node.is_dir or name not in node.children:
                return None
            node = node.children[name]
    return node


def merge(lower: Node, upper: Node, *, bottom: bool) -> Node:
    """Return what the overlay of `upper` on `lower` shows; neither is changed.

    With `bottom` nothing lies below the result, so its marks of deletion are dropped; without, they
    are kept, so that the result can stand in for both layers on top of others.
    """
    result = _copy(upper, lower.xattrs.get(OPAQUE) if lower.is_dir else None)
    if not upper.is_dir:
        return result
    names = dict(lower.children) if lower.is_dir and not upper.is_opaque else {}
    for name, child in upper.children.items():
        below = names.get(name)
        if child.is_dir and below is not None and below.is_dir:
            names[name] = merge(below, child, bottom=bottom)
        elif child.is_dir and below is not None and not bottom:
            # A folder over something else: what a layer further down has must stay hidden too.
            names[name] = _hide(child)
        elif child.is_whiteout and bottom:
            names.pop(name, None)
        else:
            names[name] = child
    result.children = {name: names[name] for name in sorted(names)}
    if bottom:
        result.xattrs.pop(OPAQUE, None)
        result.children = {
            name: settle(child) for name, child in result.children.items() if not child.is_whiteout
        }
    return result


def settle(node: Node) -> Node:
    """Return `node` as the lowest layer: without marks of deletion or opaque folders.

    Nodes that need no change are shared, so names of one file still share its node.
    """
    if not node.is_dir:
        return node
    children = {n: settle(c) for n, c in node.children.items() if not c.is_whiteout}
    if OPAQUE not in node.xattrs and all(children.get(n) is c for n, c in node.children.items()):
        return node
    result = _copy(node, None)
    result.xattrs.pop(OPAQUE, None)
    result.children = children
    return result


def _hide(node: Node) -> Node:
    result = _copy(node, b"y")
    result.children = node.children
    return result


def _copy(node: Node, opaque: bytes | None) -> Node:
    if not node.is_dir:
        return node
    xattrs = dict(node.xattrs)
    if opaque is not None:
        xattrs[OPAQUE] = opaque
    return Node(
        mode=node.mode, uid=node.uid, gid=node.gid, mtime=node.mtime, size=node.size, xattrs=xattrs
    )


def links_of(root: Node) -> dict[int, int]:
    """Return how many names each node has, by the identity of the node."""
    counts: dict[int, int] = {}
    for _, node in walk(root):
        counts[id(node)] = counts.get(id(node), 0) + 1
    return counts
