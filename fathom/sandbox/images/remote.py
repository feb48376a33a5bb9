"""Bytes that are elsewhere: in a folder, behind an address that fsspec knows, or on a web server.

A store published at an address (`push`) has the same layout as a store on disk, so any folder that
holds one can be read by others, mounted or served by any web server or object store. `attach` takes
descriptions and metadata images only; contents are fetched when they are read, or by `fetch`.

Paper: §5.2.5 (contents stay on shared storage, metadata is local).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from fathom.errors import MissingDependency
from fathom.sandbox.images import erofs_read
from fathom.sandbox.images.blobs import digest_of
from fathom.sandbox.images.errors import ImageDamaged, ImageError, ImageMissing
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.types import DIGEST, MAX_JSON, Image, Layer, check_digest, check_new_name

MAX_META = 1 << 30
# Seconds that a server may be silent, or slower than so many bytes per second.
_TIMEOUT = 30.0
_SLOWEST = 8192
_PARALLEL = 6


class Source(Protocol):
    """Reads one address. `read` returns the bytes from `start` to `end`, fewer at the end."""

    def read(self, start: int, end: int) -> bytes:
        """Return a range of bytes. Raises OSError."""
        ...


class _LocalSource:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._fd, end - start, start)

    def __del__(self) -> None:
        # Absent when opening failed.
        if hasattr(self, "_fd"):
            os.close(self._fd)


class _WebSource:
    def __init__(self, address: str) -> None:
        import httpx2

        self._address = address
        self._httpx = httpx2
        self._client = httpx2.Client(timeout=_TIMEOUT, follow_redirects=True)

    def read(self, start: int, end: int) -> bytes:
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with self._client.stream("GET", self._address, headers=headers) as answer:
                if answer.status_code == 404:
                    raise FileNotFoundError(errno.ENOENT, "the server has no such file")
                if answer.status_code == 416:
                    return b""
                if answer.status_code not in (200, 206):
                    raise OSError(errno.EIO, f"the server answered {answer.status_code}")
                # A server that ignores ranges sends everything from the beginning.
                skip = start if answer.status_code == 200 else 0
                found = bytearray()
                came = 0
                begun = time.monotonic()
                for piece in answer.iter_bytes():
                    # What is not wanted is not kept: there may be gigabytes of it.
                    found += piece[max(0, skip - came) :]
                    came += len(piece)
                    if time.monotonic() - begun > _TIMEOUT + came / _SLOWEST:
                        raise OSError(errno.ETIMEDOUT, f"only {came} bytes came in time")
                    if len(found) >= end - start:
                        break
                return bytes(found[: end - start])
        except self._httpx.HTTPError as error:
            raise OSError(errno.EIO, f"{self._address}: {error}") from error


class _FilesystemSource:
    def __init__(self, address: str) -> None:
        self._filesystem, self._path = filesystem(address)

    def read(self, start: int, end: int) -> bytes:
        try:
            return self._filesystem.cat_file(self._path, start=start, end=end)
        except OSError:
            raise
        except Exception as error:
            # Each kind of storage has errors of its own.
            raise OSError(errno.EIO, f"{self._path}: {error}") from error


def filesystem(address: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it. Raises MissingDependency."""
    core: Any = import_module("fsspec.core")  # it has no types
    try:
        return core.url_to_fs(address)
    except ImportError as error:
        raise MissingDependency(f"{address} cannot be read: {error}") from error
    except ValueError as error:
        raise ImageError(f"{address} is not an address that can be read: {error}") from error


def is_web(address: str) -> bool:
    """Tell whether an address is one of a web server."""
    return address.startswith(("http://", "https://"))


def open_source(address: str) -> Source:
    """Open an address: a path, http or https, or anything that fsspec knows. Raises OSError."""
    if "://" not in address:
        return _LocalSource(address)
    return _WebSource(address) if is_web(address) else _FilesystemSource(address)


def join(address: str, *parts: str) -> str:
    """Return the address of something below `address`."""
    return "/".join((address.rstrip("/"), *parts))


def _read_whole(address: str, limit: int) -> bytes:
    found = bytearray()
    try:
        source = open_source(address)
        while len(found) <= limit:
            piece = source.read(len(found), len(found) + (4 << 20))
            found += piece
            if len(piece) < 4 << 20:
                return bytes(found)
    except FileNotFoundError:
        raise ImageMissing(f"{address} does not exist") from None
    except OSError as error:
        raise ImageError(f"{address} cannot be read: {error}") from error
    raise ImageDamaged(f"{address} is larger than {limit} bytes")


