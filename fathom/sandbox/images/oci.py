"""Images of others: OCI layouts and docker archives, as folders or tar files, and what they say.

Every description and layer is checked against the digest that names it before it is used, layers
are checked once more when they are unpacked. Layers that this store knows are not read again.

Paper: §5.2.5 (container images become layers).
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tarfile
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from fathom.sandbox.images import layers as layering
from fathom.sandbox.images import tarball
from fathom.sandbox.images.blobs import BlobWriter
from fathom.sandbox.images.errors import ImageDamaged, ImageError, ImageMissing, store_errors
from fathom.sandbox.images.headers import Member
from fathom.sandbox.images.packed import Allowance, Reader, decompress
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.tarball import Limits
from fathom.sandbox.images.types import MAX_LAYERS, Image, RunConfig, check_digest, check_new_name

_SMALL = 8 << 20
_PIECE = 1 << 20
_PARALLEL = 4
_NESTED = 3
_MOST_MEMBERS, _LONGEST_NAME = 100_000, 4096  # of an archive that holds an image
_INDEXES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
_MANIFESTS = frozenset(
    {
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)
ACCEPT = ", ".join(sorted(_INDEXES | _MANIFESTS))
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def own_architecture() -> str:
    """Return what images call the processor of this machine."""
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What names a piece of an image: its kind, digest and size."""

    kind: str
    digest: str
    size: int


class Content(Protocol):
    """Where the pieces of an image come from. Nothing that it returns is trusted."""

    def small(self, descriptor: Descriptor) -> bytes:
        """Return a description. Raises ImageError."""
        ...

    def open(self, descriptor: Descriptor) -> AbstractContextManager[BinaryIO]:
        """Open a layer as a file that can be read from its beginning. Raises ImageError."""
        ...


