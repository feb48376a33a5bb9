"""Make layers, read them back and join them: folders, a sandbox's writes, chains of both.

`pack_diff` turns what a sandbox wrote into a layer. Its time grows with what was written and not
with the image below. The writers must be still meanwhile (frozen or ended): a file that changes
while it is read is an error, never a torn copy. `flatten` joins layers without copying contents:
only a new metadata image is written, which points into the blobs of all.

Paper: §5.2.5 (incremental snapshots of a sandbox's disk).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fathom.sandbox.images import source, tree
from fathom.sandbox.images.blobs import BlobWriter
from fathom.sandbox.images.errors import ImageError
from fathom.sandbox.images.source import Owners, Taking, own_files
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.tree import Node
from fathom.sandbox.images.types import Blob, Image, LayerRef, RunConfig, check_new_name

# Layers above the lowest are joined at most up to this size, as the report's are.
FLATTEN_LIMIT = 3 << 30


def pack_folder(store: Store, folder: Path, taking: Taking | None = None) -> LayerRef:
    """Make a layer of the folder `folder`. The same folder gives the same digest.

    Raises ImageError for devices, sockets' like and files that change meanwhile; StoreFull.
    """
    with store.making(f"no layer can be made of {folder}") as work:
        path = work / "data"
        with path.open("wb", buffering=1 << 20) as file:
            blob = BlobWriter(file)
            root = source.from_folder(folder, blob, taking or Taking())
        return publish(store, root, path, blob)


def publish(store: Store, root: Node, path: Path, blob: BlobWriter) -> LayerRef:
    """Publish the tree `root` with the contents that `blob` wrote to the closed file `path`."""
    blobs = [store.put_data(path, blob)] if blob.total else []
    return store.put_tree(root, blobs)


def pack_diff(
    store: Store, upper: Path, *, owners: Owners | None = None, limit: int = source.LIMIT
) -> LayerRef:
    """Make a layer of an overlay's upper folder: new and changed files, and marks of deleted ones.

    `owners`: how owners on disk become those of the layer, for a sandbox whose users are a range of
    this machine's. The overlay must be one of `compose`, and its writers frozen. Put the result on
    top of the layers that the sandbox ran on to restore it, or to fork it. `limit`: the most bytes
    of all files, holes included. Raises ImageError when a file changed meanwhile, ImageTooLarge,
    StoreFull.
    """
    taking = Taking(owners=owners or own_files(), upper=True, limit=limit)
    return pack_folder(store, upper, taking)


def snapshot(
    store: Store,
    image: Image,
    upper: Path,
    *,
    name: str | None = None,
    owners: Owners | None = None,
    limit: int = source.LIMIT,
) -> Image:
    """Return `image` with what was written to `upper` on top; `name` keeps it from being collected.

    `limit` as for `pack_diff`. Raises ImageError, ImageTooLarge, StoreFull.
    """
    if name is not None:
        check_new_name(name)
    diff = pack_diff(store, upper, owners=owners, limit=limit)
    result = replace(image, layers=(*image.layers, diff.digest))
    store.put_image(result, name)
    return result


def is_whole(store: Store, digest: str) -> bool:
    """Tell whether a layer and all that it needs are here."""
    try:
        store.keep(digest)
        layer = store.layer(digest)
    except ImageError:
        return False
    return store.path(layer.meta).exists() and all(
        store.has_data(blob.digest) and store.sums_path(blob.digest).exists() for blob in layer.data
    )


def joined(store: Store, layers: Sequence[str], *, bottom: bool) -> tuple[Node, list[Blob]]:
    """Return the tree that the stack `layers` shows, the lowest first, and the blobs it needs."""
    if not layers:
        raise ImageError("there are no layers to join")
    blobs: list[Blob] = []
    places: dict[str, int] = {}
    result: Node | None = None
    for digest in layers:
        for blob in store.layer(digest).data:
            if blob.digest not in places:
                places[blob.digest] = len(blobs)
                blobs.append(blob)
        numbers = [places[blob.digest] for blob in store.layer(digest).data]
        one = store.tree(digest, numbers)
        result = one if result is None else tree.merge(result, one, bottom=False)
    assert result is not None
    return (tree.settle(result) if bottom else result), blobs


def flatten(store: Store, layers: Sequence[str], *, bottom: bool = False) -> LayerRef:
    """Join a stack of layers, the lowest first, into one. Contents are shared, not copied.

    `bottom`: nothing lies below, so marks of deleted files are dropped. The same stack gives the
    same digest. Blobs that no file lies in any more are left out.
    """
    root, blobs = joined(store, layers, bottom=bottom)
    used = sorted({node.data[0] for _, node in tree.walk(root) if node.data is not None})
    places = {old: new for new, old in enumerate(used)}
    seen: set[int] = set()
    for _, node in tree.walk(root):
        if node.data is not None and id(node) not in seen:
            seen.add(id(node))
            node.data = (places[node.data[0]], node.data[1])
    return store.put_tree(root, [blobs[number] for number in used])


def flatten_small(store: Store, image: Image, *, limit: int = FLATTEN_LIMIT) -> Image:
    """Return `image` with runs of layers above its lowest joined where together within `limit`."""
    groups: list[list[str]] = [[image.layers[0]]]
    size = limit
    for digest in image.layers[1:]:
        own = store.layer(digest).size
        if size + own <= limit:
            groups[-1].append(digest)
            size += own
        else:
            groups.append([digest])
            size = own
    layers = tuple(
        group[0] if len(group) == 1 else flatten(store, group).digest for group in groups
    )
    result = replace(image, layers=layers)
    store.put_image(result)
    return result


def image_of_folder(
    store: Store,
    folder: Path,
    name: str,
    *,
    run: RunConfig | None = None,
    taking: Taking | None = None,
) -> Image:
    """Make an image of one layer of `folder` and call it `name`. Raises ImageError, StoreFull."""
    check_new_name(name)
    layer = pack_folder(store, folder, taking)
    image = Image(layers=(layer.digest,), run=run or RunConfig())
    store.put_image(image, name)
    return image