def _take(store: Store, address: str, digest: str, limit: int) -> bytes:
    """Return a description or metadata image, from here if it is here, else from `address`."""
    if store.path(digest).exists():
        return store.read(digest)
    content = _read_whole(join(address, "blobs", check_digest(digest)[7:]), limit)
    if digest_of(content) != digest:
        raise ImageDamaged(f"what {address} has for {digest} does not match: do not use it")
    store.put(content)
    return content


def attach(store: Store, address: str, reference: str) -> Image:
    """Make an image of the store at `address` known here without fetching its contents.

    `reference`: a name there, or a digest. Everything that is taken is checked: digests, and every
    metadata image as a whole, before a kernel is asked to mount it. Raises ImageMissing,
    ImageDamaged, ImageError.
    """
    name = None if DIGEST.fullmatch(reference) else check_new_name(reference)
    if "://" not in address:
        address = os.path.abspath(address)  # it is read from other folders later
    digest = reference
    if name is not None:
        text = _read_whole(
            join(
                address,
                "names",
                quote(quote(name, safe="")) if is_web(address) else quote(name, safe=""),
            ),
            200,
        )
        digest = check_digest(text.decode(errors="replace").strip())
    image = Image.decode(_take(store, address, digest, MAX_JSON))
    with ThreadPoolExecutor(_PARALLEL) as pool:
        for done in [pool.submit(_attach_layer, store, address, one) for one in image.layers]:
            done.result()
    store.put_image(image, name)
    return image


def _attach_layer(store: Store, address: str, digest: str) -> None:
    layer = Layer.decode(_take(store, address, digest, MAX_JSON))
    for blob in layer.data:
        place = join(address, "data", blob.digest[7:])
        if not store.sums_path(blob.digest).exists():
            limit = 64 + 32 * (blob.size >> 18) + 32
            store.put_sums(blob, _read_whole(f"{place}.sums", limit))
        if not store.has_data(blob.digest):
            store.add_origin(blob.digest, place)
    erofs_read.read(_take(store, address, layer.meta, MAX_META), [blob.size for blob in layer.data])


def fetch(store: Store, image: Image) -> int:
    """Bring all contents of `image` here. Returns the number of bytes. Raises ImageError."""
    from fathom.sandbox.images.ondemand import BlobCache

    wanted = {blob.digest: blob for one in image.layers for blob in store.layer(one).data}
    missing = [blob for blob in wanted.values() if not store.has_data(blob.digest)]
    with ThreadPoolExecutor(_PARALLEL) as pool:
        for done in [pool.submit(BlobCache(store, blob).complete) for blob in missing]:
            done.result()
    return sum(blob.size for blob in missing)


def push(store: Store, image: Image, address: str, name: str | None = None) -> None:
    """Publish an image at an address that fsspec can write to, for `attach`. Raises ImageError.

    Contents first and the name last, so that a reader never finds a name without its image.
    """
    if name is not None:
        check_new_name(name)
    target, root = filesystem(address)
    files: list[tuple[Path, str]] = []
    for digest in image.layers:
        layer = store.layer(digest)
        for blob in layer.data:
            if not store.has_data(blob.digest):
                raise ImageMissing(f"the contents {blob.digest} are not here: fetch them first")
            files += [
                (store.data_path(blob.digest), f"data/{blob.digest[7:]}"),
                (store.sums_path(blob.digest), f"data/{blob.digest[7:]}.sums"),
            ]
        files += [(store.path(one), f"blobs/{one[7:]}") for one in (layer.meta, digest)]
    store.put_image(image)
    files.append((store.path(image.digest), f"blobs/{image.digest[7:]}"))
    try:
        for folder in ("blobs", "data", "names"):
            target.makedirs(f"{root}/{folder}", exist_ok=True)
        _upload(target, root, files)
        if name is not None:
            place = f"{root}/names/{quote(name, safe='')}"
            target.pipe_file(place, f"{image.digest}\n".encode())
    except OSError as error:
        raise ImageError(f"the image cannot be published at {address}: {error}") from error


def _upload(target: Any, root: str, files: Sequence[tuple[Path, str]]) -> None:
    for source, place in files:
        path = f"{root}/{place}"
        if target.exists(path) and target.size(path) == source.stat().st_size:
            continue
        # A name is either absent or whole.
        target.put_file(str(source), f"{path}.part")
        target.mv(f"{path}.part", path)
