"""Where images are kept: files named by their digests, names that point at them, and holds.

    blobs/HEX          descriptions of images and layers, metadata images: SHA-256 of the file
    data/HEX           contents of files (see `blobs`); absent where they are read on demand
    data/HEX.sums      the digests of a data blob's chunks
    data/HEX.from      where a data blob can be read, one address a line
    names/NAME         digest of an image
    holds/ID           digests that living processes need; locked by each of them
    tmp/ID             what is being made; locked by its maker
    lock               shared while something is published, exclusive while rubbish is collected

A file appears under its name whole or not at all, and a name once published never changes its
bytes, so readers need no lock and any number of builders may work at the same time.

Paper: §5.2.5 (layers by digest, each with a version of its own).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from fathom.sandbox import paths
from fathom.sandbox.images import erofs, erofs_read
from fathom.sandbox.images.blobs import BlobWriter, ChunkList, digest_of
from fathom.sandbox.images.errors import ImageDamaged, ImageMissing, store_errors
from fathom.sandbox.images.holds import Hold
from fathom.sandbox.images.tree import Node
from fathom.sandbox.images.types import (
    DIGEST,
    Blob,
    Env,
    Image,
    Layer,
    LayerRef,
    check_digest,
    check_name,
    check_new_name,
)

_FOLDERS = ("blobs", "data", "names", "holds", "tmp")


class Store:
    """A folder of images. Safe to use from several processes and threads at the same time.

    `folder`: where to keep it; the user's cache folder when not given. `durable`: whether every
    file is on the disk before its name appears; without, a power cut may leave damaged files, which
    `fsck` finds. What this object published stays until it is closed, named or not.
    """

    def __init__(self, folder: str | Path | None = None, *, durable: bool = True) -> None:
        self.folder = Path(folder) if folder is not None else paths.cache_folder() / "store"
        self.durable = durable
        with store_errors("the image store cannot be made", self.folder):
            for name in _FOLDERS:
                (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o755)
            (self.folder / "lock").touch()
        self._own: Hold | None = None
        self._guard = threading.Lock()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what was published and given no name. May be called twice."""
        if self._own is not None:
            self._own.close()
            self._own = None

    # -- places -----------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Return where a description or metadata image is, or would be."""
        return self.folder / "blobs" / check_digest(digest)[7:]

    def data_path(self, digest: str) -> Path:
        """Return where a data blob is, or would be."""
        return self.folder / "data" / check_digest(digest)[7:]

    def sums_path(self, digest: str) -> Path:
        """Return where the digests of a data blob's chunks are."""
        return self.folder / "data" / f"{check_digest(digest)[7:]}.sums"

    def cache_path(self, digest: str) -> Path:
        """Return the sparse file of what was read of a data blob that is elsewhere."""
        return self.folder / "cache" / check_digest(digest)[7:]

    def origins(self, digest: str) -> list[str]:
        """Return the addresses where a data blob that is not here can be read."""
        try:
            return (self.folder / "data" / f"{digest[7:]}.from").read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []

    def add_origin(self, digest: str, address: str) -> None:
        """Remember where a data blob can be read."""
        known = self.origins(digest)
        if address not in known:
            with self.making(f"{digest} cannot be noted") as work:
                (work / "new").write_text("".join(f"{line}\n" for line in [address, *known]))
                target = self.folder / "data" / f"{check_digest(digest)[7:]}.from"
                self._move(digest, work / "new", target)

    def has_data(self, digest: str) -> bool:
        """Tell whether a data blob is here as a whole."""
        return self.data_path(digest).exists()

    # -- reading ----------------------------------------------------------------------------------

    def read(self, digest: str) -> bytes:
        """Return a description or metadata image, proven. Raises ImageMissing, ImageDamaged."""
        try:
            found = self.path(digest).read_bytes()
        except FileNotFoundError:
            raise ImageMissing(
                f"{digest} is not in the store {self.folder}: pull it again"
            ) from None
        if digest_of(found) != digest:
            raise ImageDamaged(
                f"{self.path(digest)} does not match its digest: `fathom sandbox images fsck` "
                "tells more, --repair removes it so that it can be fetched again"
            )
        return found

    def layer(self, digest: str) -> Layer:
        """Return the description of a layer. Raises ImageMissing, ImageDamaged."""
        return Layer.decode(self.read(digest))

    def image(self, digest: str) -> Image:
        """Return the description of an image. Raises ImageMissing, ImageDamaged."""
        return Image.decode(self.read(digest))

    def chunks(self, blob: Blob) -> ChunkList:
        """Return the proven digests of a blob's chunks. Raises ImageMissing, ImageDamaged."""
        try:
            digests = self.sums_path(blob.digest).read_bytes()
        except FileNotFoundError:
            raise ImageMissing(f"the digests of {blob.digest} are not in {self.folder}") from None
        return ChunkList(blob.digest, blob.size, digests)

    def tree(self, digest: str, numbers: list[int] | None = None) -> Node:
        """Return a layer's file tree; `numbers` renames its blobs. Raises ImageDamaged."""
        layer = self.layer(digest)
        return erofs_read.read(self.read(layer.meta), [b.size for b in layer.data], numbers)

    def resolve(self, reference: str) -> Image:
        """Return the image that a reference means: `name`, `name@sha256:...` or `sha256:...`.

        With a digest that version is meant, whatever the name means by now. Raises ImageMissing.
        """
        name, _, wanted = reference.rpartition("@") if "@" in reference else (reference, "", "")
        if DIGEST.fullmatch(reference):
            return self.image(reference)
        path = self._name_path(name)
        if wanted:
            return self.image(check_digest(wanted))
        try:
            return self.image(path.read_text().strip())
        except FileNotFoundError:
            named = ", ".join(sorted(self.names())[:8]) or "none yet"
            raise ImageMissing(
                f"no image is called {reference!r} here (in the store: {named}; sandboxes have "
                "base and python built in); build or pull it first"
            ) from None

    def environment(self, env: Env) -> Image:
        """Return one image of the parts of `env`. Raises ImageMissing, ImageDamaged."""
        parts = [self.resolve(reference) for reference in env.parts]
        run = parts[0].run
        for part in parts[1:]:
            run = part.run.over(run)
        layers = tuple(layer for part in parts for layer in part.layers)
        return Image(layers=layers, run=run, architecture=parts[0].architecture)

    def names(self) -> dict[str, str]:
        """Return every name and the digest of its image."""
        found: dict[str, str] = {}
        for path in sorted((self.folder / "names").iterdir()):
            with contextlib.suppress(OSError):
                found[unquote(path.name)] = path.read_text().strip()
        return found

    # -- publishing -------------------------------------------------------------------------------

    @contextmanager
    def making(self, what: str) -> Generator[Path]:
        """A folder of its own for something that is being made; gone afterwards, whatever happens.

        Raises StoreFull or ImageError for an OSError inside.
        """
        with store_errors(what, self.folder):
            folder = Path(tempfile.mkdtemp(prefix="make-", dir=self.folder / "tmp"))
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(fd)

    def put(self, content: bytes) -> str:
        """Publish a description or metadata image. Returns its digest. Raises StoreFull."""
        digest = digest_of(content)
        target = self.path(digest)
        if target.exists():
            with self._publishing(digest):
                if target.exists():
                    return digest
        with self.making(f"{digest} cannot be stored") as work:
            (work / "new").write_bytes(content)
            self._move(digest, work / "new", target)
        return digest

    def put_data(self, path: Path, writer: BlobWriter) -> Blob:
        """Publish the data blob that `writer` wrote to the closed file `path`. Raises StoreFull."""
        digest, digests = writer.finish()
        blob = Blob(digest=digest, size=writer.total)
        self.put_sums(blob, digests)
        self._move(digest, path, self.data_path(digest))
        return blob

    def adopt_cache(self, blob: Blob) -> None:
        """Make a data blob of which every chunk was fetched and proven one that is here."""
        cached = self.cache_path(blob.digest)
        with self._publishing(blob.digest):
            if cached.exists():
                cached.chmod(0o444)
                cached.replace(self.data_path(blob.digest))
            cached.with_name(f"{cached.name}.map").unlink(missing_ok=True)

    def put_sums(self, blob: Blob, digests: bytes) -> None:
        """Publish the digests of a blob's chunks. Raises ImageDamaged when they are not its own."""
        ChunkList(blob.digest, blob.size, digests)
        if not self.sums_path(blob.digest).exists():
            with self.making(f"{blob.digest} cannot be stored") as work:
                (work / "new").write_bytes(digests)
                self._move(blob.digest, work / "new", self.sums_path(blob.digest))

    def put_tree(self, root: Node, blobs: list[Blob]) -> LayerRef:
        """Publish a layer of the tree `root` whose files lie in published `blobs`."""
        content = erofs.write(root, [blob.size for blob in blobs])
        meta = self.put(content)
        layer = Layer(meta=meta, meta_size=len(content), data=tuple(blobs))
        self.put(layer.encode())
        return LayerRef(digest=layer.digest, size=layer.size)

    def put_image(self, image: Image, name: str | None = None, *, own: bool = False) -> str:
        """Publish an image whose layers are here, and give it a name. Returns its digest.

        `own`: as for `tag`.
        """
        for layer in image.layers:
            if not self.path(layer).exists():
                raise ImageMissing(f"the layer {layer} is not in the store {self.folder}")
        digest = self.put(image.encode())
        if name is not None:
            self.tag(name, digest, own=own)
        return digest

    def tag(self, name: str, digest: str, *, own: bool = False) -> None:
        """Let `name` mean the image `digest` from now on. Raises ImageMissing, ImageError.

        `own`: the program made the image itself, and may give it one of its own names.
        """
        path = self._name_path(name if own else check_new_name(name))
        self.image(digest)
        with self.making(f"the name {name} cannot be stored") as work, self._publishing(digest):
            (work / "name").write_text(f"{digest}\n")
            self._sync(work / "name")
            (work / "name").replace(path)

    def untag(self, name: str) -> None:
        """Forget a name; `collect` frees what nothing else needs. Raises ImageMissing."""
        path = self._name_path(name)
        try:
            digest = path.read_text().strip()
            path.unlink()
        except FileNotFoundError:
            raise ImageMissing(f"no image is called {name!r} here") from None
        self.forget(digest)

    def keep(self, digest: str) -> None:
        """Keep something that is here as if this object had published it. Raises ImageMissing."""
        with self._publishing(digest):
            if not self.path(digest).exists():
                raise ImageMissing(f"{digest} is not in the store {self.folder}")

    def forget(self, digest: str) -> None:
        """Let go of something that this object published, with all that it needs."""
        if self._own is not None:
            with self.locked(fcntl.LOCK_SH):
                self._own.drop(reachable(self, [digest]))

    def hold(self, *digests: str, name: str | None = None) -> Hold:
        """Keep images, layers or blobs from being collected until the result is closed.

        `name`: by which another process can take up the same hold. Raises ImageMissing.
        """
        with store_errors("nothing can be held", self.folder):
            hold = self._new_hold(name)
            try:
                with self.locked(fcntl.LOCK_SH):
                    hold.add(*digests)
                for digest in digests:
                    if not (self.path(digest).exists() or self.sums_path(digest).exists()):
                        raise ImageMissing(f"{digest} is not in the store {self.folder}")
            except BaseException:
                hold.close()
                raise
            return hold

    @contextmanager
    def locked(self, how: int) -> Generator[None]:
        """Hold the store's lock, LOCK_SH to publish or LOCK_EX to collect."""
        fd = os.open(self.folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _publishing(self, *digests: str) -> Generator[None]:
        with self.locked(fcntl.LOCK_SH):
            self._own_hold().add(*digests)
            yield

    def _own_hold(self) -> Hold:
        with self._guard:
            if self._own is None:
                self._own = self._new_hold()
            return self._own

    def _new_hold(self, name: str | None = None) -> Hold:
        name = name or f"{os.getpid()}-{secrets.token_hex(6)}"
        return Hold(self.folder / "holds" / quote(name, safe=""))

    def _move(self, digest: str, source: Path, target: Path) -> None:
        source.chmod(0o444)
        self._sync(source)
        with self._publishing(digest):
            source.replace(target)

    def _sync(self, path: Path) -> None:
        if self.durable:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _name_path(self, name: str) -> Path:
        return self.folder / "names" / quote(check_name(name), safe="")


def reachable(store: Store, roots: Iterable[str]) -> set[str]:
    """Return every digest that the images, layers and blobs `roots` need, themselves included.

    What cannot be read needs nothing.
    """
    found: set[str] = set()
    pending = list(roots)
    while pending:
        digest = pending.pop()
        if digest in found or not DIGEST.fullmatch(digest):
            continue
        found.add(digest)
        path = store.path(digest)
        try:
            with path.open("rb") as file:
                # Descriptions are JSON; metadata images begin with zeros.
                if file.read(1) != b"{":
                    continue
            content = path.read_bytes()
        except OSError:
            continue
        with contextlib.suppress(ImageDamaged):
            pending += Image.decode(content).layers
        with contextlib.suppress(ImageDamaged):
            layer = Layer.decode(content)
            pending += [layer.meta, *(blob.digest for blob in layer.data)]
    return found
