"""Keep a store sound: collect what nothing needs, and prove every byte of what is there.

What stays: images with a name, whatever a living process holds, and all that these need. Collection
takes the store's lock alone, so nothing is published while it decides; files that a mounted layer
uses stay readable even if they are removed.

Paper: none (housekeeping).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fathom.sandbox.images import erofs_read, unpack
from fathom.sandbox.images.blobs import ChunkList
from fathom.sandbox.images.errors import ImageDamaged, ImageMissing, store_errors
from fathom.sandbox.images.holds import held
from fathom.sandbox.images.store import Store, reachable
from fathom.sandbox.images.types import DIGEST, Blob, Image, Layer

# A maker locks its folder right after it made it.
_NEW = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a collection removed: number of files and folders, and bytes."""

    removed: int
    freed: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something in a store that is wrong. `repaired`: whether the damaged file was removed."""

    subject: str
    problem: str
    repaired: bool = False


def collect(store: Store, *, dry_run: bool = False) -> Collected:
    """Remove what no name and no living process needs. Raises ImageError."""
    with (
        store_errors("the store cannot be cleaned", store.folder),
        store.locked(fcntl.LOCK_EX),
    ):
        needed = reachable(store, [*store.names().values(), *held(store.folder / "holds")])
        removed = freed = kept = 0
        for path, digests in _everything(store):
            if path.parent.name == "tmp" and _is_in_use(path):
                continue
            if digests and all(digest in needed for digest in digests):
                kept += 1
                continue
            removed += 1
            freed += _size(path)
            if not dry_run:
                _remove(path)
        return Collected(removed=removed, freed=freed, kept=kept)


def _everything(store: Store) -> Iterator[tuple[Path, list[str]]]:
    """Yield each file or folder of the store and the digests it is good for."""
    for folder in ("blobs", "data", "cache"):
        if (store.folder / folder).is_dir():
            for path in (store.folder / folder).iterdir():
                yield path, [f"sha256:{path.name.partition('.')[0]}"]
    for notes in ("imported", "built"):
        if (store.folder / notes).is_dir():
            for path in (store.folder / notes).iterdir():
                yield path, path.read_text().split()[:1]
    for path in (store.folder / "tmp").iterdir():
        yield path, []
    unpacked = store.folder / "unpacked"
    if unpacked.is_dir():
        for path in unpacked.iterdir():
            if path.name.startswith("make-"):
                if time.time() - path.stat().st_mtime > 3600:
                    yield path, []
            elif not path.name.endswith(".of"):
                note = unpacked / f"{path.name}.of"
                yield path, note.read_text().split() if note.exists() else []


def _is_in_use(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return time.time() - os.fstat(fd).st_mtime < _NEW
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        if path.is_dir():
            return sum(_size(child) for child in path.iterdir() if not child.is_symlink())
        return path.lstat().st_blocks * 512
    return 0


def _remove(path: Path) -> None:
    if path.is_dir():
        unpack.remove_tree(path)
        path.with_name(f"{path.name}.of").unlink(missing_ok=True)
    else:
        path.unlink(missing_ok=True)


def check(store: Store, *, repair: bool = False) -> list[Problem]:
    """Prove every file of the store and that names, images and layers have all they need.

    `repair`: remove files that do not match their digest, so that they can be fetched again; what
    needs them is then reported as incomplete. Returns what is wrong, nothing where all is well.
    """
    problems: list[Problem] = []

    def note(path: Path, text: str) -> None:
        if repair:
            path.unlink(missing_ok=True)
        problems.append(Problem(subject=path.name, problem=text, repaired=repair))

    sizes = _check_descriptions(store, note)
    for path in sorted((store.folder / "data").glob("*.sums")):
        digest = f"sha256:{path.name[:64]}"
        size = sizes.get(digest)
        data = store.data_path(digest)
        if size is None and data.exists():
            size = data.stat().st_size
        if size is None:
            continue
        try:
            chunks = ChunkList(digest, size, path.read_bytes())
        except ImageDamaged as error:
            note(path, str(error))
            continue
        if data.exists() and (bad := chunks.damaged(data)):
            note(data, f"{len(bad)} of {len(chunks)} chunks are damaged, the first is {bad[0]}")
    problems += _incomplete(store)
    return problems


def _check_descriptions(store: Store, note: Callable[[Path, str], None]) -> dict[str, int]:
    """Check all of `blobs/`; return the sizes that layers give for their data blobs."""
    sizes: dict[str, int] = {}
    for path in sorted((store.folder / "blobs").iterdir()):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != path.name:
            note(path, "the bytes do not match the digest")
            continue
        if path.stat().st_size < 4 << 20:
            with contextlib.suppress(ImageDamaged):
                layer = Layer.decode(path.read_bytes())
                sizes.update({blob.digest: blob.size for blob in layer.data})
    return sizes


def _incomplete(store: Store) -> list[Problem]:
    problems: list[Problem] = []
    for name, digest in store.names().items():
        try:
            if not DIGEST.fullmatch(digest):
                raise ImageDamaged("its file holds no digest")
            for layer in store.image(digest).layers:
                _complete_layer(store, layer)
        except (ImageDamaged, ImageMissing) as error:
            problems.append(Problem(subject=name, problem=str(error)))
    return problems


def _complete_layer(store: Store, digest: str) -> None:
    layer = store.layer(digest)
    for blob in layer.data:
        store.chunks(blob)
        if not store.has_data(blob.digest) and not store.origins(blob.digest):
            raise ImageMissing(f"the contents {blob.digest} are not here")
    erofs_read.read(store.read(layer.meta), [blob.size for blob in layer.data])


def describe(store: Store, image: Image) -> list[tuple[str, int, int, int]]:
    """Return for each layer its digest, bytes of metadata and data, and how much data is here."""
    rows: list[tuple[str, int, int, int]] = []
    for digest in image.layers:
        layer = store.layer(digest)
        total = sum(blob.size for blob in layer.data)
        rows.append((digest, layer.meta_size, total, sum(_here(store, b) for b in layer.data)))
    return rows


def _here(store: Store, blob: Blob) -> int:
    if store.has_data(blob.digest):
        return blob.size
    cached = store.cache_path(blob.digest)
    return min(_size(cached), blob.size) if cached.exists() else 0