def parse(text: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object `text`. Raises ImageDamaged."""
    if len(text) > _SMALL:
        raise ImageDamaged(f"the {what} is larger than {_SMALL} bytes")
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageDamaged(f"the {what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ImageDamaged(f"the {what} is not an object")
    return cast("dict[str, Any]", value)


def descriptor(value: object, what: str) -> Descriptor:
    """Return the descriptor `value`. Raises ImageDamaged."""
    found = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    size = found.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= 1 << 50:
        raise ImageDamaged(f"the {what} has no proper size")
    if found.get("urls"):
        raise ImageError(f"the {what} lies at an address of its own, which is not followed")
    kind = found.get("mediaType")
    return Descriptor(
        kind=kind if isinstance(kind, str) else "",
        digest=check_digest(found.get("digest")),
        size=size,
    )


def take(content: Content, wanted: Descriptor, what: str) -> dict[str, Any]:
    """Return a description, checked against its digest. Raises ImageDamaged, ImageError."""
    text = content.small(wanted)
    if "sha256:" + hashlib.sha256(text).hexdigest() != wanted.digest:
        raise ImageDamaged(f"the {what} does not match its digest {wanted.digest}")
    return parse(text, what)


def import_image(
    store: Store,
    content: Content,
    root: Descriptor,
    name: str | None,
    *,
    architecture: str | None = None,
    limits: Limits | None = None,
) -> Image:
    """Make an image of what `root` describes and give it a name. Raises ImageError's kinds.

    `architecture`: which one to take where there are several, this machine's when not given.
    """
    wanted = architecture or own_architecture()
    manifest = _manifest(content, root, wanted)
    config = take(content, descriptor(manifest.get("config"), "configuration"), "configuration")
    found = [descriptor(one, "layer") for one in _sequence(manifest.get("layers"), "layers")]
    return assemble(store, content, found, config, name, limits=limits)


def assemble(
    store: Store,
    content: Content,
    found: list[Descriptor],
    config: dict[str, Any],
    name: str | None,
    *,
    limits: Limits | None = None,
) -> Image:
    """Make an image of layers and a configuration, several layers at a time.

    The limits are for all layers together, and never more than nine tenths of what the disk has
    free: an image that somebody made must not take the room of everybody else.
    """
    if name is not None:
        check_new_name(name)
    rootfs = config.get("rootfs")
    ids = cast("dict[str, Any]", rootfs).get("diff_ids") if isinstance(rootfs, dict) else None
    unpacked = [check_digest(one) for one in _sequence(ids, "list of unpacked layers")]
    if not 1 <= len(found) <= MAX_LAYERS or len(unpacked) != len(found):
        raise ImageDamaged(
            f"the image has {len(found)} layers and {len(unpacked)} digests of unpacked layers"
        )
    bounds = limits or Limits()
    room = shutil.disk_usage(store.folder).free // 10 * 9
    files, streams = Allowance(bounds.size, room), Allowance(bounds.size + (bounds.size >> 3))
    pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="fathom-layer")
    try:
        work = [
            pool.submit(_layer, store, content, one, diff, bounds, files, streams)
            for one, diff in zip(found, unpacked, strict=True)
        ]
        digests = tuple(one.result() for one in work)
    finally:
        # What fails ends the rest.
        pool.shutdown(cancel_futures=True)
    image = Image(
        layers=digests,
        run=_run_config(config),
        architecture=_string(config.get("architecture")) or "amd64",
    )
    store.put_image(image, name)
    return image


def _manifest(content: Content, root: Descriptor, architecture: str) -> dict[str, Any]:
    seen = [root]
    for _ in range(_NESTED):
        value = take(content, seen[-1], "manifest")
        kind = value.get("mediaType") or seen[-1].kind
        if kind not in _INDEXES and "manifests" not in value:
            if value.get("schemaVersion") != 2:
                raise ImageDamaged("the manifest has an old or unknown format")
            return value
        entries = _sequence(value.get("manifests"), "list of manifests")
        seen.append(choose(entries, architecture))
    raise ImageDamaged("the image's indexes are nested too deep")


def choose(entries: list[object], architecture: str) -> Descriptor:
    """Return the entry of an index for Linux on `architecture`. Raises ImageMissing."""
    offered: list[str] = []
    for entry in entries:
        found = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        about = found.get("platform")
        about = cast("dict[str, Any]", about) if isinstance(about, dict) else {}
        system, processor = about.get("os", "linux"), about.get("architecture", architecture)
        if system == "linux" and processor == architecture:
            return descriptor(found, "manifest")
        offered.append(f"{system}/{processor}")
    raise ImageMissing(
        f"the image is not there for linux/{architecture}, only for: {', '.join(offered) or '-'}"
    )


def _layer(
    store: Store,
    content: Content,
    wanted: Descriptor,
    diff: str,
    limits: Limits,
    files: Allowance,
    streams: Allowance,
) -> str:
    note = store.folder / "imported" / wanted.digest[7:]
    try:
        known = note.read_text().split()
        if known[1] == diff and layering.is_whole(store, known[0]):
            return known[0]
    except (FileNotFoundError, IndexError):
        pass
    with store.making(f"the layer {wanted.digest} cannot be stored") as work:
        path = work / "data"
        with content.open(wanted) as file, path.open("wb") as out:
            blob = BlobWriter(out)
            stream = Reader(decompress(file), streams)
            root = tarball.from_tar(stream, blob, limits, files)
            if (got := stream.drain()) != diff:
                raise ImageDamaged(f"the layer {wanted.digest} unpacks to {got}, not to {diff}")
        digest = layering.publish(store, root, path, blob).digest
        note.parent.mkdir(exist_ok=True)
        (work / "note").write_text(f"{digest}\n{diff}\n")
        (work / "note").replace(note)
    return digest


def _run_config(config: dict[str, Any]) -> RunConfig:
    inner = config.get("config")
    run = cast("dict[str, Any]", inner) if isinstance(inner, dict) else {}
    env = [_string(pair).partition("=") for pair in _sequence(run.get("Env") or [], "environment")]
    return RunConfig(
        env=tuple((key, value) for key, sep, value in env if key and sep),
        entrypoint=_strings(run.get("Entrypoint")),
        command=_strings(run.get("Cmd")),
        workdir=_string(run.get("WorkingDir")) or "/",
        user=_string(run.get("User")),
    )


def _strings(value: object) -> tuple[str, ...]:
    return tuple(_string(one) for one in _sequence(value or [], "command"))


def _string(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise ImageDamaged(f"{value!r:.80} in the configuration is not text")
    return value


def _sequence(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise ImageDamaged(f"the image's {what} is not a list")
    return cast("list[object]", value)


class FolderContent:
    """An OCI layout in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def index(self) -> bytes:
        """Return the layout's index."""
        return self._read(self._folder / "index.json", _SMALL)

    def small(self, descriptor: Descriptor) -> bytes:
        """Return a description."""
        return self._read(self._path(descriptor), _SMALL)

    @contextmanager
    def open(self, descriptor: Descriptor) -> Generator[BinaryIO]:
        """Open a layer, checked as a whole first."""
        try:
            with self._path(descriptor).open("rb") as file:
                check_file(file, descriptor)
                yield file
        except FileNotFoundError as error:
            raise ImageMissing(f"the layout has no {descriptor.digest}") from error

    def _path(self, descriptor: Descriptor) -> Path:
        return self._folder / "blobs" / "sha256" / descriptor.digest[7:]

    @staticmethod
    def _read(path: Path, limit: int) -> bytes:
        try:
            with path.open("rb") as file:
                return file.read(limit + 1)
        except OSError as error:
            raise ImageMissing(f"the layout is not whole: {error}") from error


class ArchiveContent:
    """An OCI layout or docker archive in a tar file.

    `paths`: name -> where a member begins and its size, None for one with holes.
    """

    def __init__(self, file: BinaryIO) -> None:
        try:
            self._archive = tarfile.open(fileobj=file, mode="r:", tarinfo=Member)
            self.paths: dict[str, tuple[int, int] | None] = {}
            for count, member in enumerate(self._archive):
                if count >= _MOST_MEMBERS:
                    raise ImageDamaged("the archive has too many members to be an image")
                name = member.name.removeprefix("./")
                if member.isreg() and len(name) <= _LONGEST_NAME:
                    span = member.offset_data, member.size
                    self.paths[name] = None if member.issparse() else span
                self._archive.members = []  # type: ignore[attr-defined]
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise ImageDamaged(f"this is not an archive of an image: {error}") from error
        self._file = file

    def member(self, name: str, limit: int = _SMALL) -> bytes:
        """Return a small member. Raises ImageMissing."""
        with self.span(name) as file:
            return file.read(limit + 1)

    def small(self, descriptor: Descriptor) -> bytes:
        """Return a description."""
        return self.member(self._name(descriptor))

    @contextmanager
    def open(self, descriptor: Descriptor) -> Generator[BinaryIO]:
        """Open a layer, checked as a whole first."""
        with self.span(self._name(descriptor)) as file:
            check_file(file, descriptor)
            yield file

    @contextmanager
    def span(self, name: str) -> Generator[BinaryIO]:
        """Open a member as a file of its own, so that several can be read at the same time."""
        if name not in self.paths:
            raise ImageMissing(f"the archive has no {name}")
        if (found := self.paths[name]) is None:
            raise ImageDamaged(f"{name} is a sparse member")
        with open(f"/proc/self/fd/{self._file.fileno()}", "rb") as file:
            yield cast("BinaryIO", _Span(file, *found))

    @staticmethod
    def _name(descriptor: Descriptor) -> str:
        return f"blobs/sha256/{descriptor.digest[7:]}"


class _Span:
    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._at
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset if whence == 0 else offset + (self._at if whence == 1 else self._size)
        return self._at

    def tell(self) -> int:
        return self._at


def check_file(file: BinaryIO, descriptor: Descriptor) -> None:
    """Prove that `file` is what its descriptor says, and go back to its beginning."""
    found = hashlib.sha256()
    size = 0
    for piece in iter(lambda: file.read(_PIECE), b""):
        size += len(piece)
        found.update(piece)
    file.seek(0)
    if size != descriptor.size or "sha256:" + found.hexdigest() != descriptor.digest:
        raise ImageDamaged(f"the layer {descriptor.digest} does not match its digest or size")


class _DockerContent:
    """A docker archive, which names its layers by paths; digests are those of what lies there."""

    def __init__(self, archive: ArchiveContent, names: Iterable[tuple[str, str]]) -> None:
        self._archive = archive
        self._names = dict(names)

    def small(self, descriptor: Descriptor) -> bytes:
        return self._archive.member(self._names[descriptor.digest])

    @contextmanager
    def open(self, descriptor: Descriptor) -> Generator[BinaryIO]:
        with self._archive.span(self._names[descriptor.digest]) as file:
            check_file(file, descriptor)
            yield file


def import_archive(
    store: Store,
    path: Path,
    name: str,
    *,
    tag: str | None = None,
    architecture: str | None = None,
    limits: Limits | None = None,
) -> Image:
    """Make an image of an OCI layout (a folder or tar file) or docker archive at `path`.

    `tag`: which image to take where the archive has several. Compressed archives are unpacked into
    the store's work folder first. Raises ImageMissing, ImageDamaged, ArchiveRefused,
    ImageTooLarge, StoreFull.
    """
    bounds = limits or Limits()
    if path.is_dir():
        content = FolderContent(path)
        root = _root(content.index(), tag)
        return import_image(store, content, root, name, architecture=architecture, limits=limits)
    with store.making(f"{path} cannot be read") as work:
        with path.open("rb") as packed:
            plain = decompress(packed)
            if plain is not packed:
                with (
                    store_errors(f"{path} cannot be unpacked", work),
                    (work / "a").open("wb") as out,
                ):
                    room = shutil.disk_usage(work).free // 10 * 9
                    stream = Reader(plain, Allowance(bounds.size, room))
                    for piece in iter(lambda: stream.read(_PIECE), b""):
                        out.write(piece)
                path = work / "a"
        with path.open("rb") as file:
            archive = ArchiveContent(file)
            if "index.json" in archive.paths:
                root = _root(archive.member("index.json"), tag)
                return import_image(
                    store, archive, root, name, architecture=architecture, limits=limits
                )
            return _import_docker(store, archive, name, tag, limits)


def _root(index: bytes, tag: str | None) -> Descriptor:
    entries = _sequence(parse(index, "index").get("manifests"), "list of manifests")
    named: list[str] = []
    for entry in entries:
        found = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        notes = found.get("annotations")
        notes = cast("dict[str, Any]", notes) if isinstance(notes, dict) else {}
        title = str(notes.get("org.opencontainers.image.ref.name", ""))
        named.append(title or "-")
        if tag is not None and tag == title:
            return descriptor(found, "manifest")
    if tag is None and len(entries) == 1:
        return descriptor(entries[0], "manifest")
    if tag is None and entries and all(title == "-" for title in named):
        return choose(entries, own_architecture())
    raise ImageMissing(
        f"the archive has no image {tag!r}: it has {', '.join(named[:20]) or 'none'}; name one "
        "with tag="
    )


def _import_docker(
    store: Store, archive: ArchiveContent, name: str, tag: str | None, limits: Limits | None
) -> Image:
    text = archive.member("manifest.json")
    try:
        entries = _sequence(json.loads(text), "list of images")
    except (ValueError, RecursionError) as error:
        raise ImageDamaged(f"the archive's manifest is not JSON: {error}") from error
    chosen: dict[str, Any] | None = None
    for entry in entries:
        found = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        tags = [str(one) for one in _sequence(found.get("RepoTags") or [], "tags")]
        if tag in tags or (tag is None and len(entries) == 1):
            chosen = found
    if chosen is None:
        raise ImageMissing(f"the archive has {len(entries)} images and none is called {tag!r}")
    config = parse(archive.member(_string(chosen.get("Config"))), "configuration")
    names: list[tuple[str, str]] = []
    found_layers: list[Descriptor] = []
    for path in _sequence(chosen.get("Layers"), "layers"):
        place = _string(path)
        with archive.span(place) as file:
            hashed = hashlib.sha256()
            size = 0
            for piece in iter(lambda: file.read(_PIECE), b""):
                hashed.update(piece)
                size += len(piece)
        digest = "sha256:" + hashed.hexdigest()
        names.append((digest, place))
        found_layers.append(Descriptor(kind="", digest=digest, size=size))
    content = _DockerContent(archive, names)
    return assemble(store, content, found_layers, config, name, limits=limits)
