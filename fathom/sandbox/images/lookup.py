"""Find things in an image without mounting it: paths through links, users, files to copy.

Paper: none (shared infrastructure).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fathom.sandbox.images import layers as layering
from fathom.sandbox.images import tree
from fathom.sandbox.images.blobs import BlobWriter
from fathom.sandbox.images.errors import ImageError, ImageMissing
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.tarball import open_blobs
from fathom.sandbox.images.tree import Node
from fathom.sandbox.images.types import Image

_LINKS = 40
_SMALL = 4 << 20
_PIECE = 1 << 20


def resolve(root: Node, path: str | bytes) -> bytes:
    """Return `path` with every link followed, within the tree; the last part may not exist.

    Raises ImageError for a circle of links.
    """
    raw = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
    pending = [part for part in raw.split(b"/") if part and part != b"."][::-1]
    done: list[bytes] = []
    followed = 0
    while pending:
        part = pending.pop()
        if part == b"..":
            if done:
                done.pop()
            continue
        node = tree.find(root, b"/".join((*done, part)))
        if node is not None and node.target:
            followed += 1
            if followed > _LINKS:
                raise ImageError(f"{raw.decode(errors='replace')} leads through too many links")
            if node.target.startswith(b"/"):
                done = []
            pending += [p for p in node.target.split(b"/") if p and p != b"."][::-1]
            continue
        done.append(part)
    return b"/".join(done)


def with_parents(root: Node, path: bytes, node: Node) -> Node:
    """Return a layer with `node` at `path`, its parents as they are in `root` or new folders."""
    layer = _shell(root)
    here, below = layer, root
    parts = [part for part in path.split(b"/") if part]
    if not parts:
        layer.children = node.children
        return layer
    for part in parts[:-1]:
        known = below.children.get(part)
        if known is not None and not known.is_dir:
            raise ImageError(f"{path.decode(errors='replace')} leads through a file")
        below = known or tree.folder()
        child = _shell(below)
        here.children[part] = child
        here = child
    last = below.children.get(parts[-1])
    if last is not None and last.is_dir and node.is_dir:
        # Contents that are added to a folder leave its own mode and owner as they are.
        shell = _shell(last)
        shell.children = node.children
        node = shell
    here.children[parts[-1]] = node
    return layer


def _shell(node: Node) -> Node:
    return Node(
        mode=node.mode, uid=node.uid, gid=node.gid, mtime=node.mtime, xattrs=dict(node.xattrs)
    )


def read_file(store: Store, image: Image, path: str, limit: int = _SMALL) -> bytes:
    """Return a file of an image. Raises ImageMissing, ImageError."""
    root, blobs = layering.joined(store, image.layers, bottom=True)
    node = tree.find(root, resolve(root, path))
    if node is None or not node.is_file:
        raise ImageMissing(f"the image has no file {path}")
    if node.size > limit:
        raise ImageError(f"{path} is larger than {limit} bytes")
    if node.data is None:
        return b""
    with open_blobs(store, blobs) as files:
        return files[node.data[0]].at(node.data[1]).read(node.size)


def owner(store: Store, image: Image, text: str) -> tuple[int, int]:
    """Return the numbers of `user`, `user:group`, `uid` or `uid:gid` as the image knows them.

    A user without a group gets its own from /etc/passwd, 0 where that does not say.
    Raises ImageError.
    """
    user, colon, group = text.partition(":")
    uid, gid = _number(user), 0
    if uid is None or not colon:
        for fields in _records(store, image, "/etc/passwd", 4):
            if fields[0] == user or (uid is not None and fields[2] == str(uid)):
                uid, gid = int(fields[2]), int(fields[3])
                break
    if uid is None:
        raise ImageError(f"the image has no user {user!r}")
    if colon:
        found = _number(group)
        if found is None:
            records = _records(store, image, "/etc/group", 3)
            found = next((int(fields[2]) for fields in records if fields[0] == group), None)
        if found is None:
            raise ImageError(f"the image has no group {group!r}")
        gid = found
    return uid, gid


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,9}", text) else None


def _records(store: Store, image: Image, path: str, count: int) -> Iterator[list[str]]:
    try:
        content = read_file(store, image, path).decode(errors="replace")
    except ImageMissing:
        return
    for line in content.splitlines():
        fields = line.split(":")
        if len(fields) >= count and all(re.fullmatch(r"\d{1,9}", f) for f in fields[2:count]):
            yield fields


def copy_out(
    store: Store, image: Image, path: str, blob: BlobWriter, given: tuple[int, int] | None
) -> Node:
    """Return what an image has at `path`, its contents appended to `blob`.

    `given`: the owner of everything, their own when not given. Raises ImageMissing.
    """
    root, blobs = layering.joined(store, image.layers, bottom=True)
    top = tree.find(root, resolve(root, path))
    if top is None:
        raise ImageMissing(f"the image has no {path}")
    seen: set[int] = set()
    with open_blobs(store, blobs) as files:
        for _, node in tree.walk(top):
            if id(node) in seen:
                continue
            seen.add(id(node))
            if given is not None:
                node.uid, node.gid = given
            if node.data is not None:
                file = files[node.data[0]].at(node.data[1])
                node.data = (0, blob.add(_pieces(file.read, node.size), node.size))
    return top


def _pieces(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    while size > 0:
        piece = read(min(size, _PIECE))
        size -= len(piece)
        yield piece
